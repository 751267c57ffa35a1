import io
import itertools
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fora_trt import Schedule
from fora_trt.bundle import Bundle
from fora_trt.engines.plan_store import PlanSource
from fora_trt.errors import BackendError, InputError
from fora_trt.evaluate import bench, peaks
from fora_trt.evaluate.bench import Benchmark
from fora_trt.evaluate.eager_fora import EagerFora
from fora_trt.evaluate.entrants import EngineClock, Entrant, entrants_of, steps_of
from fora_trt.evaluate.peak_memory import PeakMemory, main, peak_memory
from fora_trt.evaluate.peaks import Floor, measure_peaks
from fora_trt.evaluate.results import EAGER, PeakRates
from fora_trt.export.statistics import graph_statistics
from fora_trt.export.write import bundle_from_model
from fora_trt.models.sources import model_from_source
from fora_trt.runtime.conditioning import Conditioning, example_conditioning
from fora_trt.runtime.sampling import Sampler
from fora_trt.runtime.schedulers import scheduler_from_config
from fora_trt.schedule import places_in_windows

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


class Sleeper:
    """Takes steps of a known length: most of it in what counts as an engine, the rest outside."""

    device = CPU

    def __init__(
        self, bundle: Bundle, engines: EngineClock, pass_by: Callable[[float], None], full: float, reuse: float,
        outside: float,
    ) -> None:  # fmt: skip
        self.manifest = bundle.manifest
        self._engine, self._pass_by = engines.timed(pass_by), pass_by
        self._times, self._outside = {True: full, False: reuse}, outside

    def begin(
        self, timesteps: Tensor, full: Sequence[bool], conditioning: Mapping[str, Tensor], batch: int
    ) -> list[int]:
        return places_in_windows(full)

    def turn_to(self, step: int) -> None: ...

    def prepare(self, batch: int) -> object:
        return None

    def predict(self, place: int, latents: Tensor, timestep: Tensor | float, **conditioning: Tensor) -> Tensor:
        self._engine(self._times[place == 0])
        self._pass_by(self._outside)
        return torch.cat([latents, latents], 1)  # its learned variance too

    def is_capturable(self) -> bool:
        return False

    def first_not_finite(self) -> str | None:
        return None


def sleeper(bundle: Bundle, name: str, time_of: Time, full: float, reuse: float, outside: float = 0.0) -> Entrant:
    engines = EngineClock()
    return Entrant(name, Sleeper(bundle, engines, time_of.pass_by, full, reuse, outside), engines, (1, 2), (2,))


def benchmark(bundle: Bundle, *entrants: Entrant, steps: int = 6) -> Benchmark:
    return Benchmark(bundle, entrants, [], scheduler_from_config(bundle.scheduler_config, None, False), steps)


def measured(one: Benchmark, images: int, repeats: int) -> list[str]:
    return list(one.measure(example_conditioning(one.bundle.manifest, images), repeats))


def test_times_ideals_and_shares_are_those_of_steps_of_known_length(exported: Bundle, clock: Time) -> None:
    one = benchmark(exported, sleeper(exported, "sleeper", clock, full=0.02, reuse=0.002, outside=0.005))
    measured(one, 2, 3)
    plain, cached, control = one.result().rows
    assert [row.setting.label for row in (plain, cached, control)] == ["no cache", "interval 2", "5 steps, no cache"]
    assert [row.setting.full_steps for row in (plain, cached, control)] == [6, 4, 5]
    assert control.setting.control_of == 2
    # four full steps of 25 ms and two reuse steps of 7 ms take as long as 4.56 full steps
    assert (plain.seconds, cached.seconds, control.seconds) == pytest.approx((0.15, 0.114, 0.125))
    assert cached.ideal_speedup == 6 / 4
    assert cached.speedup == pytest.approx(0.15 / 0.114)
    assert cached.of_ideal == cached.speedup / 1.5
    assert plain.outside == pytest.approx(0.2)
    assert cached.outside == pytest.approx(6 * 0.005 / 0.114)
    assert plain.full_step_seconds == pytest.approx(0.025)
    assert cached.reuse_step_seconds == pytest.approx(0.007)
    assert plain.reuse_step_seconds is None
    assert plain.fastest <= plain.seconds <= plain.slowest
    assert one.result().repeats == 3


def test_rows_are_timed_in_turn(exported: Bundle, clock: Time) -> None:
    one = benchmark(
        exported, sleeper(exported, "first", clock, 0.001, 0), sleeper(exported, "second", clock, 0.001, 0), steps=4
    )
    stages = [stage for stage in measured(one, 1, 2) if "repeat" in stage]
    turns = [name for name, _ in itertools.groupby(stages)]
    assert turns == [f"{name} at 1, repeat {repeat}" for repeat in (1, 2) for name in ("first", "second")]


