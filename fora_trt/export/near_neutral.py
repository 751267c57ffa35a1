"""Hide constants from the standard optimizer that it takes for 0 or 1 though they are not.

Its rules drop `x + 0`, `x - 0`, `x * 1` and `x / 1`. They compare with a tolerance, so they also drop the guard of
`x / (y + 1e-12)`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import onnx_ir as ir

TOLERANCE = 1e-4
"""Distance from 0 or 1 within which a constant is hidden; the optimizer's own tolerance is 1e-8, or 1e-5 of 1."""


@contextmanager
def near_neutral_hidden(model: ir.Model) -> Iterator[None]:
    """Make scalar initializers that are nearly but not exactly 0 or 1 inputs of the graph within the block."""
    graph = model.graph
    hidden = {value: value.const_value for value in graph.initializers.values() if _is_near_neutral(value)}
    inputs = [*graph.inputs]
    for value in hidden:
        del graph.initializers[str(value.name)]
        value.const_value = None
        graph.inputs.append(value)
    try:
        yield
    finally:
        graph.inputs[:] = inputs
        for value, tensor in hidden.items():
            value.const_value = tensor
            graph.register_initializer(value)


def _is_near_neutral(value: ir.Value) -> bool:
    tensor = value.const_value
    if tensor is None or tensor.size != 1 or not tensor.dtype.is_floating_point():
        return False
    number = float(tensor.numpy().reshape(()))
    return any(0 < abs(number - neutral) < TOLERANCE for neutral in (0, 1))
