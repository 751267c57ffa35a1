"""Graph pass: remove unread parts of a projection whose output is split.

In a reuse graph only the gates of each adaLN projection are read: two parts of six, so two thirds of the weights are
removed.

Rules, cited below: (1) The Split is along the last axis, into parts of known width. (2) The input of the Split is a
Gemm, optionally followed by a Cast. The Gemm's weight is an initializer, its optional bias is an initializer vector,
and its output has no other reader.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from fora_trt.export.nodes import constant, int64_constant, is_read


class SliceProjectionsPass(InPlacePass):
    """Shrinks each Gemm whose Split has unread outputs; the values that are read do not change."""

    def call(self, model: ir.Model) -> PassResult:
        sliced = [
            take_projection(model.graph, node, [is_read(one) for one in node.outputs])
            for node in tuple(model.graph)
            if node.op_type == "Split"
        ]
        return PassResult(model, modified=any(sliced))


def take_projection(graph: ir.Graph, split: ir.Node, wanted: Sequence[bool]) -> bool:
    """Compute the `wanted` outputs of a Split by a separate projection; the old projection keeps the other outputs.

    Returns False and changes nothing if the rules do not hold, or if all or none of the outputs are wanted.
    """
    joined = split.inputs[0]
    cast = joined.producer() if joined is not None else None
    if cast is not None and cast.op_type == "Cast" and cast.inputs[0] is not None:
        gemm, product_type = cast.inputs[0].producer(), cast.inputs[0].type
        alone = len(cast.inputs[0].uses()) == 1
    else:
        gemm, cast, alone, product_type = cast, None, True, joined.type if joined is not None else None
    if joined is None or gemm is None or gemm.op_type != "Gemm" or len(joined.uses()) != 1 or not alone:
        return False  # rule 2
    weight, bias = gemm.inputs[1], gemm.inputs[2] if len(gemm.inputs) > 2 else None
    if weight is None or weight.const_value is None:
        return False  # rule 2
    if bias is not None and (bias.const_value is None or tuple(bias.const_value.shape) != (joined.shape or (0,))[-1:]):
        return False  # rule 2
    widths = [
        size for output in split.outputs if output.shape is not None and isinstance(size := output.shape[-1], int)
    ]
    rank = len(joined.shape) if joined.shape is not None else 0
    if split.attributes.get_int("axis", 0) not in (-1, rank - 1) or len(widths) != len(split.outputs):
        return False  # rule 1
    if all(wanted) or not any(wanted):
        return False

    kept = np.repeat(wanted, widths)  # a flag per column of the product
    axis = 0 if gemm.attributes.get_int("transB", 0) else 1
    columns = np.compress(kept, weight.const_value.numpy(), axis=axis)
    operands = [gemm.inputs[0], constant(graph, f"{weight.name}.read", columns)]
    if bias is not None and bias.const_value is not None:
        operands.append(constant(graph, f"{bias.name}.read", bias.const_value.numpy()[kept]))
    product = ir.Node("", "Gemm", operands, list(gemm.attributes.values()), num_outputs=1)
    parts = [output for output, is_wanted in zip(split.outputs, wanted, strict=True) if is_wanted]
    sizes = [width for width, is_wanted in zip(widths, wanted, strict=True) if is_wanted]
    lengths = int64_constant(graph, f"{joined.name}.lengths", sizes)
    nodes = [product]
    if cast is not None:
        nodes.append(ir.Node("", "Cast", [product.outputs[0]], list(cast.attributes.values()), num_outputs=1))
    nodes.append(
        ir.Node("", "Split", [nodes[-1].outputs[0], lengths], [ir.AttrInt64("axis", rank - 1)], num_outputs=len(parts))
    )
    graph.insert_before(split, nodes)
    assert joined.shape is not None
    for node, kind in zip(nodes[:-1], (product_type, joined.type), strict=False):
        node.outputs[0].type = kind
        node.outputs[0].shape = ir.Shape([*list(joined.shape)[:-1], int(kept.sum())])
    again = nodes[-1]
    for old, new in zip(parts, again.outputs, strict=True):
        new.type, new.shape, new.name, old.name = old.type, old.shape, old.name, None
        new.meta.update(old.meta)  # the role of an input or output
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    return True