def test_what_is_interrupted_keeps_the_rows_that_are_done(exported: Bundle, clock: Time) -> None:
    one = benchmark(
        exported, sleeper(exported, "first", clock, 0.001, 0), sleeper(exported, "second", clock, 0.001, 0), steps=4
    )
    measured(one, 1, 2)
    stages = one.measure(example_conditioning(exported.manifest, 2), 5)
    for stage in stages:
        if stage == "second at 2, repeat 1":
            break
    found = one.result(interrupted=True)
    assert found.interrupted
    assert [(row.backend, row.images) for row in found.rows].count(("second", 1)) == 3
    assert {row.backend for row in found.rows if row.images == 2} == {"first"}

    with pytest.raises(BackendError, match="nothing was measured"):
        benchmark(exported).result()


def test_a_backend_that_fails_is_a_line_and_not_the_end(exported: Bundle, clock: Time) -> None:
    class Full(Sleeper):
        def prepare(self, batch: int) -> object:
            if batch > 2:
                raise InputError(f"a batch of {batch} needs more than there is")
            return None

    engines = EngineClock()
    small = Entrant("small", Full(exported, engines, clock.pass_by, 0.001, 0, 0), engines, (1, 2), (2,))
    one = benchmark(exported, small, sleeper(exported, "large", clock, 0.001, 0), steps=4)
    measured(one, 1, 1)
    measured(one, 4, 1)
    found = one.result()
    assert {(row.backend, row.images) for row in found.rows} == {("small", 1), ("large", 1), ("large", 4)}
    (absent,) = found.absent
    assert (absent.backend, absent.why) == ("small", "at a batch of 4: a batch of 8 needs more than there is")
    with pytest.raises(BackendError, match=r"no backend can run .*: at a batch of 4: a batch of 8"):
        measured(benchmark(exported, small, steps=4), 4, 1)


def test_references_come_along_and_absent_backends_say_why(exported: Bundle) -> None:
    entrants, absent = entrants_of(
        exported, ["onnxruntime", "tensorrt"], [2, 4], lambda name: CPU, PlanSource(), references=[EAGER]
    )
    shown = {one.backend: (one.cache_intervals, one.controls) for one in entrants}
    assert shown == {"onnxruntime": ((1, 2, 4), (2, 4)), EAGER: ((1, 2), ())}
    (missing,) = absent
    assert missing.backend == "tensorrt"
    assert "cannot be used" in missing.why


@pytest.mark.parametrize("backend", ["onnxruntime", EAGER])
def test_the_clock_sees_the_engines_of_real_backends(exported: Bundle, backend: str) -> None:
    engines = EngineClock()
    steps = steps_of(exported, backend, CPU, PlanSource(), engines)
    one = benchmark(exported, Entrant(backend, steps, engines, (1, 3), ()), steps=8)
    measured(one, 2, 2)
    for row in one.result().rows:
        assert row.outside is not None
        assert 0 < row.outside < 0.9
        assert 0 < row.floor_seconds < row.seconds


def test_a_benchmark_computes_what_the_bundle_does(exported: Bundle) -> None:
    """What is timed is the real thing: its latents are those of eager FORA in fp32."""
    entrants, _ = entrants_of(exported, ["onnxruntime"], [3], lambda name: CPU, PlanSource(), references=[EAGER])
    one = benchmark(exported, *entrants, steps=9)
    measured(one, 2, 1)
    latents = {
        (timing.entrant.backend, timing.setting.label): timing.latents for timing in one.rows[2] if timing.trajectories
    }
    for label in ("no cache", "interval 3"):
        assert torch.allclose(latents["onnxruntime", label], latents[EAGER, label], atol=1e-4)
    assert not torch.allclose(latents[EAGER, "no cache"], latents[EAGER, "interval 3"], atol=1e-4)


def test_the_eager_rival_of_a_half_bundle_is_cast_as_a_whole(
    pipeline_folder: object, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = model_from_source(str(pipeline_folder), "bf16")
    bundle = bundle_from_model(model, tmp_path_factory.mktemp("export") / "half")
    rival, reference = EagerFora(bundle, CPU, cast_whole=True), EagerFora(bundle, CPU)
    assert {one.dtype for one in rival.module.parameters()} == {torch.bfloat16}
    latents, labels = torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
    rough, exact = (one.predict(0, latents, 500.0, class_labels=labels) for one in (rival, reference))
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).norm() / exact.norm() < 0.05


