"""The drop-in for diffusers: a module with the transformer's call and configuration that runs a denoiser."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from fora_trt.errors import BackendError, InputError, ScheduleError
from fora_trt.models.spec import LATENTS, PRECISIONS
from fora_trt.runtime.conditioning import inputs_of
from fora_trt.runtime.denoiser import Denoiser, mend_overflow
from fora_trt.schedule import Schedule

NESTED = "added_cond_kwargs"
"""A dictionary of more inputs among a transformer's arguments."""


class DenoiserTransformer(nn.Module):
    """Takes the place of `pipe.transformer`.

    A pipeline says neither when a trajectory begins nor how many steps it has. Both are seen from the timestep that it
    passes: it is one of those of `scheduler` or, where none was given, a view into those of the pipeline's. Where it is
    no view (a copy from another device), a timestep that rises begins a trajectory, and steps are counted from its
    first; a bundle whose sum is folded does not know the steps that follow then, and takes full ones.
    """

    def __init__(self, denoiser: Denoiser, scheduler: Any = None) -> None:
        super().__init__()
        self.denoiser = denoiser
        self._scheduler = scheduler
        self.config = FrozenDict(denoiser.manifest.model.config)
        self.dtype: torch.dtype = getattr(torch, PRECISIONS[denoiser.manifest.precision])
        self._given = denoiser.schedule
        self._last = float("inf")
        self._step = -2  # before the one before the first

    @property
    def device(self) -> torch.device:
        """Where the engines run."""
        return self.denoiser.device

    def forward(
        self, hidden_states: Tensor, timestep: Tensor | float, return_dict: bool = True, **conditioning: Any
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """The transformer's own call; `conditioning` is `class_labels` for a DiT, text and its mask for a PixArt.

        Raises `InputError` for what was not exported, `BackendError` for a prediction that is not finite.
        """
        given = self._inputs(conditioning)
        self._check_latents(hidden_states)
        self._follow(timestep)
        prediction = self.denoiser(hidden_states, timestep, **given)
        if not prediction.isfinite().all():
            manifest = self.denoiser.manifest
            raise BackendError(
                f"{manifest.name} puts out what is not finite in {manifest.precision}, first in "
                f"{self.denoiser.first_not_finite()}; {mend_overflow(manifest.precision)}"
            )
        prediction = prediction.to(hidden_states.dtype)
        return Transformer2DModelOutput(sample=prediction) if return_dict else (prediction,)

    def _follow(self, timestep: Tensor | float) -> None:
        """Begin a trajectory where one begins, with the schedule for its number of steps."""
        now = float(torch.as_tensor(timestep).flatten()[0])
        place = _place(timestep) if self._scheduler is None else self._place_in_scheduler(now)
        begins = now > self._last or self.denoiser.finished or self._last == float("inf")
        if place is not None:
            step, all_steps = place
            begins = step == 0 or step != self._step + 1
            if begins:
                self.denoiser.reset(self._schedule_of(len(all_steps) - step), all_steps[step:])
            self._step = step
        elif begins:
            self.denoiser.reset(self._given)
        self._last = now

    def _place_in_scheduler(self, now: float) -> tuple[int, Tensor] | None:
        """Which of the scheduler's timesteps this is, the next one if it can be, and all of them."""
        timesteps = torch.as_tensor(self._scheduler.timesteps).cpu().float()
        following = self._step + 1
        if 0 <= following < len(timesteps) and timesteps[following] == now:
            return following, timesteps
        found = (timesteps == now).nonzero().flatten()
        return (int(found[0]), timesteps) if len(found) else None

    def _schedule_of(self, steps: int) -> Schedule:
        """The given schedule if it has so many steps, else one of the same interval."""
        if steps == self._given.steps:
            return self._given
        if self._given.cache_interval is None:
            raise ScheduleError(
                f"the pipeline takes {steps} steps, and the schedule that was given is for {self._given.steps}; call "
                "the pipeline with as many, or load the bundle with cache_interval=N"
            )
        return Schedule.static(steps, min(self._given.cache_interval, steps))

    def _inputs(self, conditioning: dict[str, Any]) -> dict[str, Tensor]:
        """Tensors by the names of the graphs' inputs. What is None was not asked for."""
        flat = {**conditioning, **(conditioning.get(NESTED) or {})}
        flat.pop(NESTED, None)
        given = {name: value for name, value in flat.items() if value is not None}
        name, known = self.denoiser.manifest.name, inputs_of(self.denoiser.manifest)
        if odd := [one for one in given if one not in known]:
            raise InputError(
                f"the pipeline passes {odd[0]!r}, which {name} was not exported with; it takes {', '.join(known)}"
            )
        for key, value in given.items():
            wanted = known[key].sized(len(value))
            if tuple(value.shape) != wanted:
                raise InputError(
                    f"the pipeline passes {key!r} as {list(value.shape)}, and {name} was exported for {list(wanted)}; "
                    "call it with that size (max_sequence_length for a prompt), or export it again with another"
                )
        return given

    def _check_latents(self, hidden_states: Tensor) -> None:
        manifest = self.denoiser.manifest
        expected = self.denoiser.full.inputs[LATENTS].sized(len(hidden_states))
        if hidden_states.shape != expected:
            raise InputError(
                f"the pipeline asks for latents of {list(hidden_states.shape[1:])}, and {manifest.name} was exported "
                f"for {list(expected[1:])}; give it that height and width, with use_resolution_binning=False, "
                "or export it again with another --image-size"
            )


def _place(timestep: Tensor | float) -> tuple[int, Tensor] | None:
    """Which timestep this is among all of them, if it is a view into all of them; and those."""
    if not isinstance(timestep, Tensor) or timestep.numel() == 0:
        return None
    steps = timestep.untyped_storage().nbytes() // timestep.element_size()
    apart = any(stride for size, stride in zip(timestep.shape, timestep.stride(), strict=True) if size > 1)
    if apart or steps < 2:  # not one timestep for all, or a number on its own
        return None
    return int(timestep.storage_offset()), timestep.as_strided((steps,), (1,), 0)
