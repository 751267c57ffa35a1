"""Noise that a model takes as an input and that is drawn anew at every step, such as the latent of a GAN."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fora_trt.bundle import Manifest
from fora_trt.runtime.inputs import noise_of


class StepNoise:
    """Draws the noise of images, that of image k from `seeds[k]` alone, whatever its batch and its scheduler.

    Each image has a generator of its own, whose values differ from those of its first latents.
    """

    def __init__(self, manifest: Manifest, seeds: Sequence[int]) -> None:
        self._specs = noise_of(manifest)
        first = [torch.Generator().manual_seed(seed) for seed in seeds] if self._specs else []
        derived = [int(torch.randint(2**62, (), generator=one)) for one in first]
        self._generators = [torch.Generator().manual_seed(seed) for seed in derived]

    def next(self) -> dict[str, Tensor]:
        """The inputs of the next step by name, (B, ...) on the CPU; empty for a model without such inputs."""
        return {
            name: torch.stack([torch.randn(spec.sized(1)[1:], generator=one) for one in self._generators])
            for name, spec in self._specs.items()
        }
