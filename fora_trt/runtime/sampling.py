"""The sampling loop: from seeds and classes to latents, by any denoiser and any diffusers scheduler.

Shapes: B images, C, H, W latents; under guidance the denoiser sees 2B, the conditional half first.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from fora_trt.bundle import Manifest
from fora_trt.engines.cuda_graphs import Replay
from fora_trt.errors import BackendError, InputError
from fora_trt.runtime.updates import Update
from fora_trt.schedule import Schedule


class Steps(Protocol):
    """What the loop needs of a denoiser; eager PyTorch with hooks can be one too."""

    manifest: Manifest
    device: torch.device

    def prepare(self, batch: int) -> object:
        """Make ready for calls of this batch; another object than the last time if memory has moved."""

    def predict(self, full: bool, latents: Tensor, timestep: Tensor, **conditioning: Tensor) -> Tensor:
        """Run a full or a reuse step, on the current stream."""

    def is_capturable(self) -> bool:
        """Whether `predict` can become a part of a CUDA graph."""


@dataclass
class Trajectory:
    """Latents (B, C, H, W) in fp32 on the CPU, and what they took.

    `seconds` is the whole loop; `full_seconds` and `reuse_seconds` list the denoiser's steps.
    """

    latents: Tensor
    seconds: float
    full_seconds: list[float] = field(default_factory=list)
    reuse_seconds: list[float] = field(default_factory=list)

    @staticmethod
    def joined(parts: Sequence[Trajectory]) -> Trajectory:
        """One after the other: latents in a row, times together."""
        return Trajectory(
            torch.cat([part.latents for part in parts]),
            sum(part.seconds for part in parts),
            [seconds for part in parts for seconds in part.full_seconds],
            [seconds for part in parts for seconds in part.reuse_seconds],
        )

    def median_milliseconds(self) -> dict[str, float | None]:
        """Median time of a full and of a reuse step; None where there was none."""
        kinds = {"full_step_ms": self.full_seconds, "reuse_step_ms": self.reuse_seconds}
        return {name: statistics.median(times) * 1e3 if times else None for name, times in kinds.items()}


class Sampler:
    """Denoises batches with one denoiser and one scheduler.

    A step is the scaling of the latents, the engine, guidance and the scheduler's update. Where all of it stays on the
    device it is captured as a CUDA graph, one for full and one for reuse steps, and kept from batch to batch: then
    a trajectory is a launch for each step, without a copy to or from the host between the first and the last.
    """

    def __init__(self, denoiser: Steps, update: Update) -> None:
        self.denoiser, self.update = denoiser, update
        self._key: tuple[object, ...] = ()

    @torch.inference_mode()
    def __call__(
        self,
        schedule: Schedule,
        class_labels: Sequence[int],
        seeds: Sequence[int],
        guidance_scale: float = 1.0,
        watch: Any = iter,
    ) -> Trajectory:
        """Denoise one batch, image k from `seeds[k]` alone, so that it is the same in any batch.

        The schedule has a step for each call of the scheduler (`update.calls`); `watch` wraps them, for a progress
        bar. Classifier-free guidance (arXiv 2207.12598) mixes the two halves where `guidance_scale` is over 1.
        """
        manifest, device, latent = self.denoiser.manifest, self.denoiser.device, self.denoiser.manifest.latents
        check_labels(class_labels, manifest)
        assert schedule.steps == self.update.calls
        clock = StepClock(device)
        began = time.perf_counter()
        with torch.inference_mode(False), torch.no_grad():  # tensors made in that mode cannot be written outside it
            allocation = self.update.begin((latent.channels, latent.height, latent.width), seeds, device)
            self._prepare(class_labels, guidance_scale, allocation)
        for full in watch(schedule.full):
            with clock.step(full):
                self.launch(full)
        latents = self.update.latents.cpu()  # waits for the device
        if not latents.isfinite().all():
            raise BackendError(
                f"the latents of {manifest.name} are not finite after {schedule.steps} steps in {manifest.precision}; "
                "export it with --precision fp32 or bf16"
            )
        return Trajectory(latents.clone(), time.perf_counter() - began, *clock.seconds())

    def launch(self, full: bool) -> None:
        """Take a full or a reuse step of a trajectory that was begun; may return before it is done."""
        self._steps[full]()

    def _prepare(self, class_labels: Sequence[int], guidance_scale: float, allocation: object) -> None:
        """Fill the tensors that a step reads; captured steps stay as long as those are where they were."""
        guided, images, device = guidance_scale > 1, len(class_labels), self.denoiser.device
        null = [self.denoiser.manifest.guidance.null_class] * images
        labels = torch.tensor([*class_labels, *(null if guided else [])])  # (2B,) or (B,)
        key = (images, guided, allocation, self.denoiser.prepare(len(labels)))
        if key != self._key:
            self._key = key
            self._labels, self._scale = labels.to(device), torch.empty((), device=device)
            self._steps = {
                full: Replay(partial(self._step, full, guided), device, self._is_capturable) for full in (True, False)
            }
        self._labels.copy_(labels)
        self._scale.fill_(guidance_scale)

    def _step(self, full: bool, guided: bool) -> None:
        update, channels = self.update, self.denoiser.manifest.latents.channels
        latents = update.model_input()  # (B, C, H, W)
        if guided:
            latents = latents.repeat(2, 1, 1, 1)
        prediction = self.denoiser.predict(full, latents, update.timestep(), class_labels=self._labels).float()
        if guided:
            prediction = mix_guidance(prediction, self._scale, channels)
        update.advance(prediction if update.takes_variance else prediction[:, :channels])

    def _is_capturable(self) -> bool:
        return self.update.on_device and self.denoiser.is_capturable()


def sample_in_batches(
    sampler: Sampler,
    schedule: Schedule,
    class_labels: Sequence[int],
    seed: int,
    guidance_scale: float,
    batch_size: int,
    watch: Any = iter,
) -> Trajectory:
    """Denoise any number of images, `batch_size` at a time; image k has the seed `seed` + k whatever its batch."""
    parts = []
    for start in range(0, len(class_labels), batch_size):
        labels = class_labels[start : start + batch_size]
        seeds = range(seed + start, seed + start + len(labels))
        parts.append(sampler(schedule, labels, seeds, guidance_scale, watch))
    return Trajectory.joined(parts)


def mix_guidance(prediction: Tensor, scale: Tensor, channels: int) -> Tensor:
    """(2B, ...) -> (B, ...): pushes the noise away from the unconditional one; a learned variance stays as it is."""
    conditional, unconditional = prediction.chunk(2)
    noise = torch.lerp(unconditional[:, :channels], conditional[:, :channels], scale)
    return torch.cat([noise, conditional[:, channels:]], dim=1)


def check_labels(class_labels: Iterable[int], manifest: Manifest) -> None:
    """Raise `InputError` for a class that the model does not have."""
    last = manifest.guidance.num_classes - 1
    for label in class_labels:
        if not 0 <= label <= last:
            raise InputError(f"there is no class {label}; {manifest.name} has the classes 0 to {last}")


class StepClock:
    """Times the steps of a trajectory without waiting for the device: events on a GPU, the clock elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[bool, Any, Any]] = []

    def step(self, full: bool) -> StepClock:
        """Enter the returned context for the length of one step."""
        self._full, self._began = full, self._mark()
        return self

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        self._marks.append((self._full, self._began, self._mark()))

    def seconds(self) -> tuple[list[float], list[float]]:
        """Seconds of the full steps and of the reuse steps; call it when the device is done."""
        times = [(full, b.elapsed_time(e) / 1e3 if self._cuda else e - b) for full, b, e in self._marks]
        return [t for full, t in times if full], [t for full, t in times if not full]

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call] # torch does not annotate it
        event.record()
        return event
