"""What a graph holds and how much arithmetic it does, read from its ONNX file without its weights."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from fora_trt.export.nodes import nodes_behind
from fora_trt.models.spec import BATCH, WINDOW

Shape = Sequence[int]


@dataclass(frozen=True)
class GraphStatistics:
    """Nodes, bytes of the initializers, and floating-point operations per sample.

    Only matrix products, convolutions and attention are counted, a multiplication and an addition as two.
    """

    nodes: int
    weight_bytes: int
    flops: int


def graph_statistics(path: Path) -> GraphStatistics:
    """Statistics of an ONNX file for a batch of one."""
    graph = ir.load(path).graph
    weights = sum(value.const_value.nbytes for value in graph.initializers.values() if value.const_value is not None)
    return GraphStatistics(graph.num_nodes(), weights, sum(map(_flops, graph)))


def bytes_kept_for_sums(graph: ir.Graph, batch: int, window: int = 1, *, postponed: bool = True) -> int:
    """Bytes that a full graph keeps for the sums of its window, beyond the last feature that they read.

    `postponed` counts an engine that takes all sums at the end, as TensorRT does: everything that they read from the
    step is kept. Else nodes run in their order, and what sums have begun and not ended is kept too. The first output
    of the graph is the prediction; what it needs is the step.
    """
    sizes = {BATCH: batch, WINDOW: window}
    order = {node: k for k, node in enumerate(graph)}
    step = nodes_behind([graph.outputs[0]])
    read = dict.fromkeys(
        value for node in graph if node not in step for value in node.inputs if value is not None and value.producer()
    )
    features = [value for value in read if value.producer() in step]
    if postponed or not features:
        return sum(_bytes(value, sizes) for value in features)
    last = max(order[node] for value in features if (node := value.producer()) is not None)
    sums = _nodes_from(features) - step
    kept = [
        value
        for value in read
        if (value in features or value.producer() in sums)
        and (node := value.producer()) is not None
        and order[node] < last <= max(order[reader] for reader in value.consumers() if reader not in step)
    ]
    return sum(_bytes(value, sizes) for value in kept)


def _nodes_from(values: Sequence[ir.Value]) -> set[ir.Node]:
    """All nodes that need one of some values."""
    found, todo = set[ir.Node](), [*values]
    while todo:
        for node in todo.pop().consumers():
            if node not in found:
                found.add(node)
                todo += node.outputs
    return found


def _bytes(value: ir.Value, named: Mapping[str, int]) -> int:
    assert value.dtype is not None and value.shape is not None
    sizes = [size if isinstance(size, int) else named[str(size.value)] for size in value.shape]
    return math.prod(sizes) * int(value.dtype.itemsize)


def _flops(node: ir.Node) -> int:
    count = _COUNTS.get(node.op_type)
    if count is None:
        return 0
    inputs = [_sizes(value) for value in node.inputs if value is not None]
    return 2 * count(node, inputs, _sizes(node.outputs[0]))


def _sizes(value: ir.Value) -> Shape:
    return [] if value.shape is None else [_size(size) for size in value.shape]


def _size(size: int | ir.SymbolicDim) -> int:
    """For a batch of one; a whole number of batches is what flattened inputs have."""
    if isinstance(size, int):
        return size
    multiple = re.fullmatch(rf"(?:(\d+)\*)?{BATCH}", str(size.value))
    return int(multiple[1] or 1) if multiple else 1


def _matmul(node: ir.Node, inputs: list[Shape], output: Shape) -> int:
    return math.prod(output) * inputs[0][-1]


def _gemm(node: ir.Node, inputs: list[Shape], output: Shape) -> int:
    transposed = node.attributes.get_int("transA", 0)
    return math.prod(output) * inputs[0][0 if transposed else -1]


def _conv(node: ir.Node, inputs: list[Shape], output: Shape) -> int:
    return math.prod(output) * math.prod(inputs[1][1:])


def _attention(node: ir.Node, inputs: list[Shape], output: Shape) -> int:
    """Both products, on (B, heads, tokens, head size)."""
    query, key, value = inputs[:3]
    return math.prod(query) * key[-2] + math.prod(output) * value[-2]


_COUNTS: dict[str, Callable[[ir.Node, list[Shape], Shape], int]] = {
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Conv": _conv,
    "Attention": _attention,
}
