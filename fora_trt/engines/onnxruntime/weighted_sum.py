"""A CPU kernel for ONNX Runtime that computes the folded sum of gate * feature, and the graph pass that uses it.

ONNX Runtime's Mul and Add nodes write and read every intermediate tensor; the kernel (`weighted_sum.c`) reads each
feature once. It is compiled for this machine at first use; without a C compiler the graphs run unchanged.
"""

from __future__ import annotations

import atexit
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import as_file, files
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult
from onnx_ir.passes.common import RemoveUnusedNodesPass

from fora_trt.contract import of_window
from fora_trt.engines.base import BASE, WEIGHTS
from fora_trt.export.nodes import only_maker

DOMAIN, OPERATOR = "fora_trt", "WeightedSum"

MOST_TERMS = 64
"""Largest number of terms in one sum; the size of the kernel's arrays."""

MOST_JOINED = 32
"""Largest number of terms that sums are joined to: their features are in memory until the last one is computed."""

OPTIONS = ("-std=gnu17", "-O3", "-march=native", "-shared", "-fPIC")


COMPILING = 60.0
"""Seconds after which a compiler is ended; a compilation takes one to ten."""

ENDING = 2.0
"""Seconds in which a compiler removes its temporary files after SIGTERM."""


@cache
def kernel_library() -> Path | None:
    """Compile the kernel once per process and return its path; None if it cannot be compiled or loaded.

    The compiler is `cc`, or the value of the environment variable `CC`: a program, also with options. The library is a
    file in memory: it needs no folder, processes that are forked later have it too, and nothing is left to remove.
    """
    import onnxruntime  # not at the top: other backends use the pass without onnxruntime

    try:
        written, library = _places()
        with as_file(files("fora_trt.engines.onnxruntime") / "weighted_sum.c") as source:
            _run([*_compiler(), *OPTIONS, "-o", str(written), str(source)])
        onnxruntime.SessionOptions().register_custom_ops_library(str(library))
    except Exception:  # no compiler, one that does not support these options, or one that makes something else
        return None
    return library


def _places() -> tuple[Path, Path]:
    """Where a compiler writes the library, and where this process and its children find it: a file in memory.

    Systems other than Linux have none: there it is a temporary file, which this process removes when it ends.
    """
    if hasattr(os, "memfd_create"):
        handle = os.memfd_create("weighted_sum.so")
        return Path(f"/proc/{os.getpid()}/fd/{handle}"), Path(f"/proc/self/fd/{handle}")
    folder, owner = tempfile.mkdtemp(prefix="fora-trt-"), os.getpid()
    atexit.register(lambda: shutil.rmtree(folder, ignore_errors=True) if os.getpid() == owner else None)
    return Path(folder) / "weighted_sum.so", Path(folder) / "weighted_sum.so"


def _compiler() -> list[str]:
    given = os.environ.get("CC", "")
    return [given] if shutil.which(given) else shlex.split(given) or ["cc"]


def _run(command: Sequence[str]) -> None:
    """Run a compiler, whose output is of no use here; if it fails or hangs, the processes that it started end too.

    They are terminated first, because a compiler that is killed leaves its temporary files.
    """
    nothing = subprocess.DEVNULL
    process = subprocess.Popen(command, stdin=nothing, stdout=nothing, stderr=nothing, start_new_session=True)
    try:
        if status := process.wait(COMPILING):
            raise subprocess.CalledProcessError(status, command)
    except BaseException:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(ENDING)
        raise


class FuseWeightedSumsPass(InPlacePass):
    """Replaces the sums that `export.fold` writes by the operator WeightedSum, for fp32 features (B, N, C)."""

    def call(self, model: ir.Model) -> PassResult:
        fused = [_fused(model.graph, node) for node in tuple(model.graph) if node.op_type == "ReduceSum"]
        if any(fused):
            RemoveUnusedNodesPass()(model)  # their readers are counted below
            sums = [node for node in model.graph if node.op_type == OPERATOR]
            for join in (_join_gates, _join_sums):
                for node in sums:
                    join(node)
            RemoveUnusedNodesPass()(model)
            model.graph.opset_imports[DOMAIN] = 1
        return PassResult(model, modified=any(fused))


class AccumulateSumsPass(InPlacePass):
    """Adds the sums of window outputs to what is in memory already: output = base + weight * sum.

    Each window output X gets two inputs: `base.X` (V, B, N, C), initial values of its first V rows, and `weights.X`
    (W). The memory of `base.X` may be that of X. Does nothing unless WeightedSums make each window output.
    """

    def call(self, model: ir.Model) -> PassResult:
        outputs = [one for one in model.graph.outputs if str(one.name).startswith(of_window(""))]
        chains = [_chain_of(one) for one in outputs]
        if not outputs or not all(chains):
            return PassResult(model, modified=False)
        for output, chain in zip(outputs, chains, strict=True):
            assert output.shape is not None
            begun = _input(f"{BASE}{output.name}", ir.Shape([f"{BASE}rows", *output.shape[1:]]))
            weights = _input(f"{WEIGHTS}{output.name}", ir.Shape([output.shape[0]]))
            model.graph.inputs.extend([begun, weights])
            for node in chain:  # base + w * a, and to that + w * b
                replace(Operands.of(node), begun=[begun, weights]).give(node)
                begun = node.outputs[0]
        return PassResult(model, modified=True)


