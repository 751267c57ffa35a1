"""Classifier-free guidance: its scale, the steps that it applies to, and how it mixes the two predictions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fora_trt.bundle import Manifest
from fora_trt.errors import InputError


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance (arXiv 2207.12598) on the steps from `first` up to but not including `last`.

    Steps are counted from 0. A `scale` up to 1 means no guidance. Guidance in a limited interval (arXiv 2404.07724)
    saves the unconditional half of all other steps.
    """

    scale: float = 1.0
    first: int = 0
    last: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.scale < float("inf"):  # also false for NaN
            raise InputError(f"the guidance scale is {self.scale}; give a finite number of at least 0 (0 to 1: none)")

    def guides(self, step: int) -> bool:
        """Whether this step is guided, so that its batch has an unconditional half."""
        return self.scale > 1 and self.first <= step and (self.last is None or step < self.last)


def guided_channels(manifest: Manifest) -> int:
    """The number of channels that are guided, the first ones."""
    own = manifest.guidance.channels if manifest.guidance is not None else None
    return own or manifest.latents.channels


def mix_guidance(conditional: Tensor, unconditional: Tensor, scale: Tensor, channels: int) -> Tensor:
    """Guide the first `channels` channels of a prediction (B, ...); the others are those of the conditional half."""
    if channels == conditional.shape[1]:
        return torch.lerp(unconditional, conditional, scale)
    noise = torch.lerp(unconditional[:, :channels], conditional[:, :channels], scale)
    return torch.cat([noise, conditional[:, channels:]], dim=1)
