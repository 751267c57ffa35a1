"""The calls that reach TensorRT, in their order, against stand-ins; their names against the real bindings."""

from __future__ import annotations

import _thread
import ast
import builtins
import ctypes
import errno
import functools
import hashlib
import mmap
import os
import pathlib
import re
import signal
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

import pydantic
import pytest
import torch

from fora_trt.bundle import Bundle
from fora_trt.engines.base import Engine, Launch
from fora_trt.engines.options import EngineOptions
from fora_trt.engines.tensorrt import engine as tensorrt_engine
from fora_trt.engines.tensorrt.library import TENSORRT, TENSORRT_RTX, Gpu, Library
from fora_trt.engines.tensorrt.plan_builder import PlanOptions, Profile, plan_from_onnx
from fora_trt.engines.tensorrt.plan_store import build_plans, target_of
from fora_trt.errors import BackendError, InputError, PlanError
from fora_trt.pipeline import Pipeline
from fora_trt.plan import FULL_STEP, REUSE_STEP
from fora_trt.runtime.denoiser import Denoiser
from fora_trt.runtime.layout import Layout
from fora_trt.sampling.conditioning import conditioning_of_classes
from fora_trt.schedule import Schedule
from tests.tensorrt_bindings import Bindings, NoBindings, names_of, names_of_installed
from tests.tensorrt_standin import ENUM, GET, MILLISECONDS, SET, Cuda, Recorder, declared
from tests.test_partial_steps import exported_with_masks

ENGINES = Path(tensorrt_engine.__file__).parent
SOURCES = [ENGINES / name for name in ("plan_builder.py", "engine.py", "library.py")]
DEVICE, GPU = torch.device("cuda:0"), Gpu("Stand-in", "8.9")
LATENTS, LABELS = torch.zeros(2, 4, 8, 8), {"class_labels": torch.tensor([1, 2])}
EXECUTE, MEMORY = "IExecutionContext.execute_async_v3", "IExecutionContext.set_device_memory"
SCRATCH = "IExecutionContext.update_device_memory_size_for_shapes"


@dataclass
class Rig:
    """A stand-in library with a GPU, and the plans that were built by it."""

    recorder: Recorder
    cuda: Cuda
    library: Library
    bundle: Bundle
    source: EngineOptions

    def start(self) -> dict[str, Engine]:
        return tensorrt_engine.engines_from_bundle(self.bundle, DEVICE, self.source, self.library.backend)

    def profiles(self, *sizes: tuple[int, int, int]) -> None:
        profiles = tuple(Profile(minimum=a, optimum=b, maximum=c) for a, b, c in sizes)
        build_plans(self.bundle, target_of(self.library, GPU), PlanOptions(profiles=profiles), self.source.folder)

    def denoiser(self) -> Denoiser:
        return Denoiser(self.start(), self.bundle.manifest, self.library.backend)

    def pipeline(self) -> Pipeline:
        return Pipeline(self.bundle, predictor=self.denoiser())

    def mark(self) -> int:
        return len(self.recorder.calls)

    def names_since(self, mark: int) -> list[str]:
        return [call.name for call in self.recorder.since(mark)]


@pytest.fixture
def rig_for(exported: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Rig]:
    def make(backend: str) -> Rig:
        recorder = Recorder(rtx=backend == TENSORRT_RTX)
        library = Library(backend, recorder.module)
        monkeypatch.setattr(tensorrt_engine, "library_from_name", lambda name: library)
        return Rig(recorder, Cuda(recorder, monkeypatch), library, exported, EngineOptions(tmp_path / "engines"))

    return make


@pytest.fixture
def rig(rig_for: Callable[[str], Rig]) -> Rig:
    return rig_for(TENSORRT)


@pytest.fixture
def rtx(rig_for: Callable[[str], Rig]) -> Rig:
    return rig_for(TENSORRT_RTX)


def buffers_for(engine: Engine, batch: int) -> dict[str, torch.Tensor]:
    specs = (*engine.inputs.values(), *engine.outputs.values())
    return {spec.name: torch.zeros(spec.sized(batch), dtype=getattr(torch, spec.dtype)) for spec in specs}


def step(engine: Engine, batch: int = 2) -> Launch:
    """Bind an engine and take a step; returns what takes the next, on tensors whose addresses alone matter here."""
    launch = engine.bind(buffers_for(engine, batch))
    launch()
    return launch


