"""Which values of a reuse graph depend on features, and which of those are linear in them.

A forecast is a weighted sum of features. What is linear in the features can be added up in their place.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from fora_trt.export.nodes import role_of

IN_THE_FIRST = {
    *("Neg", "Cast", "Identity", "Squeeze", "Unsqueeze", "Reshape", "Transpose", "Expand", "Slice", "Split", "Gather"),
    *("ReduceSum", "ReduceMean", "Div"),
}
"""Operators that are linear in their first input, if the others are independent of features and values stay floats."""

IN_ALL = {"Add", "Sub", "Sum", "Concat"}
"""Operators that are linear if all their inputs are."""

IN_ONE = {"Mul", "MatMul"}
"""Operators that are linear in one of their inputs, if the others are independent of features."""


def featured_values(graph: ir.Graph) -> set[ir.Value]:
    """The features among the inputs, and all values that depend on them."""
    featured = {value for value in graph.inputs if role_of(value) == "feature"}
    for node in graph:
        if any(value in featured for value in node.inputs):
            featured.update(node.outputs)
    return featured


def linear_values(graph: ir.Graph, nodes: Iterable[ir.Node], featured: set[ir.Value]) -> set[ir.Value]:
    """The features and, among the outputs of `nodes`, the values that are linear in them, without a constant term.

    Values that are not floats are not linear: a forecast takes the latest ones.
    """
    linear = {value for value in graph.inputs if value in featured and _is_floating(value)}
    for node in nodes:
        read = [value in featured for value in node.inputs if value is not None]
        kind = node.op_type
        one = read.count(True) == 1 and (kind in IN_ONE or (kind in IN_THE_FIRST and read[0]))
        if (one or (all(read) and kind in IN_ALL)) and {*node.inputs} & featured <= linear:
            linear.update(value for value in node.outputs if _is_floating(value))
    return linear


def _is_floating(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.is_floating_point()
