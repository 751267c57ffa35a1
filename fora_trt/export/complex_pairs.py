"""Rewrite the complex arithmetic of a traced program, such as rotary embeddings, into real arithmetic on pairs.

ONNX Runtime and TensorRT have no complex numbers. Each complex tensor becomes two real ones, its real and its imaginary
part. Operators that only move elements are applied to both parts; operators of `_ARITHMETIC` have formulas.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch.fx.node import map_aggregate

from fora_trt.errors import ExportError

Pair: TypeAlias = tuple[Any, Any]

_REAL = {torch.complex32: torch.float16, torch.complex64: torch.float32, torch.complex128: torch.float64}

_ALIKE = (
    "_to_copy", "_unsafe_view", "alias", "cat", "chunk", "clone", "concat", "contiguous", "copy", "copy_",
    "detach", "detach_", "empty", "empty_like", "expand", "expand_as", "flatten", "gather", "getitem", "index",
    "index_put", "index_put_", "index_select", "lift_fresh", "lift_fresh_copy", "mean", "movedim", "narrow",
    "neg", "new_empty", "new_zeros", "permute", "repeat", "repeat_interleave", "reshape", "resolve_conj", "roll",
    "select", "select_scatter", "slice", "slice_scatter", "split", "split_with_sizes", "squeeze", "stack", "sum",
    "t", "to", "transpose", "unbind", "unflatten", "unsqueeze", "view", "where", "zeros", "zeros_like",
)  # fmt: skip
"""Operators that act on both parts alike."""

_SIZES = ("sym_size", "sym_numel", "sym_stride")
"""Operators that read the shape of a tensor."""

aten = torch.ops.aten


def rewrite_complex(program: torch.export.ExportedProgram, named: str) -> None:
    """Replace complex arithmetic in a program in place; `named` names the model in messages.

    Raises `ExportError` for an operator that has no real form here.
    """
    graph = program.graph_module.graph
    nodes = tuple(graph.nodes)
    if not any(map(_is_complex, nodes)):
        return
    rewriter = _Rewriter(graph, named, detect_fake_mode([node.meta.get("val") for node in nodes]))
    for node in nodes:
        rewriter.visit(node)
    for node in reversed(nodes):
        if node in rewriter.replaced and not node.users:
            graph.erase_node(node)
    program.graph_module.recompile()


def _is_complex(node: fx.Node) -> bool:
    value = node.meta.get("val")
    values = value if isinstance(value, tuple | list) else [value]
    return any(isinstance(one, Tensor) and one.is_complex() for one in values)


class _Rewriter:
    """Inserts real nodes before the complex nodes of a graph."""

    def __init__(self, graph: fx.Graph, named: str, mode: Any) -> None:
        self._graph, self._named, self._mode = graph, named, mode
        self._pairs: dict[fx.Node, Pair] = {}
        self._at: fx.Node | None = None
        self.replaced: set[fx.Node] = set()

    def visit(self, node: fx.Node) -> None:
        """Replace a node if it is complex or reads a complex node."""
        if node.op == "output" or not (_is_complex(node) or any(map(self._is_pair, node.all_input_nodes))):
            return
        self._at = node
        if node.op == "call_function":
            with self._graph.inserting_before(node):
                made = self._made(node)
            self.replaced.add(node)
        else:  # a constant: the exporter stores it as a real tensor with one more dimension
            with self._graph.inserting_before(next(one for one in _after(node) if one.op == "call_function")):
                both = self.add(aten.view_as_real.default, node)
                made = self.add(aten.select.int, both, -1, 0), self.add(aten.select.int, both, -1, 1)
        if _is_complex(node):
            self._pairs[node] = made
        elif made is not None:
            node.replace_all_uses_with(made[0] if isinstance(made, tuple) else made)

    def add(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new node, with the value that the operator has for the values of its arguments."""
        node = self._graph.call_function(target, args, kwargs)
        assert self._at is not None
        given, named = map_aggregate((args, kwargs), lambda one: one.meta["val"] if isinstance(one, fx.Node) else one)
        with self._mode:
            value = target(*given, **named)
        node.meta = {**self._at.meta, "val": value}
        return node

    def pair(self, value: Any) -> Pair:
        """The parts of an operand; None as the imaginary part of a real one."""
        if isinstance(value, complex):
            return value.real, value.imag
        return self._pairs[value] if self._is_pair(value) else (value, None)

    def _is_pair(self, value: Any) -> bool:
        return isinstance(value, fx.Node) and value in self._pairs

    def _made(self, node: fx.Node) -> Any:
        """The pair of a node, its replacement if it is real, or None if nothing replaces it."""
        name = _name_of(node)
        if name == "_assert_tensor_metadata":
            return None
        if name in _ARITHMETIC:
            return _ARITHMETIC[name](self, *node.args)
        if name in _SIZES:
            return self.add(node.target, self.pair(node.args[0])[0], *node.args[1:])
        if name in _ALIKE:
            return self._part_of(node, 0), self._part_of(node, 1)
        raise ExportError(
            f"{self._named} computes {name} of complex numbers, which ONNX does not have; write it with real numbers"
        )

    def _part_of(self, node: fx.Node, part: int) -> fx.Node:
        args, kwargs = map_aggregate((node.args, node.kwargs), lambda one: self._operand(one, part))
        return self.add(node.target, *args, **kwargs)

    def _operand(self, value: Any, part: int) -> Any:
        """An operand of one part: real numbers have no imaginary part; indices, masks and sizes stay."""
        if self._is_pair(value):
            return self._pairs[value][part]
        if isinstance(value, torch.dtype):
            return _REAL.get(value, value)
        real = value.meta.get("val") if isinstance(value, fx.Node) else None
        if part == 1 and isinstance(real, Tensor) and real.is_floating_point():
            return self.add(aten.zeros_like.default, value)
        return value