@pytest.mark.parametrize("backend", [TENSORRT, TENSORRT_RTX])
def test_an_engine_starts_without_host_code_and_with_memory_of_the_caller(
    rig_for: Callable[[str], Rig], backend: str
) -> None:
    rig = rig_for(backend)
    rig.profiles((1, 2, 4))
    mark = rig.mark()
    engines = rig.start()
    only_rtx = [
        "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy=",
        "IRuntimeConfig.cuda_graph_strategy=",
        "IRuntimeConfig.create_runtime_cache",
        "IRuntimeConfig.set_runtime_cache",
    ]
    each = [
        "Runtime.deserialize_cuda_engine",
        "ICudaEngine.create_runtime_config",
        "IRuntimeConfig.set_execution_context_allocation_strategy",
        *(only_rtx if backend == TENSORRT_RTX else []),
        "ICudaEngine.create_execution_context",
    ]
    names = [name for name in rig.names_since(mark) if name != "ILogger.__init__"]
    assert names == ["Runtime.__init__", "Runtime.engine_host_code_allowed=", *each, *each]
    assert rig.recorder.named("Runtime.engine_host_code_allowed=") == [(False,)]
    assert rig.recorder.named("Runtime.deserialize_cuda_engine") == [(b"plan",)] * 2
    configs = rig.recorder.named("ICudaEngine.create_execution_context")
    assert configs == [("IRuntimeConfig 1",), ("IRuntimeConfig 2",)]
    assert list(engines) == ["full", "reuse"]


@pytest.mark.parametrize("several", [False, True])
def test_binding_sets_profile_and_shapes_and_every_address_once(rig: Rig, several: bool) -> None:
    rig.profiles((1, 2, 4), *([(1, 2, 16), (2, 2, 3)] if several else []))
    engine = rig.start()["full"]
    buffers, mark = buffers_for(engine, 2), rig.mark()
    engine.bind(buffers)
    calls = [(call.name.partition(".")[2], call.arguments) for call in rig.recorder.since(mark, "IExecutionContext 1")]
    assert calls == [
        *([("set_optimization_profile_async", (2, 1000))] if several else []),  # 2:2:3 is the narrowest
        *(("set_input_shape", (name, spec.sized(2))) for name, spec in engine.inputs.items()),
        ("infer_shapes", ()),
        ("update_device_memory_size_for_shapes", ()),
        *(("set_tensor_address", (name, tensor.data_ptr())) for name, tensor in buffers.items()),
    ]


@pytest.mark.parametrize("backend", [TENSORRT, TENSORRT_RTX])
def test_a_step_runs_then_is_captured_then_is_replayed_until_tensors_move(
    rig_for: Callable[[str], Rig], backend: str
) -> None:
    rig = rig_for(backend)
    engine = rig.start()["full"]
    asked = ["IExecutionContext.is_stream_capturable"] if backend == TENSORRT_RTX else []
    saved = ["IRuntimeCache.serialize"] if backend == TENSORRT_RTX else []
    launches = []  # all stay, so each has a context of its own
    for saves in (saved, []):
        launch = engine.bind(buffers_for(engine, 2))
        launches.append(launch)
        mark = rig.mark()
        launch()
        wait = "Stream.wait_stream"
        assert rig.names_since(mark) == [wait, MEMORY, EXECUTE, wait, *saves]
        mark = rig.mark()
        launch()
        assert rig.names_since(mark) == [*asked, "torch.cuda.graph", EXECUTE, "CUDAGraph.replay"]
        mark = rig.mark()
        launch()
        assert rig.names_since(mark) == ["CUDAGraph.replay"]
    executed = [(1001,)] * 2 + [(1002,)] * 2
    assert rig.recorder.named(EXECUTE) == executed, "not on streams beside the caller's, 1000"


@pytest.mark.parametrize("backend", [TENSORRT, TENSORRT_RTX])
def test_a_launch_is_captured_by_others_only_after_it_ran(rig_for: Callable[[str], Rig], backend: str) -> None:
    rig = rig_for(backend)
    full, reuse = rig.start().values()  # contexts 1 and 2
    rig.recorder.results[SCRATCH] = lambda context: 2**20 if context.label == "IExecutionContext 2" else 4096
    launch = full.bind(buffers_for(full, 2))
    for before in ("its first run", "a run on the scratch that grew"):
        assert not full.can_capture(launch), before
        rig.cuda.capturing, executed = True, len(rig.recorder.named(EXECUTE))
        with pytest.raises(
            BackendError, match="captured before its first run at this batch; run it once outside the capture"
        ):
            launch()
        assert len(rig.recorder.named(EXECUTE)) == executed, "a graph would hold it"
        rig.cuda.capturing = False
        launch()
        assert full.can_capture(launch)
        assert not full.can_capture(full.bind(buffers_for(full, 2))), "another launch"
        reuse.bind(buffers_for(reuse, 2))  # grows the scratch, the first time
    rig.cuda.capturing = True
    launch()


