"""Graph pass: write an assignment to a slice, such as `q[:, :, n:] = rotated`, as a concatenation.

The exporter transposes the assigned axis to the front, scatters rows to consecutive indices, and transposes back.
ScatterND is slow, and the torch backends do not run it.

Rules, cited below: (1) Values and updates are transposed alike, and the only reader of the result transposes it back;
neither of the two is a graph output.
(2) The indices are consecutive: a Range from 0 to the length of the axis, sliced with constant bounds and the step 1.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from fora_trt.export.nodes import int64_constant, new_value, numbers_of


class ScatterSlicesPass(InPlacePass):
    """Replaces each ScatterND that assigns to a slice by a Concat of what is before it, the updates, and the rest."""

    def call(self, model: ir.Model) -> PassResult:
        changed = [_as_concat(model.graph, node) for node in tuple(model.graph) if node.op_type == "ScatterND"]
        return PassResult(model, modified=any(changed))


def _as_concat(graph: ir.Graph, scatter: ir.Node) -> bool:
    turned, indices, new = scatter.inputs
    readers = scatter.outputs[0].consumers()
    if scatter.attributes.get_string("reduction", "none") != "none" or len(readers) != 1:
        return False
    turns = [node for value in (turned, new) if value is not None and (node := value.producer()) is not None]
    perms = [node.attributes.get_ints("perm", ()) if node.op_type == "Transpose" else () for node in (*turns, *readers)]
    if (
        len(perms) != 3
        or not perms[0]
        or perms[0] != perms[1]
        or any(one.is_graph_output() for one in (scatter.outputs[0], readers[0].outputs[0]))
    ):
        return False  # rule 1
    axis = perms[0][0]
    if [perms[0][one] for one in perms[2]] != [*range(len(perms[0]))]:
        return False  # rule 1
    values, updates, result = turns[0].inputs[0], turns[1].inputs[0], readers[0].outputs[0]
    assert values is not None
    assert updates is not None
    length, count = (_length(value, axis) for value in (values, updates))
    start = _start(indices, length, count)
    if start is None:
        return False  # rule 2
    nodes: list[ir.Node] = []
    parts = [updates]
    for first, end in ((0, start), (start + count, length)):
        if first < end and values.shape is not None:
            bounds = [int64_constant(graph, f"bound{number}", [number]) for number in (first, end, axis)]
            shape = ir.Shape([end - first if k == axis else size for k, size in enumerate(values.shape)])
            part = new_value(nodes, "Slice", [values, *bounds], shape)
            part.name = f"{values.name}.{first}.{end}"
            parts.insert(0 if first == 0 else len(parts), part)
    whole = parts[0]
    if len(parts) > 1:
        whole = new_value(nodes, "Concat", parts, values.shape, ir.AttrInt64("axis", axis))
    graph.insert_before(scatter, nodes)
    ir.convenience.replace_all_uses_with(result, whole)
    return True


def _start(indices: ir.Value | None, length: int, count: int) -> int | None:
    """The first of `count` consecutive indices (count, 1) into `length` rows; None if they are others."""
    node = None if indices is None else indices.producer()
    rows = node.inputs[0] if node is not None and node.op_type == "Unsqueeze" else None
    slice_ = None if rows is None else rows.producer()
    if rows is None or slice_ is None or not 0 < count <= length:
        return None
    if slice_.op_type == "Range":
        return 0 if _is_range(slice_, length) and count == length else None
    bounds = [numbers_of(value) for value in slice_.inputs[1:]]
    all_rows = slice_.inputs[0] if slice_.op_type == "Slice" else None
    known = len(bounds) in (3, 4) and all(len(one) == 1 for one in bounds) and bounds[3:] in ([], [[1]])
    range_ = None if all_rows is None else all_rows.producer()
    if range_ is None or not known or not _is_range(range_, length):
        return None
    start, end = (min(max(one + length if one < 0 else one, 0), length) for (one,) in bounds[:2])
    return start if end - start == count else None


def _is_range(node: ir.Node, length: int) -> bool:
    """Whether a node outputs the integers from 0 to a length, which is a constant or read from a shape."""
    if node.op_type != "Range" or numbers_of(node.inputs[0]) != [0] or numbers_of(node.inputs[2]) != [1]:
        return False
    limit = node.inputs[1]
    gather = None if limit is None else limit.producer()
    if gather is None or gather.op_type != "Gather":
        return numbers_of(limit) == [length]
    shape = None if gather.inputs[0] is None else gather.inputs[0].producer()
    index = numbers_of(gather.inputs[1])
    if shape is None or shape.op_type != "Shape" or shape.attributes.get_int("start", 0) != 0 or len(index) != 1:
        return False
    return shape.inputs[0] is not None and _length(shape.inputs[0], index[0]) == length


def _length(value: ir.Value, axis: int) -> int:
    size = 0 if value.shape is None or axis >= len(value.shape) else value.shape[axis]
    return size if isinstance(size, int) else 0
