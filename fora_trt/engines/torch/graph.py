"""Convert an ONNX graph to PyTorch modules; the weights are memory-mapped from its file and not copied on a CPU.

Each module is made for fixed input shapes. Shape arithmetic in the graph is thus evaluated when the module is made. So
no step waits for the device, each module can be captured or compiled, and each has its own code object, to which the
recompilation limits of `torch.compile` apply. This file handles constants, shapes and the order of nodes; `operators`
implements the operators.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import getitem
from pathlib import Path
from typing import Any

import numpy
import onnx_ir as ir
import torch
from torch import Tensor, fx, nn

from fora_trt.engines.onnxruntime.weighted_sum import DOMAIN, FuseWeightedSumsPass
from fora_trt.engines.torch.operators import OPERATORS, Operator, torch_dtype
from fora_trt.errors import BackendError, first_line

Shape = tuple[int, ...]

HALF = (torch.float16, torch.bfloat16)

DOMAINS = ("", DOMAIN)
"""Operator domains: that of ONNX, and that of `WeightedSum`, which computes folded sums."""

KNOWN_SIZE = 2**14
"""Largest number of elements of an integer constant (sizes, axes, indices) that is treated as known."""


Stored = dict[object, Tensor]
"""Weights on the device, by their file and their place in it."""


@dataclass(frozen=True)
class Known:
    """A value that is known when the module is made, as a CPU tensor."""

    tensor: Tensor


@dataclass(frozen=True)
class Later:
    """An input, weight or result of the module at run time: its FX node, and a meta tensor of its shape and dtype."""

    node: fx.Node
    like: Tensor


class TorchGraph:
    """The nodes and weights of an ONNX graph; `module` makes PyTorch modules from them.

    With `widened`, all arithmetic is in fp32, with weights rounded to the precision of the file. Graphs of one bundle
    that are given the same `stored` have one copy of the weights that they share. Raises `BackendError` for an
    unsupported operator, and for weights that cannot be read.
    """

    def __init__(self, path: Path, device: torch.device, widened: bool = False, stored: Stored | None = None) -> None:
        self.path, self.device, self._widened = path, device, widened
        self._stored: Stored = {} if stored is None else stored
        model = ir.load(path)
        FuseWeightedSumsPass()(model)
        self.nodes, graph = tuple(model.graph), model.graph
        self.values = {str(value.name): value for value in graph.inputs}
        for node in self.nodes:
            if node.op_type != "Constant" and (node.op_type not in OPERATORS or node.domain not in DOMAINS):
                raise BackendError(
                    f"the torch backends cannot run {path}: its node {node.name!r} has the unsupported operator "
                    f"{node.op_type}; use --backend onnxruntime"
                )
            self.values.update((str(value.name), value) for value in node.outputs)
        try:
            self.constants = {value: self._constant(value, graph) for value in _constants_of(graph)}
        except (OSError, ValueError) as error:
            raise BackendError(
                f"the weights of {path} cannot be read ({first_line(error)}); export it again"
            ) from error
        self._modules: dict[object, fx.GraphModule] = {}

    def module(self, shapes: Mapping[str, Shape], outputs: Sequence[str], into: bool = False) -> fx.GraphModule:
        """The module that computes `outputs` from input tensors of these shapes, in their order; modules are cached.

        With `into`, the module takes one more tensor for each output and writes the result to it. `shapes` may also
        name an intermediate value of the graph, which then becomes an input of the module and is not computed.
        """
        key = (tuple(shapes.items()), tuple(outputs), into)
        if key not in self._modules:
            self._modules[key] = _Maker(self, shapes).module(outputs, into)
        return self._modules[key]

    def dtype_of(self, value: ir.Value) -> torch.dtype:
        """The dtype in which a value is computed: fp32 with `widened`, else that of the file."""
        assert value.dtype is not None
        return self.computed_in(torch_dtype(value.dtype))

    def computed_in(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of the computation for a dtype in the file."""
        return torch.float32 if self._widened and dtype in HALF else dtype

    def _constant(self, value: ir.Value, graph: ir.Graph) -> Known | Tensor:
        tensor = ir.convenience.get_const_tensor(value)
        assert tensor is not None
        if isinstance(tensor, ir.ExternalTensor):
            key = tensor.location, tensor.offset, tensor.dtype, tuple(tensor.shape.numpy())
            if key not in self._stored:
                self._stored[key] = _tensor_of(tensor, self.path.parent).to(self.device)
            return self._stored[key]
        found = _tensor_of(tensor, self.path.parent)
        is_known = found.numel() == 1 or (found.numel() <= KNOWN_SIZE and not found.is_floating_point())
        return Known(found.to(self.computed_in(found.dtype))) if is_known else found.to(self.device)