def test_every_launch_has_a_context_that_stays_as_it_was_bound(rig: Rig) -> None:
    """Other launches, another batch and questions about scratch go to other contexts."""
    engine = rig.start()["full"]
    first, second = step(engine, 2), step(engine, 2)
    engine.scratch_bytes(4)
    third, mark = step(engine, 3), rig.mark()
    for launch in (first, second, third, first):
        launch()
    calls = [call for call in rig.recorder.since(mark) if call.name.startswith("IExecutionContext")]
    assert [call.name for call in calls] == [EXECUTE] * 3, "the second run of each, captured; then a replay"
    assert len({call.owner for call in calls}) == 3


def test_the_context_of_a_freed_launch_serves_the_next_one(rig: Rig) -> None:
    engines = rig.start()
    engine = engines["full"]
    launches = [step(engine, 2), step(engine, 4)]
    launches.clear()
    mark = rig.mark()
    step(engine, 4)
    calls = [call.name for call in rig.recorder.since(mark, "IExecutionContext 3")]
    bound = ["IExecutionContext.set_tensor_address"] * (len(engine.inputs) + len(engine.outputs))
    assert calls == [*bound, EXECUTE], "its shapes and scratch are those that it had"
    assert len(rig.recorder.named("ICudaEngine.create_execution_context")) == 3, "two of this engine, one of the other"
    assert not [call for call in rig.recorder.calls if call.name == "IExecutionContext.__del__"]


def test_scratch_of_no_size_is_an_error_unless_the_plan_needs_none(rig: Rig) -> None:
    engine = rig.start()["full"]
    rig.recorder.fail(SCRATCH, 0, "Error Code 3: API Usage Error")
    message = "^tensorrt could not determine the scratch memory for a batch of 2: Error Code 3: API Usage Error$"
    for ask in (lambda: engine.scratch_bytes(2), lambda: step(engine)):
        with pytest.raises(BackendError, match=message):
            ask()
    rig.recorder.results |= {"ICudaEngine.device_memory_size_v2": 0, SCRATCH: 0}
    step(engine)
    assert engine.scratch_bytes(2) == 0


def test_a_stream_that_cannot_be_captured_is_run_on_each_time(rtx: Rig) -> None:
    rtx.recorder.results["IExecutionContext.is_stream_capturable"] = False
    launch = step(rtx.start()["full"])
    launch()
    launch()
    assert len(rtx.recorder.named(EXECUTE)) == 3
    assert not rtx.recorder.named("torch.cuda.graph")


def test_features_and_scratch_are_shared_at_the_larger_size(rig: Rig) -> None:
    sizes = {"IExecutionContext 1": 4096, "IExecutionContext 2": 8192}
    rig.recorder.results[SCRATCH] = lambda context: sizes[context.label]
    denoiser = rig.denoiser()
    run = denoiser.begin((FULL_STEP, REUSE_STEP), torch.zeros(2), LABELS, [2])
    for step, offset in enumerate(run.offsets):
        run.at(step, 2).predict(offset, LATENTS, 3, **LABELS)
    calls = rig.recorder.since(0)
    bound = [
        dict(call.arguments for call in calls if call.owner == owner and call.name.endswith("set_tensor_address"))
        for owner in sizes
    ]
    features = [feature.name for feature in rig.bundle.manifest.features()]
    assert features
    assert {name: bound[0][name] for name in features} == {name: bound[1][name] for name in features}
    assert len(set(bound[0].values())) == len(bound[0]), "two tensors share an address"
    first, second = [(call.owner, call.arguments) for call in calls if call.name == MEMORY]
    assert (first[0], second[0]) == tuple(sizes)
    assert first[1] == second[1]
    assert first[1][1] == 8192


def test_scratch_that_grows_is_told_to_an_engine_that_was_captured(rig: Rig) -> None:
    sizes = {"IExecutionContext 1": 4096, "IExecutionContext 2": 2**20}
    rig.recorder.results[SCRATCH] = lambda context: sizes[context.label]
    full, reuse = rig.start().values()
    launch = step(full)
    launch()
    launch()
    reuse.bind(buffers_for(reuse, 2))
    mark = rig.mark()
    launch()
    assert rig.names_since(mark)[1:3] == [MEMORY, EXECUTE], "the graph that has the old address was replayed"
    old, new = rig.recorder.named(MEMORY)
    assert old[0] != new[0]
    assert new[1] == 2**20


