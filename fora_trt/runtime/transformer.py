"""The drop-in for diffusers pipelines: a module with the transformer's signature and config that runs a denoiser."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from warnings import warn

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from fora_trt.contract import PRECISIONS
from fora_trt.errors import BackendError, ForaWarning, InputError, ScheduleError, ShapeError
from fora_trt.runtime.inputs import check_latents, checked_timestep
from fora_trt.runtime.interface import overflow_remedy
from fora_trt.runtime.step_by_step import StepByStep
from fora_trt.schedule import Schedule

NESTED = "added_cond_kwargs"
"""A transformer argument that is a dictionary of further inputs (PixArt: resolution and aspect ratio)."""

REMEDY = (
    "call the pipeline with the exported sizes (height, width and use_resolution_binning=False; max_sequence_length "
    "for a prompt), or export again with other sizes"
)


class DenoiserTransformer(nn.Module):
    """Replaces `pipe.transformer`.

    A pipeline tells its transformer neither when a trajectory begins nor how many steps it has. This class derives both
    from the timestep. `scheduler` is the pipeline, whose scheduler may be replaced later, or its scheduler. A timestep
    is looked up in `scheduler.timesteps`; if it is a view into other timesteps, or without a scheduler, in those. If it
    is neither (such as a copy from another device), a rising timestep begins a trajectory, and steps are counted from
    there. The later timesteps are then unknown, so a bundle with folded sums runs full steps only. If a scheduler was
    given that is not the one in use, a warning says so.
    """

    def __init__(self, denoiser: StepByStep, scheduler: Any = None) -> None:
        super().__init__()
        self.denoiser = denoiser
        self._scheduler = _scheduler_of(scheduler)
        self.config = FrozenDict(denoiser.manifest.model.config)
        self.dtype: torch.dtype = getattr(torch, PRECISIONS[denoiser.manifest.precision])
        self._rule = denoiser.rule
        self._last = float("inf")
        self._step = -2  # no step yet; -1 would make step 0 its successor
        self._jumped = False
        self._foreign: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """The device of the engines."""
        return self.denoiser.device

    def forward(
        self, hidden_states: Tensor, timestep: Tensor | float, return_dict: bool = True, **conditioning: Any
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """The transformer's own call; `conditioning` is `class_labels` for a DiT, the prompt and its mask for a PixArt.

        Raises `ShapeError` for inputs or shapes that were not exported, `InputError` for other invalid inputs,
        `BackendError` for a prediction that is not finite.
        """
        nested = conditioning.pop(NESTED, None) or {}
        given = {name: value for name, value in {**conditioning, **nested}.items() if value is not None}
        try:
            check_latents(self.denoiser.manifest, hidden_states, self.device)
            timestep = checked_timestep(timestep, len(hidden_states))
            self._follow(timestep)
            prediction = self.denoiser(hidden_states, timestep, **given)
        except ShapeError as error:
            raise ShapeError(f"{error}; {REMEDY}") from None
        if not prediction.isfinite().all():
            manifest = self.denoiser.manifest
            raise BackendError(
                f"{manifest.name} outputs values that are not finite in {manifest.precision}, first in tensor "
                f"{self.denoiser.first_not_finite()}; {overflow_remedy(manifest.precision)}"
            )
        prediction = prediction.to(hidden_states.dtype)
        return Transformer2DModelOutput(sample=prediction) if return_dict else (prediction,)

    def _follow(self, timestep: Tensor) -> None:
        """Reset the denoiser if this timestep begins a trajectory, with the schedule for its number of steps."""
        now = float(timestep.flatten()[0])
        located = self._located(timestep, now)
        begins = now > self._last or self.denoiser.finished or self._last == float("inf")
        if located is not None:
            begins = located.step == 0 or located.step != self._step + 1
            if begins:
                timesteps = located.timesteps[located.step :]
                schedule = self._schedule_of(len(timesteps))
                if located.scheduler is not None:
                    schedule.check_scheduler(located.scheduler, timesteps.tolist())
                self.denoiser.reset(schedule, timesteps)
            self._step = located.step
        elif begins:
            self.denoiser.reset(self._rule if isinstance(self._rule, Schedule) else Schedule.open(self._rule))
        self._last = now

    def _located(self, timestep: Tensor, now: float) -> _Located | None:
        """Where this timestep is in its trajectory; None if that is unknown.

        The timesteps that it is a view of are those that the pipeline runs, even if they are not the scheduler's.
        """
        scheduler, viewed = self._scheduler(), _step_of_view(timestep)
        if scheduler is None:
            return viewed
        name = type(scheduler).__name__
        timesteps = torch.as_tensor(scheduler.timesteps).cpu().float()
        if viewed is not None and viewed.falls and not torch.equal(viewed.timesteps, timesteps):
            return replace(viewed, scheduler=f"a scheduler that is not the {name} of as_transformer()")
        is_set = getattr(scheduler, "num_inference_steps", 0) is not None
        step = self._step_in(timesteps, now) if is_set and not self._is_foreign(timesteps) else None
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
                stacklevel=2,
            )
        return None

    def _is_foreign(self, timesteps: Tensor) -> bool:
        """Whether the pipeline was seen to run other timesteps while the scheduler had these."""
        return self._foreign is not None and torch.equal(self._foreign, timesteps)

    def _step_in(self, timesteps: Tensor, now: float) -> int | None:
        """The index of this timestep among the scheduler's; of equal ones the next is preferred."""
        following = self._step + 1
        if 0 <= following < len(timesteps) and timesteps[following] == now:
            return following
        indices = (timesteps == now).nonzero().flatten()
        return int(indices[0]) if len(indices) else None

    def _schedule_of(self, steps: int) -> Schedule:
        """The denoiser's schedule for a trajectory of `steps` steps."""
        if isinstance(self._rule, str):
            return Schedule.open(self._rule, steps)
        if steps != self._rule.steps:
            raise ScheduleError(
                f"the pipeline takes {steps} steps, but the schedule has {self._rule.steps}; call the pipeline with "
                f"{self._rule.steps} steps, or load the bundle with cache_interval=N"
            )
        return self._rule


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


def _step_of_view(timestep: Tensor) -> _Located | None:
    """If this timestep is a view into a tensor of all timesteps: its index in that tensor, and that tensor."""
    if timestep.numel() == 0:
        return None
    steps = timestep.untyped_storage().nbytes() // timestep.element_size()
    differs = any(stride for size, stride in zip(timestep.shape, timestep.stride(), strict=True) if size > 1)
    if differs or steps < 2:  # the samples have separate timesteps, or the storage holds a single number
        return None
    return _Located(int(timestep.storage_offset()), timestep.as_strided((steps,), (1,), 0).cpu().float())


def _scheduler_of(given: Any) -> Callable[[], Any]:
    """A function that returns the scheduler in use: that of a pipeline, which may be replaced, or the given one."""
    if given is not None and not hasattr(given, "scheduler") and not hasattr(given, "timesteps"):
        raise InputError(
            f"as_transformer() was given an object of type {type(given).__name__}; give the diffusers pipeline, its "
            "scheduler, or nothing"
        )
    if not hasattr(given, "scheduler"):
        return lambda: given
    pipeline = weakref.ref(given)  # the pipeline holds its transformer
    return lambda: getattr(pipeline(), "scheduler", None)
