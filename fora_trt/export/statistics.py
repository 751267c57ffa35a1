"""Statistics of an ONNX graph: number of nodes, bytes of weights and FLOPs, read without loading the weights."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from fora_trt.bundle import Bundle
from fora_trt.contract import BATCH, FULL, REUSE
from fora_trt.errors import BundleError

Shape = Sequence[int]


@dataclass(frozen=True)
class GraphStatistics:
    """Number of nodes, bytes of the initializers, and floating-point operations (FLOPs) per sample.

    FLOPs cover matrix products, convolutions and attention; a multiply-add counts as two.
    """

    nodes: int
    weight_bytes: int
    flops: int


def graph_statistics(path: Path) -> GraphStatistics:
    """Statistics of an ONNX file for a batch of one. Raises `BundleError` if it lacks the shapes of tensors."""
    graph = ir.load(path).graph
    weights = sum(value.const_value.nbytes for value in graph.initializers.values() if value.const_value is not None)
    try:
        return GraphStatistics(graph.num_nodes(), weights, sum(map(_flops, graph)))
    except IndexError as error:
        raise BundleError(f"{path} lacks shapes of tensors that it computes with; export it again") from error


def arithmetic_shares(bundle: Bundle) -> dict[str, float]:
    """The operations of a step of each partial graph and of the reuse graph, divided by those of a full step.

    1 for each if the full graph has no operation that counts. Raises `BundleError` as `graph_statistics`.
    """
    names = (FULL, *bundle.manifest.partial_graphs, REUSE)
    full, *others = (graph_statistics(bundle.graph_path(name)).flops for name in names)
    return {name: one / full if full else 1.0 for name, one in zip(names[1:], others, strict=True)}


@dataclass(frozen=True)
class StepFlops:
    """Counts the FLOPs per sample of steps that read some features instead of computing them, from the full graph.

    A step computes what its outputs need: the prediction, the features that it does not read and what the full graph
    makes of them for later steps. So everything between the first computed cache site and the prediction counts.
    """

    graph: ir.Graph

    @classmethod
    def of(cls, path: Path) -> StepFlops:
        """From the ONNX file of a full graph."""
        return cls(ir.load(path).graph)

    def reading(self, features: Collection[str]) -> int:
        """FLOPs of a step that reads the features with these names. Raises `BundleError` for an unknown feature."""
        seen, waiting = set[ir.Node](), [*self.graph.outputs]
        if absent := {*features} - {str(value.name) for node in self.graph for value in node.outputs}:
            raise BundleError(f"the full graph does not compute {min(absent)} under this name; export it again")
        while waiting:
            value = waiting.pop()
            node = None if value.name in features else value.producer()
            if node is not None and node not in seen:
                seen.add(node)
                waiting += [one for one in node.inputs if one is not None]
        return sum(map(_flops, seen))


def _flops(node: ir.Node) -> int:
    count = _COUNTS.get(node.op_type)
    if count is None:
        return 0
    inputs = [_sizes(value) for value in node.inputs if value is not None]
    return 2 * count(node, inputs, _sizes(node.outputs[0]))


def _sizes(value: ir.Value) -> Shape:
    return [] if value.shape is None else [_size(size) for size in value.shape]


def _size(size: int | ir.SymbolicDim) -> int:
    """A size for a batch of one. Flattened tensors have a multiple of the batch, such as `16*batch`."""
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
    """Multiply-adds of both matrix products of an attention on tensors (B, heads, tokens, head size)."""
    query, key, value = inputs[:3]
    return math.prod(query) * key[-2] + math.prod(output) * value[-2]


_COUNTS: dict[str, Callable[[ir.Node, list[Shape], Shape], int]] = {
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Conv": _conv,
    "Attention": _attention,
}