def _constants_of(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.initializers.values()
    for node in graph:
        if node.op_type == "Constant":
            yield node.outputs[0]


def _tensor_of(tensor: ir.TensorProtocol, folder: Path) -> Tensor:
    """A constant as a CPU tensor; external data is memory-mapped."""
    dtype, shape = torch_dtype(tensor.dtype), tuple(tensor.shape.numpy())
    if not math.prod(shape):
        return torch.empty(shape, dtype=dtype)
    size = math.prod(shape) * dtype.itemsize
    if isinstance(tensor, ir.ExternalTensor):
        # mode "c" (copy on write), because PyTorch does not support read-only tensors
        content = numpy.memmap(folder / tensor.location, numpy.uint8, "c", tensor.offset or 0, (size,))
        return torch.from_numpy(content).view(dtype).reshape(shape)
    return torch.frombuffer(bytearray(tensor.tobytes()), dtype=dtype).reshape(shape)


class _Maker:
    """Makes one module: visits the nodes that the outputs need, for inputs of the given shapes."""

    def __init__(self, source: TorchGraph, shapes: Mapping[str, Shape]) -> None:
        self._source, self._graph, self._root = source, fx.Graph(), nn.Module()
        self._held: dict[object, Later] = {}
        self._found: dict[ir.Value, Known | Later] = {
            value: known for value, known in source.constants.items() if isinstance(known, Known)
        }
        for k, (name, shape) in enumerate(shapes.items()):
            like = torch.empty(shape, dtype=source.dtype_of(source.values[name]), device="meta")
            self._found[source.values[name]] = Later(self._graph.placeholder(f"input_{k}"), like)

    def module(self, outputs: Sequence[str], into: bool) -> fx.GraphModule:
        wanted = [self._source.values[name] for name in outputs]
        targets = [self._graph.placeholder(f"target_{k}") for k in range(len(wanted))] if into else []
        for node in self._needed(wanted):
            self._compute(node)
        results = [self._later(value).node for value in wanted]
        for target, result in zip(targets, results, strict=False):
            self._graph.call_method("copy_", (target, result))
        self._graph.output(() if into else tuple(results))
        return fx.GraphModule(self._root, self._graph)

    def _needed(self, wanted: Sequence[ir.Value]) -> list[ir.Node]:
        """The nodes that compute these values from inputs and constants, in order."""
        needed: set[ir.Node] = set()
        todo = [*wanted]
        while todo:
            value = todo.pop()
            node = None if value in self._found or value in self._source.constants else value.producer()
            if node is not None and node not in needed:
                needed.add(node)
                todo += [one for one in node.inputs if one is not None]
        return [node for node in self._source.nodes if node in needed]

    def _compute(self, node: ir.Node) -> None:
        """Evaluate a node now if all its inputs are known; otherwise add a call to the module."""
        operator = OPERATORS[node.op_type]
        try:
            attributes = {name: self._plain(name, one) for name, one in node.attributes.items()}
            inputs = self._inputs(node, operator)
            now = operator.of_sizes or not any(isinstance(one, Later) for one in inputs)
            made = (self._computed if now else self._called)(operator, inputs, attributes)
        except BackendError:
            raise
        except Exception as error:  # PyTorch raises many exception classes for invalid arguments
            raise BackendError(
                f"the torch backends cannot run {self._source.path}: the node {node.name!r} ({node.op_type}) fails: "
                f"{first_line(error)}; use --backend onnxruntime"
            ) from error
        self._found.update(zip(node.outputs, made, strict=False))

    def _computed(self, operator: Operator, inputs: Sequence[Any], attributes: Mapping[str, Any]) -> Sequence[Known]:
        given = [getattr(one, "tensor", getattr(one, "like", one)) for one in inputs]
        return [Known(one) for one in _several(operator.compute(*given, **attributes))]

    def _called(self, operator: Operator, inputs: Sequence[Any], attributes: Mapping[str, Any]) -> Sequence[Later]:
        given = [self._held_of(one.tensor) if isinstance(one, Known) else one for one in inputs]
        shown = operator.compute(*[getattr(one, "like", one) for one in given], **attributes)
        arguments = tuple(one.node if isinstance(one, Later) else one for one in given)
        called = self._graph.call_function(operator.compute, arguments, dict(attributes))
        if isinstance(shown, Tensor):
            return [Later(called, shown)]
        return [Later(self._graph.call_function(getitem, (called, k)), like) for k, like in enumerate(shown)]

    def _inputs(self, node: ir.Node, operator: Operator) -> list[Any]:
        """The inputs of a node; known inputs are Python numbers where the operator needs them."""
        found: list[Any] = []
        for k, value in enumerate(node.inputs):
            one: Any = None if value is None else self._value(value)
            if isinstance(one, Known) and operator.takes_plain(k, one.tensor.dim()):
                one = one.tensor.tolist()
            elif one is not None and k in operator.numbers:
                raise ValueError(f"its input {k} depends on the values of the model's inputs; it must be a constant")
            found.append(one)
        while found and found[-1] is None:
            found.pop()
        return found

    def _value(self, value: ir.Value) -> Known | Later:
        found = self._found.get(value)
        return self._later(value) if found is None else found

    def _later(self, value: ir.Value) -> Later:
        """A value as an FX node: a computed value, an input, or a constant of the module."""
        found = self._found.get(value)
        if isinstance(found, Later):
            return found
        if found is not None:
            return self._held_of(found.tensor)
        constant = self._source.constants.get(value)
        if not isinstance(constant, Tensor):
            raise BackendError(
                f"the torch backends cannot run {self._source.path}: no node computes {value.name!r}; export it again"
            )
        return self._held_of(constant)

    def _held_of(self, tensor: Tensor) -> Later:
        if id(tensor) not in self._held:
            name = f"constant_{len(self._held)}"
            self._root.register_buffer(name, tensor.to(self._source.device), persistent=False)
            node, like = self._graph.get_attr(name), torch.empty_like(tensor, device="meta")
            if (dtype := self._source.computed_in(tensor.dtype)) != tensor.dtype:  # at each use, for less memory
                node, like = self._graph.call_method("to", (node, dtype)), like.to(dtype)
            self._held[id(tensor)] = Later(node, like)
        return self._held[id(tensor)]

    def _plain(self, name: str, attribute: ir.Attr) -> Any:
        """The value of an attribute in the form that the functions in `OPERATORS` take."""
        value: Any = attribute.value
        if name == "to":
            return self._source.computed_in(torch_dtype(value))
        if attribute.type == ir.AttributeType.TENSOR:
            return _tensor_of(value, self._source.path.parent)
        return tuple(value) if isinstance(value, (list, tuple)) else value


def _several(result: Any) -> Sequence[Tensor]:
    return [result] if isinstance(result, Tensor) else result
