"""Graph transformation: the gated sum of the features moves from every reuse step into the full step before them.

A reuse step adds `gate * feature` for every cache site to the embedded latents. The sum over the sites does not depend
on the latents, so it can be taken first: `(h + u_1) + u_2` becomes `h + (u_1 + u_2)`, and what does not depend on the
latents is hoisted. It is appended to the full graph, where the features are, for all reuse steps of the window in one
pass over each feature: the gates get one more dimension in front, the steps of the window, and so does the sum.
"""

from __future__ import annotations

from itertools import zip_longest

import onnx_ir as ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass

from fora_trt.export.hoist import EarlyPart, drop_unread, early_part, edge, replace_reads
from fora_trt.models.spec import FEATURE, FOLDED, LATENTS, WINDOW, of_window

ELEMENTWISE = {
    *("Add", "Sub", "Mul", "Div", "Neg", "Cast", "Identity", "Sigmoid", "Tanh", "Exp", "Sqrt", "Reciprocal", "Relu"),
    *("Gelu", "Softplus", "Clip", "Abs", "Pow", "Max", "Min"),
}
"""Operators to which one more dimension in front makes no difference; the others may take part without it only."""


def fold(full: ir.Model, reuse: ir.Model, hoisted: str) -> bool:
    """Move all of `reuse` that does not depend on the latents to `full`; False where that is not possible.

    It is not where an operator other than elementwise ones reads what differs from step to step. Then nothing is
    moved, and sums in `reuse` are taken in another order.

    `full` puts out the features; inputs of `reuse` whose names begin with `hoisted` differ from step to step.
    """
    _reassociate(reuse.graph)
    drop_unread(reuse)  # the sums as they were
    part = early_part(reuse.graph, {LATENTS})
    differing = _differing(part, hoisted)
    if differing is None or not part.boundary:
        return False
    folded = _append(full.graph, part, differing)
    replace_reads(reuse, {value: edge(name, value) for name, value in folded.items()})
    _drop_features(full, {value.name for value in reuse.graph.inputs})
    return True


def _reassociate(graph: ir.Graph) -> None:
    """`(late + early) + early` becomes `late + (early + early)`, wherever nobody else reads the inner sum."""
    late = {value for value in graph.inputs if value.name == LATENTS}
    for node in tuple(graph):
        if not any(value in late for value in node.inputs):
            continue
        late.update(node.outputs)
        outer = _sum_of(node, late)
        inner = None if outer is None else _sum_of(outer[0].producer(), late)
        if outer is None or inner is None or len(outer[0].uses()) != 1 or outer[0].is_graph_output():
            continue
        (_, added), (begin, first) = outer, inner
        shape = _broadcast(first.shape, added.shape)
        if shape is None:
            continue
        both = ir.Node("", "Add", [first, added], num_outputs=1)
        both.outputs[0].type, both.outputs[0].shape = added.type, shape
        graph.insert_before(node, [both])
        for k, value in enumerate((begin, both.outputs[0])):
            node.replace_input_with(k, value)


def _sum_of(node: ir.Node | None, late: set[ir.Value]) -> tuple[ir.Value, ir.Value] | None:
    """The late and the early term of a sum of two; constants count as early."""
    if node is None or node.op_type != "Add":
        return None
    one, other = node.inputs
    assert one is not None and other is not None
    if (one in late) == (other in late):
        return None
    return (one, other) if one in late else (other, one)


def _broadcast(one: ir.Shape | None, other: ir.Shape | None) -> ir.Shape | None:
    """The shape of a sum; None where it is not known."""
    if one is None or other is None:
        return None
    sizes: list[int | ir.SymbolicDim] = []
    for a, b in zip_longest(reversed([*one]), reversed([*other]), fillvalue=1):
        if a != b and 1 not in (a, b):
            return None
        sizes.insert(0, b if a == 1 else a)
    return ir.Shape(sizes)


