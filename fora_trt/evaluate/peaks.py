"""What a machine does at best, and what the arithmetic and the bytes of a graph would take at that."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.util import find_spec

import numpy
import torch
from numpy.typing import NDArray

from fora_trt.bundle import Bundle
from fora_trt.engines.memory import bytes_of, free_bytes
from fora_trt.evaluate.results import PeakRates
from fora_trt.export.statistics import graph_statistics
from fora_trt.models.spec import CONDITIONING, FULL, FULL_CONDITIONING, PRECISIONS, REUSE
from fora_trt.schedule import Schedule

MATRIX = {"cpu": 1536, "cuda": 8192}
"""Side of the matrices that are multiplied, by type of device."""

COPIED = {"cpu": 2**28, "cuda": 2**31}
"""Bytes that are read and copied, by type of device: caches of 50 MiB and more must not hold a part that matters."""

REPEATS = {"cpu": 3, "cuda": 10}
"""Timed runs after the warm-up, by type of device."""


def measure_peaks(device: torch.device, precision: str) -> PeakRates:
    """The best of several products of large matrices, and of several readings and copies of a large tensor.

    The numbers are random: a GPU that multiplies ones draws less power and reaches a rate that no model reaches.
    On a GPU the matrices are in the bundle's precision. On a CPU they are in fp32, because its kernels widen half
    precision, and ONNX Runtime multiplies them too: which of the two libraries is faster depends on the processor.
    """
    dtype = torch.float32 if device.type == "cpu" else getattr(torch, PRECISIONS[precision])
    side = MATRIX[device.type]
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(side, side, dtype=dtype, device=device, generator=generator) for _ in range(2))
    product = torch.empty_like(left)
    products: list[Callable[[], object]] = [lambda: torch.mm(left, right, out=product)]
    if device.type == "cpu" and find_spec("onnxruntime") is not None:
        products.append(_product_by_onnxruntime(left.numpy(), right.numpy()))
    copied = copied_bytes(device)
    source = torch.rand(copied // 4, device=device, generator=generator)
    target = torch.empty_like(source)
    return PeakRates(
        flops=2 * side**3 / min(_fastest(product, device) for product in products),
        bytes=max(
            copied / _fastest(source.sum, device),
            2 * copied / _fastest(lambda: target.copy_(source), device),
        ),
    )


def copied_bytes(device: torch.device) -> int:
    """`COPIED`, or a quarter of what is free where that is less: source and target then fit, with room to spare."""
    return min(COPIED[device.type], free_bytes(device) // 4 // 4 * 4)


def _product_by_onnxruntime(left: NDArray[numpy.float32], right: NDArray[numpy.float32]) -> Callable[[], object]:
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    edges = [helper.make_tensor_value_info(name, TensorProto.FLOAT, left.shape) for name in ("one", "product")]
    node = helper.make_node("MatMul", ["one", "other"], ["product"])
    graph = helper.make_graph([node], "product", edges[:1], edges[1:], [numpy_helper.from_array(right, "other")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"one": left})


def best_of(one: PeakRates | None, other: PeakRates) -> PeakRates:
    """The higher of both rates."""
    if one is None:
        return other
    return PeakRates(flops=max(one.flops, other.flops), bytes=max(one.bytes, other.bytes))


def _fastest(work: Callable[[], object], device: torch.device) -> float:
    work()  # warms up
    return min(seconds_of(work, device) for _ in range(REPEATS[device.type]))


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Time of one call; on a GPU by events on the current stream, which tell of the device and not of the host."""
    if device.type != "cuda":
        began = time.perf_counter()
        work()
        return time.perf_counter() - began
    with torch.cuda.device(device):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize(device)
        first.record()
        work()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last) / 1e3)


class Floor:
    """The least time that the graphs of a bundle could take: their operations, or their weights and edges in bytes.

    What passes between steps counts as written by a full step and read by a reuse step; conditioning graphs run once,
    for one sample at every step that reads them. Everything within a graph counts as free.
    """

    def __init__(self, bundle: Bundle) -> None:
        graphs = bundle.manifest.graphs
        self._statistics = {name: graph_statistics(bundle.graph_path(name)) for name in graphs}
        self._edges = {name: (*graph.inputs, *graph.outputs) for name, graph in graphs.items()}

    def seconds(self, schedule: Schedule, batch: int, peaks: PeakRates) -> float:
        """Of a trajectory, for this batch of the graphs (twice the images under guidance)."""

        def of(graph: str, batch: int, window: float = 0.0) -> float:
            found, edges = self._statistics[graph], self._edges[graph]
            step, more = bytes_of(edges, batch), bytes_of(edges, batch, 1) - bytes_of(edges, batch)
            moved = found.weight_bytes + step + window * more
            return max(batch * found.flops / peaks.flops, moved / peaks.bytes)

        reuse_steps = schedule.steps - schedule.full_steps
        seconds = schedule.full_steps * of(FULL, batch, reuse_steps / schedule.full_steps)
        seconds += reuse_steps * of(REUSE, batch)
        before = {CONDITIONING: schedule.steps, FULL_CONDITIONING: schedule.full_steps}
        return seconds + sum(of(graph, steps) for graph, steps in before.items() if graph in self._edges)