def _chain_of(output: ir.Value) -> list[ir.Node]:
    """The WeightedSums that make a value, each of which begins with the one before; empty for another value."""
    node = output.producer()
    if node is None or node.op_type != OPERATOR:
        return []
    if not node.attributes.get_int("begins", 0):
        return [node]
    before = node.inputs[0]
    alone = before is not None and len(before.consumers()) == 1 and not before.is_graph_output()
    chain = _chain_of(before) if before is not None and alone else []
    return [*chain, node] if chain else []


def _input(name: str, shape: ir.Shape) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=shape)


def _fused(graph: ir.Graph, node: ir.Node) -> bool:
    """Replace a ReduceSum over gate_k * feature_k, and a following Add, by one WeightedSum; False if it is none."""
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
    attributes = [ir.AttrInt64("first", -1), ir.AttrInt64("begins", len(begun))]
    fused = ir.Node(DOMAIN, OPERATOR, [*begun, *gates, *features], attributes, num_outputs=1)
    result = fused.outputs[0]
    result.name, result.type, result.shape = total.name, total.type, total.shape
    total.name = f"{total.name}.unfused"
    graph.insert_before(node, [fused])
    ir.convenience.replace_all_uses_with(total, result, replace_graph_outputs=True)
    return True


@dataclass(frozen=True)
class Operands:
    """What a WeightedSum reads: the value it begins with, if any, gates or the one tensor of them, features."""

    begun: list[ir.Value]
    gates: list[ir.Value]
    features: list[ir.Value]
    first: int
    """The row of the first gate in their one tensor; -1 if each gate is a tensor."""

    @classmethod
    def of(cls, node: ir.Node) -> Operands:
        values = [value for value in node.inputs if value is not None]
        begins, first = node.attributes.get_int("begins", 0), node.attributes.get_int("first", -1)
        read = values[begins:]
        gates = len(read) // 2 if first < 0 else 1
        return cls(values[:begins], read[:gates], read[gates:], first)

    def give(self, node: ir.Node) -> None:
        values = [*self.begun, *self.gates, *self.features]
        node.resize_inputs(len(values))
        for k, value in enumerate(values):
            node.replace_input_with(k, value)
        node.attributes["begins"] = ir.AttrInt64("begins", len(self.begun))
        node.attributes["first"] = ir.AttrInt64("first", self.first)


def _join_gates(node: ir.Node) -> None:
    """Read the gates from the tensor that a Split cuts them from: the Split would copy all of them."""
    read = Operands.of(node)
    split = read.gates[0].producer()
    if split is None or split.op_type != "Split" or any(gate.producer() is not split for gate in read.gates):
        return
    whole, first = split.inputs[0], read.gates[0].index()
    assert first is not None
    axis, rows = split.attributes.get_int("axis", 0), [one.shape[-2] if one.shape else None for one in split.outputs]
    rank = len(whole.shape) if whole is not None and whole.shape is not None else 0
    follow = all(gate.index() == first + k for k, gate in enumerate(read.gates))
    if whole is None or axis not in (-2, rank - 2) or not follow or any(size != 1 for size in rows):
        return
    replace(read, gates=[whole], first=first).give(node)


def _join_sums(node: ir.Node) -> None:
    """Add up the terms of the sum that this one begins with too: else a sum would be written and read in between.

    Features of more than MOST_JOINED terms would be in memory at once.
    """
    read = Operands.of(node)
    before = only_maker(read.begun[0], OPERATOR) if read.begun else None
    if before is None:
        return
    terms = Operands.of(before)
    if terms.gates[0].shape != read.gates[0].shape:  # those of one sum differ between steps, those of the other do not
        return
    lower, upper = sorted((terms, read), key=lambda one: one.first)
    joined = replace(terms, gates=lower.gates, features=[*lower.features, *upper.features], first=lower.first)
    if read.first < 0 and terms.first < 0:
        joined = replace(joined, gates=[*lower.gates, *upper.gates])
    elif lower.gates != upper.gates or lower.first < 0 or lower.first + len(lower.features) != upper.first:
        return
    if len(joined.features) <= MOST_JOINED:
        joined.give(node)


def _begins(shape: ir.Shape | None, feature: ir.Shape | None, total: ir.Shape | None) -> bool:
    """Whether a sum can start with a value of this shape: (1, N, C), (B, N, C), or the shape of the sum."""
    return shape is not None and feature is not None and shape in (total, feature, ir.Shape([1, *feature[1:]]))


def _stacked(value: ir.Value | None) -> Sequence[ir.Value]:
    """The values that a Concat of Unsqueeze outputs stacks; empty for other values."""
    concat = only_maker(value, "Concat")
    parts = [] if concat is None else [one.producer() for one in concat.inputs if one is not None]
    if not all(part is not None and part.op_type == "Unsqueeze" for part in parts):
        return []
    return [one for part in parts if part is not None and (one := part.inputs[0]) is not None]


def _rows(values: Sequence[ir.Value]) -> object:
    shape = values[0].shape
    return shape[-2] if shape is not None and len(shape) > 1 else None


def _fits(gates: Sequence[ir.Value], features: Sequence[ir.Value]) -> bool:
    """Whether gates have the shape (W, B, 1, C) or (B, 1, C), and features (B, N, C)."""
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