@pytest.mark.parametrize("level", ["none", "fold"])
def test_a_window_is_one_launch_once_it_was_captured(rig: Rig, level: str, optimized: dict[str, Bundle]) -> None:
    """Windows of 2, 4, 3 and 1 steps; `EXECUTE` is counted where an engine really runs, once also in a capture."""
    rig.bundle = optimized.get(level, rig.bundle)
    pipeline = rig.pipeline()
    schedule = Schedule.from_flags((True, False, True, False, False, False, True, False, False, True))
    sampler = pipeline.sampler(pipeline.sampling(10, schedule))
    given = conditioning_of_classes(rig.bundle.manifest, [1, 2])
    launched = []
    for _ in range(4):
        mark = rig.mark()
        done = sampler(given, [0, 1], 1.5)
        names = rig.names_since(mark)
        launched.append((names.count("torch.cuda.graph"), names.count("CUDAGraph.replay"), names.count(EXECUTE)))
        assert done.full_seconds == [MILLISECONDS / 1e3] * 4
        assert done.reuse_seconds == [MILLISECONDS / 1e3] * 6
    before = 0 if level == "none" else 2  # the conditioning engines, for all steps of a trajectory
    assert launched[1:] == [(4, 4, 10 + before), (0, 4, before), (0, 4, before)], "the first one warms up"

    seen = list[int]()
    sampler(given, [0, 1], 1.5, observe=lambda latents: seen.append(len(latents)))
    assert seen == [2] * 10, "who watches the latents sees all"


def test_windows_that_begin_with_different_graphs_are_captured_each(
    rig: Rig, run_folder: Path, pipeline_folder: Path
) -> None:
    rig.bundle, schedule, _ = exported_with_masks(run_folder, str(pipeline_folder), "fold")
    pipeline = rig.pipeline()
    sampler = pipeline.sampler(pipeline.sampling(schedule.steps, schedule))
    given = conditioning_of_classes(rig.bundle.manifest, [1, 2])
    layout = Layout.of(schedule.plan)
    lengths = Counter(layout.windows)
    windows = {(layout.graphs[layout.windows.index(window)], length) for window, length in lengths.items()}
    assert len({graph for graph, _ in windows}) == 5, "four masks and the full graph"
    steps, launched = Counter(step.graph for step in schedule.plan), []
    for _ in range(4):
        mark = rig.mark()
        done = sampler(given, [0, 1], 1.5)
        names = rig.names_since(mark)
        launched.append((names.count("torch.cuda.graph"), names.count("CUDAGraph.replay"), names.count(EXECUTE)))
        assert {graph: len(times) for graph, times in done.of_graphs.items()} == steps
    captured = launched[0][0] + launched[1][0]  # engines alone too, where their graph begins windows of two lengths
    assert captured >= len(windows), "once for each graph that begins a window, and each length of its windows"
    assert launched[2:] == [(0, len(lengths), 2)] * 2, "the two graphs of the conditioning, for all steps at once"


def test_scratch_does_not_move_within_a_trajectory_of_partial_steps(
    rig: Rig, run_folder: Path, pipeline_folder: Path
) -> None:
    """What was captured would read the old one. The engine of the last partial graph needs the most."""
    rig.recorder.results[SCRATCH] = lambda context: 4096 * int(context.label.split()[-1])
    rig.bundle, schedule, _ = exported_with_masks(run_folder, str(pipeline_folder), "fold")
    denoiser = rig.denoiser()
    for plan in (Schedule.fora(schedule.steps, 2).plan, schedule.plan):
        run = denoiser.begin(plan, torch.zeros(len(plan)), LABELS, [2])
        generation = run.generation
        for step, offset in enumerate(run.offsets):
            run.at(step, 2).predict(offset, LATENTS, 3, **LABELS)
        assert run.generation == generation


def test_schedules_alternate_and_each_keeps_what_it_captured(rig: Rig, optimized: dict[str, Bundle]) -> None:
    """Each length of windows has tensors of its own. Here are windows of 1, 2, 2, 1 and of 2, 3, 1 steps."""
    rig.bundle = optimized["fold"]
    pipeline = rig.pipeline()
    samplers = [pipeline.sampler(pipeline.sampling(6, schedule)) for schedule in ("fora:2", "fora:3")]
    given = conditioning_of_classes(rig.bundle.manifest, [1, 2])
    launched = []
    for _ in range(4):
        for sampler in samplers:
            mark = rig.mark()
            sampler(given, [0, 1], 1.5)
            names = rig.names_since(mark)
            launched.append((names.count("torch.cuda.graph"), names.count("CUDAGraph.replay")))
    assert launched[3:] == [(3, 3), *[(0, 4), (0, 3)] * 2], "the trajectories before warm up"


