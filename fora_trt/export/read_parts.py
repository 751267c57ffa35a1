"""Graph pass: compute only the tokens that are read, where streams of tokens are concatenated and sliced later.

Some networks concatenate text and image tokens, add to both, and keep the image tokens at the end. In a reuse graph,
where all that is added are gated features, the Slice moves to the Concat: `Slice(Concat(text, image) + gate * feature)`
becomes `image + gate * Slice(feature)`. Then there is one stream, whose sum can be folded, and the text is not read.

Rules, cited below: (1) A cut is a Slice with constant bounds and the step 1 along one axis of known length, which is
neither the first nor the last, or a Split along such an axis. (2) A cut of a Concat along its axis reads the
concatenated values. (3) A Concat of all parts of a value, in order, is this value. (4) A cut moves before nodes that
compute each token by itself if it reaches in this way a Concat or the input of a Cast to a wider dtype. All that read
such a node are cuts along this axis or nodes that cuts move before, so nothing is computed twice. For a node that does
not work element by element, such as a projection, all of them read the same tokens, so it is not computed in parts.
"""

from __future__ import annotations

from typing import NamedTuple

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult
from onnx_ir.passes.common import RemoveUnusedNodesPass

from fora_trt.export.nodes import ELEMENTWISE, constant, int64_constant, is_read, is_widened, numbers_of

NORMALIZATIONS = ("LayerNormalization", "RMSNormalization")


class Part(NamedTuple):
    """The entries from `start` to `stop` along an axis, which is counted from the last one, -1."""

    axis: int
    start: int
    stop: int


class ReadPartsPass(InPlacePass):
    """Moves cuts before the nodes that compute more than is read; the values that are read do not change."""

    def call(self, model: ir.Model) -> PassResult:
        remove = RemoveUnusedNodesPass()
        remove(model)  # rules 3 and 4 depend on who reads a value
        joined = [_read_whole(node) for node in tuple(model.graph) if node.op_type == "Concat"]
        remove(model)
        moved = _Cuts(model.graph).move()
        remove(model)
        return PassResult(model, modified=any(joined) or moved)


def _read_whole(concat: ir.Node) -> bool:
    """Replace a Concat by the value of which it concatenates all parts (rule 3); False for another one."""
    cuts = [cut for value in concat.inputs if (cut := _cut_of(value)) is not None]
    axis, output = _axis_of(concat), concat.outputs[0]
    if len(cuts) != len(concat.inputs) or output.is_graph_output():
        return False
    wholes, parts = {whole for whole, _ in cuts}, [part for _, part in cuts]
    ends = [0, *(part.stop for part in parts)]
    if len(wholes) > 1 or [(part.axis, part.start) for part in parts] != [(axis, end) for end in ends[:-1]]:
        return False
    (whole,) = wholes
    if ends[-1] != _length(whole, axis):
        return False
    ir.convenience.replace_all_uses_with(output, whole)
    return True


