"""A kernel for ONNX Runtime on a CPU, and the graph pass that uses it: the sum of gate * feature in one pass.

ONNX Runtime multiplies and adds tensor by tensor, and each time everything goes over memory; the kernel
(`weighted_sum.c`) reads every feature once. It is compiled when it is first needed, for this machine; where there is no
C compiler the graphs run as they are.
"""

from __future__ import annotations

import atexit
import os
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from importlib.resources import as_file, files
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult
from onnx_ir.passes.common import RemoveUnusedNodesPass

from fora_trt.export.nodes import only_maker

DOMAIN, OPERATOR = "fora_trt", "WeightedSum"

MOST_TERMS = 64
"""Of one sum; the kernel has room for so many."""

OPTIONS = ("-std=gnu17", "-O3", "-march=native", "-shared", "-fPIC")


@cache
def kernel_library() -> Path | None:
    """The compiled kernel, for the life of this process; None where it cannot be compiled or loaded.

    The compiler is `cc`, or what the environment variable `CC` says.
    """
    import onnxruntime  # here: the pass is of use to other backends too

    folder = tempfile.TemporaryDirectory(prefix="fora-trt-")
    atexit.register(folder.cleanup)
    library = Path(folder.name) / "weighted_sum.so"
    compiler = shlex.split(os.environ.get("CC") or "cc")
    try:
        with as_file(files("fora_trt.engines") / "weighted_sum.c") as source:
            command = [*compiler, *OPTIONS, "-o", str(library), str(source)]
            subprocess.run(command, check=True, capture_output=True, timeout=60)
        onnxruntime.SessionOptions().register_custom_ops_library(str(library))
    except Exception:  # no compiler, one that does not know these options, a folder that nothing can be run from
        return None
    return library


class FuseWeightedSumsPass(InPlacePass):
    """Replaces the sums that `export.fold` writes by WeightedSum, in fp32 and for features (B, N, C)."""

    def call(self, model: ir.Model) -> PassResult:
        fused = [_fused(model.graph, node) for node in tuple(model.graph) if node.op_type == "ReduceSum"]
        if any(fused):
            RemoveUnusedNodesPass()(model)
            model.graph.opset_imports[DOMAIN] = 1
        return PassResult(model, modified=any(fused))


def _fused(graph: ir.Graph, node: ir.Node) -> bool:
    """Of sum over k of gate_k * feature_k, and of what that sum is added to."""
    product = only_maker(node.inputs[0], "Mul")
    sides = [] if product is None else [_stacked(value) for value in product.inputs]
    total = node.outputs[0]
    if len(sides) != 2 or not all(sides) or total.dtype != ir.DataType.FLOAT:
        return False
    gates, features = sides if _rows(sides[0]) == 1 else sides[::-1]
    if not _fits(gates, features):
        return False
    begun: list[ir.Value] = []
    adding = total.consumers()
    if len(adding) == 1 and adding[0].op_type == "Add" and not total.is_graph_output():
        (other,) = (value for value in adding[0].inputs if value is not total)
        if other is not None and other.dtype == total.dtype and _begins(other.shape, features[0].shape, total.shape):
            begun, node, total = [other], adding[0], adding[0].outputs[0]
    fused = ir.Node(DOMAIN, OPERATOR, [*begun, *gates, *features], num_outputs=1)
    result = fused.outputs[0]
    result.name, result.type, result.shape = total.name, total.type, total.shape
    total.name = f"{total.name}.unfused"
    graph.insert_before(node, [fused])
    ir.convenience.replace_all_uses_with(total, result, replace_graph_outputs=True)
    return True


def _begins(shape: ir.Shape | None, feature: ir.Shape | None, total: ir.Shape | None) -> bool:
    """Whether a sum can begin with a value of this shape: one for all, for each sample, or for each sample and step."""
    return shape is not None and feature is not None and shape in (total, feature, ir.Shape([1, *feature[1:]]))


def _stacked(value: ir.Value | None) -> Sequence[ir.Value]:
    """What is laid side by side in a value, along a dimension made for it."""
    concat = only_maker(value, "Concat")
    parts = [] if concat is None else [one.producer() for one in concat.inputs if one is not None]
    if not all(part is not None and part.op_type == "Unsqueeze" for part in parts):
        return []
    return [one for part in parts if part is not None and (one := part.inputs[0]) is not None]


def _rows(values: Sequence[ir.Value]) -> object:
    shape = values[0].shape
    return shape[-2] if shape is not None and len(shape) > 1 else None


def _fits(gates: Sequence[ir.Value], features: Sequence[ir.Value]) -> bool:
    """Whether these are (W, B, 1, C) or (B, 1, C), and (B, N, C)."""
    sizes = [[one.shape for one in values] for values in (gates, features)]
    if len(gates) != len(features) or len(gates) > MOST_TERMS:
        return False
    if any(shape is None or shape != many[0] for many in sizes for shape in many):
        return False
    gate, feature = (many[0] for many in sizes)
    return (
        gate is not None
        and feature is not None
        and len(feature) == 3
        and len(gate) in (3, 4)
        and (gate[-3], gate[-2], gate[-1]) == (feature[0], 1, feature[2])
    )