@pytest.mark.parametrize("level", ["none", "fold"])
def test_only_a_window_whose_launches_all_ran_is_captured(rig: Rig, level: str, optimized: dict[str, Bundle]) -> None:
    rig.bundle = optimized.get(level, rig.bundle)
    denoiser = rig.denoiser()
    assert denoiser.window is None, "no step is known"
    plan, timesteps = Schedule.from_flags((True, False, False, True)).plan, torch.tensor([900.0, 700, 500, 300])
    run = denoiser.begin(plan, timesteps, LABELS, [2])
    memory, captured = run.generation, []
    for step, offset in enumerate(run.offsets[:3]):
        captured.append(run.at(0, 2).is_capturable())
        assert run.at(3, 2).is_capturable() == (step > 0), "its window has the full step alone"
        run.at(step, 2).predict(offset, LATENTS, 3, **LABELS)
    assert [*captured, run.at(0, 2).is_capturable()] == [False, False, level == "none", True]

    assert run.generation == memory
    run.at(0, 1)
    ready = run.at(0, 2)
    assert run.generation != memory, "captured steps would go on with launches that are no more"
    assert not ready.is_capturable(), "it was bound anew"


def test_a_trajectory_of_another_batch_in_between_is_followed_by_a_first_run(rig: Rig) -> None:
    pipeline = rig.pipeline()
    schedule = Schedule.from_flags((True, False))
    sampler, other = (pipeline.sampler(pipeline.sampling(2, schedule)) for _ in range(2))
    both, captures = conditioning_of_classes(rig.bundle.manifest, [1, 2]), []
    for one, given in ((sampler, both), (other, both.at([0])), (sampler, both), (sampler, both), (sampler, both)):
        mark = rig.mark()
        one(given, range(given.images), 1.5)
        captures.append(rig.names_since(mark).count("torch.cuda.graph"))
    assert captures == [0, 0, 0, 1, 0]


def test_the_reuse_engine_reads_its_step_of_the_sums_where_it_is(rig: Rig, optimized: dict[str, Bundle]) -> None:
    rig.bundle = optimized["fold"]
    denoiser = rig.denoiser()
    run = denoiser.begin((FULL_STEP, REUSE_STEP, REUSE_STEP), torch.tensor([900.0, 700, 500]), LABELS, [2])
    read = []
    for step, offset in enumerate(run.offsets):
        ready, mark = run.at(step, 2), rig.mark()
        ready.predict(offset, LATENTS, 3, **LABELS)
        told = [call.arguments for call in rig.recorder.since(mark) if call.name.endswith("set_tensor_address")]
        read.append(dict(told).get("folded.0"))
    sums = run.window.buffers.tensors["window.folded.0"]
    assert sums.shape == (2, 2, 16, 16)
    assert read == [None, None, sums[1].data_ptr()], "the first was bound before its step"
    assert "folded.0" not in run.window.buffers.tensors


@pytest.mark.parametrize(
    ("member", "result", "message"),
    [
        ("Runtime.deserialize_cuda_engine", None, r"could not load .*full\.plan"),
        ("ICudaEngine.create_execution_context", None, "could not start an execution context"),
        ("IExecutionContext.set_tensor_address", False, "could not bind latents"),
        ("IExecutionContext.set_input_shape", False, "could not take the shape of latents"),
        (EXECUTE, False, "could not run a step"),
    ],
)
def test_every_failure_is_raised_with_the_reason_in_one_line(
    rig: Rig, member: str, result: object, message: str
) -> None:
    rig.recorder.fail(member, result, "Error Code 1:\n  no such thing  ")
    with pytest.raises(BackendError, match=f"^tensorrt {message}: Error Code 1: no such thing$"):
        step(rig.start()["full"])


def test_a_refused_profile_and_a_shape_that_cannot_be_inferred_are_named(rig: Rig) -> None:
    rig.profiles((1, 2, 4), (2, 4, 8))
    engine = rig.start()["full"]
    rig.recorder.results["IExecutionContext.infer_shapes"] = ["latents", "timestep"]
    with pytest.raises(BackendError, match="cannot infer the shape of latents, timestep"):
        step(engine)
    rig.recorder.results["IExecutionContext.set_optimization_profile_async"] = False
    with pytest.raises(BackendError, match="could not use profile 0: no error was logged"):
        step(engine)


