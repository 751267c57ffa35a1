"""The denoiser: called like the network that it replaces, it alternates a full and a reuse engine on shared buffers.

Shapes: B is the batch of one call (twice the images under guidance), C, H, W are the latents' channels and sides.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fora_trt.bundle import Bundle, Manifest
from fora_trt.engines.backends import AUTO, backend_from_name, device_from_name
from fora_trt.engines.base import Engine
from fora_trt.engines.memory import bytes_of, check_room
from fora_trt.engines.plan_store import PlanSource
from fora_trt.errors import InputError, ScheduleError
from fora_trt.models.examples import default_of
from fora_trt.models.spec import FULL, LATENTS, NOISE_PREDICTION, REUSE, TIMESTEP, InputSpec
from fora_trt.runtime.conditioning import check_values, inputs_of
from fora_trt.schedule import Schedule

OPEN_STEPS = 1000
"""Length of a schedule whose number of steps nobody said: as many as models are trained with."""

if TYPE_CHECKING:
    from fora_trt.runtime.transformer import DenoiserTransformer


def mend_overflow(precision: str) -> str:
    """What to do about a model that is not finite in this precision."""
    finer = {"fp16": "bf16 or fp32", "bf16": "fp32"}
    return (
        f"export it with --precision {finer[precision]}"
        if precision in finer
        else "its weights or its inputs are too large even for fp32; look at the checkpoint and the guidance scale"
    )


def load(
    bundle: str | Path | Bundle,
    *,
    schedule: Schedule | None = None,
    cache_interval: int | None = None,
    backend: str = AUTO,
    device: str | torch.device = AUTO,
    plans: PlanSource | None = None,
) -> Denoiser:
    """Open a bundle and start its engines.

    `schedule` says which steps are full; `cache_interval` instead of it leaves the number of steps open, for a
    diffusers pipeline that sets it at every call (`as_transformer`), or until `reset(schedule)`. `backend` is `auto`
    or a name that `fora-trt doctor` lists; `device` is `auto`, `cpu` or `cuda:N`. `plans` tells the TensorRT backends
    where their plans are, or are to be built: in `engines/` unless told otherwise.
    Raises `BundleError` for a damaged bundle and `BackendError` where the backend does not work.
    """
    if (schedule is None) == (cache_interval is None):
        raise InputError("load() takes either schedule=Schedule.static(steps, cache_interval) or cache_interval=N")
    schedule = schedule or Schedule.from_first(OPEN_STEPS, cache_interval or 1)
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    chosen = backend_from_name(backend)
    where = device if isinstance(device, torch.device) else device_from_name(device, chosen)
    return Denoiser(chosen.engines(opened, where, plans), opened.manifest, schedule, chosen.name)


class Denoiser:
    """Alternates the engines of one bundle over a schedule.

    It allocates every tensor of both graphs once, for the largest batch so far; a smaller one uses the first rows. The
    features that the full engine writes are the very memory that the reuse engine reads: tensors are bound by name,
    and a feature has one name in both graphs.
    """

    def __init__(self, engines: Mapping[str, Engine], manifest: Manifest, schedule: Schedule, backend: str) -> None:
        self.full, self.reuse = engines[FULL], engines[REUSE]
        self.manifest = manifest
        self.schedule = schedule
        self.backend = backend
        self.device = self.full.device
        self.buffers: dict[str, Tensor] = {}
        engines_tensors = (self.full.inputs, self.full.outputs, self.reuse.inputs, self.reuse.outputs)
        self._tensors = {name: one for tensors in engines_tensors for name, one in tensors.items()}
        self._inputs = {name: one for name, one in self._tensors.items() if name in inputs_of(manifest)}
        self._memory: dict[str, Tensor] = {}
        self._allocation = object()
        self._scratch: tuple[int, int] | None = None
        self._step = 0

    @torch.no_grad()
    def __call__(self, latents: Tensor, timestep: Tensor | float, **conditioning: Tensor) -> Tensor:
        """Run the next step of the schedule; return the prediction (B, out_channels, H, W).

        `latents` is (B, C, H, W), `timestep` a scalar or (B,), `conditioning` the model's other inputs by name
        (`class_labels`, (B,)). The result is the denoiser's own buffer, valid until the next call.
        Raises `ScheduleError` past the end of the schedule, `InputError` for what the graphs do not take.
        """
        if self.finished:
            raise ScheduleError(
                f"all {self.schedule.steps} steps of the schedule are done; call reset() before the next trajectory"
            )
        full = self.next_step_is_full
        if not full and len(latents) != self._batch:
            raise ScheduleError(
                f"the batch became {len(latents)} within a trajectory, whose features are for another; "
                "call reset() first"
            )
        if self._step == 0:  # once a trajectory: on a GPU this waits for it
            for name in conditioning.keys() & self._inputs.keys():
                check_values(self._inputs[name], conditioning[name], self.manifest.conditioning.get(name, InputSpec()))
        self.prepare(len(latents))
        prediction = self.predict(full, latents, timestep, **conditioning)
        self._step += 1
        return prediction

    def prepare(self, batch: int) -> object:
        """Let both engines use tensors of this batch; another object than the last time if memory has moved.

        Memory only grows. Features of a batch stay where they are for a smaller one, which takes their first rows.
        """
        if batch > self._capacity or batch < 1:
            self._allocate(batch)
        if batch != self._batch:
            self.buffers, buffers = {}, {name: tensor[:batch] for name, tensor in self._memory.items()}
            self.full.bind(buffers)
            self.reuse.bind(buffers)
            self.buffers = buffers
            if (scratch := (self.full.scratch_address(), self.reuse.scratch_address())) != self._scratch:
                self._scratch, self._allocation = scratch, object()
        return self._allocation

    def predict(self, full: bool, latents: Tensor, timestep: Tensor | float, **conditioning: Tensor) -> Tensor:
        """Run a full or a reuse step whatever the schedule says, on tensors that were prepared."""
        self._fill(latents, timestep, conditioning)
        (self.full if full else self.reuse).enqueue()
        return self.buffers[NOISE_PREDICTION]

    def is_capturable(self) -> bool:
        """Whether `predict` can become a part of a CUDA graph."""
        return self.full.is_capturable() and self.reuse.is_capturable()

    def first_not_finite(self) -> str | None:
        """What is not finite after a step: the latents that went in, else the first feature, else the prediction."""
        features = [feature.name for feature in self.manifest.features()]
        for name in (LATENTS, *features, NOISE_PREDICTION):
            if not self.buffers[name].isfinite().all():
                return name
        return None

    def reset(self, schedule: Schedule | None = None) -> None:
        """Go back to the first step, of another schedule if one is given."""
        self.schedule = schedule or self.schedule
        self._step = 0

    @property
    def finished(self) -> bool:
        """Whether every step of the schedule is done."""
        return self._step >= self.schedule.steps

    @property
    def next_step_is_full(self) -> bool:
        """Whether the next call computes every layer."""
        return not self.finished and self.schedule.full[self._step]

    def as_transformer(self) -> DenoiserTransformer:
        """A stand-in for the transformer of a diffusers pipeline: `pipe.transformer = denoiser.as_transformer()`."""
        from fora_trt.runtime.transformer import DenoiserTransformer

        return DenoiserTransformer(self)

    @property
    def _capacity(self) -> int:
        return len(self._memory[LATENTS]) if self._memory else 0

    @property
    def _batch(self) -> int:
        return len(self.buffers[LATENTS]) if self.buffers else 0

    def _allocate(self, batch: int) -> None:
        if batch < 1:
            raise InputError(f"the batch is {batch}; at least one latent is needed")
        self.buffers, self._memory = {}, {}  # before the new ones: both need not fit at once
        check_room(batch, self.device, self._bytes_of)
        memory: dict[str, Tensor] = {}
        with torch.inference_mode(False):  # tensors made in that mode cannot be written outside it
            for tensor in self._tensors.values():
                dtype = getattr(torch, tensor.dtype)
                memory[tensor.name] = torch.zeros(tensor.sized(batch), dtype=dtype, device=self.device)
        self._memory, self._allocation = memory, object()

    def _bytes_of(self, batch: int) -> int:
        scratch = max(self.full.scratch_bytes(batch), self.reuse.scratch_bytes(batch))
        return bytes_of(self._tensors.values(), batch) + scratch

    def _fill(self, latents: Tensor, timestep: Tensor | float, conditioning: Mapping[str, Tensor]) -> None:
        """Copy the arguments to their buffers, cast to the graphs' dtypes."""
        expected = self.buffers[LATENTS].shape
        if latents.shape != expected:
            raise InputError(f"latents have shape {tuple(latents.shape)}; this bundle takes {tuple(expected)}")
        self.buffers[LATENTS].copy_(latents)
        self.buffers[TIMESTEP].copy_(torch.as_tensor(timestep))
        if unknown := conditioning.keys() - self._inputs.keys():
            raise InputError(f"this bundle takes no {min(unknown)!r}; it takes {', '.join(self.full.inputs)}")
        for name, tensor in self._inputs.items():
            buffer, told = self.buffers[name], self.manifest.conditioning.get(name, InputSpec())
            value = default_of(tensor, told) if name not in conditioning and told.default else conditioning.get(name)
            if value is None:
                raise InputError(f"{name!r} is missing; this bundle takes {', '.join(self.full.inputs)}")
            if value.shape not in (buffer.shape, (1, *buffer.shape[1:])):
                raise InputError(f"{name!r} has shape {tuple(value.shape)}; this bundle takes {tuple(buffer.shape)}")
            buffer.copy_(value)
