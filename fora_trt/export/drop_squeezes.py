"""Graph pass: remove each `Squeeze` along an axis whose size is not 1.

In PyTorch, `x.squeeze(1)` does nothing if that size is not 1 (PixArt has such a call). In ONNX, the node is invalid,
and the exporter does not check for this.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult


class DropSqueezesPass(InPlacePass):
    """Replaces each Squeeze whose axes all have a known size other than 1 by its input."""

    def call(self, model: ir.Model) -> PassResult:
        dropped = [node for node in tuple(model.graph) if node.op_type == "Squeeze" and _does_nothing(node)]
        for node in dropped:
            source, result = node.inputs[0], node.outputs[0]
            assert source is not None
            source.shape, source.type = source.shape or result.shape, source.type or result.type
            name = result.name if result.is_graph_output() else source.name
            ir.convenience.replace_all_uses_with(result, source, replace_graph_outputs=True)
            model.graph.remove(node, safe=True)
            source.name = name
        return PassResult(model, modified=bool(dropped))


def _does_nothing(node: ir.Node) -> bool:
    source, axes = node.inputs[0], node.inputs[1] if len(node.inputs) > 1 else None
    values = ir.convenience.get_const_tensor(axes) if axes is not None else None
    if source is None or source.shape is None or values is None:
        return False
    shape = source.shape
    sizes = [shape[int(axis)] for axis in values.numpy().flatten()]
    return all(isinstance(size, int) and size != 1 for size in sizes)