def test_a_step_that_fails_while_it_is_captured_leaves_no_graph(rig: Rig) -> None:
    launch = step(rig.start()["full"])
    rig.recorder.fail(EXECUTE, False, "not permitted while capturing")
    for _ in range(2):
        with pytest.raises(BackendError, match="could not run a step: not permitted while capturing"):
            launch()
    assert not rig.recorder.named("CUDAGraph.replay")


def test_a_batch_outside_all_profiles_names_them_and_the_command(rig: Rig) -> None:
    rig.profiles((1, 2, 4), (2, 4, 8))
    engine = rig.start()["full"]
    with pytest.raises(InputError, match=r"batch of 9 .* 1:2:4, 2:4:8 .* fora-trt build --batch 1:9:9"):
        engine.scratch_bytes(9)
    engine.scratch_bytes(5)
    assert rig.recorder.named("IExecutionContext.set_optimization_profile_async")[-1][0] == 1


def test_a_batch_too_large_for_the_gpu_names_one_that_fits(rig: Rig) -> None:
    shape = "IExecutionContext.set_input_shape"
    rig.recorder.results[SCRATCH] = lambda context: rig.recorder.named(shape)[-1][1][0] * 2**30
    denoiser = rig.denoiser()
    rig.cuda.free = 3 * 2**30 + 2**29
    message = r"a batch of 8 .* needs 8\.00 GiB on cuda:0, but only 3\.50 GiB are free; a batch of 3 fits"
    with pytest.raises(InputError, match=message):
        denoiser.begin((FULL_STEP, REUSE_STEP), torch.zeros(2), LABELS, [8])
    rig.cuda.free = 2**20
    with pytest.raises(InputError, match="not even a batch of 1 fits"):
        denoiser.begin((FULL_STEP, REUSE_STEP), torch.zeros(2), LABELS, [8])


def test_weights_that_do_not_fit_are_not_loaded(rig: Rig) -> None:
    rig.profiles((1, 2, 4))
    rig.cuda.free = 7  # two plans of four bytes
    with pytest.raises(
        BackendError, match=r"the weights of .* cuda:0 has 0\.00 GiB free; end other programs on the GPU"
    ):
        rig.start()
    assert not rig.recorder.named("Runtime.deserialize_cuda_engine")


@pytest.mark.parametrize("way", ["close", "del"])
def test_a_graph_is_freed_before_its_context_and_that_before_its_engine(rig: Rig, way: str) -> None:
    engines = rig.start()
    engine = engines.pop("full")
    launch = step(engine)
    launch()
    mark = rig.mark()
    if way == "close":
        engine.close()  # type: ignore[attr-defined] # of this backend alone
    del engine, launch
    names = [call.name for call in rig.recorder.calls[mark:]]
    first = ["torch.cuda.synchronize", "CUDAGraph.__del__"]
    freed = ["IExecutionContext.__del__", "IRuntimeConfig.__del__", "ICudaEngine.__del__"]
    assert names == [*(first if way == "close" else reversed(first)), *freed]


def test_compiled_kernels_are_kept_for_the_next_engine_unless_they_were_altered(rtx: Rig) -> None:
    step(rtx.start()["full"])
    (kept,) = rtx.source.folder.rglob("full.sm89.kernels")
    assert kept.read_bytes() == hashlib.sha256(b"kernels").digest() + b"kernels"
    rtx.start()
    assert rtx.recorder.named("IRuntimeCache.deserialize") == [(b"kernels",)]
    kept.write_bytes(kept.read_bytes() + b"!")
    rtx.start()
    assert len(rtx.recorder.named("IRuntimeCache.deserialize")) == 1


def test_kernels_of_another_batch_are_kept_too_and_looked_for_once_a_batch(rtx: Rig) -> None:
    kernels = [b"of 2", b"of 2 and 4"]
    rtx.recorder.results["IRuntimeCache.serialize"] = lambda cache: kernels[0]
    engine = rtx.start()["full"]
    launches = [step(engine), step(engine)]
    assert len(rtx.recorder.named("IRuntimeCache.serialize")) == 1, "the second launch is at the same batch"
    del kernels[0]
    launches.append(step(engine, batch=4))
    (kept,) = rtx.source.folder.rglob("full.sm89.kernels")
    assert kept.read_bytes()[32:] == b"of 2 and 4"
    for launch in launches:
        launch()
    assert len(rtx.recorder.named("IRuntimeCache.serialize")) == 2


