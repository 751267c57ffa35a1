"""Find the first node of an exported graph whose result differs from that of the same operation in PyTorch.

The exporter names values of the graph after the nodes of the traced program. So the program is traced again and
interpreted, and values of the same name are compared, in the order of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

import onnx_ir as ir
import torch
from torch import Tensor, fx
from torch.export.graph_signature import InputKind
from torch.utils._pytree import tree_leaves

from fora_trt.bundle import Bundle, GraphError, GraphRecord, tensor_spec
from fora_trt.contract import BATCH, FULL, LATENTS, TIMESTEP, TensorSpec
from fora_trt.engines.base import Engine
from fora_trt.engines.torch.graph import HALF
from fora_trt.export.check import GRAPH_TOLERANCE
from fora_trt.export.split import FullStep, steps_of_module
from fora_trt.export.traced import onnx_from_program, program_from_step
from fora_trt.models.examples import example_inputs
from fora_trt.models.precision import cast_all
from fora_trt.models.spec import Model

GUARDS = tuple(f"aten.{name}" for name in ("add.", "add_.", "sub.", "rsub.", "clamp", "maximum."))
"""Operators that keep a divisor or a root away from zero."""

Engines: TypeAlias = Callable[[Bundle], Mapping[str, Engine]]

BATCH_SIZE = 3
"""Batch of the inputs, which are those of the first steps that the check measures: it may be only they that differ."""


@torch.no_grad()
def first_difference(model: Model, bundle: Bundle, graph: str, engines: Engines) -> str:
    """Name, operator and module of the first node that differs; `bundle` has the graphs at level `none`."""
    paths = [site.module for site in bundle.manifest.cache_sites]
    step, _ = steps_of_module(model.module, model.spec, paths)
    step.cut_later = True
    inputs, others = (example_inputs(model.spec.inputs, model.spec.conditioning, BATCH_SIZE, seed) for seed in (1, 2))
    others = inputs | {name: others[name] for name in (LATENTS, TIMESTEP) if name in others}
    program = onnx_from_program(program_from_step(step, inputs), step, bundle.manifest.opset).exported_program
    assert program is not None
    interpreter = _Interpreter(program, step)
    expected = interpreter.values(inputs, {})
    read = {one.name for one in bundle.manifest.graphs[graph].inputs}
    if features := {name: expected[name] for name in step.features if name in read}:
        expected = interpreter.values(others, features)
        inputs = others | features
    for node, name, got in _results(bundle, graph, engines, inputs):
        want = expected.get(name)
        if want is None or want.shape != got.shape or not want.numel():
            continue
        if not GraphError.between(got, want).relative <= GRAPH_TOLERANCE[model.precision]:
            traced = interpreter.nodes[name]
            module, lost = _module_of(traced) or model.spec.architecture, _lost(traced, node)
            reads = f", which in PyTorch reads {lost!r}: the graph lacks it" if lost is not None else ""
            return f"the first node that differs is {node.name!r} ({node.op_type}) in {module}{reads}"
    return "no node alone differs by more than the tolerance"


def _module_of(traced: fx.Node) -> str:
    """The path of the module that a traced node belongs to; empty for the network itself."""
    stack = [*(traced.meta.get("nn_module_stack") or {}).values()]
    return str(stack[-1][0]).removeprefix("module").removeprefix(".") if stack else ""


def _lost(traced: fx.Node, exported: ir.Node) -> str | None:
    """The first guard that the traced node reads and the exported graph does not compute."""
    assert exported.graph is not None
    there = {str(value.name) for node in exported.graph for value in node.outputs}
    read = (one.name for one in traced.all_input_nodes if str(one.target).startswith(GUARDS))
    return next((name for name in read if name not in there), None)


@torch.no_grad()
def first_not_finite(model: Model, inputs: Mapping[str, Tensor]) -> str | None:
    """The first module that outputs values that are not finite in PyTorch, in words; None if no module does."""
    found: list[str] = []

    def look(path: str, module: torch.nn.Module, output: Any) -> None:
        tensors = (one for one in tree_leaves(output) if isinstance(one, Tensor) and one.is_floating_point())
        if not found and not all(one.isfinite().all() for one in tensors):
            own = module.named_parameters(recurse=False)
            odd = [name for name, parameter in own if not parameter.isfinite().all()]
            found.append(f"{path}, whose {odd[0]} is not finite" if odd else path)

    hooks = [
        module.register_forward_hook(lambda one, _, output, path=path: look(path or type(one).__name__, one, output))
        for path, module in model.module.named_modules()
    ]
    try:
        model.spec.call(model.module, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


class _Interpreter(fx.Interpreter):
    """Runs a traced full step in fp32 and keeps the tensors by the names that they have in the ONNX graph."""

    def __init__(self, program: torch.export.ExportedProgram, step: FullStep) -> None:
        super().__init__(program.graph_module)
        outputs: Any = program.graph_module.graph.output_node().args[0]
        self._program = program
        self._names = dict(zip(outputs[1:], step.features, strict=True))
        self._prediction = outputs[0]
        self.nodes: dict[str, fx.Node] = {}

    def values(self, inputs: Mapping[str, Tensor], features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All tensors for these inputs; the values of `features` replace those that the program computes."""
        self._found: dict[str, Tensor] = {}
        self._features = features
        given = iter(inputs.values())
        program = self._program
        stored = {**program.state_dict, **program.constants}
        specs = program.graph_signature.input_specs
        taken = [next(given) if one.kind == InputKind.USER_INPUT else stored[str(one.target)] for one in specs]
        self.run(*cast_all(taken, torch.float32))
        return self._found

    def run_node(self, n: fx.Node) -> Any:
        name = self._names.get(n, n.name)
        result = super().run_node(n)
        if isinstance(result, Tensor):
            result = self._found[name] = self._features.get(name, result)
            self.nodes[name] = n
        return result

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """The function with fp32 in place of half precision."""
        wide = fx.node.map_aggregate((args, kwargs), lambda one: torch.float32 if one in HALF else one)
        return super().call_function(target, *wide)


