"""Graph pass: expand the mask of each `Attention` to one row per query.

A mask over prompt tokens has one row for all queries. ONNX broadcasts this row; ONNX Runtime does not.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from fora_trt.export.nodes import int64_constant

MASK, QUERIES = 3, -2  # index of the mask among an Attention's inputs; axis of the queries in query and mask


class ExpandMasksPass(InPlacePass):
    """Inserts an Expand before each mask with one row; later passes merge equal Expands."""

    def call(self, model: ir.Model) -> PassResult:
        expanded = [_expanded(model.graph, node) for node in tuple(model.graph) if node.op_type == "Attention"]
        return PassResult(model, modified=any(expanded))


def _expanded(graph: ir.Graph, node: ir.Node) -> bool:
    mask = node.inputs[MASK] if len(node.inputs) > MASK else None
    query = node.inputs[0]
    if mask is None or query is None or mask.shape is None or query.shape is None or len(query.shape) != 4:
        return False
    rows, queries = mask.shape[QUERIES], query.shape[QUERIES]
    if rows != 1 or not isinstance(queries, int) or queries == 1:
        return False
    sizes = int64_constant(graph, f"{mask.name}.rows", [queries, 1])
    expand = ir.Node("", "Expand", [mask, sizes], num_outputs=1)
    expand.outputs[0].type = mask.type
    expand.outputs[0].shape = ir.Shape([*list(mask.shape)[:QUERIES], queries, *list(mask.shape)[QUERIES + 1 :]])
    graph.insert_before(node, [expand])
    node.replace_input_with(MASK, expand.outputs[0])
    return True
