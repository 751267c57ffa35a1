"""FORA in plain PyTorch: the reference that the two-graph runtime is compared with, in results and in time.

It shares nothing with the split: each site's output is kept when the step is full and returned when it is not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fora_trt.bundle import Bundle
from fora_trt.engines.torch_engine import model_from_bundle
from fora_trt.models.spec import LATENTS, TIMESTEP
from fora_trt.schedule import Schedule


class EagerFora:
    """Called like a `Denoiser`; computes in fp32."""

    def __init__(self, bundle: Bundle, device: torch.device) -> None:
        model = model_from_bundle(bundle)
        self.manifest, self.device = bundle.manifest, device
        self.module, self._call = model.module.float().to(device), model.spec.call
        self._schedule, self._step = Schedule.static(1, 1), 0
        for site in bundle.manifest.cache_sites:
            module = self.module.get_submodule(site.module)
            module.forward = self._cached(module.forward)

    def __call__(self, latents: Tensor, timestep: Tensor | float, **conditioning: Tensor) -> Tensor:
        times = torch.as_tensor(timestep, dtype=torch.float32, device=self.device).expand(len(latents))
        prediction = self._call(self.module, {LATENTS: latents.float(), TIMESTEP: times, **conditioning})
        self._step += 1
        return prediction

    def reset(self, schedule: Schedule | None = None) -> None:
        """Begin a trajectory."""
        self._schedule, self._step = schedule or self._schedule, 0

    @property
    def next_step_is_full(self) -> bool:
        """Whether the next call computes every layer."""
        return self._schedule.full[self._step]

    def _cached(self, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        kept: list[Tensor] = []

        def cached(*args: Any, **kwargs: Any) -> Tensor:
            if self.next_step_is_full:
                kept[:] = [forward(*args, **kwargs)]
            return kept[0]

        return cached
