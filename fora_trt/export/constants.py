"""Constants that graph passes add: axes, lengths and sizes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir


def int64_constant(graph: ir.Graph, name: str, values: Sequence[int]) -> ir.Value:
    """The constant vector of this name in the graph; made of `values` where there is none yet."""
    if name not in graph.initializers:
        tensor = ir.tensor(np.array(values, dtype=np.int64), name=name)
        kind = ir.TensorType(ir.DataType.INT64)
        graph.register_initializer(ir.Value(name=name, shape=ir.Shape([len(values)]), type=kind, const_value=tensor))
    return graph.initializers[name]
