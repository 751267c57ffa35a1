"""Settings to compare: schedulers, numbers of steps and schedules, each with an equal-time control.

The control of a cached setting uses the same scheduler without caching and with fewer steps, chosen to take the same
time.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fora_trt.errors import InputError
from fora_trt.pipeline import Pipeline, Sampling
from fora_trt.plan import HIGHEST_ORDER
from fora_trt.report.results import Setting
from fora_trt.sampling.conditioning import Conditioning
from fora_trt.sampling.guidance import Guidance
from fora_trt.sampling.scheduler_step import timesteps_of
from fora_trt.schedule import NONE, Schedule

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
            scheduler=type(sampling.scheduler).__name__,
            steps=sampling.steps,
            nfe=sampling.nfe,
            full_steps=sampling.schedule.full_steps,
            schedule=sampling.schedule.text,
            control_of=control_of,
        )
        return cls(setting, sampling)

    @property
    def group(self) -> tuple[str, int]:
        """Scheduler and number of steps; the candidate without caching is the reference of its group."""
        return self.setting.scheduler, self.setting.steps


def candidates_of(
    pipeline: Pipeline, schedulers: Sequence[str | None], steps: Sequence[int], schedules: Sequence[str]
) -> list[Candidate]:
    """Every scheduler at every number of steps: first without caching, then with each schedule.

    None is the model's own scheduler. Duplicates are dropped. Raises `InputError` for an unknown scheduler,
    `ScheduleError` for a schedule that does not fit the steps.
    """
    found = {type(one).__name__: one for one in map(pipeline.scheduler_named, schedulers)}
    candidates: list[Candidate] = []
    for scheduler in found.values():
        for number in dict.fromkeys(steps):
            plain = Sampling.of(scheduler, number)
            cached = [text for text in dict.fromkeys(schedules) if text != NONE]
            candidates += [Candidate.of(plain), *(Candidate.of(plain.with_schedule(text)) for text in cached)]
    return candidates


def control_of(candidate: Candidate, steps: int) -> Candidate:
    """The control of a cached candidate, with this number of steps."""
    return Candidate.of(Sampling.of(candidate.sampling.scheduler, steps), candidate.setting.schedule)


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


def controls_of(candidates: Sequence[Candidate], reuse_shares: Mapping[str, float]) -> list[int]:
    """The number of steps of each candidate's control; 0 for a candidate without caching.

    `reuse_shares` has, by schedule, the time of a reuse step divided by the time of a full step.
    """
    steps = []
    for one in candidates:
        setting = one.setting
        time = setting.full_steps + (setting.nfe - setting.full_steps) * reuse_shares.get(setting.schedule, 1.0)
        steps.append(steps_at_equal_time(one, time) if setting.caches else 0)
    return steps


def with_controls(candidates: Sequence[Candidate], steps: Sequence[int]) -> list[Candidate]:
    """The candidates by group, each group followed by its controls; `steps` has the steps of each control."""
    groups: dict[tuple[str, int], list[Candidate]] = {}
    controls: dict[tuple[str, int], list[Candidate]] = {}
    for one, number in zip(candidates, steps, strict=True):
        groups.setdefault(one.group, []).append(one)
        if number:
            controls.setdefault(one.group, []).append(control_of(one, number))
    return [one for key, group in groups.items() for one in (*group, *controls.get(key, []))]


def reuse_share_of(pipeline: Pipeline, candidate: Candidate, conditioning: Conditioning, guidance: Guidance) -> float:
    """Time of a reuse step divided by the time of a full step, from a few short trajectories after a warm-up.

    The first reuse step of a window takes longer than the next ones. So the pilot uses windows as long as the
    candidate's longest (at most `LONGEST_PILOT`) and its forecast order, and takes medians over the windows. A schedule
    without reuse steps has 1.
    """
    if not candidate.sampling.schedule.caches:
        return 1.0
    length = min(candidate.sampling.schedule.longest_window + 1, LONGEST_PILOT)
    plain = Sampling.of(candidate.sampling.scheduler, length * PILOT_WINDOWS)
    flags = [number % length == 0 for number in range(plain.nfe)]
    order = min(candidate.sampling.schedule.depth - 1, HIGHEST_ORDER)
    sampler = pipeline.sampler(plain.with_schedule(Schedule.from_flags(flags).with_forecast(order)))
    seeds = range(conditioning.images)
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
    scheduler = setting.scheduler.removesuffix("Scheduler").lower()
    control = "" if setting.control_of is None else f"-for-{_in_a_name(setting.control_of)}"
    caching = _in_a_name(setting.schedule) if setting.caches else "no-cache"
    return f"{scheduler}-{setting.steps}-steps-{caching}{control}"


def _in_a_name(schedule: str) -> str:
    """The text of a schedule with all characters but letters, digits, dots and hyphens replaced by hyphens."""
    return "".join(sign if sign.isalnum() or sign in ".-" else "-" for sign in schedule)
