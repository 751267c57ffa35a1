"""Follows a trajectory from the timesteps of a diffusers pipeline alone, and resets a denoiser where one begins.

A pipeline tells its transformer neither when a trajectory begins nor how many steps it has. Both follow from the
timestep: it is looked up in `scheduler.timesteps`; if it is a view into other timesteps, or without a scheduler, in
those. If it is neither (such as a copy from another device), a rising timestep begins a trajectory, and steps are
counted from there. The later timesteps are then unknown, so a bundle with folded sums runs full steps only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from warnings import warn

import torch
from torch import Tensor

from fora_trt.call import TimeMap
from fora_trt.errors import ForaWarning, ScheduleError
from fora_trt.runtime.step_by_step import StepByStep
from fora_trt.schedule import Schedule


class Follower:
    """The trajectory of one slot, with a denoiser of its own.

    `scheduler` returns the scheduler in use, or None. `time` maps its timesteps to those of the module.
    """

    def __init__(self, denoiser: StepByStep, scheduler: Callable[[], Any], time: TimeMap) -> None:
        self.denoiser = denoiser
        self._scheduler, self._time = scheduler, time
        self._last = float("inf")
        self._step = -2  # no step yet; -1 would make step 0 its successor
        self._jumped = False
        self._foreign: Tensor | None = None

    def follow(self, timestep: Tensor) -> Tensor:
        """The scheduler's time of a call with the module's time, (), (1,) or (B,).

        The denoiser is reset if this timestep begins a trajectory, with the schedule for its number of steps.
        """
        times = timestep if self._time == TimeMap() else self._time.of_scheduler(timestep).float()
        now = float(times.flatten()[0])
        located = self._located(timestep, now)
        if located is not None:
            if located.step == 0 or located.step != self._step + 1:
                timesteps = located.timesteps[located.step :]
                schedule = self._schedule_of(len(timesteps))
                if located.scheduler is not None:
                    schedule.check_scheduler(located.scheduler, timesteps.tolist())
                self.denoiser.reset(schedule, timesteps)
            self._step = located.step
            if times is not timestep and bool((times == times.flatten()[0]).all()):
                times = located.timesteps[located.step].expand(times.shape)  # without the rounding of the map
        elif self._last == float("inf") or now > self._last or self.denoiser.finished:
            rule = self.denoiser.rule
            sites = self.denoiser.manifest.cache_sites
            self.denoiser.reset(rule if isinstance(rule, Schedule) else Schedule.open(rule, sites=sites))
        self._last = now
        return times

    def _located(self, timestep: Tensor, now: float) -> _Located | None:
        """Where this timestep is in its trajectory; None if that is unknown.

        The timesteps that it is a view of are those that the pipeline runs, even if they are not the scheduler's.
        """
        scheduler = self._scheduler()
        viewed = step_of_view(timestep) if self._time == TimeMap() else None
        if scheduler is None:
            return viewed
        name = type(scheduler).__name__
        timesteps = torch.as_tensor(scheduler.timesteps).cpu().float()
        if viewed is not None and viewed.falls and not torch.equal(viewed.timesteps, timesteps):
            return replace(viewed, scheduler=f"a scheduler that is not the {name} of as_transformer()")
        is_set = getattr(scheduler, "num_inference_steps", 0) is not None
        step = self._step_in(timesteps, timestep) if is_set and not self._is_foreign(timesteps) else None
        jumps = step is not None and step not in (0, self._step + 1) and now < self._last
        if step is not None and not (jumps and self._jumped):
            self._jumped = jumps
            return _Located(step, timesteps, name)
        if not self._is_foreign(timesteps):
            self._foreign, self._jumped = timesteps, False
            warn(
                f"the pipeline does not run the timesteps of the {name} that as_transformer() was given, so later "
                "timesteps are unknown; if pipe.scheduler was replaced, give as_transformer(pipe), which follows it",
                category=ForaWarning,
                stacklevel=4,
            )
        return None

    def _is_foreign(self, timesteps: Tensor) -> bool:
        """Whether the pipeline was seen to run other timesteps while the scheduler had these."""
        return self._foreign is not None and torch.equal(self._foreign, timesteps)

    def _step_in(self, timesteps: Tensor, timestep: Tensor) -> int | None:
        """The index of this timestep among the scheduler's; of equal ones the next is preferred."""
        near, following = are_now(timesteps, timestep, self._time), self._step + 1
        if 0 <= following < len(timesteps) and near[following]:
            return following
        indices = near.nonzero().flatten()
        return int(indices[0]) if len(indices) else None

    def _schedule_of(self, steps: int) -> Schedule:
        """The denoiser's schedule for a trajectory of `steps` steps."""
        rule = self.denoiser.rule
        if isinstance(rule, str):
            return Schedule.open(rule, steps, self.denoiser.manifest.cache_sites)
        if steps != rule.steps:
            raise ScheduleError(
                f"the pipeline takes {steps} steps, but the schedule has {rule.steps}; call the pipeline with "
                f"{rule.steps} steps, or load the bundle with cache_interval=N"
            )
        return rule


def are_now(timesteps: Tensor, timestep: Tensor, time: TimeMap) -> Tensor:
    """Which of the scheduler's timesteps (S,) the module's timestep is.

    Where the pipeline maps its times, times are equal up to the rounding of their dtype.
    """
    now, times = timestep.flatten()[0].double().cpu(), time.of_model(timesteps.double())
    if time == TimeMap():
        return times == now
    rounding = torch.finfo(timestep.dtype if timestep.is_floating_point() else torch.float32).eps
    return (times - now).abs() <= 2 * rounding * times.abs().clamp(min=1e-3)


@dataclass(frozen=True)
class _Located:
    """The index of a step among all timesteps (S,) of its trajectory, and the class of the scheduler if it is known."""

    step: int
    timesteps: Tensor
    scheduler: str | None = None

    @property
    def falls(self) -> bool:
        """Whether no timestep is larger than the one before."""
        return bool((self.timesteps.diff() <= 0).all())


def step_of_view(timestep: Tensor) -> _Located | None:
    """If this timestep is a view into a tensor of all timesteps: its index in that tensor, and that tensor."""
    if timestep.numel() == 0:
        return None
    steps = timestep.untyped_storage().nbytes() // timestep.element_size()
    differs = any(stride for size, stride in zip(timestep.shape, timestep.stride(), strict=True) if size > 1)
    if differs or steps < 2:  # the samples have separate timesteps, or the storage holds a single number
        return None
    return _Located(int(timestep.storage_offset()), timestep.as_strided((steps,), (1,), 0).cpu().float())
