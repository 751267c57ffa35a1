"""Build a plan from an ONNX graph: parse, configure, build. Supports TensorRT 10.14 to 11 and TensorRT-RTX."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fora_trt.contract import CONDITIONING_GRAPHS, TensorSpec
from fora_trt.engines.options import Progress
from fora_trt.engines.tensorrt.library import Library
from fora_trt.errors import PlanError
from fora_trt.files import Record, beside


class Profile(Record):
    """An optimization profile: the smallest and largest batch of a plan, and the batch for which it is tuned."""

    minimum: int
    optimum: int
    maximum: int

    def admits(self, batch: int) -> bool:
        """Whether a call of this batch size can run in the profile."""
        return self.minimum <= batch <= self.maximum

    def __str__(self) -> str:
        return f"{self.minimum}:{self.optimum}:{self.maximum}"


CONDITIONING_ROWS = Profile(minimum=1, optimum=64, maximum=256)
"""Profile of a conditioning graph, whose batch is steps times distinct samples; larger batches need several calls."""

WINDOWS = (0, 4, 63)
"""Supported numbers of sums that a full step computes (min, opt, max), for plans of graphs with folded sums: one for
each reuse step of its window, and for a forecast also for those of the next windows."""


class PlanOptions(Record):
    """The user's options that change a plan."""

    profiles: tuple[Profile, ...]
    optimization_level: int | None = None
    workspace_gib: float | None = None

    def of_graph(self, name: str) -> PlanOptions:
        """The options for one graph: `profiles` apply to the graphs of a step, `CONDITIONING_ROWS` to the others."""
        of_step = name not in CONDITIONING_GRAPHS
        return self if of_step else self.model_copy(update={"profiles": (CONDITIONING_ROWS,)})


class Attention(Record):
    """An attention, and whether one fused kernel runs it; None if the builder does not report that."""

    name: str
    fused: bool | None


@dataclass(frozen=True)
class BuiltPlan:
    """The attentions of a plan that was built, and the duration of the build."""

    attentions: tuple[Attention, ...]
    seconds: float


def plan_from_onnx(
    library: Library,
    onnx: Path,
    plan: Path,
    inputs: Sequence[TensorSpec],
    options: PlanOptions,
    compute_capabilities: Sequence[str],
    timing_cache: Path | None = None,
    progress: Progress = lambda fraction, phase: None,
) -> BuiltPlan:
    """Build a plan from the graph in `onnx` and write it to `plan`.

    The graph and its external data must have been checked before, because TensorRT's parser follows links. TensorRT
    builds on and for the current CUDA device; TensorRT-RTX builds for `compute_capabilities` and needs no GPU. Raises
    `PlanError`.
    """
    began = time.perf_counter()
    trt, log = library.module, library.log
    log.clear()
    try:
        builder = trt.Builder(library.logger)
    except TypeError as problem:  # raised by the bindings if the builder could not be created
        raise PlanError(f"{library.backend} could not start its builder: {log.reason()}") from problem
    # In TensorRT 10 this flag makes the builder use the dtypes of the graph; later versions always do so.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, library.logger)  # owns the memory-mapped weights, so it must outlive the build
    if not parser.parse_from_file(os.fspath(onnx)):
        reasons = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
        raise PlanError(f"{library.backend} cannot read {onnx}: {reasons or log.reason()}")
    names = _decomposable_attentions(trt, network)
    config = _configured(library, builder, inputs, options, compute_capabilities)
    if log.errors:  # setters log errors instead of raising them
        raise PlanError(f"{library.backend} does not accept the build options: {log.reason()}")
    if timing_cache is not None:
        _use_timing_cache(trt, config, timing_cache)
        log.clear()  # a rejected timing cache is not an error
    monitor, writer = _monitor(trt, progress), _writer(trt, plan)
    config.progress_monitor = monitor
    done = _run_cancellable(lambda: builder.build_serialized_network_to_stream(network, config, writer), monitor)
    writer.close()
    if writer.problem is not None:
        raise writer.problem
    if not done:
        raise PlanError(f"{library.backend} could not build {onnx}: {log.reason()}")
    if timing_cache is not None:
        with beside(timing_cache) as file:
            file.write(config.get_timing_cache().serialize())
    return BuiltPlan(_fused_among(names, log.layers), time.perf_counter() - began)


def _decomposable_attentions(trt: Any, network: Any) -> list[str]:
    """Allow the builder to decompose an attention into smaller kernels if no fused kernel fits; return their names."""
    names = []
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # the bindings return the base class
            layer.attention.decomposable = True
            names.append(layer.attention.name or layer.name)
    return names


