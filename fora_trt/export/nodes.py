"""What graph passes add to a graph: nodes, and constants (axes, lengths, sizes, weights that are laid out anew)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import count

import numpy as np
import onnx_ir as ir


def constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """A constant of this name in the graph, one for equal arrays; others that ask for the name get a number behind."""
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
    """A vector of whole numbers."""
    return constant(graph, name, np.array(values, dtype=np.int64))


def new_value(
    nodes: list[ir.Node], kind: str, inputs: Sequence[ir.Value], shape: ir.Shape | None, *attributes: ir.Attr
) -> ir.Value:
    """The output of a new node, which is appended to `nodes`; it has the dtype of the first input."""
    node = ir.Node("", kind, inputs, attributes, num_outputs=1)
    output = node.outputs[0]
    output.name, output.type, output.shape = f"{inputs[0].name}.{kind}", inputs[0].type, shape
    nodes.append(node)
    return output


def is_read(value: ir.Value) -> bool:
    """Whether a node reads a value, or it is an output of its graph."""
    return bool(value.uses()) or value.is_graph_output()


def only_maker(value: ir.Value | None, kind: str) -> ir.Node | None:
    """The node of this kind that makes a value, if the value has one reader and is no output of the graph."""
    node = None if value is None else value.producer()
    if value is None or node is None or node.op_type != kind or len(value.uses()) != 1 or value.is_graph_output():
        return None
    return node


def before_cast(value: ir.Value) -> ir.Value | None:
    """What a Cast made a value of; None if the value is no output of a Cast, or the dtype before it is unknown."""
    cast = value.producer()
    source = cast.inputs[0] if cast is not None and cast.op_type == "Cast" else None
    return source if source is not None and source.dtype is not None else None


def nodes_behind(values: Iterable[ir.Value]) -> set[ir.Node]:
    """All nodes that some values are computed by."""
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
