import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fora_trt import Schedule
from fora_trt.bundle import Bundle
from fora_trt.engines.options import EngineOptions
from fora_trt.errors import BackendError, InputError
from fora_trt.evaluate import bench, peaks
from fora_trt.evaluate import peak_memory as peak_memory_module
from fora_trt.evaluate.bench import Benchmark
from fora_trt.evaluate.eager_fora import EagerFora, PlainPredictor, PlainRun
from fora_trt.evaluate.peak_memory import PeakMemory, peak_memory, steps_until_full
from fora_trt.evaluate.peaks import Roofline, measure_peaks
from fora_trt.evaluate.targets import EngineClock, Target, targets_of
from fora_trt.export.statistics import graph_statistics
from fora_trt.pipeline import Pipeline, PipelineConfig
from fora_trt.plan import FULL_STEP, Plan, Step
from fora_trt.report.results import EAGER, PeakRates
from fora_trt.runtime.interface import Predictor
from fora_trt.sampling.conditioning import Conditioning, example_conditioning
from fora_trt.sampling.guidance import Guidance
from fora_trt.sampling.loop import Sampler, Watch
from tests.conftest import BundleAt

CPU = torch.device("cpu")


class Time:
    """A clock that goes on only where a step says so."""

    now = 0.0

    def pass_by(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Time:
    """In place of the machine's, which other work on it would disturb."""
    clock = Time()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(bench, "measure_peaks", lambda device, precision: PeakRates(flops=1e9, bytes=1e9))
    return clock


class Sleeper(PlainPredictor):
    """Takes steps of a known length: most of it in what counts as an engine, the rest outside."""

    device = CPU

    def __init__(
        self, pipeline: Pipeline, engines: EngineClock, pass_by: Callable[[float], None], full: float, reuse: float,
        overhead: float,
    ) -> None:  # fmt: skip
        self.manifest = pipeline.manifest
        self._engine, self._pass_by = engines.timed(pass_by), pass_by
        self._times, self._overhead = {True: full, False: reuse}, overhead

    def compute(self, step: Step, latents: Tensor, timestep: Tensor | float, **conditioning: Tensor) -> Tensor:
        self._engine(self._times[step.is_full])
        self._pass_by(self._overhead)
        return torch.cat([latents, latents], 1)  # its learned variance too


def target_of(
    pipeline: Pipeline, name: str, predictor: Predictor, engines: EngineClock, *schedules: str, controls: bool = True
) -> Target:
    """A target that is timed without caching and then along each of the schedules."""
    taken = [pipeline.sampling(schedule=one).schedule for one in ("none", *schedules)]
    return Target(name, pipeline.over(predictor), engines, tuple(taken), schedules if controls else ())


def sleeper(
    pipeline: Pipeline, name: str, clock: Time, full: float, reuse: float, overhead: float = 0.0,
    kind: type[Sleeper] = Sleeper,
) -> Target:  # fmt: skip
    engines = EngineClock()
    return target_of(pipeline, name, kind(pipeline, engines, clock.pass_by, full, reuse, overhead), engines, "fora:2")


def measured(one: Benchmark, images: int, repeats: int) -> list[str]:
    return list(one.measure(example_conditioning(one.pipeline.manifest, images), repeats))


def test_times_ideals_and_shares_are_those_of_steps_of_known_length(exported: Bundle, clock: Time) -> None:
    pipeline = Pipeline(exported, steps=6)
    one = Benchmark(pipeline, [sleeper(pipeline, "sleeper", clock, full=0.02, reuse=0.002, overhead=0.005)])
    measured(one, 2, 3)
    plain, cached, control = one.result().rows
    assert [row.setting.label for row in (plain, cached, control)] == ["no cache", "fora:2", "5 steps, no cache"]
    assert [row.setting.full_steps for row in (plain, cached, control)] == [6, 4, 5]
    assert control.setting.control_of == "fora:2"
    # four full steps of 25 ms and two reuse steps of 7 ms take as long as 4.56 full steps
    assert (plain.seconds, cached.seconds, control.seconds) == pytest.approx((0.15, 0.114, 0.125))
    assert cached.ideal_speedup == 6 / 4
    assert cached.speedup == pytest.approx(0.15 / 0.114)
    assert cached.of_ideal == cached.speedup / 1.5
    assert plain.overhead == pytest.approx(0.2)
    assert cached.overhead == pytest.approx(6 * 0.005 / 0.114)
    assert plain.full_step_seconds == pytest.approx(0.025)
    assert cached.reuse_step_seconds == pytest.approx(0.007)
    assert plain.reuse_step_seconds is None
    assert plain.fastest <= plain.seconds <= plain.slowest
    assert one.result().repeats == 3


def test_rows_are_timed_in_turn(exported: Bundle, clock: Time) -> None:
    pipeline = Pipeline(exported, steps=4)
    one = Benchmark(pipeline, [sleeper(pipeline, name, clock, 0.001, 0) for name in ("first", "second")])
    stages = [stage for stage in measured(one, 1, 2) if "repeat" in stage]
    turns = [name for name, _ in itertools.groupby(stages)]
    assert turns == [f"{name}, batch 1: repeat {repeat}" for repeat in (1, 2) for name in ("first", "second")]


def test_what_is_interrupted_keeps_the_rows_that_are_done(exported: Bundle, clock: Time) -> None:
    pipeline = Pipeline(exported, steps=4)
    one = Benchmark(pipeline, [sleeper(pipeline, name, clock, 0.001, 0) for name in ("first", "second")])
    measured(one, 1, 2)
    stages = one.measure(example_conditioning(exported.manifest, 2), 5)
    for stage in stages:
        if stage == "second, batch 2: repeat 1":
            break
    found = one.result(interrupted=True)
    assert found.interrupted
    assert [(row.backend, row.images) for row in found.rows].count(("second", 1)) == 3
    assert {row.backend for row in found.rows if row.images == 2} == {"first"}

    with pytest.raises(BackendError, match="interrupted before the first measurement"):
        Benchmark(pipeline, []).result()


def test_a_backend_that_fails_is_a_line_and_not_the_end(exported: Bundle, clock: Time) -> None:
    class Full(Sleeper):
        def begin(
            self,
            plan: Plan,
            timesteps: Tensor,
            conditioning: Mapping[str, Tensor],
            batches: Sequence[int],
            first: int = 0,
        ) -> PlainRun:
            if max(batches) > 2:
                raise InputError(f"a batch of {max(batches)} needs more than there is")
            return super().begin(plan, timesteps, conditioning, batches, first)

    pipeline = Pipeline(exported, steps=4)
    small = sleeper(pipeline, "small", clock, 0.001, 0, kind=Full)
    one = Benchmark(pipeline, [small, sleeper(pipeline, "large", clock, 0.001, 0)])
    measured(one, 1, 1)
    measured(one, 4, 1)
    found = one.result()
    assert {(row.backend, row.images) for row in found.rows} == {("small", 1), ("large", 1), ("large", 4)}
    (absent,) = found.absent
    assert (absent.backend, absent.why) == ("small", "at a batch of 4: a batch of 8 needs more than there is")
    with pytest.raises(BackendError, match=r"no backend can run .*: at a batch of 4: a batch of 8"):
        measured(Benchmark(pipeline, [small]), 4, 1)


def test_a_benchmark_computes_what_the_bundle_does(exported: Bundle) -> None:
    """What is timed is the real thing: its latents are those of eager FORA in fp32."""
    pipeline = Pipeline(exported, steps=9)
    targets, _ = targets_of(
        pipeline, ["onnxruntime"], [Schedule.fora(9, 3)], lambda name: CPU, EngineOptions(), references=[EAGER]
    )
    one = Benchmark(pipeline, targets)
    measured(one, 2, 1)
    latents = {
        (timing.target.backend, timing.setting.label): timing.latents for timing in one.rows[2] if timing.trajectories
    }
    for label in ("no cache", "fora:3"):
        assert torch.allclose(latents["onnxruntime", label], latents[EAGER, label], atol=1e-4)
    assert not torch.allclose(latents[EAGER, "no cache"], latents[EAGER, "fora:3"], atol=1e-4)


def test_the_eager_rival_of_a_half_bundle_is_cast_as_a_whole(bundle_at: BundleAt) -> None:
    bundle = bundle_at("fold", "bf16")
    rival, reference = EagerFora(bundle, CPU, cast_whole=True), EagerFora(bundle, CPU)
    assert {one.dtype for one in rival.module.parameters()} == {torch.bfloat16}
    latents, labels = torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
    rough, exact = (one.compute(FULL_STEP, latents, 500.0, class_labels=labels) for one in (rival, reference))
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).norm() / exact.norm() < 0.05