def test_kernels_that_cannot_be_written_are_no_error(rtx: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = rtx.start()["full"]

    def full_disk(path: Path) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr("fora_trt.engines.tensorrt.engine.beside", full_disk)
    step(engine)
    assert not list(rtx.source.folder.rglob("*.kernels"))
    assert rtx.recorder.named(EXECUTE)


def build(rig: Rig, folder: Path, cache: Path | None = None, **options: Any) -> tuple[str, ...]:
    onnx, record = rig.bundle.graph_path("full"), rig.bundle.manifest.graphs["full"]
    wanted = PlanOptions(profiles=(Profile(minimum=1, optimum=2, maximum=4),), **options)
    built = plan_from_onnx(rig.library, onnx, folder / "full.plan", record.inputs, wanted, ("8.9",), cache)
    return tuple(f"{one.name} {one.fused}" for one in built.attentions)


def test_a_plan_is_strongly_typed_without_tf32_and_as_the_options_say(rig: Rig, tmp_path: Path) -> None:
    recorder, kinds = rig.recorder, rig.recorder.module.LayerType
    attention = recorder.make("IAttention", name="node_attention")
    layers = [
        recorder.make("ILayer", type=kinds.CONSTANT, name="weight"),
        recorder.make("ILayer", type=kinds.ATTENTION_INPUT, name="input", attention=attention),
    ]
    recorder.results |= {"INetworkDefinition.num_layers": 2, "INetworkDefinition.get_layer": lambda _, i: layers[i]}
    assert build(rig, tmp_path, optimization_level=4, workspace_gib=1.5) == ("node_attention None",)
    assert (tmp_path / "full.plan").read_bytes() == b"plan"
    module = recorder.module
    expected: dict[str, list[tuple[Any, ...]]] = {
        "Builder.create_network": [(1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED),)],
        "IBuilderConfig.clear_flag": [(module.BuilderFlag.TF32,)],
        "IAttention.decomposable=": [(True,)],
        "IBuilderConfig.builder_optimization_level=": [(4,)],
        "IBuilderConfig.set_memory_pool_limit": [(module.MemoryPoolType.WORKSPACE, 3 * 2**29)],
        "IBuilderConfig.max_aux_streams=": [(0,)],
    }
    assert {name: recorder.named(name) for name in expected} == expected
    shapes = {name: (low, best, high) for name, low, best, high in recorder.named("IOptimizationProfile.set_shape")}
    assert shapes["latents"] == ((1, 4, 8, 8), (2, 4, 8, 8), (4, 4, 8, 8))
    assert shapes.keys() == {"latents", "timestep", "class_labels"}


@pytest.mark.parametrize("fits", [True, False])
def test_a_timing_cache_that_does_not_fit_is_left_aside_and_written_anew(rig: Rig, tmp_path: Path, fits: bool) -> None:
    cache = tmp_path / "timings"
    cache.write_bytes(b"earlier")
    answers = iter([fits, True])

    def answer(*_: Any) -> bool:
        fitting = next(answers)
        if not fitting:  # as the library does, which must not end the build
            rig.recorder.logger.log(1, "the cache is of another version")
        return fitting

    rig.recorder.results["IBuilderConfig.set_timing_cache"] = answer
    build(rig, tmp_path, cache)
    tried = rig.recorder.named("IBuilderConfig.create_timing_cache")
    assert tried == ([(b"earlier",)] if fits else [(b"earlier",), (b"",)])
    assert {ignore for _, ignore in rig.recorder.named("IBuilderConfig.set_timing_cache")} == {False}
    assert cache.read_bytes() == b"timings"


@pytest.mark.parametrize(
    ("member", "result", "message"),
    [
        ("Builder.build_serialized_network_to_stream", False, "could not build .*: out of tactics"),
        ("OnnxParser.parse_from_file", False, "cannot read .*: out of tactics"),
        ("IBuilderConfig.clear_flag", None, "does not accept the build options: out of tactics"),
        ("IBuilderConfig.add_optimization_profile", -1, "does not accept the batch profile 1:2:4: out of tactics"),
    ],
)
def test_a_build_that_fails_says_why_and_leaves_no_set_of_plans(
    rig: Rig, member: str, result: object, message: str
) -> None:
    rig.recorder.fail(member, result, "out of\ntactics")
    with pytest.raises(PlanError, match=f"^tensorrt {message}$"):
        rig.profiles((1, 2, 4))
    assert not list(rig.source.folder.rglob("*.plan"))
    assert not list(rig.source.folder.rglob("manifest.json"))


