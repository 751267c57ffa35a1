"""Take out of the graphs of a step what need not be computed in it: `hoist` and `fold`, and what joins their graphs."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from fora_trt.export.fold import fold
from fora_trt.export.hoist import GraphWriter, Numbering, drop_unread, early_part, edge, replace_reads
from fora_trt.export.nodes import int64_constant
from fora_trt.models.spec import CONDITIONING, FULL, HOISTED, REUSE, TensorSpec, of_window

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

    Returns the graphs, with the conditioning graph if there is one, and the level that was reached: a model none of
    whose values depend on timestep and class alone, or whose sum cannot be folded, stays below.
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
            reads[value] = placeholders.setdefault(name, edge(name, value))
        replace_reads(model, reads)
    if not values:
        return graphs, "none"
    folded = level == "fold" and fold(full, reuse, SINGLE)
    outputs = _stack(writer, values, (full, reuse))
    conditioning = ir.Model(writer.graph(CONDITIONING, outputs, like=full.graph), ir_version=full.ir_version)
    return {CONDITIONING: conditioning, FULL: full, REUSE: reuse}, "fold" if folded else "conditioning"


def _stack(writer: GraphWriter, values: dict[str, ir.Value], models: Sequence[ir.Model]) -> list[ir.Value]:
    """Join values that the same graphs read along their second dimension, so that few tensors pass between graphs."""
    inputs = {name: [model for model in models if name in _input_names(model)] for name in values}
    windows = {name: [model for model in models if of_window(name) in _input_names(model)] for name in values}
    groups: dict[object, list[str]] = {}
    for name, value in values.items():
        assert value.shape is not None
        alike = name if len(value.shape) < 2 else (value.dtype, tuple(value.shape[2:]))
        readers = tuple(tuple(map(models.index, found[name])) for found in (inputs, windows))
        if any(readers):
            groups.setdefault((alike, readers), []).append(name)
    outputs = []
    for k, names in enumerate(groups.values()):
        stacked = f"{HOISTED}{k}"
        outputs.append(_joined(writer, stacked, [values[name] for name in names]))
        for model in inputs[names[0]]:
            _split(model, stacked, names)
        for model in windows[names[0]]:
            _split(model, of_window(stacked), list(map(of_window, names)))
    return outputs


def _input_names(model: ir.Model) -> list[str]:
    return [str(value.name) for value in model.graph.inputs]


def _joined(writer: GraphWriter, name: str, values: list[ir.Value]) -> ir.Value:
    if len(values) == 1:
        values[0].name = name
        return values[0]
    concat = ir.Node("", "Concat", values, [ir.AttrInt64("axis", 1)], num_outputs=1)
    output = concat.outputs[0]
    output.name, output.type, output.shape = name, values[0].type, _stacked_shape(values, axis=1)
    writer.nodes.append(concat)
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