def test_what_plain_pytorch_keeps_is_not_asked_for_again(exported: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    rival = EagerFora(exported, CPU)
    begin = partial(rival.begin, [FULL_STEP], torch.zeros(1), {})
    begin([2])
    monkeypatch.setattr("fora_trt.engines.memory.free_bytes", lambda device: 0)
    begin([2])
    with pytest.raises(InputError, match=r"a batch of 3 .* not even a batch of 1 fits"):
        begin([3])


def test_the_roofline_counts_operations_and_bytes(exported: Bundle) -> None:
    """Three blocks of width 16 on 16 tokens; the products of the full graph are counted by hand."""
    roofline = Roofline(exported)
    schedule = Schedule.fora(4, 2)
    tokens, width = 16, 16
    block = 2 * tokens * width * (4 * width + 8 * width) + 2 * 2 * tokens * tokens * width
    adaln = 2 * width * 6 * width
    edges = 2 * tokens * 16 * width + 2 * tokens * width * 32  # patches in, predictions out
    embedder = 2 * 256 * width + 2 * width * width  # each block has one of its own
    full = 3 * (block + adaln + embedder) + edges + 2 * width * 2 * width
    rates = PeakRates(flops=1.0, bytes=1e30)
    seconds = roofline.seconds(Schedule.fora(1, 1), 1, rates)
    assert seconds == full
    assert roofline.seconds(Schedule.fora(1, 1), 3, rates) == 3 * seconds
    assert seconds * 3 < roofline.seconds(schedule, 1, rates) < seconds * 3.5  # three full steps and a reuse one

    weights = exported.manifest.files["full.onnx.data"].size
    features = 6 * tokens * width * 4
    moved = [roofline.seconds(Schedule.fora(1, 1), batch, PeakRates(flops=1e30, bytes=1.0)) for batch in (1, 2)]
    inline = graph_statistics(exported.graph_path("full")).weight_bytes - weights  # constants in the graph's own file
    assert moved[0] == pytest.approx(weights + inline + features, rel=0.15)
    assert moved[1] - moved[0] == pytest.approx(features + 4 * 64 * (4 + 8), rel=0.01)


def test_peak_rates_are_those_of_this_machine() -> None:
    rates = measure_peaks(CPU, "fp32")
    assert 1e9 < rates.flops < 1e14
    assert 1e8 < rates.bytes < 1e12


def test_products_for_the_roofline_are_of_seeded_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU multiplies ones faster than numbers that differ."""
    multiplied: list[Tensor] = []

    def product(left: Tensor, right: Tensor, *, out: Tensor) -> Tensor:
        multiplied.extend((left, right))
        return out

    monkeypatch.setattr(torch, "mm", product)
    monkeypatch.setattr(peaks, "MATRIX", {"cpu": 256})
    monkeypatch.setattr(peaks, "COPIED", {"cpu": 2**20})
    measure_peaks(CPU, "fp32")
    left, right = multiplied[:2]
    assert left.std().item() == pytest.approx(1, abs=0.05)
    assert not torch.equal(left, right)
    measure_peaks(CPU, "fp32")
    assert torch.equal(multiplied[-2], left) and torch.equal(multiplied[-1], right)


def test_work_of_a_gpu_is_timed_by_events(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            told.append("record")

        def synchronize(self) -> None:
            told.append("wait")

        def elapsed_time(self, other: "Event") -> float:
            return 250.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: told.append("idle"))
    assert peaks.seconds_of(lambda: told.append("work"), torch.device("cuda", 0)) == 0.25
    assert told == ["idle", "record", "work", "record", "wait"]


def test_copies_for_the_roofline_are_larger_than_caches_and_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, gib = torch.device("cuda", 0), 2**30
    monkeypatch.setattr(peaks, "free_bytes", lambda device: 70 * gib)
    assert (peaks.copied_bytes(CPU), peaks.copied_bytes(gpu)) == (gib // 4, 2 * gib)
    monkeypatch.setattr(peaks, "free_bytes", lambda device: gib + 12)
    assert peaks.copied_bytes(gpu) == gib // 4, "a quarter, in whole numbers of four bytes"


def measured_peak(bundle: Bundle, given: Conditioning | None = None, **settings: Any) -> int:
    """Of a guided benchmark of six steps on the CPU."""
    usual: dict[str, Any] = {"steps": 6, "guidance_scale": 1.5, "backend": "onnxruntime", "device": "cpu"}
    return peak_memory(
        PipelineConfig(bundle.folder, **{**usual, **settings}), given or example_conditioning(bundle.manifest, 2)
    )


@pytest.mark.slow
def test_peak_memory_is_that_of_a_process_of_its_own(exported: Bundle) -> None:
    ballast = torch.ones(2**28)  # 1 GiB, of this process
    assert 100 * 2**20 < measured_peak(exported) < ballast.nbytes


@pytest.mark.slow
def test_a_process_that_cannot_measure_memory_says_why(exported: Bundle) -> None:
    with pytest.raises(BackendError, match=r"^unknown backend 'no such backend'; choose one of "):
        measured_peak(exported, backend="no such backend")


def test_a_process_that_says_nothing_is_named(exported: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(BackendError, match="the process exited with 1 and printed nothing"):
        measured_peak(exported)


@pytest.mark.usefixtures("memory_in_this_process")
def test_inputs_that_cannot_be_measured_are_a_sentence(exported: Bundle) -> None:
    given = example_conditioning(exported.manifest, 2)
    with pytest.raises(BackendError, match=r"^classifier-free guidance needs unconditional inputs"):
        measured_peak(exported, replace(given, unconditional=None))
    with pytest.raises(BackendError, match=r"^'class_labels' has shape \[2\]; tiny takes \[3\]$"):
        measured_peak(exported, replace(given, images=3))


@pytest.mark.usefixtures("memory_in_this_process")
def test_memory_is_measured_with_the_scheduler_and_the_guidance_of_the_benchmark(
    exported: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[tuple[object, ...]] = []

    def take(self: Sampler, given: Conditioning, seeds: object, guidance: object, watch: Watch) -> None:
        assert [*watch(range(6))] == [0, 1], "until a reuse step has run"
        taken.append((self.scheduler_step.timesteps.tolist(), self.schedule.full, given.digest(), guidance))

    monkeypatch.setattr(Sampler, "__call__", take)
    given = example_conditioning(exported.manifest, 3).at([2, 0, 1])
    settings = {"scheduler": "dpm-solver++", "timestep_spacing": "trailing", "guidance_scale": 3.5}
    assert measured_peak(exported, given, **settings) > 0
    times = [999, 832, 666, 499, 332, 166]
    assert taken == [(times, Schedule.fora(6, 3).full, given.digest(), Guidance(3.5))]


def test_memory_of_a_forecast_is_measured_where_it_reads_all_its_full_steps() -> None:
    steps = [steps_until_full(Schedule.from_text(text, 12)) for text in ("none", "fora:3", "fora:3,forecast=2")]
    assert steps == [1, 2, 7]


def test_the_peak_of_a_gpu_is_what_was_least_free(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, free, reserved, seen = torch.device("cuda", 0), [1000], [0, 0], threading.Event()

    def mem_get_info(device: torch.device) -> tuple[int, int]:
        if threading.current_thread() is not threading.main_thread():
            if free[0] == 400:
                seen.set()
            elif free[0] == 500:
                raise RuntimeError("not now")
        return free[0], 2000

    for name, found in (
        ("mem_get_info", mem_get_info),
        ("memory_reserved", lambda device: reserved[0]),
        ("max_memory_reserved", lambda device: reserved[1]),
    ):
        monkeypatch.setattr(torch.cuda, name, found)
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *device: None)

    with PeakMemory(gpu) as peak:
        free[0] = 500  # while another thread captures, say
        time.sleep(0.02)
        free[0] = 400
        assert seen.wait(10)
        free[0] = 900  # freed before the end
    assert peak.bytes == 600

    reserved[0] = 50
    with PeakMemory(gpu) as peak:
        reserved[1] = 750  # for less time than lies between two samples
    assert peak.bytes == 700

    with pytest.raises(InputError), PeakMemory(gpu):
        raise InputError("the error of the block comes through")
    assert not [one for one in threading.enumerate() if one.name == "peak memory"]


def test_the_peak_of_a_process_is_never_less_than_what_it_holds() -> None:
    with PeakMemory(CPU) as peak:
        ballast = torch.ones(2**26)
    assert peak.bytes > ballast.nbytes


def test_memory_that_was_not_measured_is_told(exported: Bundle, clock: Time, monkeypatch: pytest.MonkeyPatch) -> None:
    given = example_conditioning(exported.manifest, 2)
    asked: list[tuple[PipelineConfig, Conditioning]] = []

    def refused(config: PipelineConfig, given: Conditioning) -> int:
        asked.append((config, given))
        if config.backend == "first":
            raise BackendError("the process was killed by SIGKILL")
        return 2**20

    monkeypatch.setattr(bench, "peak_memory", refused)
    pipeline = Pipeline(exported, scheduler="unipc", steps=4, guidance_scale=2.5, engines="plans")
    targets = [sleeper(pipeline, name, clock, 0.001, 0) for name in ("first", "second")]
    one = Benchmark(pipeline, targets, memory=True)
    list(one.measure(given, 1))
    timed = partial(PipelineConfig, exported.folder, "fora:3", "unipc", steps=4, guidance_scale=2.5, engines="plans")
    assert asked == [(timed(backend=name, device="cpu"), given) for name in ("first", "second")]
    found = one.result()
    assert {row.backend: row.peak_memory_bytes for row in found.rows} == {"first": None, "second": 2**20}
    assert found.notes == (
        "peak memory of first at a batch of 2 could not be measured: the process was killed by SIGKILL",
    )


def test_what_measures_memory_ends_with_the_process_that_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    parents = iter([7, 7, 1])
    ended: list[int] = []
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    peak_memory_module._end_with(7)
    assert ended == [1]
    assert [*parents] == []


def test_guidance_without_a_second_half_is_refused(exported: Bundle) -> None:
    alone = replace(exported, manifest=exported.manifest.model_copy(update={"guidance": None, "conditioning": {}}))
    with pytest.raises(InputError, match="needs unconditional inputs; tiny has none; leave --guidance-scale out"):
        Benchmark(Pipeline(alone, steps=4, guidance_scale=2.0), [])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of two libraries in turn on few cores would make times what they are not."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
