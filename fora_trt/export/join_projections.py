"""Graph pass: join projections of one input that feed one attention, such as Q, K and V, into one MatMul.

One Transpose from (B, N, P, H, D) to (P, B, H, N, D) makes each of the P projections contiguous. It replaces P
products, biases and transposes, so a GPU launches fewer kernels. On a CPU this brings no gain and costs copies:
`SeparateProjectionsPass` reverts it there.

Rules, cited below: (1) A projection is a MatMul by a weight matrix, an optional bias, a Reshape that splits the last
axis into heads, and a Transpose from (B, N, H, D) to (B, H, N, D). (2) No value between these nodes has another reader
or is a graph output. (3) The projections feed the same MatMul of two computed operands or the same `Attention`, with no
other product by a weight in between. (4) Two or more such projections are joined if they read the same input and have
equal dtypes and shapes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult
from onnx_ir.passes.common import RemoveUnusedNodesPass

from fora_trt.export.nodes import constant, int64_constant, new_value, only_maker

TO_HEADS, JOINED_TO_HEADS = [0, 2, 1, 3], [2, 0, 3, 1, 4]

Operands = tuple[ir.Node, ir.Value, ir.Value | None]
"""A MatMul, its weight, and the bias that is added to its output; None without a bias."""


@dataclass(frozen=True)
class Projection:
    """A projection by rule 1; `heads` (B, H, N, D) is its output."""

    product: ir.Node
    weight: ir.Value
    bias: ir.Value | None
    heads: ir.Value

    @property
    def alike(self) -> object:
        """The key that joined projections share: rule 4."""
        assert self.heads.shape is not None
        return self.product.inputs[0], self.heads.dtype, tuple(self.heads.shape), self.weight.dtype


class JoinProjectionsPass(InPlacePass):
    """Joins the projections that feed the same attention."""

    def call(self, model: ir.Model) -> PassResult:
        graph = model.graph
        projections = {
            one.heads: one for node in graph if node.op_type == "Transpose" and (one := _projection_of(node))
        }
        order = {node: k for k, node in enumerate(graph)}
        joined = False
        for node in reversed(order):  # the last product of an attention reads all its projections
            groups: dict[object, list[Projection]] = {}
            for heads in _reached(node, projections):
                groups.setdefault(projections[heads].alike, []).append(projections.pop(heads))
            for group in groups.values():
                if len(group) > 1:
                    _join(graph, sorted(group, key=lambda one: order[one.product]))
                    joined = True
        return PassResult(model, modified=joined)


class SeparateProjectionsPass(InPlacePass):
    """Splits joined projections into one MatMul each; its weight is a Slice, which engines evaluate at load time."""

    def call(self, model: ir.Model) -> PassResult:
        separated = [_separate(model.graph, node) for node in tuple(model.graph) if node.op_type == "Transpose"]
        if any(separated):
            RemoveUnusedNodesPass()(model)
        return PassResult(model, modified=any(separated))


def _separate(graph: ir.Graph, transpose: ir.Node) -> bool:
    """Replace the parts of joined projections by separate ones; False if `transpose` does not belong to any."""
    split, parts = transpose.inputs[0], transpose.outputs[0].consumers()
    reshape = only_maker(split, "Reshape")
    joined = list(transpose.attributes.get_ints("perm", ())) == JOINED_TO_HEADS
    if reshape is None or split is None or split.shape is None or not joined or None in map(_index_of, parts):
        return False
    operands, (heads, size) = _operands_of(reshape.inputs[0]), split.shape[3:]
    if operands is None or not isinstance(heads, int) or not isinstance(size, int):
        return False
    for part in parts:
        heads_of_part, index = part.outputs[0], _index_of(part)
        assert index is not None
        nodes = _product_of_part(graph, operands, index, heads, size)
        for node in nodes:
            node.outputs[0].name = f"{heads_of_part.name}.{node.outputs[0].name}"
        nodes[-1].outputs[0].shape = heads_of_part.shape
        graph.insert_before(part, nodes)
        ir.convenience.replace_all_uses_with(heads_of_part, nodes[-1].outputs[0])
    return True


def _product_of_part(graph: ir.Graph, operands: Operands, index: int, heads: int, size: int) -> list[ir.Node]:
    """The nodes of the separate projection number `index`."""
    product, weight, bias = operands
    tokens = product.inputs[0]
    assert tokens is not None
    ends = [int64_constant(graph, f"column.{k}", [k]) for k in (index * heads * size, (index + 1) * heads * size)]
    last, split = int64_constant(graph, "last", [-1]), int64_constant(graph, "heads", [0, 0, heads, size])
    nodes: list[ir.Node] = []
    columns = new_value(nodes, "Slice", [weight, *ends, last], None)
    value = new_value(nodes, "MatMul", [tokens, columns], None)
    if bias is not None:
        value = new_value(nodes, "Add", [value, new_value(nodes, "Slice", [bias, *ends, last], None)], None)
    value = new_value(nodes, "Reshape", [value, split], None)
    new_value(nodes, "Transpose", [value], None, ir.AttrInt64s("perm", TO_HEADS))
    return nodes


def _index_of(part: ir.Node) -> int | None:
    """The number of the joined projection that a Gather selects; None for any other node."""
    index = part.inputs[1] if part.op_type == "Gather" and part.attributes.get_int("axis", 0) == 0 else None
    tensor = None if index is None else index.const_value
    taken = tensor is not None and not len(tensor.shape) and not part.outputs[0].is_graph_output()
    return int(tensor.numpy()) if tensor is not None and taken else None


def _projection_of(transpose: ir.Node) -> Projection | None:
    """The projection that ends with a Transpose; None if it does not satisfy rules 1 and 2."""
    heads, split = transpose.outputs[0], transpose.inputs[0]
    reshape = only_maker(split, "Reshape")
    if reshape is None or list(transpose.attributes.get_ints("perm", ())) != TO_HEADS or heads.is_graph_output():
        return None  # rules 1 and 2
    operands = _operands_of(reshape.inputs[0])
    if operands is None:
        return None  # rules 1 and 2
    product, weight, bias = operands
    before, after = (None if value is None else value.shape for value in (product.outputs[0], split))
    if before is None or after is None or heads.shape is None or len(before) != 3 or len(after) != 4:
        return None  # rule 1
    widths = [weight.shape[1] if weight.shape is not None else None, *([bias.shape[0]] if bias and bias.shape else [])]
    known = isinstance(after[2], int) and isinstance(after[3], int) and None not in [*before]
    if list(before)[:2] != list(after)[:2] or not known or any(width != before[2] for width in widths):
        return None  # rule 1
    return Projection(product, weight, bias, heads)


def _operands_of(tokens: ir.Value | None) -> Operands | None:
    """The MatMul that computes `tokens`, with its weight and bias; None if no such MatMul computes them."""
    biased = only_maker(tokens, "Add")
    bias = None if biased is None else _weight_among(biased, rank=1)
    summed = tokens if biased is None else next((value for value in biased.inputs if value is not bias), None)
    product = only_maker(summed, "MatMul")
    weight = None if product is None else _weight_among(product, rank=2)
    if product is None or weight is None or weight is not product.inputs[1] or (biased is not None and bias is None):
        return None
    return product, weight, bias


def _weight_among(node: ir.Node, rank: int) -> ir.Value | None:
    """The only constant of this rank that a node reads; None if there is not exactly one."""
    constants = [value for value in node.inputs if value is not None and value.const_value is not None]
    fitting = [value for value in constants if value.shape is not None and len(value.shape) == rank]
    return fitting[0] if len(fitting) == 1 else None


def _reached(node: ir.Node, heads: Collection[ir.Value]) -> list[ir.Value]:
    """The heads that feed a node, if it is an attention: rule 3."""
    if node.op_type != "Attention" and not _is_product(node, computed=True):
        return []
    found: dict[ir.Value, None] = {}
    todo, seen = [*node.inputs], set[ir.Value]()
    while todo:
        value = todo.pop()
        if value is None or value in seen:
            continue
        seen.add(value)
        producer = value.producer()
        if value in heads:
            found[value] = None
        elif producer is not None and not _is_product(producer, computed=False):
            todo += producer.inputs
    return [*found]


def _is_product(node: ir.Node, computed: bool) -> bool:
    """Whether a node is a matrix product of two computed operands, or of one and a weight if `computed` is false."""
    if node.op_type not in ("MatMul", "Gemm", "Conv"):
        return False
    return computed == all(value is None or value.const_value is None for value in node.inputs[:2])


def _join(graph: ir.Graph, projections: Sequence[Projection]) -> None:
    first = projections[0]
    shape = first.heads.shape
    tokens = first.product.inputs[0]
    assert shape is not None and tokens is not None
    (batch, heads, length, size), count = shape, len(projections)
    assert isinstance(heads, int) and isinstance(size, int)
    flat = ir.Shape([batch, length, count * heads * size])

    nodes: list[ir.Node] = []
    value = new_value(nodes, "MatMul", [tokens, _side_by_side(graph, projections)], flat)
    value.name = f"{first.heads.name}.joined"  # unique even if several attentions read the same tokens
    if any(one.bias is not None for one in projections):
        value = new_value(nodes, "Add", [value, _biases(graph, projections, heads * size)], flat)
    lengths = int64_constant(graph, f"{count}.projections", [0, 0, count, heads, size])
    value = new_value(nodes, "Reshape", [value, lengths], ir.Shape([batch, length, count, heads, size]))
    order = ir.AttrInt64s("perm", JOINED_TO_HEADS)
    value = new_value(nodes, "Transpose", [value], ir.Shape([count, *shape]), order)
    for k, one in enumerate(projections):
        index = constant(graph, f"projection.{k}", np.array(k))
        part = new_value(nodes, "Gather", [value, index], shape, ir.AttrInt64("axis", 0))
        part.name, one.heads.name = one.heads.name, f"{one.heads.name}.apart"
        ir.convenience.replace_all_uses_with(one.heads, part)
    graph.insert_before(first.product, nodes)


def _side_by_side(graph: ir.Graph, projections: Sequence[Projection]) -> ir.Value:
    """The weights of all projections, concatenated along the columns."""
    arrays = [_array(one.weight) for one in projections]
    return constant(graph, f"{projections[0].weight.name}.joined", np.concatenate(arrays, axis=1))


def _biases(graph: ir.Graph, projections: Sequence[Projection], width: int) -> ir.Value:
    """The biases of all projections, concatenated; zeros for a projection without a bias."""
    given = {one: _array(one.bias) for one in projections if one.bias is not None}
    none = np.zeros(width, dtype=next(iter(given.values())).dtype)
    name = next(one.bias.name for one in given if one.bias is not None)
    return constant(graph, f"{name}.joined", np.concatenate([given.get(one, none) for one in projections]))


def _array(value: ir.Value) -> np.ndarray:
    assert value.const_value is not None
    return value.const_value.numpy()
