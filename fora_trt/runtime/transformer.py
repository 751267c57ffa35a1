"""The drop-in for diffusers pipelines: a module with the transformer's signature and config that runs a denoiser."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from fora_trt.contract import PRECISIONS
from fora_trt.errors import BackendError, ScheduleError, ShapeError
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
    from the timestep: it looks the timestep up in `scheduler.timesteps`. Without a scheduler it takes the timestep for
    a view into the pipeline's tensor of timesteps and reads that tensor. If the timestep is not a view (such as a copy
    from another device), a rising timestep begins a trajectory, and steps are counted from there. The later timesteps
    are then unknown, so a bundle with folded sums runs full steps only.
    """

    def __init__(self, denoiser: StepByStep, scheduler: Any = None) -> None:
        super().__init__()
        self.denoiser = denoiser
        self._scheduler = scheduler
        self.config = FrozenDict(denoiser.manifest.model.config)
        self.dtype: torch.dtype = getattr(torch, PRECISIONS[denoiser.manifest.precision])
        self._rule = denoiser.rule
        self._last = float("inf")
        self._step = -2  # no step yet; -1 would make step 0 its successor

    @property
    def device(self) -> torch.device:
        """The device of the engines."""
        return self.denoiser.device

    def forward(
        self, hidden_states: Tensor, timestep: Tensor | float, return_dict: bool = True, **conditioning: Any
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """The transformer's own call; `conditioning` is `class_labels` for a DiT, the prompt and its mask for a PixArt.

        Raises `ShapeError` for inputs or shapes that were not exported, `BackendError` for a prediction that is not
        finite.
        """
        nested = conditioning.pop(NESTED, None) or {}
        given = {name: value for name, value in {**conditioning, **nested}.items() if value is not None}
        self._follow(timestep)
        try:
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

    def _follow(self, timestep: Tensor | float) -> None:
        """Reset the denoiser if this timestep begins a trajectory, with the schedule for its number of steps."""
        now = float(torch.as_tensor(timestep).flatten()[0])
        located = _step_of_view(timestep) if self._scheduler is None else self._step_in_scheduler(now)
        begins = now > self._last or self.denoiser.finished or self._last == float("inf")
        if located is not None:
            step, timesteps = located
            begins = step == 0 or step != self._step + 1
            if begins:
                schedule = self._schedule_of(len(timesteps) - step)
                if self._scheduler is not None:
                    schedule.check_scheduler(type(self._scheduler).__name__, timesteps[step:].tolist())
                self.denoiser.reset(schedule, timesteps[step:])
            self._step = step
        elif begins:
            self.denoiser.reset(self._rule if isinstance(self._rule, Schedule) else Schedule.open(self._rule))
        self._last = now

    def _step_in_scheduler(self, now: float) -> tuple[int, Tensor] | None:
        """The index of this timestep among the scheduler's, and all of them; of equal ones the next is preferred."""
        timesteps = torch.as_tensor(self._scheduler.timesteps).cpu().float()
        following = self._step + 1
        if 0 <= following < len(timesteps) and timesteps[following] == now:
            return following, timesteps
        indices = (timesteps == now).nonzero().flatten()
        return (int(indices[0]), timesteps) if len(indices) else None

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


def _step_of_view(timestep: Tensor | float) -> tuple[int, Tensor] | None:
    """If this timestep is a view into a tensor of all timesteps: its index in that tensor, and that tensor."""
    if not isinstance(timestep, Tensor) or timestep.numel() == 0:
        return None
    steps = timestep.untyped_storage().nbytes() // timestep.element_size()
    differs = any(stride for size, stride in zip(timestep.shape, timestep.stride(), strict=True) if size > 1)
    if differs or steps < 2:  # the samples have separate timesteps, or the storage holds a single number
        return None
    return int(timestep.storage_offset()), timestep.as_strided((steps,), (1,), 0)