def _results(bundle: Bundle, graph: str, engines: Engines, inputs: Mapping[str, Tensor]) -> Any:
    """Nodes of a graph in order, with the name and the tensor of each result that the engines compute."""
    model = ir.load(bundle.graph_path(graph))
    named = {str(one.name): one for one in model.graph.outputs}
    for node in model.graph:
        named.update((str(one.name), one) for one in node.outputs if _is_kept(one))
    model.graph.outputs[:] = [*named.values()]
    record = bundle.manifest.graphs[graph]
    kept = GraphRecord(
        file=f"{graph}.all.onnx", inputs=record.inputs, outputs=tuple(map(tensor_spec, model.graph.outputs))
    )
    ir.save(model, bundle.folder / kept.file)
    manifest = bundle.manifest.model_copy(update={"graphs": {FULL: kept}})
    engine = engines(replace(bundle, manifest=manifest))[FULL]
    tensors = {one.name: _empty(one) for one in kept.outputs}
    for one in record.inputs:
        tensors[one.name] = _empty(one).copy_(inputs[one.name])
    engine.bind(tensors)()
    for node in model.graph:
        for value in node.outputs:
            if str(value.name) in tensors:
                yield node, str(value.name), tensors[str(value.name)]


def _is_kept(value: ir.Value) -> bool:
    """Whether a result has a known dtype, and a known shape for a batch."""
    if value.dtype is None or value.shape is None or not value.name:
        return False
    return all(isinstance(size, int) or size.value == BATCH for size in value.shape)


def _empty(spec: TensorSpec) -> Tensor:
    return torch.zeros(spec.sized(BATCH_SIZE), dtype=getattr(torch, spec.dtype))
