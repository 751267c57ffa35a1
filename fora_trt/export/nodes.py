"""Helpers of the graph passes that add nodes, constants and edges to a graph.

An edge is an input or an output of a graph. Its role is stored in its `meta`, which is not written to files.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import count

import numpy as np
import onnx_ir as ir

from fora_trt.contract import LATENTS, WINDOW, Role

_ROLE = "role"

LATE: tuple[Role, ...] = ("latents", "noise")
"""Roles of the inputs that are known only when their step begins."""

ELEMENTWISE = {
    *("Add", "Sub", "Mul", "Div", "Neg", "Cast", "Identity", "Sigmoid", "Tanh", "Exp", "Sqrt", "Reciprocal", "Relu"),
    *("Gelu", "Softplus", "Clip", "Abs", "Pow", "Max", "Min"),
}
"""Operators that compute each element of their output from one element of each input, which are broadcast."""


def constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """Add a constant, or return the one with this name and equal content; a name in use gets a number appended."""
    tensor, unique = ir.tensor(np.asarray(array, order="C"), name=name), name
    for k in count(1):
        there = graph.initializers.get(unique)
        if there is None:
            break
        if there.const_value is not None and _alike(there.const_value, tensor):
            return there
        unique = f"{name}.{k}"
    tensor.name = unique
    kind = ir.TensorType(tensor.dtype)
    value = ir.Value(name=unique, shape=ir.Shape(array.shape), type=kind, const_value=tensor)
    graph.register_initializer(value)
    return value


def int64_constant(graph: ir.Graph, name: str, values: Sequence[int]) -> ir.Value:
    """A constant int64 vector."""
    return constant(graph, name, np.array(values, dtype=np.int64))


def numbers_of(value: ir.Value | None) -> list[int]:
    """The numbers of a constant; none for another value."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return [] if tensor is None else [int(number) for number in tensor.numpy().flatten()]


def new_value(
    nodes: list[ir.Node], kind: str, inputs: Sequence[ir.Value], shape: ir.Shape | None, *attributes: ir.Attr
) -> ir.Value:
    """Append a new node to `nodes` and return its output, which has the dtype of the first input."""
    node = ir.Node("", kind, inputs, attributes, num_outputs=1)
    output = node.outputs[0]
    output.name, output.type, output.shape = f"{inputs[0].name}.{kind}", inputs[0].type, shape
    nodes.append(node)
    return output


def edge(name: str, like: ir.Value, role: Role, *, leading: str | None = None) -> ir.Value:
    """A new graph input with the dtype and shape of `like`; `leading` names an additional first dimension."""
    assert like.shape is not None
    shape = like.shape if leading is None else ir.Shape([leading, *like.shape])
    return with_role(ir.Value(name=name, shape=shape, type=like.type), role)


def with_role(value: ir.Value, role: Role) -> ir.Value:
    """Set the role of a graph input or output, and return the value."""
    value.meta[_ROLE] = role
    return value


def role_of(value: ir.Value) -> Role:
    """The role of a graph input or output."""
    role: Role = value.meta[_ROLE]
    return role


def late_inputs(graph: ir.Graph) -> set[str]:
    """Names of the inputs that are known only when their step begins: the latents, and noise that is drawn."""
    return {str(value.name) for value in graph.inputs if value.name == LATENTS or value.meta.get(_ROLE) in LATE}


def is_of_window(value: ir.Value) -> bool:
    """Whether a value has one entry per reuse step of a window: (window, batch, ...)."""
    return value.shape is not None and len(value.shape) > 0 and value.shape[0] == ir.SymbolicDim(WINDOW)


def is_read(value: ir.Value) -> bool:
    """Whether a node reads the value or the value is a graph output."""
    return bool(value.uses()) or value.is_graph_output()


def only_maker(value: ir.Value | None, kind: str) -> ir.Node | None:
    """The producer of a value, if it is of this kind and the value has exactly one reader and is no graph output."""
    node = None if value is None else value.producer()
    if value is None or node is None or node.op_type != kind or len(value.uses()) != 1 or value.is_graph_output():
        return None
    return node


def before_cast(value: ir.Value) -> ir.Value | None:
    """The input of the Cast that produces a value; None if no Cast produces it or the input's dtype is unknown."""
    cast = value.producer()
    source = cast.inputs[0] if cast is not None and cast.op_type == "Cast" else None
    return source if source is not None and source.dtype is not None else None


def is_widened(value: ir.Value) -> bool:
    """Whether a value is the output of a Cast to a wider dtype."""
    source = before_cast(value)
    if source is None or source.dtype is None or value.dtype is None:
        return False
    return source.dtype.itemsize < value.dtype.itemsize


def nodes_behind(values: Iterable[ir.Value]) -> set[ir.Node]:
    """All nodes on which the given values depend."""
    found: set[ir.Node] = set()
    todo = [*values]
    while todo:
        node = todo.pop().producer()
        if node is not None and node not in found:
            found.add(node)
            todo += [value for value in node.inputs if value is not None]
    return found


def _alike(one: ir.TensorProtocol, other: ir.TensorProtocol) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
