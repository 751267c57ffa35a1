"""Settings to compare: schedulers, numbers of steps and schedules, and their equal-time controls.

The control of a cached setting takes the same time without caching, with fewer steps.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fora_trt.contract import FULL
from fora_trt.errors import InputError, ScheduleError
from fora_trt.pipeline import Pipeline, Sampling
from fora_trt.plan import HIGHEST_ORDER
from fora_trt.report.results import CALIBRATED, FORA, FORECAST, NO_CACHE, PER_LAYER, Setting
from fora_trt.sampling.conditioning import Conditioning
from fora_trt.sampling.guidance import Guidance
from fora_trt.sampling.scheduler_step import timesteps_of
from fora_trt.sampling.schedulers import SchedulerChoice
from fora_trt.schedule import NONE, Schedule, is_file

PILOT_WINDOWS, PILOT_REPEATS = 3, 3
LONGEST_PILOT = 8  # longest window in a pilot run, in steps; it stands for longer windows too


@dataclass(frozen=True)
class Candidate:
    """A setting, and the scheduler and schedule that implement it."""

    setting: Setting
    sampling: Sampling

    @classmethod
    def of(cls, sampling: Sampling, control_of: str | None = None) -> Candidate:
        """The candidate of a scheduler and schedule; with `control_of` it is the control of that schedule."""
        setting = Setting(
            scheduler=sampling.name,
            steps=sampling.steps,
            nfe=sampling.nfe,
            full_steps=sampling.schedule.full_steps,
            partial_steps=sampling.schedule.partial_steps,
            schedule=sampling.schedule.text,
            method=method_of(sampling.schedule),
            control_of=control_of,
        )
        return cls(setting, sampling)

    @property
    def group(self) -> tuple[str, int]:
        """Scheduler and number of steps; the candidate without caching is the reference of its group."""
        return self.setting.scheduler, self.setting.steps


def method_of(schedule: Schedule) -> str:
    """What the reuse steps of a schedule do: nothing, FORA, a forecast, or what a calibration found."""
    if not schedule.caches:
        return NO_CACHE
    if schedule.made_from:
        return CALIBRATED
    if schedule.masks:
        return PER_LAYER
    return FORECAST if schedule.depth > 1 else FORA


def candidates_of(
    pipeline: Pipeline, schedulers: Sequence[str | None], steps: Sequence[int], schedules: Sequence[str]
) -> list[Candidate]:
    """Every scheduler at every number of steps, the largest first: without caching, then with each schedule.

    The first is what images are compared with, so more steps make a better reference.
    None is the model's own scheduler. Duplicates are dropped. A schedule file belongs to one scheduler and one number
    of steps, and is compared there alone. Raises `InputError` for an unknown scheduler, `ScheduleError` for a schedule
    that does not fit the steps and for a file that fits nowhere.
    """
    named = {pipeline.scheduler_text(name): name for name in schedulers}
    groups = [pipeline.uncached(name, number) for name in named.values() for number in sorted({*steps}, reverse=True)]
    cached = [_fitting(pipeline, text, groups) for text in dict.fromkeys(schedules) if text != NONE]
    found = [
        Candidate.of(one)
        for number, plain in enumerate(groups)
        for one in (plain, *(fitting[number] for fitting in cached if number in fitting))
    ]
    return list({one.setting: one for one in found}.values())  # `every=2` and `every=3` may be equal for few steps


def _fitting(pipeline: Pipeline, text: str, groups: Sequence[Sampling]) -> dict[int, Sampling]:
    """The groups with this schedule, by their number; a file fits some of them."""
    found, problem = {}, None
    for number, plain in enumerate(groups):
        try:
            found[number] = plain.with_schedule(text)
            pipeline.check_schedule(found[number].schedule)
        except ScheduleError as error:  # noqa: PERF203 # each may be one that the file is not for
            if not is_file(text):
                raise
            problem = error
    if not found and problem is not None:
        raise problem
    return found


def control_of(candidate: Candidate, steps: int) -> Candidate:
    """The control of a cached candidate with the same scheduler and this number of steps."""
    sampling = candidate.sampling
    return Candidate.of(Sampling.of(sampling.scheduler, steps, name=sampling.name), candidate.setting.schedule)


def steps_at_equal_time(candidate: Candidate, full_steps: float) -> int:
    """The number of steps without caching that takes about as long as `full_steps` full steps.

    It is at most the candidate's own number. Among the numbers that the scheduler supports, it is the one whose NFE is
    nearest to `full_steps`.
    """
    supported: dict[int, float] = {}
    for steps in range(1, candidate.setting.steps + 1):
        try:
            supported[steps] = abs(timesteps_of(candidate.sampling.scheduler, steps) - full_steps)
        except InputError:  # noqa: PERF203 # each number may be one that the scheduler does not support
            continue
    return min(supported, key=lambda steps: supported[steps])


def paces_of(candidates: Sequence[Candidate]) -> list[list[Candidate]]:
    """The cached candidates that take about the same time: of one group, with equally many full steps.

    One with partial steps is alone: how long these take depends on what they compute.
    """
    paces: dict[tuple[object, ...], list[Candidate]] = {}
    for one in candidates:
        if one.setting.caches:
            alone = one.setting.schedule if one.setting.partial_steps else None
            paces.setdefault((one.group, one.setting.full_steps, alone), []).append(one)
    return [*paces.values()]


def evaluations_of(pace: Sequence[Candidate], reuse_shares: Mapping[str, float]) -> int:
    """The number of evaluations without caching that takes as long as the slowest of these candidates.

    `reuse_shares` has, by schedule, the time of a reuse step divided by the time of a full step.
    """
    times = [
        one.setting.full_steps + (one.setting.nfe - one.setting.full_steps) * reuse_shares[one.setting.schedule]
        for one in pace
    ]
    return max(1, round(max(times)))


def with_controls(candidates: Sequence[Candidate], controls: Sequence[Sampling]) -> list[Candidate]:
    """The candidates by group and pace, each pace followed by its control; `controls` has one for each pace.

    A control that several paces share comes after the first of them.
    """
    made: set[tuple[str, int]] = set()
    ordered: dict[tuple[str, int], list[Candidate]] = {}
    for one in candidates:
        ordered.setdefault(one.group, [])
        if not one.setting.caches:
            ordered[one.group].append(one)
    for pace, control in zip(paces_of(candidates), controls, strict=True):
        ordered[pace[0].group] += pace
        if (control.name, control.steps) not in made:
            made.add((control.name, control.steps))
            ordered[pace[0].group].append(Candidate.of(control, pace[0].setting.schedule))
    return [one for group in ordered.values() for one in group]


def reuse_share_of(pipeline: Pipeline, candidate: Candidate, conditioning: Conditioning, guidance: Guidance) -> float:
    """Time of a step that is not full divided by that of a full step, from a few short trajectories after a warm-up.

    With partial steps it is the mean over whole trajectories. Else all such steps are reuse steps. The first of a
    window takes longer than the next ones, so the pilot uses windows as long as the candidate's longest (at most
    `LONGEST_PILOT`) and its forecast order, and takes medians over the windows. A schedule without caching has 1.
    """
    if not candidate.sampling.schedule.caches:
        return 1.0
    seeds = range(conditioning.images)
    if candidate.sampling.schedule.masks:
        sampler = pipeline.sampler(candidate.sampling)
        done = [sampler(conditioning, seeds, guidance) for _ in range(1 + PILOT_REPEATS)][1:]
        others = [seconds for one in done for name, times in one.of_graphs.items() if name != FULL for seconds in times]
        return min(1.0, statistics.mean(others) / statistics.median(done[0].full_seconds))
    length = min(candidate.sampling.schedule.longest_window + 1, LONGEST_PILOT)
    plain = Sampling.of(candidate.sampling.scheduler, length * PILOT_WINDOWS)
    flags = [number % length == 0 for number in range(plain.nfe)]
    order = min(candidate.sampling.schedule.depth - 1, HIGHEST_ORDER)
    sampler = pipeline.sampler(plain.with_schedule(Schedule.from_flags(flags).with_forecast(order)))
    done = [sampler(conditioning, seeds, guidance) for _ in range(1 + PILOT_REPEATS)][1:]
    reuse = length - 1
    windows = [
        sum(one.reuse_seconds[start : start + reuse]) / reuse
        for one in done
        for start in range(0, len(one.reuse_seconds) - reuse + 1, reuse)
    ]
    full = [seconds for one in done for seconds in one.full_seconds]
    return min(1.0, statistics.median(windows) / statistics.median(full))


def file_name_of(setting: Setting) -> str:
    """A file name without suffix, unique for each setting."""
    scheduler = _in_a_name(SchedulerChoice.from_text(setting.scheduler).label)
    control = "" if setting.control_of is None else f"-for-{_in_a_name(setting.control_of)}"
    caching = _in_a_name(setting.schedule) if setting.caches else "no-cache"
    return f"{scheduler}-{setting.steps}-steps-{caching}{control}"


def _in_a_name(text: str) -> str:
    """The text of a schedule or scheduler with hyphens in place of all other signs than letters, digits and dots."""
    return re.sub(r"[^a-zA-Z0-9.]+", "-", text).strip("-")
