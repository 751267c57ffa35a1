"""FORA in eager PyTorch: the reference for the results and times of the two-graph runtime.

It shares no code with the split: hooks keep the output of each cache site in a full step and return it in a reuse
step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fora_trt.bundle import Bundle, Manifest
from fora_trt.contract import LATENTS, PRECISIONS, TIMESTEP
from fora_trt.engines.memory import bytes_of, check_room
from fora_trt.engines.tf32 import without_tf32
from fora_trt.evaluate.source_module import model_from_bundle
from fora_trt.models.precision import cast_all
from fora_trt.quiet import quiet
from fora_trt.schedule import Step, offsets_in_windows


class PlainPredictor(ABC):
    """A `Predictor` in plain PyTorch, which computes and allocates nothing before the loop."""

    manifest: Manifest
    device: torch.device
    _room_for = 0

    def begin(
        self, plan: Sequence[Step], timesteps: Tensor, conditioning: Mapping[str, Tensor], batches: Sequence[int]
    ) -> PlainRun:
        """Check that the batch fits the device's memory (`InputError` if not); compute nothing."""
        if (batch := max(batches)) > self._room_for:  # once per size: the features kept later would count as used
            check_room(batch, self.device, lambda count: bytes_of(self.manifest.features(), count))
            self._room_for = batch
        return PlainRun(self, offsets_in_windows(plan))

    @abstractmethod
    def predict(self, offset: int, latents: Tensor, timestep: Tensor | float, **conditioning: Tensor) -> Tensor:
        """Compute every layer at offset 0; at other offsets reuse the features of the last full step."""

    def first_not_finite(self) -> str | None:
        """Always None: no tensors are kept to check."""
        return None


@dataclass(frozen=True)
class PlainRun:
    """A run, and also each of its steps: a step needs no data except the arguments of its call."""

    predictor: PlainPredictor
    offsets: Sequence[int]
    generation: object = None

    def at(self, step: int, batch: int) -> PlainRun:
        """Return the run itself; there is nothing to prepare."""
        return self

    def predict(self, offset: int, latents: Tensor, timestep: Tensor | float, **conditioning: Tensor) -> Tensor:
        """Run a step."""
        return self.predictor.predict(offset, latents, timestep, **conditioning)

    def is_capturable(self) -> bool:
        """Always False: the reference is eager PyTorch without CUDA graphs."""
        return False


class EagerFora(PlainPredictor):
    """Computes in fp32, or with `cast_whole` entirely in the bundle's precision.

    fp32 is the reference for results. `cast_whole` does the same as `pipe.to(torch.float16)`; it is the reference for
    times.
    """

    def __init__(self, bundle: Bundle, device: torch.device, cast_whole: bool = False) -> None:
        model = model_from_bundle(bundle, precision="fp32" if cast_whole else None)
        self.manifest, self.device = bundle.manifest, device
        if model.half is not None:
            model.half.widen()
        self._dtype = getattr(torch, PRECISIONS[bundle.manifest.precision]) if cast_whole else torch.float32
        with quiet("diffusers"):  # diffusers warns about any cast
            self.module, self.call = model.module.to(device, self._dtype), model.spec.call
        self._inputs = [tensor.name for tensor in model.spec.inputs]
        self._dtypes = {tensor.name: getattr(torch, tensor.dtype) for tensor in model.spec.inputs}
        self._full = True
        for site in bundle.manifest.cache_sites:
            module = self.module.get_submodule(site.module)
            module.forward = self._cached(module.forward)

    @torch.no_grad()
    def predict(self, offset: int, latents: Tensor, timestep: Tensor | float, **conditioning: Tensor) -> Tensor:
        self._full = offset == 0
        times = torch.as_tensor(timestep, device=self.device).to(self._dtypes[TIMESTEP]).expand(len(latents))
        given: dict[str, Tensor] = cast_all({LATENTS: latents, **conditioning}, self._dtype) | {TIMESTEP: times}
        with without_tf32(self.device):
            return self.call(self.module, {name: given[name] for name in self._inputs}).float()

    def _cached(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        kept: list[Any] = []

        def cached(*args: Any, **kwargs: Any) -> Any:
            if self._full:
                kept[:] = [forward(*args, **kwargs)]
            return kept[0]

        return cached
