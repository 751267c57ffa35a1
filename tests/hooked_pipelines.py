"""Caching by hooks on the real transformers inside a pipeline: the reference for the drop-in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from fora_trt.bundle import Bundle
from fora_trt.evaluate.eager_fora import forecast_of
from fora_trt.schedule import Schedule


class Hooked:
    """A transformer whose sites return what earlier full steps kept; calls of one step take the slots in turn."""

    def __init__(self, module: Any, sites: Sequence[str], schedule: str, steps: int, slots: int) -> None:
        self.plan = Schedule.open(schedule, steps).plan
        self.slots, self.calls = slots, 0
        self.sites = [module.get_submodule(path) for path in sites]
        self.kept: dict[tuple[int, str], list[Any]] = {}
        for path, site in zip(sites, self.sites, strict=True):
            site.forward = self._cached(path, site.forward)
        self.module = module
        own = type(module).forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            made = own(module, *args, **kwargs)
            self.calls += 1
            return made

        module.forward = forward

    def _cached(self, path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def cached(*args: Any, **kwargs: Any) -> Any:
            step, slot = self.plan[self.calls // self.slots], self.calls % self.slots
            kept = self.kept.setdefault((slot, path), [])
            if step.is_full:
                kept[:] = [forward(*args, **kwargs), *kept[:3]]
                return kept[0]
            first = kept[0][0] if isinstance(kept[0], tuple | list) else kept[0]
            return forecast_of(kept, step.weights, len(first))

        return cached

    def remove(self) -> None:
        """Take the hooks off."""
        for site in (*self.sites, self.module):
            del site.forward


def hooked(pipe: Any, given: Mapping[str, Any], bundles: Mapping[str, Bundle], schedule: str, steps: int) -> Tensor:
    """The latents of a pipeline whose transformers cache the sites of the bundles by hooks.

    Each transformer has the schedule for the steps from its first call to the end.
    """

    def with_hooks(text: str, begins: Mapping[str, int]) -> tuple[Tensor, dict[str, int]]:
        made: dict[str, Hooked] = {}
        for name, bundle in bundles.items():
            spec = bundle.manifest.pipeline
            assert spec is not None
            sites = [site.module for site in bundle.manifest.cache_sites]
            made[name] = Hooked(getattr(pipe, name), sites, text, steps - begins[name], len(spec.call.slots))
        try:
            return latents_of(pipe, given, steps), {name: one.calls // one.slots for name, one in made.items()}
        finally:
            for one in made.values():
                one.remove()

    begins = dict.fromkeys(bundles, 0)
    if len(bundles) > 1:
        _, taken = with_hooks("none", begins)
        begins = dict(zip(bundles, accumulate([0, *taken.values()]), strict=False))
    return with_hooks(schedule, begins)[0]


def latents_of(pipe: Any, given: Mapping[str, Any], steps: int, seed: int = 7) -> Tensor:
    """The latents of a pipeline call."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        made = pipe(**given, num_inference_steps=steps, generator=noise, output_type="latent", return_dict=False)[0]
    return made if isinstance(made, Tensor) else torch.as_tensor(made)
