"""Graph transformation: move the gated sum of the features from the reuse graph into the full graph.

A reuse step adds `gate * feature` of every cache site to the embedded latents. The sum over the sites does not depend
on the latents and can be computed first: `(h + u_1) + u_2` becomes `h + (u_1 + u_2)`. The nodes that compute
`u_1 + u_2` move to the full graph, which computes the features. There they compute the sums of all reuse steps of the
window and read each feature once: gates and sums get a leading dimension, the reuse steps of the window.

Terms that are independent of the features, such as the position embedding, stay in the reuse graph. So a sum is linear
in the features, and a forecast can add up sums. Folded values that are not linear get the role `function` instead.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import zip_longest

import onnx_ir as ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass

from fora_trt.contract import FOLDED, WINDOW, Role, of_window
from fora_trt.export.hoist import EarlyPart, drop_unread, early_part, replace_reads
from fora_trt.export.linear import featured_values, linear_values
from fora_trt.export.nodes import (
    ELEMENTWISE,
    constant,
    edge,
    int64_constant,
    is_of_window,
    is_widened,
    late_inputs,
    new_value,
    role_of,
    with_role,
)

GROUP = 8
"""Largest number of `gate * feature` terms that are stacked, multiplied by one Mul and added by one ReduceSum."""

ALONG_AN_AXIS = {"Concat", "Unsqueeze", "ReduceSum"}
"""Operators that accept an additional leading dimension if their axes are negative (counted from the last). Elementwise
operators do so too; others may not read a value that differs between steps."""


def fold(full: ir.Model, reuse: ir.Model, kept: Collection[str] = ()) -> bool:
    """Move all nodes of `reuse` that do not depend on the latents to `full`; return False if that is not possible.

    `full` outputs the features that `reuse` reads; afterwards those that it still reads, and those named in `kept`. The
    hoisted inputs of `reuse` differ between steps. Nodes that do not depend on a feature stay. Folding is impossible if
    an operator that does not accept an additional leading dimension reads a value that differs between steps. Then no
    node moves; only the order of the sums in `reuse` changes.
    """
    gather_sums(reuse)
    featured = featured_values(reuse.graph)
    part = _of_features(early_part(reuse.graph, late_inputs(reuse.graph)), featured)
    differing = _differing(part)
    if differing is None or not part.boundary:
        return False
    linear = linear_values(reuse.graph, part.nodes, featured)
    roles: dict[ir.Value, Role] = {value: "sum" if value in linear else "function" for value in part.boundary}
    folded = _append(full.graph, part, differing, roles)
    replace_reads(reuse, {value: edge(name, value, roles[value]) for name, value in folded.items()})
    _drop_features(full, {*kept, *(value.name for value in reuse.graph.inputs)})
    return True


def gather_sums(model: ir.Model) -> None:
    """Bring together the sums of adjacent cached sites of a reuse or partial graph, and compute them in groups."""
    _reassociate(model.graph)
    drop_unread(model)  # the replaced sums
    _group(model.graph)
    drop_unread(model)


def _of_features(part: EarlyPart, featured: set[ir.Value]) -> EarlyPart:
    """The part of an early part that computes the boundary values which depend on features."""
    boundary = tuple(value for value in part.boundary if value in featured)
    needed: set[ir.Node | None] = {value.producer() for value in boundary}
    for node in reversed(part.nodes):
        if node in needed:
            needed.update(value.producer() for value in node.inputs if value is not None)
    return EarlyPart(tuple(node for node in part.nodes if node in needed), boundary)


def _reassociate(graph: ir.Graph) -> None:
    """Turn `(late + early) + early` into `late + (early + early)` if the inner sum has no other reader.

    A late value depends on the latents, an early value does not. Only early values that depend on features are brought
    together; others are added to the late value before them.
    """
    names = late_inputs(graph)
    late = {value for value in graph.inputs if value.name in names}
    featured = featured_values(graph)
    for node in tuple(graph):
        if not any(value in late for value in node.inputs):
            continue
        late.update(node.outputs)
        outer = _sum_of(node, late)
        inner = None if outer is None else _sum_of(outer[0].producer(), late)
        if outer is None or inner is None or len(outer[0].uses()) != 1 or outer[0].is_graph_output():
            continue
        (_, added), (begin, first) = outer, inner
        joins = added in featured
        one, other = (first, added) if joins else (begin, added)
        shape = _broadcast(one.shape, other.shape)
        if first not in featured or shape is None:
            continue
        both = ir.Node("", "Add", [one, other], num_outputs=1)
        total = both.outputs[0]
        total.type, total.shape = added.type, shape
        graph.insert_before(node, [both])
        (featured if joins else late).add(total)
        for k, value in enumerate((begin, total) if joins else (total, first)):
            node.replace_input_with(k, value)


def _sum_of(node: ir.Node | None, late: set[ir.Value]) -> tuple[ir.Value, ir.Value] | None:
    """The late and the early operand of an Add; constants are early. None for other nodes and two alike operands."""
    if node is None or node.op_type != "Add":
        return None
    one, other = node.inputs
    assert one is not None and other is not None
    if (one in late) == (other in late):
        return None
    return (one, other) if one in late else (other, one)


def _broadcast(one: ir.Shape | None, other: ir.Shape | None) -> ir.Shape | None:
    """The broadcast shape of two operands; None if it is unknown."""
    if one is None or other is None:
        return None
    sizes: list[int | ir.SymbolicDim] = []
    for a, b in zip_longest(reversed([*one]), reversed([*other]), fillvalue=1):
        if a != b and 1 not in (a, b):
            return None
        sizes.insert(0, b if a == 1 else a)
    return ir.Shape(sizes)


def _group(graph: ir.Graph) -> None:
    """Compute sums of `gate * feature` in groups: stack gates and features, multiply once, reduce over the group.

    A chain of Mul and Add nodes would read and write the accumulated sum of the whole window once per feature. Features
    that are cast to a wider dtype stay in a chain, because stacking would store them in the wider dtype. Compilers fuse
    the chain into one kernel that reads the narrow dtype.
    """
    part = early_part(graph, late_inputs(graph))
    differing = _differing(part) or set()
    for total in part.boundary:
        root = total.producer()
        assert root is not None
        terms = _terms(total, {*part.nodes})
        weighted: dict[object, list[tuple[ir.Value, ir.Value]]] = {}
        others = []
        for term in terms:
            factors = _gate_and_feature(term, differing)
            if factors is None:
                others.append(term)
            else:
                alike = tuple((factor.dtype, tuple(factor.shape or ())) for factor in factors)
                weighted.setdefault(alike, []).append(factors)
        groups = [pairs[k : k + GROUP] for pairs in weighted.values() for k in range(0, len(pairs), GROUP)]
        if sum(map(len, groups)) < 2:
            continue
        nodes: list[ir.Node] = []
        sums = [_weighted_sum(graph, nodes, pairs) for pairs in groups]
        others.sort(key=differing.__contains__)  # terms that are equal in all steps come first
        result = (others + sums)[0]
        for value in (others + sums)[1:]:
            result = new_value(nodes, "Add", [result, value], _broadcast(result.shape, value.shape))
        graph.insert_after(root, nodes)
        ir.convenience.replace_all_uses_with(total, result)


def _terms(value: ir.Value, within: set[ir.Node]) -> list[ir.Value]:
    """The terms of a chain of Add nodes, in order."""
    terms: list[ir.Value] = []
    while True:
        node = value.producer()
        first = not terms
        if node is None or node not in within or node.op_type != "Add" or (len(value.uses()) > 1 and not first):
            return [value, *terms]
        one, other = node.inputs
        assert one is not None and other is not None
        value, term = (other, one) if _is_sum(other) and not _is_sum(one) else (one, other)
        terms.insert(0, term)


def _is_sum(value: ir.Value) -> bool:
    node = value.producer()
    return node is not None and node.op_type == "Add"


def _gate_and_feature(term: ir.Value, differing: set[ir.Value]) -> tuple[ir.Value, ir.Value] | None:
    """The factors of a Mul: a gate, which differs between steps, and a feature, which does not.

    None for other terms, for factors of different rank or dtype, and for a feature that is cast to a wider dtype.
    """
    node = term.producer()
    if node is None or node.op_type != "Mul":
        return None
    one, other = node.inputs
    assert one is not None and other is not None
    if (one in differing) == (other in differing) or _rank(one) != _rank(other) or one.dtype != other.dtype:
        return None
    gate, feature = (one, other) if one in differing else (other, one)
    return None if is_widened(feature) else (gate, feature)


def _weighted_sum(graph: ir.Graph, nodes: list[ir.Node], pairs: list[tuple[ir.Value, ir.Value]]) -> ir.Value:
    """The sum of gate * feature over pairs of equal shapes; its nodes are appended to `nodes`."""
    rank = _rank(pairs[0][0])
    axes = int64_constant(graph, f"axis{-rank}", [-rank])
    sides: list[ir.Value] = []
    for side in ([gate for gate, _ in pairs], [feature for _, feature in pairs]):
        assert side[0].shape is not None
        first, *others = side[0].shape
        lifted = [new_value(nodes, "Unsqueeze", [one, axes], ir.Shape([first, 1, *others])) for one in side]
        shape = ir.Shape([first, len(pairs), *others])
        sides.append(new_value(nodes, "Concat", lifted, shape, ir.AttrInt64("axis", -rank)))
    product = new_value(nodes, "Mul", sides, _broadcast(sides[0].shape, sides[1].shape))
    assert product.shape is not None
    first, _, *others = product.shape
    return new_value(nodes, "ReduceSum", [product, axes], ir.Shape([first, *others]), ir.AttrInt64("keepdims", 0))


def _differing(part: EarlyPart) -> set[ir.Value] | None:
    """The values that differ between the steps of a window, which all depend on a hoisted input.

    None if a node that reads such a value does not accept an additional leading dimension for the steps.
    """
    differing: set[ir.Value] = set()
    for node in part.nodes:
        for value in node.inputs:
            if value is None or value.producer() is not None or value.is_initializer():
                continue
            if role_of(value) == "hoisted":
                differing.add(value)
            elif role_of(value) != "feature":
                return None
        read = [value for value in node.inputs if value in differing]
        if not read:
            continue
        rank = min(_rank(value) for value in read if value is not None)
        others = [value for value in node.inputs if value is not None and value not in differing]
        if not _takes_window(node) or any(_rank(value) > rank for value in others):
            return None
        differing.update(node.outputs)
    return differing


def _takes_window(node: ir.Node) -> bool:
    """Whether a node accepts an additional leading dimension of its inputs and passes it on to its outputs."""
    if node.op_type not in ALONG_AN_AXIS:
        return node.op_type in ELEMENTWISE
    if node.op_type == "Concat":
        return node.attributes.get_int("axis", 0) < 0
    axes = node.inputs[1] if len(node.inputs) > 1 else None
    tensor = None if axes is None else ir.convenience.get_const_tensor(axes)
    return tensor is not None and bool((tensor.numpy() < 0).all())


def _rank(value: ir.Value) -> int:
    return len(value.shape) if value.shape is not None else 1_000


def _append(
    full: ir.Graph, part: EarlyPart, differing: set[ir.Value], roles: Mapping[ir.Value, Role]
) -> dict[str, ir.Value]:
    """Copy the nodes of `part` into the full graph; return its boundary values by the names of the new reuse inputs.

    Each node is inserted as early as its inputs allow. Each feature is thus added to the sums right after it is
    computed, and its memory can be freed.
    """
    features = {value.name: value for value in full.outputs if role_of(value) == "feature"}
    copies: dict[ir.Value, ir.Value] = {}
    order = {node: k for k, node in enumerate(full)}
    inserted: dict[ir.Node | None, list[ir.Node]] = {}  # by the node after which they are inserted
    anchors: dict[ir.Value, ir.Node | None] = {}

    def copy_of(value: ir.Value) -> ir.Value:
        if value in copies:
            return copies[value]
        assert value.name is not None
        if value.name in features:
            copies[value] = features[value.name]
        elif value.const_value is not None:
            copies[value] = constant(full, value.name, value.const_value.numpy())
        else:
            copies[value] = edge(of_window(value.name), value, role_of(value), leading=WINDOW)
            full.inputs.append(copies[value])
        return copies[value]

    def anchor_of(value: ir.Value) -> ir.Node | None:
        return anchors.get(value, value.producer())

    for node in part.nodes:
        read = [None if value is None else copy_of(value) for value in node.inputs]
        copy = ir.Node("", node.op_type, read, list(node.attributes.values()), num_outputs=len(node.outputs))
        before = [one for value in read if value is not None and (one := anchor_of(value)) is not None]
        anchor = max(before, key=order.__getitem__, default=None)
        inserted.setdefault(anchor, []).append(copy)
        for old, new in zip(node.outputs, copy.outputs, strict=True):
            new.name, new.type = f"fold.{old.name}", old.type
            new.shape = ir.Shape([WINDOW, *old.shape]) if old in differing and old.shape is not None else old.shape
            copies[old], anchors[new] = new, anchor
    first = full[0]
    for anchor, nodes in inserted.items():
        if anchor is None:
            full.insert_before(first, nodes)
        else:
            full.insert_after(anchor, nodes)
    named: dict[str, ir.Value] = {}
    for k, value in enumerate(part.boundary):
        name = f"{FOLDED}{k}"
        named[name] = value
        copies[value].name = of_window(name) if value in differing else name
        full.outputs.append(with_role(copies[value], roles[value]))
    return named


def _drop_features(full: ir.Model, read: set[str | None]) -> None:
    kept = [value for value in full.graph.outputs if value.name in read or role_of(value) != "feature"]
    roles = [*map(role_of, kept)]
    full.graph.outputs.clear()
    full.graph.outputs.extend(kept)
    CommonSubexpressionEliminationPass()(full)  # may replace output values, which then lose their roles
    for value, role in zip(full.graph.outputs, roles, strict=True):
        with_role(value, role)
    _widen_apart(full.graph)
    drop_unread(full)


def _widen_apart(graph: ir.Graph) -> None:
    """Duplicate each widening Cast that both the full step and the folded sums read.

    An engine can then keep the narrow feature in memory until the sums read it, instead of the wide one.
    """
    for cast in tuple(graph):
        wide = cast.outputs[0]
        readers = {node: is_of_window(node.outputs[0]) for node in wide.consumers()}
        if cast.op_type != "Cast" or not is_widened(wide) or len({*readers.values()}) < 2:
            continue
        again = ir.Node("", "Cast", cast.inputs, list(cast.attributes.values()), num_outputs=1)
        copy = again.outputs[0]
        copy.name, copy.type, copy.shape = f"{wide.name}.{WINDOW}", wide.type, wide.shape
        graph.insert_after(cast, [again])
        for node, index in wide.uses():
            if readers[node]:
                node.replace_input_with(index, copy)
