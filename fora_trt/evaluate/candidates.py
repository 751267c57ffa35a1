"""What `quality` compares: schedulers, numbers of steps and cache intervals, and fewer steps in the same time."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from diffusers import SchedulerMixin

from fora_trt.bundle import Bundle
from fora_trt.errors import InputError
from fora_trt.evaluate.results import Setting
from fora_trt.runtime.conditioning import Conditioning
from fora_trt.runtime.sampling import Guidance, Sampler, Steps
from fora_trt.runtime.schedulers import scheduler_from_config
from fora_trt.runtime.updates import Update, timesteps_of, update_from_scheduler
from fora_trt.schedule import Schedule

PILOT_WINDOWS, PILOT_REPEATS = 3, 3
LONGEST_PILOT = 8  # cache interval; a longer one is timed as this


@dataclass(frozen=True)
class Candidate:
    """A setting, ready to be run. Those of one scheduler and number of steps share an update."""

    setting: Setting
    scheduler: SchedulerMixin
    update: Update
    schedule: Schedule

    @classmethod
    def of(
        cls,
        scheduler: SchedulerMixin,
        steps: int,
        cache_interval: int,
        update: Update | None = None,
        control_of: int | None = None,
    ) -> Candidate:
        """Raises `InputError` or `ScheduleError` for steps that the scheduler or the interval does not admit."""
        update = update or update_from_scheduler(scheduler, steps)
        schedule = Schedule.static(update.calls, cache_interval)
        setting = Setting(
            scheduler=type(scheduler).__name__,
            steps=steps,
            calls=None if update.calls == steps else update.calls,
            full_steps=schedule.full_steps,
            cache_interval=cache_interval,
            control_of=control_of,
        )
        return cls(setting, scheduler, update, schedule)

    @property
    def caches(self) -> bool:
        """Whether any step reuses what another computed."""
        return self.setting.cache_interval > 1


def candidates_of(
    bundle: Bundle, schedulers: Sequence[str | None], steps: Sequence[int], cache_intervals: Sequence[int]
) -> list[Candidate]:
    """Every scheduler at every number of steps: first without caching, then at each cache interval.

    None is the scheduler of the model's own. What is named twice is there once. Raises `InputError` for an unknown
    scheduler, `ScheduleError` for an interval over the steps.
    """
    learned = bundle.manifest.latents.learned_sigma
    found = [scheduler_from_config(bundle.scheduler_config, name, learned) for name in schedulers]
    candidates: list[Candidate] = []
    for scheduler in {type(one).__name__: one for one in found}.values():
        for number in dict.fromkeys(steps):
            plain = Candidate.of(scheduler, number, 1)
            cached = [interval for interval in dict.fromkeys(cache_intervals) if interval != 1]
            candidates += [plain, *(Candidate.of(scheduler, number, one, plain.update) for one in cached)]
    return candidates


def controls_of(candidates: Sequence[Candidate], reuse_shares: Mapping[int, float]) -> list[int]:
    """For each candidate the number of steps that takes as long without caching; 0 for one that caches nothing.

    `reuse_shares` is the time of a reuse step as a part of a full one, by cache interval. A scheduler that calls the
    model more often than it takes steps is given as many calls as come nearest.
    """
    return [_steps_in_time_of(one, reuse_shares[one.setting.cache_interval]) if one.caches else 0 for one in candidates]


def with_controls(candidates: Sequence[Candidate], steps: Sequence[int]) -> list[Candidate]:
    """The candidates, those of one scheduler and number of steps followed by their controls in so many `steps`."""
    groups: dict[Update, list[Candidate]] = {}
    controls: dict[Update, list[Candidate]] = {}
    for one, number in zip(candidates, steps, strict=True):
        groups.setdefault(one.update, []).append(one)
        if number:
            control = Candidate.of(one.scheduler, number, 1, control_of=one.setting.cache_interval)
            controls.setdefault(one.update, []).append(control)
    return [one for update, group in groups.items() for one in (*group, *controls.get(update, []))]


def _steps_in_time_of(candidate: Candidate, reuse_share: float) -> int:
    full = candidate.setting.full_steps
    calls = full + (candidate.schedule.steps - full) * reuse_share
    admitted: dict[int, float] = {}
    for steps in range(1, candidate.setting.steps + 1):
        try:
            admitted[steps] = abs(timesteps_of(candidate.scheduler, steps) - calls)
        except InputError:  # noqa: PERF203 # each number may be one that the scheduler does not admit
            continue
    return min(admitted, key=lambda steps: admitted[steps])


def reuse_share_of(
    denoiser: Steps, scheduler: SchedulerMixin, cache_interval: int, conditioning: Conditioning, guidance: Guidance
) -> float:
    """Time of a reuse step as a part of that of a full step, from a few short trajectories after a warm-up.

    A reuse step that follows a full one takes longer than the next, so they are timed at their interval, a window of
    them at once; medians over the windows.
    """
    interval = min(cache_interval, LONGEST_PILOT)
    sampler = Sampler(denoiser, update_from_scheduler(scheduler, interval * PILOT_WINDOWS))
    schedule = Schedule.from_first(sampler.update.calls, interval)
    seeds = range(conditioning.images)
    done = [sampler(schedule, conditioning, seeds, guidance) for _ in range(1 + PILOT_REPEATS)][1:]
    reuse = interval - 1
    windows = [
        sum(one.reuse_seconds[start : start + reuse]) / reuse
        for one in done
        for start in range(0, len(one.reuse_seconds) - reuse + 1, reuse)
    ]
    full = [seconds for one in done for seconds in one.full_seconds]
    return min(1.0, statistics.median(windows) / statistics.median(full))


def file_name_of(setting: Setting) -> str:
    """A file name without suffix, another for each setting."""
    scheduler = setting.scheduler.removesuffix("Scheduler").lower()
    caching = "no-cache" if setting.cache_interval == 1 else f"interval-{setting.cache_interval}"
    control = "" if setting.control_of is None else f"-for-interval-{setting.control_of}"
    return f"{scheduler}-{setting.steps}-steps-{caching}{control}"
