"""Times trajectories: every backend with every schedule, the equal-time controls, and the PyTorch references."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import Tensor

from fora_trt.contract import FULL, REUSE
from fora_trt.errors import BackendError, ForaError, InputError, first_line
from fora_trt.evaluate.candidates import Candidate, control_of, steps_at_equal_time
from fora_trt.evaluate.peak_memory import peak_memory, release
from fora_trt.evaluate.peaks import Roofline, best_of, measure_peaks
from fora_trt.evaluate.solvers import closest_solver
from fora_trt.evaluate.targets import Target
from fora_trt.export.statistics import arithmetic_shares
from fora_trt.pipeline import Pipeline, Sampling
from fora_trt.presets import DEFAULT_INTERVAL
from fora_trt.report.results import EAGER, NO_CACHE, Absent, Bench, BenchRow, PartialSteps, PeakRates, Setting
from fora_trt.sampling.conditioning import Conditioning, example_conditioning
from fora_trt.sampling.guidance import Guidance
from fora_trt.sampling.loop import Sampler, Trajectory
from fora_trt.schedule import NONE, fora_text


@dataclass
class Timing:
    """A row while it is measured: its target, its setting, and one trajectory per repeat."""

    target: Target
    candidate: Candidate
    sampler: Sampler
    trajectories: list[Trajectory] = field(default_factory=list)
    engine_seconds: list[float | None] = field(default_factory=list)

    @classmethod
    def of(cls, target: Target, candidate: Candidate) -> Timing:
        """A row of a target, without measurements."""
        return cls(target, candidate, target.pipeline.sampler(candidate.sampling))

    @property
    def setting(self) -> Setting:
        """The sampling setting of the row."""
        return self.candidate.setting

    def run(self, given: Conditioning, guidance: Guidance, keep: bool = True) -> Trajectory:
        """Run one trajectory; with `keep` record it and its times, otherwise it is a warm-up."""
        self.target.clock.restart()
        done = self.sampler(given, range(given.images), guidance)
        if keep:
            self.trajectories.append(done)
            self.engine_seconds.append(self.target.engine_seconds(self.sampler.schedule))
        return done

    @property
    def seconds(self) -> float:
        """Median time of a trajectory."""
        return statistics.median(trajectory.seconds for trajectory in self.trajectories)

    @property
    def spread(self) -> tuple[float, float]:
        """Time of the fastest and of the slowest trajectory."""
        times = [trajectory.seconds for trajectory in self.trajectories]
        return min(times), max(times)

    @property
    def latents(self) -> Tensor:
        """The latents at the end of the last trajectory, (B, C, H, W)."""
        return self.trajectories[-1].latents

    @property
    def overhead(self) -> float | None:
        """Median fraction of the time that was spent outside the engines; None if unknown."""
        shares = [
            1 - inside / done.seconds
            for inside, done in zip(self.engine_seconds, self.trajectories, strict=True)
            if inside is not None
        ]
        return statistics.median(shares) if shares else None


def timings_of(target: Target) -> list[Timing]:
    """One row per schedule of a target; the first is without caching."""
    plain = target.pipeline.sampling(schedule=target.schedules[0])
    return [Timing.of(target, Candidate.of(plain.with_schedule(one))) for one in target.schedules]


def control_of_row(row: Timing, evaluations: float, solver: Sampling | None = None) -> Timing:
    """The equal-time control of a cached row that takes as long as these evaluations without caching.

    It has the same backend; its scheduler is that of the row, or `solver` at its number of steps.
    """
    if solver is not None:
        return Timing.of(row.target, Candidate.of(solver, row.setting.schedule))
    return Timing.of(row.target, control_of(row.candidate, steps_at_equal_time(row.candidate, evaluations)))


class Benchmark:
    """Times a bundle, one batch size after the other; `result` returns the measurements so far at any moment."""

    def __init__(
        self,
        pipeline: Pipeline,
        targets: Sequence[Target],
        absent: Sequence[Absent] = (),
        memory: bool = False,
        solved: bool = False,
    ) -> None:
        """`pipeline` has the bundle and the settings of all targets; with `memory` peak memory is measured too.

        With `solved` the controls use the solver setting that comes closest to no caching, else the scheduler of the
        row: all take about the same time. Raises `InputError` if guidance is on and the model has no unconditional
        inputs.
        """
        self.pipeline, self.targets, self.absent = pipeline, list(targets), list(absent)
        self._measures_memory, self._solved = memory, solved
        given = example_conditioning(pipeline.manifest, 1)
        self.guidance = pipeline.guidance(given, pipeline.sampling(schedule=NONE))
        if self.guidance.scale > 1 and given.unconditional is None:
            raise InputError(
                f"classifier-free guidance needs unconditional inputs; {pipeline.manifest.name} has none; leave "
                "--guidance-scale out"
            )
        self.rows: dict[int, list[Timing]] = {}
        self.notes: list[str] = []
        self._memory: dict[tuple[str, str, int, str], int] = {}
        self._peaks: PeakRates | None = None

    def measure(self, given: Conditioning, repeats: int) -> Iterator[str]:
        """Time every row `repeats` times at one batch size; yield a description of each measurement before it starts.

        Rows are interleaved, so that a drift of the machine's speed affects all alike. Each row runs once before the
        first repeat. Raises `BackendError` if no backend can run.
        """
        images, rows = given.images, []
        for device in {target.pipeline.device for target in self.targets}:
            release(device)  # memory cached at the previous batch size
        for target in self.targets:
            yield f"{target.backend}, batch {images}: warm-up"
            try:
                rows += self._warmed(target, given)
            except Exception as error:  # such as out of memory or a compiler error
                why = str(error) if isinstance(error, ForaError) else f"{type(error).__name__}: {first_line(error)}"
                self.absent.append(Absent(backend=target.backend, why=f"at a batch of {images}: {why}"))
        if not rows:
            raise BackendError(f"no backend can run {self.pipeline.bundle.folder}: {self.absent[-1].why}")
        self.rows[images] = rows
        for repeat in range(repeats):
            device, precision = rows[0].target.pipeline.device, self.pipeline.manifest.precision
            self._peaks = best_of(self._peaks, measure_peaks(device, precision))
            for row in rows:
                yield f"{row.target.backend}, batch {images}: repeat {repeat + 1}"
                row.run(given, self.guidance)
        if self._measures_memory:
            for key in dict.fromkeys(self._memory_key(images, row) for row in rows):
                yield f"{key[0]}, batch {images}: peak memory"
                self._measure_memory(key, given)

    def _warmed(self, target: Target, given: Conditioning) -> list[Timing]:
        """The rows of a target after a warm-up run; each cached row is followed by its control."""
        rows = timings_of(target)
        for row in rows:
            row.run(given, self.guidance, keep=False)
        if not target.controls:
            return rows
        done = [row.run(given, self.guidance, keep=False) for row in rows]
        warmed = []
        for row, each in zip(rows, done, strict=True):
            warmed.append(row)
            if row.setting.schedule in target.controls:
                evaluations = row.setting.nfe * each.seconds / done[0].seconds
                solver = None
                if self._solved:
                    number, seeds = max(1, round(evaluations)), range(given.images)
                    solver = closest_solver(target.pipeline, number, given, seeds, self.guidance, done[0].latents)
                warmed.append(control_of_row(row, evaluations, solver))
                warmed[-1].run(given, self.guidance, keep=False)
        return warmed

    def _measure_memory(self, key: tuple[str, str, int, str], given: Conditioning) -> None:
        """Measure peak memory for the rows of a key, with their conditioning, scheduler and guidance."""
        backend, device, images, schedule = key
        config = replace(
            self.pipeline.config,
            bundle=self.pipeline.bundle.folder,
            backend=backend,
            device=device,
            schedule=schedule,
            guidance_scale=self.guidance.scale,
        )
        try:
            self._memory[key] = peak_memory(config, given)
        except BackendError as error:
            self.notes.append(f"peak memory of {backend} at a batch of {images} could not be measured: {error}")

    def _memory_key(self, images: int, row: Timing) -> tuple[str, str, int, str]:
        """Rows with the same key need about the same memory; the last part is the schedule for which it is measured.

        A forecast keeps what several full steps computed. Otherwise engines always allocate the features or the sums of
        a window; eager PyTorch allocates the features only if the schedule reuses them.
        """
        cached = row.target.backend != EAGER or row.setting.caches
        usual = fora_text(min(DEFAULT_INTERVAL, row.setting.nfe)) if cached else NONE
        schedule = row.setting.schedule if row.sampler.schedule.depth > 1 else usual
        return row.target.backend, str(row.target.pipeline.device), images, schedule

    @cached_property
    def _shares(self) -> dict[str, float]:
        return arithmetic_shares(self.pipeline.bundle)

    def begins(self, images: int) -> bool:
        """Whether all rows of a batch size are known and none is timed yet, so that the work left can be counted."""
        return images in self.rows and not any(row.trajectories for row in self.rows[images])

    @property
    def has_result(self) -> bool:
        """Whether a row was timed."""
        return bool(self._timed()) and self._peaks is not None

    def _timed(self) -> list[tuple[int, Timing]]:
        return [(images, row) for images, rows in self.rows.items() for row in rows if row.trajectories]

    def result(self, interrupted: bool = False) -> Bench:
        """The results so far, without rows that have no timed run. Raises `BackendError` if there is none."""
        timed = self._timed()
        if not timed or self._peaks is None:
            raise BackendError("the benchmark was interrupted before the first measurement; run it again")
        roofline, peaks = Roofline(self.pipeline.bundle), self._peaks
        return Bench(
            device=str(timed[0][1].target.pipeline.device),
            steps=self.pipeline.config.steps,
            guidance_scale=self.guidance.scale,
            repeats=min(len(row.trajectories) for _, row in timed),
            interrupted=interrupted,
            peaks=peaks,
            rows=tuple(self._row(images, row, roofline, peaks) for images, row in timed),
            absent=tuple(self.absent),
            notes=tuple(self.notes),
        )

    def _row(self, images: int, row: Timing, roofline: Roofline, peaks: PeakRates) -> BenchRow:
        uncached = next(one for one in self.rows[images] if one.target is row.target and one.setting.label == NO_CACHE)
        times = Trajectory.joined(row.trajectories).of_graphs
        medians = {graph: statistics.median(seconds) for graph, seconds in times.items()}
        schedule, shares = row.sampler.schedule, self._shares
        batch = images * (2 if self.guidance.scale > 1 else 1)
        return BenchRow(
            backend=row.target.backend,
            images=images,
            setting=row.setting,
            seconds=row.seconds,
            fastest=row.spread[0],
            slowest=row.spread[1],
            full_step_seconds=medians[FULL],
            reuse_step_seconds=medians.get(REUSE),
            partial_steps=tuple(
                PartialSteps(graph=graph, steps=number, arithmetic=shares[graph], seconds=medians[graph])
                for graph, number in Counter(step.graph for step in schedule.plan if step.is_partial).items()
            ),
            overhead=row.overhead,
            speedup=uncached.seconds / row.seconds,
            ideal_speedup=uncached.setting.full_steps / schedule.work(shares),
            roofline_seconds=roofline.seconds(schedule, batch, peaks),
            peak_memory_bytes=self._memory.get(self._memory_key(images, row)),
        )
