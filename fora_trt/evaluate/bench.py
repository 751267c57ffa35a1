"""How long trajectories take: every backend at every cache interval, in turn, beside what a user would pick instead."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from diffusers import SchedulerMixin
from torch import Tensor

from fora_trt.bundle import Bundle
from fora_trt.engines.plan_store import PlanSource
from fora_trt.errors import BackendError, ForaError, InputError, first_line
from fora_trt.evaluate.entrants import Entrant
from fora_trt.evaluate.peak_memory import peak_memory, release
from fora_trt.evaluate.peaks import Floor, best_of, measure_peaks
from fora_trt.evaluate.results import EAGER, NO_CACHE, Absent, Bench, BenchRow, PeakRates, Setting
from fora_trt.runtime.conditioning import Conditioning, example_conditioning, usual_guidance_scale
from fora_trt.runtime.denoiser import Denoiser
from fora_trt.runtime.sampling import Sampler, Trajectory
from fora_trt.runtime.updates import update_from_scheduler
from fora_trt.schedule import Schedule


@dataclass
class Timing:
    """A row while it is measured: what takes the steps, on which schedule, and a trajectory for every repeat."""

    entrant: Entrant
    setting: Setting
    schedule: Schedule
    sampler: Sampler
    trajectories: list[Trajectory] = field(default_factory=list)
    engine_seconds: list[float | None] = field(default_factory=list)

    def run(self, given: Conditioning, guidance_scale: float, keep: bool = True) -> Trajectory:
        """Take one trajectory; keep it with its times, or let it have been a warm-up."""
        self.entrant.clock.restart()
        done = self.sampler(self.schedule, given, range(given.images), guidance_scale)
        if keep:
            self.trajectories.append(done)
            self.engine_seconds.append(self.entrant.engine_seconds(self.sampler.denoiser, self.schedule))
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
        """What the last trajectory ended at, (B, C, H, W)."""
        return self.trajectories[-1].latents

    @property
    def outside(self) -> float | None:
        """Median share of the time that was spent outside of the engines."""
        shares = [
            1 - inside / done.seconds
            for inside, done in zip(self.engine_seconds, self.trajectories, strict=True)
            if inside is not None
        ]
        return statistics.median(shares) if shares else None


def timings_of(entrant: Entrant, scheduler: SchedulerMixin, steps: int) -> list[Timing]:
    """A row for every cache interval of an entrant, the first without caching."""
    samplers = [_sampler(entrant, scheduler, steps) for _ in entrant.cache_intervals]
    return [
        _timing(entrant, scheduler, sampler, steps, interval)
        for sampler, interval in zip(samplers, entrant.cache_intervals, strict=True)
    ]


def control_of(row: Timing, scheduler: SchedulerMixin, seconds: float, uncached: float) -> Timing:
    """The same backend without caching in so many fewer steps that it takes the `seconds` of a cached row."""
    steps = max(1, min(row.setting.steps, round(row.setting.steps * seconds / uncached)))
    sampler = _sampler(row.entrant, scheduler, steps)
    return _timing(row.entrant, scheduler, sampler, steps, 1, row.setting.cache_interval)


def _sampler(entrant: Entrant, scheduler: SchedulerMixin, steps: int) -> Sampler:
    """A sampler for one row. On a GPU its windows are captured, and those of other rows must not undo that."""
    takes = entrant.steps
    if isinstance(takes, Denoiser) and takes.device.type == "cuda":
        takes = takes.twin()
    return Sampler(takes, update_from_scheduler(scheduler, steps))


def _timing(
    entrant: Entrant, scheduler: SchedulerMixin, sampler: Sampler, steps: int, interval: int, control: int | None = None
) -> Timing:
    schedule = Schedule.static(sampler.update.calls, interval)
    setting = Setting(
        scheduler=type(scheduler).__name__,
        steps=steps,
        calls=None if schedule.steps == steps else schedule.steps,
        full_steps=schedule.full_steps,
        cache_interval=interval,
        control_of=control,
    )
    return Timing(entrant, setting, schedule, sampler)


class Benchmark:
    """Times a bundle, one batch size after the other; what is done can be asked for at any moment."""

    def __init__(
        self,
        bundle: Bundle,
        entrants: Sequence[Entrant],
        absent: Sequence[Absent],
        scheduler: SchedulerMixin,
        steps: int,
        guidance_scale: float | None = None,
        plans: PlanSource | None = None,
    ) -> None:
        """Without `guidance_scale` the model's usual one; `plans` for the processes that measure memory, if any."""
        self.bundle, self.entrants, self.absent = bundle, list(entrants), list(absent)
        self.steps, self._scheduler, self._plans = steps, scheduler, plans
        given = example_conditioning(bundle.manifest, 1)
        usual = usual_guidance_scale(bundle.manifest, given)
        self.guidance_scale = usual if guidance_scale is None else guidance_scale
        if self.guidance_scale > 1 and given.unconditional is None:
            raise InputError(
                f"{bundle.manifest.name} has no unconditional half to guide with; leave --guidance-scale out"
            )
        self.rows: dict[int, list[Timing]] = {}
        self.notes: list[str] = []
        self._memory: dict[tuple[str, str, int, bool], int] = {}
        self._peaks: PeakRates | None = None

    def measure(self, given: Conditioning, repeats: int) -> Iterator[str]:
        """Time every row `repeats` times at one batch size; yield what comes next before it is done.

        Rows are interleaved, so that a machine whose speed drifts hits all alike, and each runs once before the first
        repeat. Raises `BackendError` if nothing can run.
        """
        images, rows = given.images, []
        for device in {entrant.steps.device for entrant in self.entrants}:
            release(device)  # what the copies of the batch before took
        for entrant in self.entrants:
            yield f"{entrant.backend} at {images}, warming up"
            try:
                rows += self._warmed(entrant, given)
            except Exception as error:  # a batch that does not fit, a compiler that fails
                why = str(error) if isinstance(error, ForaError) else f"{type(error).__name__}: {first_line(error)}"
                self.absent.append(Absent(backend=entrant.backend, why=f"at a batch of {images}: {why}"))
        if not rows:
            raise BackendError(f"no backend can run {self.bundle.folder}: {self.absent[-1].why}")
        self.rows[images] = rows
        for repeat in range(repeats):
            device, precision = rows[0].entrant.steps.device, self.bundle.manifest.precision
            self._peaks = best_of(self._peaks, measure_peaks(device, precision))
            for row in rows:
                yield f"{row.entrant.backend} at {images}, repeat {repeat + 1}"
                row.run(given, self.guidance_scale)
        if self._plans is not None:
            for key in dict.fromkeys(self._memory_key(images, row) for row in rows):
                yield f"{key[0]} at {images}, its memory"
                self._measure_memory(key, given, self._plans)

    def _warmed(self, entrant: Entrant, given: Conditioning) -> list[Timing]:
        """Rows of an entrant that have run, and behind cached ones their controls."""
        rows = timings_of(entrant, self._scheduler, self.steps)
        for row in rows:
            row.run(given, self.guidance_scale, keep=False)
        if not entrant.controls:
            return rows
        seconds = [row.run(given, self.guidance_scale, keep=False).seconds for row in rows]
        warmed = []
        for row, each in zip(rows, seconds, strict=True):
            warmed.append(row)
            if row.setting.cache_interval in entrant.controls:
                warmed.append(control_of(row, self._scheduler, each, seconds[0]))
                warmed[-1].run(given, self.guidance_scale, keep=False)
        return warmed

    def _measure_memory(self, key: tuple[str, str, int, bool], given: Conditioning, plans: PlanSource) -> None:
        """Of what the rows of this key time: the same conditioning, scheduler and guidance."""
        backend, device, images, cached = key
        timed = (given, self._scheduler, self.steps, self.guidance_scale)
        try:
            self._memory[key] = peak_memory(self.bundle, backend, device, cached, plans, *timed)
        except BackendError as error:
            self.notes.append(f"peak memory of {backend} at a batch of {images} is missing: {error}")

    def _memory_key(self, images: int, row: Timing) -> tuple[str, str, int, bool]:
        """Engines have their features whether a schedule reuses them or not; eager PyTorch keeps them if it does."""
        cached = row.entrant.backend != EAGER or row.setting.cache_interval > 1
        return row.entrant.backend, str(row.entrant.steps.device), images, cached

    def result(self, interrupted: bool = False) -> Bench:
        """What was measured so far; rows that were not timed once are left out."""
        timed = [(images, row) for images, rows in self.rows.items() for row in rows if row.trajectories]
        if not timed or self._peaks is None:
            raise BackendError("nothing was measured before it was interrupted")
        floor, peaks = Floor(self.bundle), self._peaks
        return Bench(
            device=str(timed[0][1].entrant.steps.device),
            steps=self.steps,
            guidance_scale=self.guidance_scale,
            repeats=min(len(row.trajectories) for _, row in timed),
            interrupted=interrupted,
            peaks=peaks,
            rows=tuple(self._row(images, row, floor, peaks) for images, row in timed),
            absent=tuple(self.absent),
            notes=tuple(self.notes),
        )

    def _row(self, images: int, row: Timing, floor: Floor, peaks: PeakRates) -> BenchRow:
        uncached = next(
            one for one in self.rows[images] if one.entrant is row.entrant and one.setting.label == NO_CACHE
        )
        full, reuse = (
            [seconds for done in row.trajectories for seconds in getattr(done, kind)]
            for kind in ("full_seconds", "reuse_seconds")
        )
        batch = images * (2 if self.guidance_scale > 1 else 1)
        return BenchRow(
            backend=row.entrant.backend,
            images=images,
            setting=row.setting,
            seconds=row.seconds,
            fastest=row.spread[0],
            slowest=row.spread[1],
            full_step_seconds=statistics.median(full),
            reuse_step_seconds=statistics.median(reuse) if reuse else None,
            outside=row.outside,
            speedup=uncached.seconds / row.seconds,
            ideal_speedup=uncached.setting.full_steps / row.setting.full_steps,
            floor_seconds=floor.seconds(row.schedule, batch, peaks),
            peak_memory_bytes=self._memory.get(self._memory_key(images, row)),
        )
