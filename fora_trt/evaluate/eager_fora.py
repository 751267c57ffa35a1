"""FORA in plain PyTorch: the reference that the two-graph runtime is compared with, in results and in time.

It shares nothing with the split: each site's output is kept when the step is full and returned when it is not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fora_trt.bundle import Bundle, Manifest
from fora_trt.engines.memory import bytes_of, check_room
from fora_trt.engines.tf32 import without_tf32
from fora_trt.evaluate.source_module import model_from_bundle
from fora_trt.models.precision import cast_all
from fora_trt.models.spec import LATENTS, PRECISIONS, TIMESTEP
from fora_trt.quiet import quiet
from fora_trt.schedule import places_in_windows


class PlainSteps:
    """The part of a `Denoiser` that is the same in plain PyTorch: nothing is computed or allocated before the loop."""

    manifest: Manifest
    device: torch.device
    _room_for = 0

    def begin(
        self, timesteps: Tensor, full: Sequence[bool], conditioning: Mapping[str, Tensor], batch: int
    ) -> list[int]:
        """Nothing is computed before the loop."""
        return places_in_windows(full)

    def turn_to(self, step: int) -> None:
        """A step knows all it needs from its call."""

    def prepare(self, batch: int) -> object:
        """Nothing is allocated before it is needed; what cannot fit is refused with `InputError`."""
        if batch > self._room_for:  # once: later, the features that it keeps are no longer free
            check_room(batch, self.device, lambda count: bytes_of(self.manifest.features(), count))
            self._room_for = batch
        return None

    def is_capturable(self) -> bool:
        """Eager PyTorch is what most people run; it is left as it is."""
        return False


class EagerFora(PlainSteps):
    """Takes steps like a `Denoiser`; computes in fp32, or with `cast_whole` all of it in the bundle's precision.

    The one is the reference for results, the other what `pipe.to(torch.float16)` gives, the reference for time.
    """

    def __init__(self, bundle: Bundle, device: torch.device, cast_whole: bool = False) -> None:
        model = model_from_bundle(bundle, precision="fp32" if cast_whole else None)
        self.manifest, self.device = bundle.manifest, device
        if model.half is not None:
            model.half.widen()
        self._dtype = getattr(torch, PRECISIONS[bundle.manifest.precision]) if cast_whole else torch.float32
        with quiet("diffusers"):  # it warns of casts whatever they are to
            self.module, self.call = model.module.to(device, self._dtype), model.spec.call
        self._inputs = [tensor.name for tensor in model.spec.inputs]
        self._dtypes = {tensor.name: getattr(torch, tensor.dtype) for tensor in model.spec.inputs}
        self._full = True
        for site in bundle.manifest.cache_sites:
            module = self.module.get_submodule(site.module)
            module.forward = self._cached(module.forward)

    @torch.no_grad()
    def predict(self, place: int, latents: Tensor, timestep: Tensor | float, **conditioning: Tensor) -> Tensor:
        """Compute every layer, or behind the first place reuse what the sites put out in the last full step."""
        self._full = place == 0
        times = torch.as_tensor(timestep, device=self.device).to(self._dtypes[TIMESTEP]).expand(len(latents))
        given: dict[str, Tensor] = cast_all({LATENTS: latents, **conditioning}, self._dtype) | {TIMESTEP: times}
        with without_tf32(self.device):
            return self.call(self.module, {name: given[name] for name in self._inputs}).float()

    def first_not_finite(self) -> str | None:
        """Nothing is kept to look at."""
        return None

    def _cached(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        kept: list[Any] = []

        def cached(*args: Any, **kwargs: Any) -> Any:
            if self._full:
                kept[:] = [forward(*args, **kwargs)]
            return kept[0]

        return cached
