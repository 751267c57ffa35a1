"""Graph pass: compute only the tokens that are read, where streams of tokens are concatenated and sliced later.

Some networks concatenate text and image tokens, add to both, and keep the image tokens at the end. In a reuse graph,
where all that is added are gated features, the Slice moves to the Concat: `Slice(Concat(text, image) + gate * feature)`
becomes `image + gate * Slice(feature)`. Then there is one stream, whose sum can be folded, and the text is not read.

Rules, cited below: (1) A cut is a Slice with constant bounds and the step 1 along one axis of known length, which is
neither the first nor the last, or a Split along such an axis. (2) A cut of a Concat along its axis reads the
concatenated values. (3) A Concat of all parts of a value, in order, is this value. (4) A cut moves before nodes that
compute each token by itself if it reaches a Concat in this way. All that read such a node are cuts along this axis or
nodes that cuts move before, so nothing is computed twice. For a node that does not work element by element, such as a
projection, all of them read the same tokens, so it is not computed in parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult
from onnx_ir.passes.common import RemoveUnusedNodesPass

from fora_trt.export.nodes import ELEMENTWISE, constant, int64_constant, is_read

NORMALIZATIONS = ("LayerNormalization", "RMSNormalization")


@dataclass(frozen=True)
class Part:
    """The entries from `start` to `stop` along an axis, which is -1 for the last; all values have it from the last."""

    axis: int
    start: int
    stop: int

    def of_length(self, value: ir.Value | None) -> int:
        """The length of a value along the axis; 0 if it is unknown or the value does not have the axis."""
        if value is None or value.shape is None or len(value.shape) < -self.axis:
            return 0
        size = value.shape[self.axis]
        return size if isinstance(size, int) else 0


class ReadPartsPass(InPlacePass):
    """Moves cuts before the nodes that compute more than they read; the values that are read do not change."""

    def call(self, model: ir.Model) -> PassResult:
        remove = RemoveUnusedNodesPass()
        remove(model)  # rules 3 and 4 depend on who reads a value
        joined = [_read_whole(node) for node in tuple(model.graph) if node.op_type == "Concat"]
        remove(model)
        moved = _Cuts(model.graph).move()
        remove(model)
        return PassResult(model, modified=any(joined) or moved)


def _read_whole(concat: ir.Node) -> bool:
    """Replace a Concat by the value of which it concatenates all parts (rule 3); False if it is another one."""
    cuts = [_cut_of(value) for value in concat.inputs]
    first, whole = cuts[0], cuts[0] and cuts[0][0]
    if first is None or whole is None or any(cut is None or cut[0] is not whole for cut in cuts):
        return False
    parts = [cut[1] for cut in cuts if cut is not None]
    ends = [part.stop for part in parts]
    output, axis = concat.outputs[0], parts[0].axis
    in_order = [part.start for part in parts] == [0, *ends[:-1]] and ends[-1] == parts[0].of_length(whole)
    if not in_order or any(part.axis != axis for part in parts) or _axis_of(concat) != axis or output.is_graph_output():
        return False
    ir.convenience.replace_all_uses_with(output, whole)
    return True


class _Cuts:
    """The cuts of a graph, and the nodes that they can move before."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self._read: dict[ir.Node, set[Part]] = {}  # of nodes that cuts can move before: the parts that are read
        for node in reversed(graph):
            if parts := self._parts_read(node):
                self._read[node] = parts
        self._reaching: set[ir.Node] = set()  # rule 4
        for node, parts in reversed(self._read.items()):
            (axis,) = {part.axis for part in parts}
            if any(self._reaches(value, axis) for value in _cut_inputs(node)):
                self._reaching.add(node)
        self._moving: set[ir.Node] = set()  # with what is added to the streams of tokens
        for node in self._read:
            if node in self._reaching or {*node.outputs[0].consumers()} & self._moving:
                self._moving.add(node)
        self._moved: dict[tuple[ir.Value, Part], ir.Value] = {}

    def move(self) -> bool:
        """Replace what each cut outputs, if it reaches a Concat; return False if no cut does."""
        modified = False
        for node in tuple(self.graph):
            for output in node.outputs:
                cut = _cut_of(output)
                if (
                    cut is not None
                    and is_read(output)
                    and not output.is_graph_output()
                    and self._reaches(cut[0], cut[1].axis)
                ):
                    part = self._part(*cut, before=node)
                    ir.convenience.replace_all_uses_with(output, part)
                    modified = True
        return modified

    def _reaches(self, value: ir.Value, axis: int) -> bool:
        """Whether a cut of the value along the axis reaches a Concat."""
        node = value.producer()
        return node is not None and (node in self._reaching or _axis_of(node) == axis)

    def _parts_read(self, node: ir.Node) -> set[Part]:
        """The parts that are read of a node's output if cuts can move before it; otherwise none."""
        output, found = node.outputs[0], set[Part]()
        for reader, index in output.uses():
            parts = self._read.get(reader, set()) if output in _cut_inputs(reader) else set()
            parts = parts or {cut[1] for one in reader.outputs if index == 0 and is_read(one) and (cut := _cut_of(one))}
            end = reader.outputs[0] if reader in self._read else output
            if not parts or any(part.of_length(output) != part.of_length(end) for part in parts):
                return set()
            found |= parts
        tokenwise = node.op_type in ELEMENTWISE or (len(found) == 1 and _computes_tokens(node))
        alone = len(node.outputs) == 1 and not output.is_graph_output()
        return found if tokenwise and alone and len({part.axis for part in found}) == 1 else set()

    def _part(self, value: ir.Value, part: Part, before: ir.Node) -> ir.Value:
        """A part of a value; nodes that compute it are inserted before a node."""
        key = value, part
        if key not in self._moved:
            self._moved[key] = self._made(value, part, before)
        return self._moved[key]

    def _made(self, value: ir.Value, part: Part, before: ir.Node) -> ir.Value:
        axis, start, stop = part.axis, part.start, part.stop
        node, cut = value.producer(), _cut_of(value)
        if (start, stop) == (0, part.of_length(value)):
            return value
        if value.const_value is not None:
            entries = value.const_value.numpy().take(range(start, stop), axis)
            return constant(self.graph, f"{value.name}.part", entries)
        if cut is not None and cut[1].axis == axis:
            return self._part(cut[0], Part(axis, cut[1].start + start, cut[1].start + stop), before)
        if node is not None and _axis_of(node) == axis:
            return self._of_concat(node, part, before)
        if node is not None and node in self._moving:
            whole = [one for one in _cut_inputs(node) if part.of_length(one) == part.of_length(value)]
            read = [self._part(one, part, before) if one in whole else one for one in node.inputs]
            return self._new(node.op_type, read, value, stop - start, part, before, [*node.attributes.values()])
        bounds = [int64_constant(self.graph, f"part{number}", [number]) for number in (start, stop, axis)]
        return self._new("Slice", [value, *bounds], value, stop - start, part, before, [])

    def _of_concat(self, concat: ir.Node, part: Part, before: ir.Node) -> ir.Value:
        """A part of a concatenated value (rule 2)."""
        found, first = list[ir.Value](), 0
        for value in concat.inputs:
            assert value is not None
            length = part.of_length(value)
            start, stop = max(part.start - first, 0), min(part.stop - first, length)
            if start < stop:
                found.append(self._part(value, Part(part.axis, start, stop), before))
            first += length
        if len(found) == 1:
            return found[0]
        along = [ir.AttrInt64("axis", part.axis)]
        return self._new("Concat", found, concat.outputs[0], part.stop - part.start, part, before, along)

    def _new(
        self,
        kind: str,
        inputs: Sequence[ir.Value | None],
        like: ir.Value,
        length: int,
        part: Part,
        before: ir.Node,
        attributes: Sequence[ir.Attr],
    ) -> ir.Value:
        node = ir.Node("", kind, inputs, attributes, num_outputs=1)
        output = node.outputs[0]
        assert like.shape is not None
        sizes = [*like.shape]
        sizes[part.axis] = length
        output.name, output.type, output.shape = f"{like.name}.part", like.type, ir.Shape(sizes)
        self.graph.insert_before(before, node)
        return output


