"""Graph pass: replace each `Where` that selects between boolean tensors by logical operators.

ONNX defines `Where` for every dtype; ONNX Runtime has none for bool on CPUs.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from fora_trt.export.nodes import new_value


class LogicalWheresPass(InPlacePass):
    """Replaces Where(c, x, y) on bool by (c and x) or (not c and y)."""

    def call(self, model: ir.Model) -> PassResult:
        wheres = [node for node in model.graph if node.op_type == "Where" and node.outputs[0].dtype == ir.DataType.BOOL]
        for node in wheres:
            _replace(model.graph, node)
        return PassResult(model, modified=bool(wheres))


def _replace(graph: ir.Graph, node: ir.Node) -> None:
    condition, one, other = node.inputs
    assert condition is not None and one is not None and other is not None
    nodes, selected = list[ir.Node](), node.outputs[0]
    otherwise = new_value(nodes, "Not", [condition], condition.shape)
    parts = [new_value(nodes, "And", both, selected.shape) for both in ([condition, one], [otherwise, other])]
    value = new_value(nodes, "Or", parts, selected.shape)
    value.name, selected.name = selected.name, f"{selected.name}.where"  # keep the name: it may be a graph output
    graph.insert_before(node, nodes)
    ir.convenience.replace_all_uses_with(selected, value, replace_graph_outputs=True)
    graph.remove(node, safe=True)