class _Cuts:
    """The cuts of a graph, and the nodes that they move before."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self._read: dict[ir.Node, set[Part]] = {}  # the parts that are read of a node, where these are all
        for node in reversed(graph):
            if parts := self._parts_read(node):
                self._read[node] = parts
        self._reaching: set[ir.Node] = set()  # rule 4
        for node, parts in reversed(self._read.items()):
            axis = next(part.axis for part in parts)
            cut_with = [one for one in node.inputs if one is not None and _is_cut_with(one, node, axis)]
            if is_widened(node.outputs[0]) or any(self._reaches(one, axis) for one in cut_with):
                self._reaching.add(node)
        self._moving: set[ir.Node] = set()  # those that reach one, and those that only they read
        for node in self._read:
            if node in self._reaching or {*node.outputs[0].consumers()} <= self._moving:
                self._moving.add(node)
        self._made: dict[tuple[ir.Value, Part], ir.Value] = {}

    def move(self) -> bool:
        """Replace what the cuts output that reach a Concat; False if none does."""
        replaced = [self._replace(one) for node in tuple(self.graph) for one in node.outputs if is_read(one)]
        return any(replaced)

    def _replace(self, output: ir.Value) -> bool:
        cut, node = _cut_of(output), output.producer()
        if cut is None or node is None or not self._reaches(cut[0], cut[1].axis):
            return False
        part = self._part(*cut, before=node)
        if output.is_graph_output():  # it keeps its name
            if part.producer() is None or part.is_graph_output():
                return False
            part.name, output.name = output.name, None
        ir.convenience.replace_all_uses_with(output, part, replace_graph_outputs=True)
        return True

    def _reaches(self, value: ir.Value, axis: int) -> bool:
        """Whether a cut of the value along the axis reaches a Concat or a Cast to a wider dtype."""
        node = value.producer()
        return node is not None and (node in self._reaching or _axis_of(node) == axis)

    def _parts_read(self, node: ir.Node) -> set[Part]:
        """The parts that are read of a node's output if cuts may move before it; otherwise none."""
        output, found = node.outputs[0], set[Part]()
        for reader in output.consumers():
            parts = {cut[1] for one in reader.outputs if is_read(one) and (cut := _cut_of(one)) and cut[0] is output}
            parts |= {part for part in self._read.get(reader, ()) if _is_cut_with(output, reader, part.axis)}
            if not parts:
                return set()
            found |= parts
        alone = len(node.outputs) == 1 and not output.is_graph_output() and len({part.axis for part in found}) == 1
        return found if alone and (node.op_type in ELEMENTWISE or (len(found) == 1 and _is_tokenwise(node))) else set()

    def _part(self, value: ir.Value, part: Part, before: ir.Node) -> ir.Value:
        """A part of a value; nodes that compute it are inserted before a node."""
        if part[1:] == (0, _length(value, part.axis)):
            return value
        if (value, part) not in self._made:
            self._made[value, part] = self._new_part(value, part, before)
        return self._made[value, part]

    def _new_part(self, value: ir.Value, part: Part, before: ir.Node) -> ir.Value:
        (axis, start, stop), node, cut = part, value.producer(), _cut_of(value)
        if value.const_value is not None:
            return constant(
                self.graph, f"{value.name}.{start}.{stop}", value.const_value.numpy().take(range(start, stop), axis)
            )
        if cut is not None and cut[1].axis == axis:
            return self._part(cut[0], Part(axis, cut[1].start + start, cut[1].start + stop), before)
        kind, attributes = "Slice", list[ir.Attr]()
        read: list[ir.Value | None]
        if node is not None and _axis_of(node) == axis:
            read = self._concatenated(node, part, before)
            if len(read) == 1 and read[0] is not None:
                return read[0]
            kind, attributes = node.op_type, [ir.AttrInt64("axis", axis)]
        elif node is not None and node in self._moving:
            kind, attributes = node.op_type, [*node.attributes.values()]
            read = [
                self._part(one, part, before) if one is not None and _is_cut_with(one, node, axis) else one
                for one in node.inputs
            ]
        else:
            read = [value, *(int64_constant(self.graph, f"bound{number}", [number]) for number in (start, stop, axis))]
        new = ir.Node("", kind, read, attributes, num_outputs=1)
        output, sizes = new.outputs[0], [*(value.shape or ())]
        sizes[axis] = stop - start
        output.name, output.type, output.shape = f"{value.name}.{start}.{stop}", value.type, ir.Shape(sizes)
        self.graph.insert_before(before, new)
        return output

    def _concatenated(self, concat: ir.Node, part: Part, before: ir.Node) -> list[ir.Value | None]:
        """The values that a part of a concatenated value consists of (rule 2)."""
        found, first = list[ir.Value | None](), 0
        for value in concat.inputs:
            assert value is not None
            start, stop = max(part.start - first, 0), min(part.stop - first, _length(value, part.axis))
            if start < stop:
                found.append(self._part(value, Part(part.axis, start, stop), before))
            first += _length(value, part.axis)
        return found


def _cut_of(value: ir.Value | None) -> tuple[ir.Value, Part] | None:
    """The value and the part of it that a cut outputs (rule 1); None if no cut outputs the value."""
    node = None if value is None else value.producer()
    whole = node.inputs[0] if node is not None and node.op_type in ("Slice", "Split") else None
    if node is None or value is None or whole is None:
        return None
    rank = len(whole.shape or ())
    if node.op_type == "Split":
        axis = _from_last(node.attributes.get_int("axis", 0), rank)
        start = sum(_length(one, axis) for one in node.outputs[: node.outputs.index(value)])
        stop = start + _length(value, axis)
    else:
        numbers = [numbers_of(one) for one in node.inputs[1:]]
        if len(numbers) not in (3, 4) or any(len(one) != 1 for one in numbers) or numbers[3:] not in ([], [[1]]):
            return None
        axis = _from_last(numbers[2][0], rank)
        length = _length(whole, axis)
        start, stop = (min(max(end + length if end < 0 else end, 0), length) for (end,) in numbers[:2])
    return (whole, Part(axis, start, stop)) if -rank < axis < -1 and start < stop else None


def _from_last(axis: int, rank: int) -> int:
    """An axis that may be counted from the first or the last, counted from the last."""
    return axis - rank if axis >= 0 else axis


def _length(value: ir.Value | None, axis: int) -> int:
    """The length along an axis that is counted from the last; 0 if there is no such axis or its length is unknown."""
    if value is None or value.shape is None or len(value.shape) < -axis:
        return 0
    size = value.shape[axis]
    return size if isinstance(size, int) else 0


def _axis_of(node: ir.Node) -> int:
    """The axis of a Concat of values with known lengths, counted from the last; 0 for another node."""
    if node.op_type != "Concat":
        return 0
    axis = _from_last(node.attributes.get_int("axis", 0), len(node.outputs[0].shape or ()))
    return axis if all(_length(value, axis) for value in (*node.inputs, *node.outputs)) else 0


def _is_cut_with(value: ir.Value, node: ir.Node, axis: int) -> bool:
    """Whether a part of a node's output along an axis takes the same part of this input.

    It does not if the value is broadcast along the axis, or if it is the weights of a node that has some.
    """
    taken = node.op_type in ELEMENTWISE or value is node.inputs[0]
    return taken and 0 < _length(value, axis) == _length(node.outputs[0], axis)


def _is_tokenwise(node: ir.Node) -> bool:
    """Whether a node computes each vector along the last axis by itself: a normalization or a projection."""
    rank = len(node.outputs[0].shape or ())
    if node.op_type in NORMALIZATIONS:
        return node.attributes.get_int("axis", -1) in (-1, rank - 1)
    weight = node.inputs[1] if node.op_type == "MatMul" else None
    return weight is not None and weight.const_value is not None and len(weight.const_value.shape) == 2