def test_what_plain_pytorch_keeps_is_not_asked_for_again(exported: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    rival = EagerFora(exported, CPU)
    rival.prepare(2)
    monkeypatch.setattr("fora_trt.engines.memory.free_bytes", lambda device: 0)
    rival.prepare(2)
    with pytest.raises(InputError, match=r"a batch of 3 .* not even a batch of 1 would fit"):
        rival.prepare(3)


def test_the_floor_counts_operations_and_bytes(exported: Bundle) -> None:
    """Three blocks of width 16 on 16 tokens; the products of the full graph are counted by hand."""
    floor = Floor(exported)
    schedule = Schedule.static(4, 2)
    tokens, width = 16, 16
    block = 2 * tokens * width * (4 * width + 8 * width) + 2 * 2 * tokens * tokens * width
    adaln = 2 * width * 6 * width
    edges = 2 * tokens * 16 * width + 2 * tokens * width * 32  # patches in, predictions out
    embedder = 2 * 256 * width + 2 * width * width  # each block has one of its own
    full = 3 * (block + adaln + embedder) + edges + 2 * width * 2 * width
    rates = PeakRates(flops=1.0, bytes=1e30)
    seconds = floor.seconds(Schedule.static(1, 1), 1, rates)
    assert seconds == full
    assert floor.seconds(Schedule.static(1, 1), 3, rates) == 3 * seconds
    assert seconds * 3 < floor.seconds(schedule, 1, rates) < seconds * 3.5  # three full steps and a reuse one

    weights = exported.manifest.files["full.onnx.data"].size
    features = 6 * tokens * width * 4
    moved = [floor.seconds(Schedule.static(1, 1), batch, PeakRates(flops=1e30, bytes=1.0)) for batch in (1, 2)]
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


def measured_peak(bundle: Bundle, backend: str = "onnxruntime", scale: float = 1.5, **more: Any) -> int:
    scheduler = more.get("scheduler", scheduler_from_config(bundle.scheduler_config, None, False))
    given = more.get("given", example_conditioning(bundle.manifest, 2))
    return peak_memory(bundle, backend, "cpu", True, PlanSource(), given, scheduler, 6, scale)


def test_peak_memory_is_that_of_a_process_of_its_own(exported: Bundle) -> None:
    ballast = torch.ones(2**28)  # 1 GiB, of this process
    assert 100 * 2**20 < measured_peak(exported) < ballast.nbytes


def test_a_process_that_cannot_measure_memory_says_why(exported: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match=r"^there is no backend 'no such backend'; known are "):
        measured_peak(exported, "no such backend")
    given = example_conditioning(exported.manifest, 2)
    with pytest.raises(BackendError, match=r"^guidance needs an unconditional half"):
        measured_peak(exported, given=replace(given, unconditional=None))
    with pytest.raises(BackendError, match=r"^'class_labels' has shape \[2\]; .* takes \[3\]$"):
        measured_peak(exported, given=replace(given, images=3))
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(BackendError, match="the process ended with 1 and said nothing"):
        measured_peak(exported)


def test_memory_is_measured_with_the_scheduler_and_the_guidance_of_the_benchmark(
    exported: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(command: list[str], *, input: str, **more: Any) -> "subprocess.CompletedProcess[str]":
        """In this process what would be another."""
        printed = io.StringIO()
        with monkeypatch.context() as inside, redirect_stdout(printed):
            inside.setattr(sys, "stdin", io.StringIO(input))
            main(*command[3:])
        return subprocess.CompletedProcess(command, 0, printed.getvalue(), "")

    taken: list[tuple[object, ...]] = []

    def take(self: Sampler, schedule: Schedule, given: Conditioning, seeds: object, guidance: object) -> None:
        taken.append((self.update.timesteps.tolist(), schedule.full, given.digest(), guidance))

    monkeypatch.setattr(subprocess, "run", started)
    monkeypatch.setattr(Sampler, "__call__", take)
    given = example_conditioning(exported.manifest, 3).at([2, 0, 1])
    trailing = scheduler_from_config(exported.scheduler_config, "dpm-solver++", False, "trailing")
    assert measured_peak(exported, scale=3.5, scheduler=trailing, given=given) > 0
    assert taken == [([999, 749, 499, 249], (True, False, False, True), given.digest(), 3.5)]


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
    asked: list[tuple[Any, ...]] = []

    def refused(*request: Any) -> int:
        asked.append(request)
        if request[1] == "first":
            raise BackendError("the process was ended by SIGKILL")
        return 2**20

    monkeypatch.setattr(bench, "peak_memory", refused)
    entrants = [sleeper(exported, name, clock, 0.001, 0) for name in ("first", "second")]
    scheduler = scheduler_from_config(exported.scheduler_config, "unipc", False)
    plans = PlanSource()
    one = Benchmark(exported, entrants, [], scheduler, 4, 2.5, plans)
    list(one.measure(given, 1))
    assert asked == [(exported, name, "cpu", True, plans, given, scheduler, 4, 2.5) for name in ("first", "second")]
    found = one.result()
    assert {row.backend: row.peak_memory_bytes for row in found.rows} == {"first": None, "second": 2**20}
    assert found.notes == ("peak memory of first at a batch of 2 is missing: the process was ended by SIGKILL",)


def test_guidance_without_a_second_half_is_refused(exported: Bundle) -> None:
    alone = replace(exported, manifest=exported.manifest.model_copy(update={"guidance": None, "conditioning": {}}))
    with pytest.raises(InputError, match="no unconditional half"):
        Benchmark(alone, [], [], scheduler_from_config(exported.scheduler_config, None, False), 4, 2.0)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of two libraries in turn on few cores would make times what they are not."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
