"""Take out of the graphs of a step what need not be computed in it: `hoist` and `fold`, and what joins their graphs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import count

import onnx_ir as ir
from onnx_ir.passes import Sequential
from onnx_ir.passes.common import RemoveUnusedNodesPass

from fora_trt.export.fold import fold
from fora_trt.export.hoist import GraphWriter, Numbering, drop_unread, early_part, edge, replace_reads
from fora_trt.export.nodes import int64_constant, is_read, new_value, nodes_behind
from fora_trt.export.slice_projections import SliceProjectionsPass, take_projection
from fora_trt.models.spec import CONDITIONING, FULL, FULL_CONDITIONING, HOISTED, REUSE, TensorSpec, of_window

SINGLE = "hoisted."
"""Begins the names of values that pass from the conditioning graph to another, until they are stacked."""

FLOATING = ("float16", "bfloat16", "float32", "float64")


def pooled_inputs(inputs: Sequence[TensorSpec]) -> list[str]:
    """Of the inputs of a model those that hold a number or a vector for a sample: timestep, class, pooled text.

    A prompt's tokens and their mask are not among them: what depends on those alone is the same at every step.
    """
    return [one.name for one in inputs if len(one.shape) <= (2 if one.dtype in FLOATING else 1)]


def optimized(graphs: dict[str, ir.Model], inputs: Sequence[TensorSpec], level: str) -> tuple[dict[str, ir.Model], str]:
    """Optimize the full and the reuse graph of a model with these inputs, as far as `level`; they are changed.

    Returns the graphs, with those of the conditioning if there are some, and the level that was reached: a model none
    of whose values depend on timestep and class alone, or whose sum cannot be folded, stays below.
    """
    if level == "none":
        return graphs, level
    full, reuse = graphs[FULL], graphs[REUSE]
    pooled, numbering = pooled_inputs(inputs), Numbering()
    writer = GraphWriter(numbering)
    values: dict[str, ir.Value] = {}  # of the conditioning graph, by the names under which the others read them
    for model in (full, reuse):
        part = early_part(model.graph, {str(value.name) for value in model.graph.inputs} - {*pooled})
        writer.add(part.nodes)
        reads: dict[ir.Value, ir.Value] = {}
        placeholders: dict[str, ir.Value] = {}
        for value in part.boundary:
            name = f"{SINGLE}{numbering.of(value)}"
            values[name] = writer.value(value)
            values[name].name = name
            reads[value] = placeholders.setdefault(name, edge(name, value))
        replace_reads(model, reads)
    if not values:
        return graphs, "none"
    folded = level == "fold" and fold(full, reuse, SINGLE)
    read = {name: _readers(name, graphs) for name in values}
    outputs = [value for name, value in values.items() if read[name]]
    conditioning = ir.Model(writer.graph(CONDITIONING, outputs, like=full.graph), ir_version=full.ir_version)
    parts = _parted(conditioning, {name for name in values if read[name] == {(FULL, False)}})
    models, numbers = {**parts, **graphs}, count()
    for one in parts.values():
        _stack(one.graph, models, numbers)
    return models, "fold" if folded else "conditioning"


def _readers(name: str, models: Mapping[str, ir.Model]) -> frozenset[tuple[str, bool]]:
    """Which graphs read a value, for the step at hand or, with True, for every step of a window."""
    inputs = {graph: {value.name for value in model.graph.inputs} for graph, model in models.items()}
    ways = {False: name, True: of_window(name)}
    return frozenset((graph, ahead) for graph in models for ahead, one in ways.items() if one in inputs[graph])


def _parted(model: ir.Model, apart: Collection[str]) -> dict[str, ir.Model]:
    """Move what is computed for the outputs named in `apart` alone to a graph of its own, if that has weights.

    What the others need too is computed for both, and passes over. A projection of which both need parts becomes two.
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
            reads[value] = edge(passed.name, value)
            outputs.append(passed)
    first = ir.Model(writer.graph(CONDITIONING, outputs, like=graph), ir_version=model.ir_version)
    graph.name = FULL_CONDITIONING
    graph.outputs[:] = own
    replace_reads(model, reads)
    return {CONDITIONING: first, FULL_CONDITIONING: model}


def _is_apart(value: ir.Value, kept: set[ir.Node], apart: Collection[str]) -> bool:
    """Whether neither a node that is kept nor an output that is kept needs a value."""
    return not {*value.consumers()} & kept and (not value.is_graph_output() or value.name in apart)


def _is_weight(value: ir.Value) -> bool:
    return value.const_value is not None and len(value.const_value.shape) > 1


def _stack(graph: ir.Graph, models: Mapping[str, ir.Model], numbers: Iterator[int]) -> None:
    """Join outputs that the same graphs read along their second dimension, so that few tensors pass between graphs."""
    groups: dict[object, list[ir.Value]] = {}
    for value in graph.outputs:
        assert value.shape is not None
        alike = value if len(value.shape) < 2 else (value.dtype, tuple(value.shape[2:]))
        groups.setdefault((alike, _readers(str(value.name), models)), []).append(value)
    outputs = []
    for values in groups.values():
        singles, name = [str(value.name) for value in values], f"{HOISTED}{next(numbers)}"
        for reader, ahead in sorted(_readers(singles[0], models)):  # the same order in every export
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
    return output


def _split(model: ir.Model, name: str, singles: list[str]) -> None:
    """Let a graph read one input instead of several that are stacked in it; a window's has a dimension more."""
    graph = model.graph
    found = {str(value.name): value for value in graph.inputs}
    parts = [found[single] for single in singles]
    if len(parts) == 1:
        parts[0].name = name
        return
    axis = 2 if name.startswith(of_window("")) else 1
    stacked = ir.Value(name=name, type=parts[0].type, shape=_stacked_shape(parts, axis))
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
