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


class EagerFora:
    """Takes steps like a `Denoiser`; computes in fp32."""

    def __init__(self, bundle: Bundle, device: torch.device) -> None:
        model = model_from_bundle(bundle)
        self.manifest, self.device = bundle.manifest, device
        self.module, self._call = model.module.float().to(device), model.spec.call
        self._full = True
        for site in bundle.manifest.cache_sites:
            module = self.module.get_submodule(site.module)
            module.forward = self._cached(module.forward)

    def prepare(self, batch: int) -> object:
        """Nothing is allocated before it is needed."""
        return None

    @torch.no_grad()
    def predict(self, full: bool, latents: Tensor, timestep: Tensor | float, **conditioning: Tensor) -> Tensor:
        """Compute every layer, or reuse what the sites put out in the last full step."""
        self._full = full
        times = torch.as_tensor(timestep, dtype=torch.float32, device=self.device).expand(len(latents))
        return self._call(self.module, {LATENTS: latents.float(), TIMESTEP: times, **conditioning})

    def is_capturable(self) -> bool:
        """Eager PyTorch is what most people run; it is left as it is."""
        return False

    def _cached(self, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        kept: list[Tensor] = []

        def cached(*args: Any, **kwargs: Any) -> Tensor:
            if self._full:
                kept[:] = [forward(*args, **kwargs)]
            return kept[0]

        return cached
