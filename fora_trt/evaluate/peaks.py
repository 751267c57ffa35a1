"""Measures the peak rates of a machine, and computes the roofline: the time that graphs take at these rates."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec

import numpy
import torch
from numpy.typing import NDArray

from fora_trt.bundle import Bundle
from fora_trt.contract import CONDITIONING, FULL_CONDITIONING, PRECISIONS, REUSE
from fora_trt.engines.memory import bytes_of, free_bytes
from fora_trt.export.statistics import graph_statistics
from fora_trt.report.results import PeakRates
from fora_trt.schedule import Schedule

MATRIX = {"cpu": 1536, "cuda": 8192}
"""Side of the matrices that are multiplied, by type of device."""

COPIED = {"cpu": 2**28, "cuda": 2**31}
"""Bytes that are read and copied, by type of device: much more than fits in caches of 50 MiB and larger."""

REPEATS = {"cpu": 3, "cuda": 10}
"""Timed runs after the warm-up, by type of device."""


def measure_peaks(device: torch.device, precision: str) -> PeakRates:
    """Peak FLOP/s of large matrix products and peak bytes per second of large reads and copies, best of several runs.

    The data are random: with constant data a GPU draws less power and reaches a rate that no model reaches. On a GPU
    the matrices have the bundle's precision. On a CPU they are in fp32, because its kernels convert half precision to
    fp32. There both torch and ONNX Runtime are measured: which is faster depends on the processor.
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
    """`COPIED`, but at most a quarter of the free memory, so that source and target fit easily."""
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
    """The higher value of each rate."""
    if one is None:
        return other
    return PeakRates(flops=max(one.flops, other.flops), bytes=max(one.bytes, other.bytes))


def _fastest(work: Callable[[], object], device: torch.device) -> float:
    work()  # warms up
    return min(seconds_of(work, device) for _ in range(REPEATS[device.type]))


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Time of one call; on a GPU the device's time, measured by events on the current stream."""
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


class Roofline:
    """A lower bound for the time of a bundle's graphs at the peak rates of a machine.

    The time of a graph is the larger of two: its operations at peak FLOP/s, and the bytes of its weights, inputs and
    outputs at peak bandwidth. Features or sums count twice: written by a full step and read by a reuse step. Tensors
    within a graph count as free. Conditioning graphs run once per step that reads them, for one sample.
    """

    def __init__(self, bundle: Bundle) -> None:
        graphs = bundle.manifest.graphs
        self._statistics = {name: graph_statistics(bundle.graph_path(name)) for name in graphs}
        self._edges = {name: (*graph.inputs, *graph.outputs) for name, graph in graphs.items()}

    def seconds(self, schedule: Schedule, batch: int, peaks: PeakRates) -> float:
        """Roofline time of a trajectory; `batch` is the batch of the graphs (twice the images under guidance)."""

        def of(graph: str, batch: int, window: float = 0.0) -> float:
            statistics, edges = self._statistics[graph], self._edges[graph]
            step, more = bytes_of(edges, batch), bytes_of(edges, batch, 1) - bytes_of(edges, batch)
            moved = statistics.weight_bytes + step + window * more
            return max(batch * statistics.flops / peaks.flops, moved / peaks.bytes)

        steps = Counter(step.graph for step in schedule.plan)
        reuse_steps = steps[REUSE]
        windows = schedule.steps - reuse_steps
        seconds = sum(
            number * of(graph, batch, 0 if graph == REUSE else reuse_steps / windows) for graph, number in steps.items()
        )
        before = {CONDITIONING: schedule.steps, FULL_CONDITIONING: windows}
        return seconds + sum(of(graph, steps) for graph, steps in before.items() if graph in self._edges)
