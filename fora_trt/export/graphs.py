"""Trace a split module to two ONNX graphs: stable names, one symbolic batch dimension, no mark of where.

The full step is traced. The reuse graph is cut out of it, which is much faster than a second trace: features become
inputs, and what nothing else was computed from is dropped.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import Sequential
from onnx_ir.passes.common import (
    ClearMetadataAndDocStringPass,
    CommonSubexpressionEliminationPass,
    DeduplicateInitializersPass,
    LiftConstantsToInitializersPass,
    NameFixPass,
    RemoveUnusedNodesPass,
)
from onnxscript.optimizer import fold_constants_ir
from torch import Tensor

from fora_trt.bundle import tensor_spec
from fora_trt.errors import ExportError, first_line
from fora_trt.export.drop_squeezes import DropSqueezesPass
from fora_trt.export.expand_masks import ExpandMasksPass
from fora_trt.export.hoist import drop_unread, edge, replace_reads
from fora_trt.export.join_projections import JoinProjectionsPass
from fora_trt.export.optimize import optimized
from fora_trt.export.patches import PatchRowsPass, PlainTransposesPass
from fora_trt.export.slice_projections import SliceProjectionsPass
from fora_trt.export.split import FullStep, Split, check_sites, steps_of_module
from fora_trt.models.examples import example_inputs
from fora_trt.models.sites import OTHER
from fora_trt.models.spec import BATCH, FEATURE, FULL, LATENTS, REUSE, CacheSite, Model, TensorSpec
from fora_trt.quiet import quiet

TRACED_BATCH = 2  # any size but 0 and 1, which torch.export treats as constants
INLINE_BYTES = 2**14  # a smaller constant stays in the graph's own file: shapes and lengths must be readable there
OPSETS = range(20, 25)  # LayerNormalization and Gelu are single operators from 20 on, Attention from 23


@dataclass(frozen=True)
class Graph:
    """An ONNX graph and what its inputs and outputs promise."""

    onnx: ir.Model
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class Graphs:
    """The graphs of a model by name, its cache sites in the order of the module tree, and how far it was optimized."""

    graphs: dict[str, Graph]
    sites: list[CacheSite]
    optimization: str


def graphs_from_model(
    model: Model, opset: int, optimization: str = "none", report: Callable[[str], None] = lambda stage: None
) -> Graphs:
    """The graphs of a full and of a reuse step, and what they have in common, optimized as far as is possible.

    Only what is read is kept: a reuse graph has no input that features made needless (the text of a prompt, whose
    cross-attention is cached), and a feature that no reuse step reads is no feature. Raises `ExportError`.
    """
    paths = [path for path, _ in model.sites]
    if any(kind == OTHER for _, kind in model.sites):
        report("checking the cache sites")
        check_sites(model.module, model.spec, paths)
    full, _ = steps_of_module(model.module, model.spec, paths)
    full.cut_later = True
    report("tracing the full graph")
    whole = _traced(full, model.output.name, opset)
    features = {spec.name: spec for spec in map(tensor_spec, whole.graph.outputs[1:])}
    for spec in features.values():
        _check_shape(spec, f"the output of the cache site {spec.name.removeprefix(FEATURE)}")
    report("cutting the reuse graph out of it")
    light = _cut(whole)
    for graph in (whole, light):
        _tidy(graph, full)
    unread = features.keys() - {value.name for value in light.graph.inputs}
    _drop_outputs(whole, unread)
    sites = [
        CacheSite(path, kind, tuple(features[name] for name in full.outputs[path].features if name not in unread))
        for path, kind in model.sites
    ]
    needless = [site.module for site in sites if not site.features]
    if len(needless) == len(sites):
        raise ExportError(f"the model reads the output of none of the cache sites, {needless[0]} first; name others")
    if needless:
        report(f"passing over {len(needless)} cache sites whose output no reuse step reads, {needless[0]} first")
        sites = [site for site in sites if site.features]
    if optimization != "none":
        report("taking out what need not be computed at every step")
    graphs, reached = optimized({FULL: whole, REUSE: light}, model.spec.inputs, optimization)
    return Graphs({name: _graph(one) for name, one in graphs.items()}, sites, reached)


def _graph(model: ir.Model) -> Graph:
    Sequential(SliceProjectionsPass(), RemoveUnusedNodesPass(), NameFixPass())(model)
    return Graph(model, tuple(map(tensor_spec, model.graph.inputs)), tuple(map(tensor_spec, model.graph.outputs)))


def _drop_outputs(model: ir.Model, names: Collection[str]) -> None:
    kept = [value for value in model.graph.outputs if value.name not in names]
    model.graph.outputs.clear()
    model.graph.outputs.extend(kept)
    RemoveUnusedNodesPass()(model)


def save_graph(graph: Graph, path: Path) -> list[Path]:
    """Write `path` and its weights beside it as `path`.data, if there are any; return the files written."""
    data = path.with_name(path.name + ".data")
    ir.save(graph.onnx, path, external_data=data.name, size_threshold_bytes=INLINE_BYTES)
    if data.exists() and not data.stat().st_size:  # all constants are small
        data.unlink()
    onnx.checker.check_model(path)
    return [path, data] if data.exists() else [path]


def program_from_step(step: Split, inputs: Mapping[str, Tensor]) -> torch.export.ExportedProgram:
    """A step as one graph of PyTorch operators, its first dimension symbolic. Raises `ExportError` where it is not."""
    batch = torch.export.Dim(BATCH)
    with torch.no_grad(), quiet("torch.export"):
        try:
            return torch.export.export(
                step.eval(),
                tuple(inputs.values()),
                dynamic_shapes=(tuple({0: batch} for _ in inputs),),  # of the one variadic argument
                strict=False,
            )
        except ExportError:
            raise
        except Exception as error:  # torch.export raises many kinds, none of which a user can act on
            reason = first_line(error)
            raise ExportError(
                f"{step.spec.architecture} does not trace with a symbolic batch dimension: {reason}"
            ) from error


def _traced(step: FullStep, prediction: str, opset: int) -> ir.Model:
    """`torch.export` first, which raises where the batch would be specialised; then ONNX, as it comes."""
    if opset not in OPSETS:
        raise ExportError(f"the opset is {opset}; fora-trt writes {OPSETS[0]} to {OPSETS[-1]}")
    inputs = example_inputs(step.spec.inputs, step.spec.conditioning, TRACED_BATCH)
    program = program_from_step(step, inputs)
    with torch.no_grad(), quiet("torch.onnx"):
        traced = torch.onnx.export(program, dynamo=True, opset_version=opset, optimize=False, verbose=False)
    assert traced is not None
    model = traced.model
    model.graph.name = FULL
    _rename(model.graph, list(inputs), [prediction, *step.features])
    return model


def _cut(model: ir.Model) -> ir.Model:
    """The reuse graph: the rest of a full graph whose features, the outputs behind the first, are inputs."""
    rest = model.clone()
    rest.graph.name = REUSE
    features = [*rest.graph.outputs[1:]]
    del rest.graph.outputs[1:]
    replace_reads(rest, {value: edge(str(value.name), value) for value in features})
    return rest


def _tidy(model: ir.Model, step: FullStep) -> None:
    """Optimize a graph, and check its edges again. Inputs that nobody reads are dropped.

    What makes it small comes first: the time of the optimizer's rewriting grows with the square of the nodes.
    """
    once_only = (DeduplicateInitializersPass(), CommonSubexpressionEliminationPass())
    with quiet("torch.onnx"):
        fold_constants_ir(model)
        lift = LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)
        Sequential(RemoveUnusedNodesPass(), lift, *once_only)(model)
        torch.onnx.ONNXProgram(model, None).optimize()
    _name_attentions(model.graph)
    Sequential(
        DropSqueezesPass(),
        ExpandMasksPass(),
        PatchRowsPass(),
        PlainTransposesPass(),
        JoinProjectionsPass(),
        RemoveUnusedNodesPass(),
        *once_only,
        ClearMetadataAndDocStringPass(),
    )(model)
    name = model.graph.name
    drop_unread(model)
    if LATENTS not in (value.name for value in model.graph.inputs):
        shown = ", ".join(step.sites[:3]) + (", ..." if len(step.sites) > 3 else "")
        raise ExportError(
            f"nothing in the {name} graph depends on the latents with {shown} cached; cache less than that"
        )
    for value in (*model.graph.inputs, *model.graph.outputs):
        spec = tensor_spec(value)
        _check_shape(spec, f"{spec.name!r} of the {name} graph")


def _rename(graph: ir.Graph, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Give edges their stable names, and the exporter's batch symbol the name `batch`, in every value."""
    for values, names in ((graph.inputs, inputs), (graph.outputs, outputs)):
        if len(values) != len(names):
            raise ExportError(f"the traced graph has {len(values)} edges where {len(names)} were expected")
        for value, name in zip(values, names, strict=True):
            value.name = name
    first = graph.inputs[0].shape
    symbol = first[0].value if first is not None and isinstance(first[0], ir.SymbolicDim) else None
    if symbol is None:
        return  # specialised: the check of every edge says so
    pattern = re.compile(rf"\b{re.escape(symbol)}\b")
    for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape(
                pattern.sub(BATCH, size.value) if isinstance(size, ir.SymbolicDim) and size.value else size
                for size in value.shape
            )


def _name_attentions(graph: ir.Graph) -> None:
    """Call each `Attention` by the module that it is in, so that what a backend tells of it can be understood."""
    taken = {node.name for node in graph}
    for node in graph:
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
        if node.op_type == "Attention" and scopes is not None:
            path = ast.literal_eval(scopes)[-2].removeprefix("module.")  # the last scope is the node's own
            if path not in taken:  # a module can hold several
                node.name = path
                taken.add(path)


def _check_shape(tensor: TensorSpec, what: str) -> None:
    """The exporter can silently make a dimension constant; a graph that did so would fit one batch size only."""
    fixed = all(isinstance(size, int) for size in tensor.shape[1:])
    if not tensor.shape or tensor.shape[0] != BATCH or not fixed:
        raise ExportError(
            f"{what} has shape {list(tensor.shape)}; expected a first dimension {BATCH!r} and fixed sizes after it. "
            "The model specialises its batch or changes its shapes, so it cannot be exported as it is"
        )