def _after(node: fx.Node) -> Any:
    while node.op != "root":
        node = node.next
        yield node


def _name_of(node: fx.Node) -> str:
    if node.target is operator.getitem:
        return "getitem"
    schema = getattr(node.target, "_schema", None)
    return str(schema.name).rpartition("::")[2] if schema is not None else str(node.target)


def _real(to: _Rewriter, op: Any, one: Any, other: Any) -> Any:
    """A real sum, difference, product or quotient of tensors and numbers."""
    if isinstance(one, fx.Node):
        return to.add(op.Tensor if isinstance(other, fx.Node) else op.Scalar, one, other)
    if not isinstance(other, fx.Node):
        return {aten.add: operator.add, aten.sub: operator.sub, aten.mul: operator.mul}[op](one, other)
    if op is aten.sub:
        op, other = aten.add, to.add(aten.neg.default, other)
    return to.add(op.Scalar, other, one)


def _sum(to: _Rewriter, one: Any, other: Any) -> Pair:
    (a, b), (c, d) = to.pair(one), to.pair(other)
    return _real(to, aten.add, a, c), d if b is None else b if d is None else _real(to, aten.add, b, d)


def _difference(to: _Rewriter, one: Any, other: Any) -> Pair:
    (a, b), (c, d) = to.pair(one), to.pair(other)
    return _real(to, aten.sub, a, c), b if d is None else _real(to, aten.sub, 0.0 if b is None else b, d)


def _product(to: _Rewriter, one: Any, other: Any) -> Pair:
    (a, b), (c, d) = to.pair(one), to.pair(other)
    if b is None or d is None:
        real, imaginary, factor = (c, d, a) if b is None else (a, b, c)
        return _real(to, aten.mul, real, factor), _real(to, aten.mul, imaginary, factor)
    ac, bd, ad, bc = (_real(to, aten.mul, *both) for both in ((a, c), (b, d), (a, d), (b, c)))
    return _real(to, aten.sub, ac, bd), _real(to, aten.add, ad, bc)


def _quotient(to: _Rewriter, one: Any, other: Any) -> Pair:
    (a, b), (c, d) = to.pair(one), to.pair(other)
    if d is not None or b is None:
        raise ExportError("the model divides by complex numbers, which ONNX does not have; write it with real numbers")
    return _real(to, aten.div, a, c), _real(to, aten.div, b, c)


def _polar(to: _Rewriter, length: Any, angle: Any) -> Pair:
    cos, sin = to.add(aten.cos.default, angle), to.add(aten.sin.default, angle)
    return to.add(aten.mul.Tensor, length, cos), to.add(aten.mul.Tensor, length, sin)


def _exponential(to: _Rewriter, value: Any) -> Pair:
    real, imaginary = to.pair(value)
    return _polar(to, to.add(aten.exp.default, real), imaginary)


def _length(to: _Rewriter, value: Any) -> fx.Node:
    real, imaginary = to.pair(value)
    squares = [to.add(aten.mul.Tensor, one, one) for one in (real, imaginary)]
    return to.add(aten.sqrt.default, to.add(aten.add.Tensor, *squares))


def _conjugate(to: _Rewriter, value: Any) -> Pair:
    real, imaginary = to.pair(value)
    return real, to.add(aten.neg.default, imaginary)


def _parts_of(to: _Rewriter, value: Any) -> Pair:
    return to.add(aten.select.int, value, -1, 0), to.add(aten.select.int, value, -1, 1)


def _complex_from_real(to: _Rewriter, value: Any) -> fx.Node:
    return to.add(aten.stack.default, [*to.pair(value)], -1)


_ARITHMETIC: dict[str, Callable[..., Any]] = {
    "view_as_complex": _parts_of,
    "view_as_real": _complex_from_real,
    "complex": lambda to, real, imaginary: (real, imaginary),
    "polar": _polar,
    "real": lambda to, value: to.pair(value)[0],
    "imag": lambda to, value: to.pair(value)[1],
    "conj": _conjugate,
    "_conj": _conjugate,
    "conj_physical": _conjugate,
    "mul": _product,
    "div": _quotient,
    "add": _sum,
    "sub": _difference,
    "rsub": lambda to, one, other: _difference(to, other, one),
    "exp": _exponential,
    "abs": _length,
}