def _differing(part: EarlyPart, hoisted: str) -> set[ir.Value] | None:
    """Values that differ between the steps of a window; None if a node that reads some cannot take them all at once."""
    differing: set[ir.Value] = set()
    for node in part.nodes:
        for value in node.inputs:
            if value is None or value.producer() is not None or value.is_initializer():
                continue
            assert value.name is not None
            if value.name.startswith(hoisted):
                differing.add(value)
            elif not value.name.startswith(FEATURE):
                return None
        read = [value for value in node.inputs if value in differing]
        if not read:
            continue
        rank = min(_rank(value) for value in read if value is not None)
        others = [value for value in node.inputs if value is not None and value not in differing]
        if node.op_type not in ELEMENTWISE or any(_rank(value) > rank for value in others):
            return None
        differing.update(node.outputs)
    return differing


def _rank(value: ir.Value) -> int:
    return len(value.shape) if value.shape is not None else 1_000


def _append(full: ir.Graph, part: EarlyPart, differing: set[ir.Value]) -> dict[str, ir.Value]:
    """Copy the nodes into the full graph, each as early as it can run; return the boundary by the reuse graph's names.

    A feature is added up when it has just been computed, and need not be kept.
    """
    outputs = {value.name: value for value in full.outputs}
    copies: dict[ir.Value, ir.Value] = {}
    order = {node: k for k, node in enumerate(full)}
    behind: dict[ir.Node | None, list[ir.Node]] = {}
    anchors: dict[ir.Value, ir.Node | None] = {}

    def copy_of(value: ir.Value) -> ir.Value:
        if value in copies:
            return copies[value]
        assert value.name is not None
        if value.name in outputs:
            copies[value] = outputs[value.name]
        elif value.const_value is not None:
            copies[value] = _constant(full, value)
        else:
            copies[value] = edge(of_window(value.name), value, leading=WINDOW)
            full.inputs.append(copies[value])
        return copies[value]

    def anchor_of(value: ir.Value) -> ir.Node | None:
        return anchors.get(value, value.producer())

    for node in part.nodes:
        read = [None if value is None else copy_of(value) for value in node.inputs]
        copy = ir.Node("", node.op_type, read, list(node.attributes.values()), num_outputs=len(node.outputs))
        before = [one for value in read if value is not None and (one := anchor_of(value)) is not None]
        anchor = max(before, key=order.__getitem__, default=None)
        behind.setdefault(anchor, []).append(copy)
        for old, new in zip(node.outputs, copy.outputs, strict=True):
            new.name, new.type = f"fold.{old.name}", old.type
            new.shape = ir.Shape([WINDOW, *old.shape]) if old in differing and old.shape is not None else old.shape
            copies[old], anchors[new] = new, anchor
    first = full[0]
    for anchor, nodes in behind.items():
        if anchor is None:
            full.insert_before(first, nodes)
        else:
            full.insert_after(anchor, nodes)
    named: dict[str, ir.Value] = {}
    for k, value in enumerate(part.boundary):
        name = f"{FOLDED}{k}"
        named[name] = value
        copies[value].name = of_window(name) if value in differing else name
        full.outputs.append(copies[value])
    return named


def _constant(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """A constant of another graph in this one: the one of the same name if it is the same."""
    tensor, there = value.const_value, graph.initializers.get(str(value.name))
    assert tensor is not None
    if there is not None and there.const_value is not None and there.const_value.tobytes() == tensor.tobytes():
        return there
    copy = ir.Value(name=f"fold.{value.name}", shape=value.shape, type=value.type, const_value=tensor)
    graph.register_initializer(copy)
    return copy


def _drop_features(full: ir.Model, read: set[str | None]) -> None:
    kept = [value for value in full.graph.outputs if value.name in read or not str(value.name).startswith(FEATURE)]
    full.graph.outputs.clear()
    full.graph.outputs.extend(kept)
    CommonSubexpressionEliminationPass()(full)
    drop_unread(full)
