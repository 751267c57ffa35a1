"""A predictor that is called like the network it replaces: step by step, without `begin`.

It counts the calls along a schedule. Steps whose timesteps were given to `reset` form one run; any other step is a
separate run. Shapes: B is the batch of one call; C, H, W are channels, height and width of the latents; S is the number
of steps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from warnings import warn

import torch
from torch import Tensor

from fora_trt.bundle import Manifest
from fora_trt.contract import FULL, REUSE
from fora_trt.errors import BusyError, ForaWarning, ScheduleError
from fora_trt.memo import Memo
from fora_trt.plan import Plan, adapted
from fora_trt.runtime.access import Access
from fora_trt.runtime.inputs import check_latents, checked_timestep, completed_inputs, inputs_of
from fora_trt.runtime.interface import Run
from fora_trt.schedule import Schedule


@dataclass(frozen=True)
class _Followed:
    """A run, the plan of the whole trajectory, the run's first step in it, and its batch and conditioning.

    `equal` tells for each conditioning input whether a tensor has the same values. It is None where no later step can
    continue the run, or none of them reads conditioning.
    """

    run: Run
    plan: Plan
    first: int
    batch: int
    equal: Mapping[str, Memo[bool]] | None

    def has(self, conditioning: Mapping[str, Tensor]) -> bool:
        """Whether a later step with this conditioning can continue the run."""
        return self.equal is not None and all(self.equal[name](value) for name, value in conditioning.items())


@dataclass
class Taken:
    """Numbers of full, of reuse and of partial steps that were taken."""

    full: int = 0
    reuse: int = 0
    partial: int = 0


class StepByStep(ABC):
    """Runs one step of the schedule per call. `schedule` is a `Schedule`, or a text form for any number of steps.

    `taken` counts the steps of all trajectories.
    """

    manifest: Manifest
    device: torch.device

    def __init__(self, schedule: Schedule | str) -> None:
        self.rule = schedule
        self._schedule = schedule if isinstance(schedule, Schedule) else None
        self._step = 0
        self._timesteps: Tensor | None = None
        self._followed: _Followed | None = None
        self.access = Access()
        self.taken = Taken()

    @abstractmethod
    def begin(
        self,
        plan: Plan,
        timesteps: Tensor,
        conditioning: Mapping[str, Tensor],
        batches: Sequence[int],
        first: int = 0,
    ) -> Run:
        """Announce a trajectory; see `Predictor.begin`."""

    @abstractmethod
    def another(self) -> StepByStep:
        """A second denoiser on the same engines, for another trajectory: it has buffers and a schedule of its own."""

    @abstractmethod
    def first_not_finite(self) -> str | None:
        """Name of the first non-finite tensor of the last step; see `Predictor.first_not_finite`."""

    @property
    @abstractmethod
    def foresees(self) -> bool:
        """Whether timesteps and conditioning must be known before the steps that use them."""

    @property
    @abstractmethod
    def folds(self) -> bool:
        """Whether a reuse step reads a sum that the full step before it folded for its timestep."""

    @property
    def schedule(self) -> Schedule:
        """The schedule of the trajectory at hand. Raises `ScheduleError` for a text that needs the number of steps."""
        if self._schedule is None:
            assert isinstance(self.rule, str)
            self._schedule = self._checked(Schedule.open(self.rule, sites=self.manifest.cache_sites))
        return self._schedule

    def _checked(self, schedule: Schedule) -> Schedule:
        """The schedule. Raises `ScheduleError` if it was calibrated for another model."""
        schedule.check_model(self.manifest.model.weights_sha256, self.manifest.model.options.source)
        return schedule

    @torch.no_grad()
    def __call__(self, latents: Tensor, timestep: Tensor | float, **conditioning: Tensor) -> Tensor:
        """Run the next step of the schedule; return the prediction (B, out_channels, H, W).

        `latents` is (B, C, H, W), `timestep` a scalar or (B,), `conditioning` the model's other inputs by name
        (`class_labels`, (B,)). The result is a buffer of the denoiser, valid until the next call.
        Raises `ScheduleError` past the end of the schedule, `InputError` for inputs that the graphs do not take,
        `BusyError` in a thread or process other than that of the trajectory.
        """
        with self.access.alone():
            return self._next(latents, timestep, conditioning)

    def _next(self, latents: Tensor, timestep: Tensor | float, conditioning: Mapping[str, Tensor]) -> Tensor:
        if not self.access.own(begun=self._step > 0):
            raise BusyError(
                f"another thread has run step {self._step} of a trajectory on this denoiser; load one for each thread, "
                "or call reset() before a trajectory, and begin none before the last is done"
            )
        if self.finished:
            raise ScheduleError(
                f"all {self.schedule.steps} steps of the schedule are done; call reset() before the next trajectory"
            )
        check_latents(self.manifest, latents, self.device)
        batch = len(latents)
        timestep = checked_timestep(timestep, batch)
        if not self.next_step_is_full and (self._followed is None or batch != self._followed.batch):
            raise ScheduleError(
                f"the batch size changed to {batch} within a trajectory, but the cached features have another batch "
                "size; call reset() before the next trajectory"
            )
        given = completed_inputs(self.manifest, conditioning, batch, values=self._step == 0, noise=True)
        fixed = {name: given[name] for name in inputs_of(self.manifest)}
        followed = self._follow(timestep, fixed, batch)
        step = self._step - followed.first
        prediction = followed.run.at(step, batch).predict(followed.run.offsets[step], latents, timestep, **given)
        self._step += 1
        graph = followed.run.graphs[step]
        self.taken.full += graph == FULL
        self.taken.reuse += graph == REUSE
        self.taken.partial += graph not in (FULL, REUSE)
        return prediction

    def reset(self, schedule: Schedule | None = None, timesteps: Tensor | None = None) -> None:
        """Go back to the first step, and replace the schedule if one is given.

        `timesteps` (S,) are the timesteps of the coming calls. A bundle with folded sums needs them; without them every
        step runs in full.
        """
        with self.access.alone():
            self._reset(schedule, timesteps)

    def _reset(self, schedule: Schedule | None, timesteps: Tensor | None) -> None:
        self._schedule = self._schedule if schedule is None else self._checked(schedule)
        self._timesteps = None if timesteps is None else torch.as_tensor(timesteps).cpu().float()
        if self._timesteps is not None and self._timesteps.shape != (self.schedule.steps,):
            raise ScheduleError(
                f"reset() was given {self._timesteps.numel()} timesteps for a schedule of {self.schedule.steps} steps; "
                "give one timestep per step"
            )
        self._step, self._followed = 0, None

    @property
    def finished(self) -> bool:
        """Whether all steps of the schedule have run."""
        return self._step >= self.schedule.steps

    @property
    def next_step_is_full(self) -> bool:
        """Whether the next call computes every layer."""
        return not self.finished and self._plan[self._step].is_full

    @property
    def _plan(self) -> Plan:
        """The plan of the trajectory at hand: the schedule's, adapted to what has happened since its first step."""
        return self.schedule.plan if self._followed is None else self._followed.plan

    def _follow(self, timestep: Tensor, given: Mapping[str, Tensor], batch: int) -> _Followed:
        """The run that the next step belongs to; a new run if the step does not continue the last one."""
        plan, first = self._plan, self._step
        known = self._followed
        changed = known is None or known.batch != batch
        if not self.foresees:
            if changed:
                plan = adapted(plan, forgotten=[first])
                times = torch.zeros(len(plan) - first)
                self._followed = _Followed(self.begin(plan, times, given, [batch], first), plan, first, batch, None)
            assert self._followed is not None
            return self._followed
        announced = self._is_announced(timestep)
        if announced and known is not None and not changed and known.has(given):
            return known
        if self.folds and not plan[first].is_full:
            kind = "partial" if plan[first].is_partial else "reuse"
            warn(
                f"running a full step instead of a {kind} step: this timestep was not announced, so no sum was "
                "precomputed; call as_transformer(pipe) or reset(timesteps=...), keep the conditioning fixed "
                "during a trajectory, or export with --optimize conditioning",
                category=ForaWarning,
                stacklevel=3,
            )
        if self.folds or changed:  # what earlier full steps have kept is not for this run
            plan = adapted(plan, full=[first], forgotten=[first])
        if announced and self._timesteps is not None:
            run = self.begin(plan, self._timesteps[first:], given, [batch], first)
            self._followed = _Followed(run, plan, first, batch, _copied(given))
        else:
            run = self.begin(plan, timestep.reshape(1, -1), given, [batch], first)
            self._followed = _Followed(run, plan, first, batch, None)
        return self._followed

    def _is_announced(self, timestep: Tensor) -> bool:
        """Whether all samples of this call have the timestep that `reset` was given for the next step."""
        now = timestep.flatten()[:1].cpu().float()
        alike = bool((timestep == timestep.flatten()[0]).all())
        return self._timesteps is not None and alike and bool(self._timesteps[self._step] == now)


def _copied(conditioning: Mapping[str, Tensor]) -> dict[str, Memo[bool]]:
    """For each input whether a tensor equals a copy of this one."""

    def equality(value: Tensor) -> Memo[bool]:
        copy = value.cpu().clone()
        return Memo(lambda other: torch.equal(other.cpu(), copy))

    return {name: equality(value) for name, value in conditioning.items()}
