"""FORA in eager PyTorch: the reference for the results and times of the two-graph runtime.

It shares no code with the split: hooks keep the output of each cache site in a full step and return it in a reuse
step. For a forecast they keep those of several full steps and return their weighted sum.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fora_trt.bundle import Bundle, Manifest
from fora_trt.contract import LATENTS, PRECISIONS, TIMESTEP
from fora_trt.engines.memory import bytes_of, check_room
from fora_trt.engines.tf32 import without_tf32
from fora_trt.errors import ScheduleError
from fora_trt.evaluate.source_module import model_from_bundle, with_unread_inputs
from fora_trt.masks import Masks
from fora_trt.models.precision import cast_all
from fora_trt.plan import FULL_STEP, LATEST, Plan, Step, depth_of, offsets_of
from fora_trt.quiet import quiet


class PlainPredictor(ABC):
    """A `Predictor` in plain PyTorch, which computes and allocates nothing before the loop.

    `depth` is the number of full steps whose features the trajectory at hand reads.
    """

    manifest: Manifest
    device: torch.device
    depth = 1
    _room_for = (0, 0)

    def begin(
        self,
        plan: Plan,
        timesteps: Tensor,
        conditioning: Mapping[str, Tensor],
        batches: Sequence[int],
        first: int = 0,
    ) -> PlainRun:
        """Compute nothing; raise `InputError` for a batch that does not fit, `ScheduleError` for unknown masks."""
        if unknown := {step.graph for step in plan if step.is_partial} - self.manifest.partial_graphs.keys():
            raise ScheduleError(f"no mask is known for {len(unknown)} kinds of partial steps of the schedule")
        self.depth, batch = depth_of(plan), max(batches)
        if (self.depth, batch) > self._room_for:  # once per size: the features kept later would count as used
            check_room(batch, self.device, lambda count: self.depth * bytes_of(self.manifest.features(), count))
            self._room_for = self.depth, batch
        return PlainRun(self, plan[first:], offsets_of(plan)[first:])

    @abstractmethod
    def compute(self, step: Step, latents: Tensor, timestep: Tensor | float, **conditioning: Tensor) -> Tensor:
        """Compute every layer in a full step; in a reuse step read the weighted features of the last full steps."""

    def first_not_finite(self) -> str | None:
        """Always None: no tensors are kept to check."""
        return None


@dataclass(frozen=True)
class PlainRun:
    """A run; its steps need no preparation."""

    predictor: PlainPredictor
    plan: Plan
    offsets: Sequence[int]
    generation: object = None

    @property
    def graphs(self) -> Sequence[str]:
        """The graph of each step."""
        return [step.graph for step in self.plan]

    def at(self, step: int, batch: int) -> PlainStep:
        """Step number `step` of the run."""
        return PlainStep(self, step)


@dataclass(frozen=True)
class PlainStep:
    """A step of a run, and the steps after it in its window."""

    run: PlainRun
    step: int
    variant: object = None

    def predict(self, offset: int, latents: Tensor, timestep: Tensor | float, **conditioning: Tensor) -> Tensor:
        """Run the step at an offset in the window."""
        step = self.run.plan[self.step + offset - self.run.offsets[self.step]]
        return self.run.predictor.compute(step, latents, timestep, **conditioning)

    def is_capturable(self) -> bool:
        """Always False: the reference is eager PyTorch without CUDA graphs."""
        return False


def forecast_of(kept: Sequence[Any], weights: Sequence[float], batch: int, full_batch: int | None = None) -> Any:
    """What a reuse step reads: the weighted sum of what the last full steps kept, the latest first.

    Tensors (B, ...) are cut to the first `batch` samples and added in fp32. Tuples and lists are added element by
    element; from anything but tensors of numbers the latest is taken. With `full_batch`, the batch of the latest full
    step, tensors (k * B, ...) are cut to k rows of each sample.
    """
    latest = kept[0]
    if isinstance(latest, (tuple, list)):
        return type(latest)(forecast_of(parts, weights, batch, full_batch) for parts in zip(*kept, strict=True))
    if not isinstance(latest, Tensor):
        return latest
    rows = batch if full_batch is None else batch * max(1, len(latest) // full_batch)
    if weights == LATEST or not latest.is_floating_point():
        return latest if len(latest) == rows else latest[:rows]
    total = sum(weight * one[:rows].float() for weight, one in zip(weights, kept, strict=False))
    return torch.as_tensor(total).to(latest.dtype)


def _is_floating(one: Any) -> bool:
    return isinstance(one, Tensor) and one.is_floating_point()


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
        self._spec = model.spec
        self._dtypes = {tensor.name: getattr(torch, tensor.dtype) for tensor in model.spec.inputs}
        self._step, self._batch, self._full_batch = FULL_STEP, 0, 0
        self._kept: dict[str, list[Any]] = {}
        for site in bundle.manifest.cache_sites:
            module = self.module.get_submodule(site.module)
            module.forward = self._cached(site.module, module.forward)

    @torch.no_grad()
    def compute(self, step: Step, latents: Tensor, timestep: Tensor | float, **conditioning: Tensor) -> Tensor:
        self._step, self._batch = step, len(latents)
        times = torch.as_tensor(timestep, device=self.device).to(self._dtypes[TIMESTEP]).expand(len(latents))
        given = with_unread_inputs({LATENTS: latents, TIMESTEP: times, **conditioning}, self._spec)
        cast: dict[str, Tensor] = cast_all(given, self._dtype) | {TIMESTEP: times}
        with without_tf32(self.device):
            result = self.call(self.module, {tensor.name: cast[tensor.name] for tensor in self._spec.inputs}).float()
        if step.computes:
            self._full_batch = self._batch
        return result

    def add_graphs(self, masks: Masks) -> None:
        """Take steps with these masks too, which the bundle need not have graphs for."""
        known = {**self.manifest.partial_graphs, **masks}
        self.manifest = self.manifest.model_copy(update={"partial_graphs": known})

    def features(self) -> dict[str, Tensor]:
        """The latest output of each cache site that was called, flattened: (B, V)."""
        leaves = {path: tree_leaves(kept[0]) for path, kept in self._kept.items() if kept}
        return {
            path: torch.cat([one.reshape(self._full_batch, -1) for one in values if _is_floating(one)], dim=1).float()
            for path, values in leaves.items()
        }

    def _cached(self, path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        kept = self._kept.setdefault(path, [])

        def cached(*args: Any, **kwargs: Any) -> Any:
            read = partial(forecast_of, batch=self._batch, full_batch=self._full_batch)
            if not self._step.computes:
                return read(kept, self._step.weights)
            computes = self._step.is_full or path in self.manifest.partial_graphs[self._step.graph]
            latest = forward(*args, **kwargs) if computes else read(kept[:1], LATEST)
            kept[:] = [latest, *kept[: self.depth - 1]]
            return latest

        return cached
