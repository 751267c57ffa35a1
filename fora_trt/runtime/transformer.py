"""The drop-in for diffusers: a module with the transformer's call and configuration that runs a denoiser."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from fora_trt.models.spec import LATENTS
from fora_trt.runtime.denoiser import Denoiser


class DenoiserTransformer(nn.Module):
    """Takes the place of `pipe.transformer`.

    A pipeline does not say when a trajectory begins. Timesteps never rise along a trajectory, so one that does starts
    the schedule anew; so does the end of the schedule.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.config = FrozenDict(denoiser.manifest.model.config)
        self.dtype: torch.dtype = getattr(torch, denoiser.full.inputs[LATENTS].dtype)
        self._last = float("inf")

    @property
    def device(self) -> torch.device:
        """Where the engines run."""
        return self.denoiser.device

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, return_dict: bool = True, **conditioning: Any
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """The transformer's own call; `conditioning` is `class_labels` for a DiT."""
        now = float(timestep.flatten()[0])
        if now > self._last or self.denoiser.finished:
            self.denoiser.reset()
        self._last = now
        given = {name: value for name, value in conditioning.items() if value is not None}
        prediction = self.denoiser(hidden_states, timestep, **given)
        return Transformer2DModelOutput(sample=prediction) if return_dict else (prediction,)