def test_a_full_disk_is_an_os_error_and_not_the_builders(rig: Rig, tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    (tmp_path / "full.plan").symlink_to("/dev/full")
    writes: list[int] = []

    def large(_: Any, __: Any, ___: Any, writer: Any) -> bool:
        writes.append(writer.write(bytes(2**20)))
        return False

    rig.recorder.results["Builder.build_serialized_network_to_stream"] = large
    with pytest.raises(OSError, match="No space left"):
        build(rig, tmp_path)
    assert writes == [0]


def test_an_interrupt_stops_the_builder_before_it_is_passed_on(rig: Rig, tmp_path: Path) -> None:
    stopped: list[str] = []

    def slow(_: Any, __: Any, config: Any, ___: Any) -> bool:
        monitor, deadline = config.progress_monitor, time.monotonic() + 10
        monitor.phase_start("building", None, 10**6)
        threading.Timer(0.05, _thread.interrupt_main).start()
        for number in range(10**6):
            if time.monotonic() > deadline:
                break
            if not monitor.step_complete("building", number):
                stopped.append("by the monitor")
                break
            time.sleep(0.001)
        return False

    rig.recorder.results["Builder.build_serialized_network_to_stream"] = slow
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # some runners ignore the signal
    try:
        with pytest.raises(KeyboardInterrupt):
            build(rig, tmp_path)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert stopped == ["by the monitor"]


@pytest.fixture(scope="module", params=["10.16.1.11", "11.4.0.106", "tensorrt_rtx"])
def bindings(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bindings:
    which: str = request.param
    try:
        return names_of_installed(which) if "rtx" in which else names_of(which, tmp_path_factory.mktemp("bindings"))
    except NoBindings as reason:
        pytest.skip(str(reason))


def test_all_that_the_standin_has_is_in_the_bindings(bindings: Bindings) -> None:
    members = [(name, *item) for name, use in declared("rtx" in bindings.title).items() for item in use.items()]
    problems = []
    for name, member, use in members:
        if use in (GET, SET):
            problems.append(bindings.problem(name, member, "property", assigned=use == SET))
        elif use == ENUM:
            problems.append(bindings.problem(name, member, "enum member"))
        else:
            problems.append(bindings.problem(name, member, "method", None if use is None else int(use)))
    assert len(problems) >= 60
    assert not list(filter(None, problems))
    assert bindings.problem("IExecutionContext", "set_tensor_adress")


def defined_in(tree: ast.Module) -> Iterator[str]:
    """What a module of the project defines: functions, classes, annotated fields, attributes of `self`."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.AnnAssign):
            yield ast.unparse(node.target).removeprefix("self.")
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr


def unknown_names(source: str) -> set[str]:
    """Attribute names that neither the stand-ins nor the project nor anything else used there defines."""
    package = ENGINES.parents[1]
    files = [*ENGINES.parent.rglob("*.py"), package / "bundle.py", package / "files.py", package / "contract.py"]
    known = {name for file in files for name in defined_in(ast.parse(file.read_text()))}
    known |= {name for rtx in (False, True) for members in declared(rtx).values() for name in members}
    known |= {name for rtx in (False, True) for name in declared(rtx)}
    others: tuple[Any, ...] = (
        builtins, bytes, ctypes, dict, functools, hashlib, hashlib.sha256(), list, memoryview, mmap, os, pathlib, Path,
        re, str, set, threading, threading.Event, threading.Thread, time, torch, weakref, torch.cuda, torch.Tensor,
        torch.device, torch.cuda.Stream, util, pydantic.BaseModel, open(os.devnull, "rb"),  # noqa: SIM115, PTH123 - for its type
    )  # fmt: skip
    known |= {name for one in others for name in dir(one)} | {"__members__", "cuda_stream", "major", "minor"}
    return {node.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)} - known


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_every_attribute_in_the_sources_is_known(path: Path) -> None:
    assert not unknown_names(path.read_text())


@pytest.mark.parametrize(
    ("file", "name", "misspelt"),
    [
        ("engine.py", "set_tensor_address", "set_tensor_adress"),
        ("engine.py", "EAGER", "EAGERLY"),
        ("plan_builder.py", "max_aux_streams", "max_auxiliary_streams"),
        ("library.py", "ILogger.ERROR", "ILogger.ERRORS"),
    ],
)
def test_a_misspelt_name_is_found_in_the_sources(file: str, name: str, misspelt: str) -> None:
    source = (ENGINES / file).read_text()
    assert name in source
    assert unknown_names(source.replace(name, misspelt)) == {misspelt.rpartition(".")[2]}


def test_everything_that_the_standin_has_is_used() -> None:
    text = "".join(path.read_text() for path in SOURCES)
    by_number = {"SM80", "SM86", "SM89", "SM120", "CONSTANT"}  # capabilities are found by number; one other layer
    names = {name for rtx in (False, True) for members in declared(rtx).values() for name in members}
    assert {name for name in names if not re.search(rf"\b{name}\b", text)} == by_number
