"""Optimize the full and the reuse graph: hoist the conditioning path, fold the sums, and connect the graphs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import count

import onnx_ir as ir
from onnx_ir.passes import Sequential
from onnx_ir.passes.common import RemoveUnusedNodesPass

from fora_trt.contract import (
    CONDITIONING,
    FULL,
    FULL_CONDITIONING,
    HOISTED,
    LATENTS,
    REUSE,
    Optimization,
    TensorSpec,
    of_window,
)
from fora_trt.export.fold import fold
from fora_trt.export.hoist import GraphWriter, Numbering, batch_from, drop_unread, early_part, replace_reads
from fora_trt.export.nodes import LATE, edge, int64_constant, is_of_window, is_read, new_value, nodes_behind, with_role
from fora_trt.export.slice_projections import SliceProjectionsPass, take_projection

SINGLE = "hoisted."
"""Name prefix of single values that pass from the conditioning graph to other graphs, before they are stacked."""


def pooled_inputs(inputs: Sequence[TensorSpec]) -> list[str]:
    """Names of the inputs that hold one number or vector per sample: timestep, class, pooled text, also as one token.

    Prompt tokens and their mask are excluded: values that depend only on them are equal at every step. So is noise that
    is drawn at every step, whose values are unknown before it.
    """
    longer = {one.name: sum(size != 1 for size in one.shape[1:]) for one in inputs}
    return [one.name for one in inputs if one.role not in LATE and longer[one.name] <= int(one.is_floating)]


def optimized(
    graphs: dict[str, ir.Model], inputs: Sequence[TensorSpec], level: Optimization, kept: Collection[str] = ()
) -> tuple[dict[str, ir.Model], Optimization]:
    """Optimize the full and the reuse graph of a model in place, up to `level`; `inputs` are the model's inputs.

    The full graph outputs the features named in `kept` even if no reuse step reads them.

    Returns all graphs, including new conditioning graphs, and the level that was reached. It is lower than `level` if
    no value depends on timestep and class alone, or if the sums cannot be folded.
    """
    if level == "none":
        return graphs, level
    full, reuse = graphs[FULL], graphs[REUSE]
    pooled, numbering = pooled_inputs(inputs), Numbering()
    writer = GraphWriter(numbering)
    values: dict[str, ir.Value] = {}  # outputs of the conditioning graph, by the names of the inputs that read them
    for model in (full, reuse):
        batch_from(model.graph, pooled)  # so that expanded constants can be hoisted
        part = early_part(model.graph, {str(value.name) for value in model.graph.inputs} - {*pooled})
        writer.add(part.nodes)
        reads: dict[ir.Value, ir.Value] = {}
        placeholders: dict[str, ir.Value] = {}
        for value in part.boundary:
            name = f"{SINGLE}{numbering.of(value)}"
            values[name] = with_role(writer.value(value), "hoisted")
            values[name].name = name
            reads[value] = placeholders.setdefault(name, edge(name, value, "hoisted"))
        batch_from(model.graph, [LATENTS])
        replace_reads(model, reads)
    if not values:
        return graphs, "none"
    folded = level == "fold" and fold(full, reuse, kept)
    read = {name: _readers(name, graphs) for name in values}
    outputs = [value for name, value in values.items() if read[name]]
    conditioning = ir.Model(writer.graph(CONDITIONING, outputs, like=full.graph), ir_version=full.ir_version)
    parts = _parted(conditioning, {name for name in values if read[name] == {(FULL, False)}})
    models, numbers = {**parts, **graphs}, count()
    for one in parts.values():
        _stack(one.graph, models, numbers)
    return models, "fold" if folded else "conditioning"


def _readers(name: str, models: Mapping[str, ir.Model]) -> frozenset[tuple[str, bool]]:
    """The graphs that read a value, each with True if it reads the stacked values of all reuse steps of a window."""
    inputs = {graph: {value.name for value in model.graph.inputs} for graph, model in models.items()}
    ways = {False: name, True: of_window(name)}
    return frozenset((graph, ahead) for graph in models for ahead, one in ways.items() if one in inputs[graph])


def _parted(model: ir.Model, apart: Collection[str]) -> dict[str, ir.Model]:
    """Move nodes that only the outputs named in `apart` need to a second graph, if these nodes read weights.

    Values that both graphs need are computed by the first graph and passed to the second. A projection of which each
    graph needs different parts is split into two.
    """
    graph = model.graph
    kept = nodes_behind(one for one in graph.outputs if one.name not in apart)
    for split in tuple(node for node in graph if node.op_type == "Split" and node in kept):
        take_projection(graph, split, [is_read(one) and _is_apart(one, kept, apart) for one in split.outputs])
    Sequential(SliceProjectionsPass(), RemoveUnusedNodesPass())(model)

    kept = nodes_behind(one for one in graph.outputs if one.name not in apart)
    others = [node for node in graph if node not in kept]
    read = dict.fromkeys(value for node in others for value in node.inputs if value is not None)
    if not kept or not any(_is_weight(value) and not {*value.consumers()} & kept for value in read):
        return {CONDITIONING: model}
    writer = GraphWriter(Numbering())
    writer.add(node for node in graph if node in kept)
    own = [value for value in graph.outputs if value.producer() not in kept]
    outputs = [writer.value(value) for value in graph.outputs if value.producer() in kept]
    reads: dict[ir.Value, ir.Value] = {}
    for value in read:
        if value.producer() in kept:
            passed = writer.value(value)
            if passed in outputs:
                passed = new_value(writer.nodes, "Identity", [passed], value.shape)
            passed.name = f"{SINGLE}passed.{len(reads)}"
            reads[value] = edge(passed.name, value, "hoisted")
            outputs.append(with_role(passed, "hoisted"))
    first = ir.Model(writer.graph(CONDITIONING, outputs, like=graph), ir_version=model.ir_version)
    graph.name = FULL_CONDITIONING
    graph.outputs[:] = own
    replace_reads(model, reads)
    return {CONDITIONING: first, FULL_CONDITIONING: model}


def _is_apart(value: ir.Value, kept: set[ir.Node], apart: Collection[str]) -> bool:
    """Whether no kept node reads the value and it is not a kept output."""
    return not {*value.consumers()} & kept and (not value.is_graph_output() or value.name in apart)


def _is_weight(value: ir.Value) -> bool:
    return value.const_value is not None and len(value.const_value.shape) > 1


def _stack(graph: ir.Graph, models: Mapping[str, ir.Model], numbers: Iterator[int]) -> None:
    """Concatenate outputs with the same readers along the second dimension, so that few tensors pass between graphs."""
    groups: dict[object, list[ir.Value]] = {}
    for value in graph.outputs:
        assert value.shape is not None
        alike = value if len(value.shape) < 2 else (value.dtype, tuple(value.shape[2:]))
        groups.setdefault((alike, _readers(str(value.name), models)), []).append(value)
    outputs = []
    for values in groups.values():
        singles, name = [str(value.name) for value in values], f"{HOISTED}{next(numbers)}"
        for reader, ahead in sorted(_readers(singles[0], models)):  # sorted, so that exports are reproducible
            _split(models[reader], *((of_window(name), [*map(of_window, singles)]) if ahead else (name, singles)))
        outputs.append(_joined(graph, name, values))
    graph.outputs[:] = outputs


def _joined(graph: ir.Graph, name: str, values: list[ir.Value]) -> ir.Value:
    if len(values) == 1:
        values[0].name = name
        return values[0]
    nodes: list[ir.Node] = []
    output = new_value(nodes, "Concat", values, _stacked_shape(values, axis=1), ir.AttrInt64("axis", 1))
    output.name = name
    graph.extend(nodes)
    return with_role(output, "hoisted")


def _split(model: ir.Model, name: str, singles: list[str]) -> None:
    """Replace several inputs of a graph by one stacked input and a Split; window tensors have one more dimension."""
    graph = model.graph
    found = {str(value.name): value for value in graph.inputs}
    parts = [found[single] for single in singles]
    if len(parts) == 1:
        parts[0].name = name
        return
    axis = 2 if is_of_window(parts[0]) else 1
    stacked = edge(name, parts[0], "hoisted")
    stacked.shape = _stacked_shape(parts, axis)
    lengths = int64_constant(graph, f"{name}.lengths", _sizes_along(parts, axis))
    split = ir.Node("", "Split", [stacked, lengths], [ir.AttrInt64("axis", axis)], num_outputs=len(parts))
    graph.insert_before(graph[0], split)
    for part, output in zip(parts, split.outputs, strict=True):
        output.name, output.type, output.shape = f"{part.name}.part", part.type, part.shape
        ir.convenience.replace_all_uses_with(part, output)
    graph.inputs.append(stacked)
    drop_unread(model)


def _stacked_shape(values: Sequence[ir.Value], axis: int) -> ir.Shape:
    sizes = [*(values[0].shape or ())]
    sizes[axis] = sum(_sizes_along(values, axis))
    return ir.Shape(sizes)


def _sizes_along(values: Sequence[ir.Value], axis: int) -> list[int]:
    found = [value.shape[axis] for value in values if value.shape is not None]
    return [size for size in found if isinstance(size, int)]
