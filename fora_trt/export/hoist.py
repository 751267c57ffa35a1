"""Graph transformation: move nodes that do not depend on the late inputs (such as the latents) to a separate graph.

`early_part` finds these nodes in a graph. `GraphWriter` merges the early parts of several graphs into one and computes
equal values once. `replace_reads` turns the moved values into inputs of the remaining graph. This module depends on
no architecture.

A node is early by these rules, cited below: (1) it reads at least one early value, and otherwise only constants and
values that depend only on the batch size. (2) Each of its outputs has one or several rows per sample and known other
sizes. (3) It has no subgraph, and none of its outputs is a graph output. (4) A last early node stays in the remaining
graph if it only widens or expands its input, so that the smaller tensor passes between the graphs, or if its output
does not have exactly one row per sample. (5) Nodes that depend only on the batch size, such as those that expand a
guidance scale to the batch and embed it, are copied where an early node reads them; their outputs do not pass between
graphs.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from fora_trt.contract import BATCH
from fora_trt.export.nodes import is_read

WIDENING = ("Cast", "Expand")


@dataclass(frozen=True)
class EarlyPart:
    """The early nodes of a graph in order, and the boundary: the values of them that the remaining nodes read."""

    nodes: tuple[ir.Node, ...]
    boundary: tuple[ir.Value, ...]


def early_part(graph: ir.Graph, late: Collection[str]) -> EarlyPart:
    """The part of `graph` that does not depend on the inputs named in `late`."""
    early = {value for value in graph.inputs if value.name not in late}
    of_batch: set[ir.Value] = set()  # values that depend only on the batch size
    nodes: list[ir.Node] = []
    for node in graph:
        read = [value for value in node.inputs if value is not None and not value.is_initializer()]
        if (_reads_batch(node) and read[0].name not in late) or (
            read and of_batch.issuperset(read) and _is_plain(node)
        ):
            of_batch.update(node.outputs)
        elif read and all(value in early or value in of_batch for value in read) and _has_rows(node):
            early.update(node.outputs)
        else:
            continue
        nodes.append(node)
    taken = {node for node in nodes if node.outputs[0] in early}
    for node in reversed(nodes):
        if node not in taken:  # rule 5
            if _readers(node) & taken:
                taken.add(node)
            continue
        widens = node.op_type in WIDENING and _bytes(node.outputs[0]) > _bytes(node.inputs[0])  # rule 4
        ends = [output for output in node.outputs if {*output.consumers()} - taken]
        if (widens and not _readers(node) & taken) or any(_rows(output) != 1 for output in ends):
            taken.remove(node)
    kept = tuple(node for node in nodes if node in taken)
    ends = [one for node in kept for one in node.outputs if one in early and {*one.consumers()} - taken]
    return EarlyPart(kept, tuple(ends))


def batch_from(graph: ir.Graph, names: Collection[str]) -> None:
    """Take the batch size from the first of these inputs that the graph has; without one, nothing changes."""
    source = next((value for value in graph.inputs if value.name in names), None)
    for node in graph:
        if source is not None and _reads_batch(node):
            node.replace_input_with(0, source)


def _reads_batch(node: ir.Node) -> bool:
    """Whether a node outputs the batch size of a graph input, as a vector of one number."""
    value = node.inputs[0] if node.op_type == "Shape" else None
    if value is None or not value.is_graph_input() or _rows(value) != 1:
        return False
    return (node.attributes.get_int("start", 0), node.attributes.get_int("end", 0)) == (0, 1)


def _is_plain(node: ir.Node) -> bool:
    """Whether a node satisfies rule 3."""
    inside = any(one.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for one in node.attributes.values())
    return not inside and not any(one.is_graph_output() for one in node.outputs)


def _has_rows(node: ir.Node) -> bool:
    """Whether a node satisfies rules 2 and 3."""
    return _is_plain(node) and all(map(_rows, node.outputs))


def _rows(value: ir.Value) -> int:
    """Number of rows of a value per sample; 0 if its first dimension is not a multiple of the batch or is unknown."""
    if value.shape is None or value.dtype is None or len(value.shape) == 0:
        return 0
    first, *others = value.shape
    multiple = re.fullmatch(rf"(?:(\d+)\*)?{BATCH}", str(first.value) if isinstance(first, ir.SymbolicDim) else "")
    return int(multiple[1] or 1) if multiple and all(isinstance(one, int) for one in others) else 0


def _readers(node: ir.Node) -> set[ir.Node]:
    return {reader for output in node.outputs for reader in output.consumers()}


def _bytes(value: ir.Value | None) -> float:
    """Bytes of one sample of a value; infinite if unknown."""
    if value is None or value.shape is None or value.dtype is None:
        return math.inf
    return math.prod(size for size in value.shape if isinstance(size, int)) * float(value.dtype.itemsize)


class Numbering:
    """Value numbering: values get the same number if the same operators compute them from equal inputs and constants.

    Inputs are compared by name and constants by content, so values of different graphs can be compared.
    """

    def __init__(self) -> None:
        self._numbers: dict[object, int] = {}
        self._known: dict[ir.Value, int] = {}

    def of(self, value: ir.Value) -> int:
        """The number of a value. Nodes must be visited in topological order."""
        if value not in self._known:
            self._known[value] = self._numbers.setdefault(self._description(value), len(self._numbers))
        return self._known[value]

    def _description(self, value: ir.Value) -> object:
        if value.const_value is not None:
            tensor = value.const_value
            return tensor.dtype, tuple(tensor.shape), hashlib.sha256(tensor.tobytes()).digest()
        node = value.producer()
        if node is None:
            return value.name
        read = tuple(None if one is None else self.of(one) for one in node.inputs)
        attributes = tuple(sorted((name, str(attribute.value)) for name, attribute in node.attributes.items()))
        return node.domain, node.op_type, attributes, read, value.index()


class GraphWriter:
    """Copies nodes of several graphs into a new one and computes equal values only once."""

    def __init__(self, numbering: Numbering) -> None:
        self._numbering = numbering
        self._values: dict[int, ir.Value] = {}
        self._names: set[str] = set()
        self._inputs: list[ir.Value] = []
        self._constants: list[ir.Value] = []
        self.nodes: list[ir.Node] = []

    def add(self, nodes: Iterable[ir.Node]) -> None:
        """Copy nodes, given in topological order."""
        for node in nodes:
            read = [None if value is None else self.value(value) for value in node.inputs]
            numbers = [self._numbering.of(output) for output in node.outputs]
            if numbers[0] in self._values:
                continue
            outputs = [self._copy_of(output) for output in node.outputs]
            self._values.update(zip(numbers, outputs, strict=True))
            self.nodes.append(ir.Node(node.domain, node.op_type, read, list(node.attributes.values()), outputs=outputs))

    def value(self, value: ir.Value) -> ir.Value:
        """The copy of a value of another graph: the output of a copied node, or a new input or constant."""
        number = self._numbering.of(value)
        if number not in self._values:
            assert value.producer() is None
            copy = self._values[number] = self._copy_of(value)
            (self._inputs if value.const_value is None else self._constants).append(copy)
        return self._values[number]

    def graph(self, name: str, outputs: Sequence[ir.Value], like: ir.Graph) -> ir.Graph:
        """The new graph with these outputs, in the opset of `like`."""
        return ir.Graph(
            self._inputs,
            outputs,
            nodes=self.nodes,
            initializers=self._constants,
            opset_imports=dict(like.opset_imports),
            name=name,
        )

    def _copy_of(self, value: ir.Value) -> ir.Value:
        name, k = value.name or "value", 0
        while name in self._names:
            name, k = f"{value.name}.{k}", k + 1
        self._names.add(name)
        copy = ir.Value(name=name, shape=value.shape, type=value.type, const_value=value.const_value)
        copy.meta.update(value.meta)  # the role of an input or output
        return copy


def replace_reads(model: ir.Model, replacements: dict[ir.Value, ir.Value]) -> None:
    """Replace values by new graph inputs for all readers and graph outputs, then drop unread nodes and inputs."""
    for value, replacement in replacements.items():
        ir.convenience.replace_all_uses_with(value, replacement, replace_graph_outputs=True)
    model.graph.inputs.extend(dict.fromkeys(replacements.values()))
    drop_unread(model)


def drop_unread(model: ir.Model) -> None:
    """Remove unread nodes, constants and inputs."""
    RemoveUnusedNodesPass()(model)
    read = [value for value in model.graph.inputs if is_read(value)]
    model.graph.inputs.clear()
    model.graph.inputs.extend(read)
