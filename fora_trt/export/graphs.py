"""Trace a split module to two ONNX graphs: stable names, one symbolic batch dimension, no mark of where."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
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
    RemoveUnusedNodesPass,
)
from torch import Tensor

from fora_trt.bundle import tensor_spec
from fora_trt.errors import ExportError
from fora_trt.export.slice_projections import SliceProjectionsPass
from fora_trt.export.split import FullStep, ReuseStep, Split, example_inputs, find_sites
from fora_trt.models.spec import BATCH, FEATURE, FULL, REUSE, CacheSite, Model, TensorSpec
from fora_trt.quiet import quiet

TRACED_BATCH = 2  # any size but 0 and 1, which torch.export treats as constants
OPSETS = range(20, 25)  # LayerNormalization and Gelu are single operators from 20 on, Attention from 23


@dataclass(frozen=True)
class Graph:
    """An ONNX graph and what its inputs and outputs promise."""

    onnx: ir.Model
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def full_graph_from_model(model: Model, cache: Sequence[str] | None, opset: int) -> tuple[Graph, list[CacheSite]]:
    """The graph of a full step, and the cache sites in the order of its outputs after the prediction.

    `cache` names kinds or patterns; all kinds of the architecture when it is None. Raises `ExportError`.
    """
    spec = model.spec
    found = find_sites(model.module, spec, tuple(spec.cache_sites if cache is None else cache))
    names = [f"{FEATURE}{path}" for path, _ in found]
    step = FullStep(model.module, spec, (path for path, _ in found))
    graph = _traced(step, example_inputs(spec.inputs, spec.guidance, TRACED_BATCH), [spec.output.name, *names], opset)
    features = [tensor_spec(value) for value in graph.graph.outputs[1:]]
    sites = [CacheSite(path, kind, feature) for (path, kind), feature in zip(found, features, strict=True)]
    for site in sites:
        _check_shape(site.feature, f"the output of the cache site {site.module}")
    return Graph(graph, spec.inputs, (spec.output, *features)), sites


def reuse_graph_from_model(model: Model, sites: Sequence[CacheSite], opset: int) -> Graph:
    """The graph of a reuse step: `torch.export` drops what nobody reads once the features are inputs."""
    features = tuple(site.feature for site in sites)
    inputs = example_inputs(model.spec.inputs, model.spec.guidance, TRACED_BATCH) | {
        feature.name: torch.zeros(feature.sized(TRACED_BATCH), dtype=getattr(torch, feature.dtype))
        for feature in features
    }
    step = ReuseStep(model.module, model.spec, (site.module for site in sites))
    graph = _traced(step, inputs, [model.spec.output.name], opset)
    return Graph(graph, (*model.spec.inputs, *features), (model.spec.output,))


def save_graph(graph: Graph, path: Path) -> list[Path]:
    """Write `path` and its weights beside it as `path`.data; return the files written."""
    data = path.with_name(path.name + ".data")
    ir.save(graph.onnx, path, external_data=data.name)
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
            reason = str(error).strip().partition("\n")[0]
            raise ExportError(
                f"{step.spec.architecture} does not trace with a symbolic batch dimension: {reason}"
            ) from error


def _traced(step: Split, inputs: dict[str, Tensor], outputs: Sequence[str], opset: int) -> ir.Model:
    """`torch.export` first, which raises where the batch would be specialised; then ONNX, checked again."""
    if opset not in OPSETS:
        raise ExportError(f"the opset is {opset}; fora-trt writes {OPSETS[0]} to {OPSETS[-1]}")
    program = program_from_step(step, inputs)
    with torch.no_grad(), quiet("torch.onnx"):
        traced = torch.onnx.export(program, dynamo=True, opset_version=opset, verbose=False)
    assert traced is not None
    model = traced.model
    _rename(model.graph, list(inputs), outputs)
    _name_attentions(model.graph)
    Sequential(
        DeduplicateInitializersPass(),
        CommonSubexpressionEliminationPass(),
        SliceProjectionsPass(),
        RemoveUnusedNodesPass(),
        ClearMetadataAndDocStringPass(),
    )(model)
    model.graph.name = FULL if isinstance(step, FullStep) else REUSE
    expected = {value.name: tensor_spec(value) for value in (*model.graph.inputs, *model.graph.outputs)}
    for name in (*inputs, *outputs):
        if name not in expected:
            raise ExportError(f"the {model.graph.name} graph lost {name!r} while it was traced")
        _check_shape(expected[name], f"{name!r} of the {model.graph.name} graph")
    return model


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
