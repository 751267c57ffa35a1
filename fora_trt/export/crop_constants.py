"""Graph pass: store only the part of a constant that a graph reads.

SD3 crops its position embedding, a table of 192 x 192 positions, to the size of the image. The standard optimizer does
not evaluate this, because the table is large.

Rules, cited below: (1) The nodes of `_PARTS` read only constants and output a static shape with at most as many
elements as they read. (2) The part that other nodes read has fewer elements than the constant.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult
from onnx_ir.passes.common import RemoveUnusedNodesPass

from fora_trt.export.nodes import constant, numbers_of


class CropConstantsPass(InPlacePass):
    """Replaces each part of a constant, such as a slice, by a smaller constant."""

    def call(self, model: ir.Model) -> PassResult:
        parts: dict[ir.Value, tuple[np.ndarray, ir.Value]] = {}  # views, and the constants that they are views of
        for node in model.graph:
            if (found := _part(node, parts)) is not None:
                parts[node.outputs[0]] = found
        cropped = False
        for value, (array, source) in parts.items():
            whole = source.const_value
            if whole is None or array.size >= whole.size or all(node.outputs[0] in parts for node in value.consumers()):
                continue  # rule 2
            smaller = constant(model.graph, f"{source.name}.part", np.ascontiguousarray(array))
            ir.convenience.replace_all_uses_with(value, smaller)
            cropped = True
        if cropped:
            RemoveUnusedNodesPass()(model)
        return PassResult(model, modified=cropped)


def _part(node: ir.Node, parts: dict[ir.Value, tuple[np.ndarray, ir.Value]]) -> tuple[np.ndarray, ir.Value] | None:
    """What a node reads of a constant, and the constant; None if the rules do not hold."""
    take = _PARTS.get(node.op_type)
    first = node.inputs[0] if node.inputs else None
    if take is None or first is None or any(one is not None and one.const_value is None for one in node.inputs[1:]):
        return None
    if first in parts:
        array, source = parts[first]
    elif first.const_value is not None and not first.is_graph_input():
        array, source = first.const_value.numpy(), first
    else:
        return None
    shape = node.outputs[0].shape
    sizes = [size for size in shape or () if isinstance(size, int)]
    if shape is None or len(sizes) != len(shape) or math.prod(sizes) > array.size or node.outputs[0].is_graph_output():
        return None  # rule 1
    return take(node, array, sizes), source


def _reshaped(node: ir.Node, array: np.ndarray, sizes: list[int]) -> np.ndarray:
    view: np.ndarray = array.reshape(sizes)
    return view


def _transposed(node: ir.Node, array: np.ndarray, sizes: list[int]) -> np.ndarray:
    return np.transpose(array, node.attributes.get_ints("perm") or None)


def _gathered(node: ir.Node, array: np.ndarray, sizes: list[int]) -> np.ndarray:
    rows = np.array(numbers_of(node.inputs[1]))
    return array.take(rows, axis=node.attributes.get_int("axis", 0)).reshape(sizes)


def _sliced(node: ir.Node, array: np.ndarray, sizes: list[int]) -> np.ndarray:
    starts, ends, *more = map(numbers_of, node.inputs[1:])
    axes = more[0] if more and more[0] else [*range(len(starts))]
    steps = more[1] if len(more) > 1 else [1] * len(starts)
    window = [slice(None)] * array.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        backwards_to_the_first = step < 0 and end < -array.shape[axis]
        window[axis] = slice(start, None if backwards_to_the_first else end, step)
    view: np.ndarray = array[tuple(window)]
    return view


_PARTS: dict[str, Callable[[ir.Node, np.ndarray, list[int]], np.ndarray]] = {
    "Reshape": _reshaped,
    "Squeeze": _reshaped,
    "Unsqueeze": _reshaped,
    "Transpose": _transposed,
    "Gather": _gathered,
    "Slice": _sliced,
}