def _cut_of(value: ir.Value | None) -> tuple[ir.Value, Part] | None:
    """The value and the part of it that a cut outputs (rule 1); None if no cut outputs the value."""
    node = None if value is None else value.producer()
    whole = node.inputs[0] if node is not None and node.inputs else None
    if node is None or whole is None or whole.shape is None or node.op_type not in ("Slice", "Split"):
        return None
    rank = len(whole.shape)
    if node.op_type == "Split":
        axis = node.attributes.get_int("axis", 0)
        part = Part(axis - rank if axis >= 0 else axis, 0, 0)
        lengths = [part.of_length(one) for one in node.outputs]
        first = sum(lengths[: node.outputs.index(value)])
        part = Part(part.axis, first, first + part.of_length(value))
        known = all(lengths) and sum(lengths) == part.of_length(whole)
    else:
        bounds = [None if one is None else ir.convenience.get_const_tensor(one) for one in node.inputs[1:]]
        numbers = [one.numpy().tolist() if one is not None else [] for one in bounds]
        if len(numbers) not in (3, 4) or any(len(one) != 1 for one in numbers) or numbers[3:] not in ([], [[1]]):
            return None
        (start,), (stop,), (axis,) = numbers[:3]
        part = Part(axis - rank if axis >= 0 else axis, 0, 0)
        length = part.of_length(whole)
        start, stop = (min(max(one + length if one < 0 else one, 0), length) for one in (start, stop))
        part, known = Part(part.axis, start, stop), start < stop
    return (whole, part) if known and -rank < part.axis < -1 else None


def _axis_of(node: ir.Node) -> int:
    """The axis of a Concat, counted from the last; 0 for another node or an unknown rank."""
    shape = node.outputs[0].shape
    if node.op_type != "Concat" or shape is None:
        return 0
    axis = node.attributes.get_int("axis", 0)
    return axis - len(shape) if axis >= 0 else axis


def _cut_inputs(node: ir.Node) -> list[ir.Value]:
    """The inputs from which a node takes the tokens that it outputs: all of them, or of weighted nodes the first."""
    values = [value for value in node.inputs if value is not None]
    return values if node.op_type in ELEMENTWISE else values[:1]


def _computes_tokens(node: ir.Node) -> bool:
    """Whether a node computes each vector along the last axis by itself: a normalization or a projection."""
    rank = len(node.outputs[0].shape or ())
    if node.op_type in NORMALIZATIONS:
        return node.attributes.get_int("axis", -1) in (-1, rank - 1)
    weight = node.inputs[1] if node.op_type == "MatMul" else None
    return weight is not None and weight.const_value is not None and len(weight.const_value.shape) == 2
