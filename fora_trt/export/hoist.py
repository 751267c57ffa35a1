"""Graph transformation: what does not depend on the inputs that arrive late becomes a graph of its own.

`early_part` finds it in a graph, `GraphWriter` writes the early parts of several graphs as one, equal values once, and
`replace_reads` lets the remainder read from its inputs what was taken out. Nothing here knows an architecture.

What is early, rules cited below: (1) a node is early if it reads an early value, and besides those only constants; (2)
each of its outputs has one or several rows for every sample and a shape that is known otherwise, so shape arithmetic
stays where it is; (3) it has no graph inside and is no output of its graph; (4) at the end of what is early, a node is
left to the remainder if it only widens or repeats what it reads, so that the tensor that passes between the graphs is
the small one, or if its output has not one row for every sample.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from fora_trt.export.nodes import is_read
from fora_trt.models.spec import BATCH

WIDENING = ("Cast", "Expand")


@dataclass(frozen=True)
class EarlyPart:
    """Nodes that can run before the late inputs are there, in their order, and those outputs that others read."""

    nodes: tuple[ir.Node, ...]
    boundary: tuple[ir.Value, ...]


def early_part(graph: ir.Graph, late: Collection[str]) -> EarlyPart:
    """What of `graph` does not depend on the inputs named in `late`."""
    early = {value for value in graph.inputs if value.name not in late}
    nodes: list[ir.Node] = []
    for node in graph:
        read = [value for value in node.inputs if value is not None and not value.is_initializer()]
        if read and all(value in early for value in read) and _has_rows(node):
            nodes.append(node)
            early.update(node.outputs)
    taken = {*nodes}
    for node in reversed(nodes):  # rule 4
        widens = node.op_type in WIDENING and _bytes(node.outputs[0]) > _bytes(node.inputs[0])
        ends = [output for output in node.outputs if {*output.consumers()} - taken]
        if (widens and not _readers(node) & taken) or any(_rows(output) != 1 for output in ends):
            taken.remove(node)
    kept = tuple(node for node in nodes if node in taken)
    return EarlyPart(kept, tuple(one for node in kept for one in node.outputs if {*one.consumers()} - taken))


def _has_rows(node: ir.Node) -> bool:
    """Rules 2 and 3."""
    inside = any(one.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for one in node.attributes.values())
    return not inside and all(_rows(one) and not one.is_graph_output() for one in node.outputs)


def _rows(value: ir.Value) -> int:
    """How many rows a value has for every sample; 0 where it has none or its shape is not known."""
    if value.shape is None or value.dtype is None or len(value.shape) == 0:
        return 0
    first, *others = value.shape
    multiple = re.fullmatch(rf"(?:(\d+)\*)?{BATCH}", str(first.value) if isinstance(first, ir.SymbolicDim) else "")
    return int(multiple[1] or 1) if multiple and all(isinstance(one, int) for one in others) else 0


def _readers(node: ir.Node) -> set[ir.Node]:
    return {reader for output in node.outputs for reader in output.consumers()}


def _bytes(value: ir.Value | None) -> float:
    """Of one sample; infinite where it is not known."""
    if value is None or value.shape is None or value.dtype is None:
        return math.inf
    return math.prod(size for size in value.shape if isinstance(size, int)) * float(value.dtype.itemsize)


class Numbering:
    """A number for every value, the same for values that are computed alike from the same inputs and constants.

    Inputs are told apart by name, constants by their content, so that values of several graphs can be compared.
    """

    def __init__(self) -> None:
        self._numbers: dict[object, int] = {}
        self._known: dict[ir.Value, int] = {}

    def of(self, value: ir.Value) -> int:
        """The number of a value; its node's inputs must be numbered before it, as those of a sorted graph are."""
        if value not in self._known:
            self._known[value] = self._numbers.setdefault(self._description(value), len(self._numbers))
        return self._known[value]

    def _description(self, value: ir.Value) -> object:
        if value.const_value is not None:
            tensor = value.const_value
            return tensor.dtype, tuple(tensor.shape), hashlib.sha256(tensor.tobytes()).digest()
        node = value.producer()
        if node is None:
            return value.name
        read = tuple(None if one is None else self.of(one) for one in node.inputs)
        told = tuple(sorted((name, str(attribute.value)) for name, attribute in node.attributes.items()))
        return node.domain, node.op_type, told, read, value.index()


class GraphWriter:
    """Copies nodes of other graphs into a new one; a value that is there already is not computed again."""

    def __init__(self, numbering: Numbering) -> None:
        self._numbering = numbering
        self._values: dict[int, ir.Value] = {}
        self._names: set[str] = set()
        self._inputs: list[ir.Value] = []
        self._constants: list[ir.Value] = []
        self.nodes: list[ir.Node] = []

    def add(self, nodes: Iterable[ir.Node]) -> None:
        """Copy nodes, in their order."""
        for node in nodes:
            read = [None if value is None else self.value(value) for value in node.inputs]
            numbers = [self._numbering.of(output) for output in node.outputs]
            if numbers[0] in self._values:
                continue
            outputs = [self._copy_of(output) for output in node.outputs]
            self._values.update(zip(numbers, outputs, strict=True))
            self.nodes.append(ir.Node(node.domain, node.op_type, read, list(node.attributes.values()), outputs=outputs))

    def value(self, value: ir.Value) -> ir.Value:
        """What stands for a value of another graph: a copied node's output, or a new input or constant."""
        number = self._numbering.of(value)
        if number not in self._values:
            assert value.producer() is None
            copy = self._values[number] = self._copy_of(value)
            (self._inputs if value.const_value is None else self._constants).append(copy)
        return self._values[number]

    def graph(self, name: str, outputs: Sequence[ir.Value], like: ir.Graph) -> ir.Graph:
        """The graph that puts out `outputs`, in the opset of another."""
        return ir.Graph(
            self._inputs,
            outputs,
            nodes=self.nodes,
            initializers=self._constants,
            opset_imports=dict(like.opset_imports),
            name=name,
        )

    def _copy_of(self, value: ir.Value) -> ir.Value:
        name, k = value.name or "value", 0
        while name in self._names:
            name, k = f"{value.name}.{k}", k + 1
        self._names.add(name)
        return ir.Value(name=name, shape=value.shape, type=value.type, const_value=value.const_value)


def replace_reads(model: ir.Model, replacements: dict[ir.Value, ir.Value]) -> None:
    """Let all that read some values, outputs too, read inputs instead, which are appended; then drop what is unread."""
    for value, replacement in replacements.items():
        ir.convenience.replace_all_uses_with(value, replacement, replace_graph_outputs=True)
    model.graph.inputs.extend(dict.fromkeys(replacements.values()))
    drop_unread(model)


def drop_unread(model: ir.Model) -> None:
    """Remove nodes, constants and inputs that nobody reads."""
    RemoveUnusedNodesPass()(model)
    read = [value for value in model.graph.inputs if is_read(value)]
    model.graph.inputs.clear()
    model.graph.inputs.extend(read)


def edge(name: str, like: ir.Value, *, leading: str | None = None) -> ir.Value:
    """A value to be an input, of the dtype and shape of another, with one more dimension in front if one is named."""
    assert like.shape is not None
    shape = like.shape if leading is None else ir.Shape([leading, *like.shape])
    return ir.Value(name=name, shape=shape, type=like.type)