def _configured(
    library: Library,
    builder: Any,
    inputs: Sequence[TensorSpec],
    options: PlanOptions,
    compute_capabilities: Sequence[str],
) -> Any:
    trt = library.module
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # full fp32 precision, as in the reference
    config.max_aux_streams = 0  # a single stream, for CUDA graph capture
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if library.is_rtx:
        config.num_compute_capabilities = len(compute_capabilities)
        for i, capability in enumerate(compute_capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{capability.replace('.', '')}"), i)
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # no allocations during a capture
    else:
        if options.optimization_level is not None:
            config.builder_optimization_level = options.optimization_level
        if options.workspace_gib is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(options.workspace_gib * 2**30))
    for wanted in options.profiles:
        profile = builder.create_optimization_profile()
        for tensor in inputs:
            sizes = zip((wanted.minimum, wanted.optimum, wanted.maximum), WINDOWS, strict=True)
            profile.set_shape(tensor.name, *(tensor.sized(batch, window) for batch, window in sizes))
        if config.add_optimization_profile(profile) < 0:
            raise PlanError(f"{library.backend} does not accept the batch profile {wanted}: {library.log.reason()}")
    return config


def _use_timing_cache(trt: Any, config: Any, path: Path) -> None:
    """Use the kernel timings of earlier builds; a timing cache of another GPU or version is ignored."""
    content = path.read_bytes() if path.is_file() else b""
    if not config.set_timing_cache(config.create_timing_cache(content), False):
        config.set_timing_cache(config.create_timing_cache(b""), False)


def _monitor(trt: Any, progress: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc] # the base class is known only at run time
        """Combines the progress of nested phases into one fraction. The builder's threads call the methods."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.cancelled = threading.Event()
            self._open: dict[str, list[int]] = {}  # phase -> finished steps, all steps; outermost first
            self._lock = threading.Lock()
            self._reached = 0.0

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            with self._lock:
                self._open[phase] = [0, steps]
            progress(self._fraction(), phase)

        def step_complete(self, phase: str, step: int) -> bool:
            with self._lock:
                if phase in self._open:
                    self._open[phase][0] = step + 1
            progress(self._fraction(), phase)
            return not self.cancelled.is_set()

        def phase_finish(self, phase: str) -> None:
            with self._lock:
                self._open.pop(phase, None)

        def _fraction(self) -> float:
            """The finished fraction of the outermost phase; a nested phase counts as a part of one step."""
            with self._lock:
                inner = 0.0
                for done, steps in reversed(self._open.values()):
                    inner = min(1.0, (done + inner) / max(steps, 1))
                self._reached = max(self._reached, inner)
                return self._reached

    return Monitor()


def _writer(trt: Any, path: Path) -> Any:
    class Writer(trt.IStreamWriter):  # type: ignore[misc] # the base class is known only at run time
        """Writes a plan during the build. Exceptions must not pass through the builder, so `problem` stores them."""

        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.problem: OSError | None = None
            self._file = path.open("wb")
            self.close = self._file.close

        def write(self, data: Any) -> int:
            try:
                self._file.write(data)
            except OSError as problem:
                self.problem = problem
                return 0
            return memoryview(data).nbytes

    return Writer()


def _run_cancellable(build: Callable[[], Any], monitor: Any) -> bool:
    """Build in another thread, so that this one receives Ctrl-C; KeyboardInterrupt is raised after the build stops."""
    result: list[bool] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            result.append(bool(build()))
        except BaseException as error:
            failure.append(error)
        finally:
            done.set()

    done = threading.Event()  # before Python 3.13, an interrupted join treats the thread as finished
    thread = threading.Thread(target=run, name="plan builder")
    thread.start()
    interrupt: KeyboardInterrupt | None = None
    while not done.is_set():
        try:
            done.wait(timeout=0.1)
        except KeyboardInterrupt as pressed:  # noqa: PERF203 # may be raised in any iteration
            interrupt = pressed
            monitor.cancelled.set()
    if interrupt is not None:
        raise interrupt
    if failure:
        raise failure[0]
    return result[0]


def _fused_among(names: Sequence[str], layers: Sequence[str]) -> tuple[Attention, ...]:
    """Which attentions run as fused kernels, parsed from the builder's log lines (layer, kernel, ONNX nodes)."""
    fused: set[str] = set()
    for text in layers:
        for kernel, nodes in re.findall(r"^Name: (\S+), LayerType: .*Metadata: (.*)$", text, flags=re.MULTILINE):
            if "mha" in kernel.lower():
                fused.update(re.findall(r"\[ONNX Layer: ([^\]]+)\]", nodes))
    return tuple(Attention(name=name, fused=name in fused if layers else None) for name in names)
