"""The sampling loop: from seeds and classes to latents, by any denoiser and any diffusers scheduler.

Shapes: B images, C, H, W latents; under guidance the denoiser sees 2B, the conditional half first.
"""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from fora_trt.bundle import Manifest
from fora_trt.errors import BackendError, InputError
from fora_trt.runtime.schedulers import takes_variance
from fora_trt.schedule import Schedule


class Steps(Protocol):
    """What the loop needs of a denoiser; eager PyTorch with hooks can be one too."""

    manifest: Manifest
    device: torch.device

    @property
    def next_step_is_full(self) -> bool: ...

    def __call__(self, latents: Tensor, timestep: Tensor | float, **conditioning: Tensor) -> Tensor: ...

    def reset(self, schedule: Schedule | None = None) -> None: ...


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


def timesteps_of(scheduler: SchedulerMixin, steps: int) -> int:
    """Set the scheduler to `steps`; return how often it will call the model, which can be more (Heun, PNDM)."""
    if steps < 1:
        raise InputError(f"the number of steps is {steps}; at least 1 is needed")
    try:
        scheduler.set_timesteps(steps)
    except ValueError as error:
        raise InputError(f"{type(scheduler).__name__} does not admit {steps} steps: {error}") from error
    return len(scheduler.timesteps)


@torch.inference_mode()
def sample(
    denoiser: Steps,
    scheduler: SchedulerMixin,
    schedule: Schedule,
    class_labels: Sequence[int],
    seeds: Sequence[int],
    guidance_scale: float = 1.0,
    watch: Any = iter,
) -> Trajectory:
    """Denoise one batch, image k from `seeds[k]` alone, so that it is the same in any batch.

    The scheduler must be set to its timesteps (`timesteps_of`); `watch` wraps them, for a progress bar.
    Classifier-free guidance (arXiv 2207.12598) mixes the two halves where `guidance_scale` is over 1.
    """
    manifest, device = denoiser.manifest, denoiser.device
    latent = manifest.latents
    check_labels(class_labels, manifest)
    guided = guidance_scale > 1
    null = [manifest.guidance.null_class] * len(class_labels)
    labels = torch.tensor([*class_labels, *(null if guided else [])], device=device)  # (2B,) or (B,)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = [torch.randn(latent.channels, latent.height, latent.width, generator=one) for one in generators]
    latents = torch.stack(noise).to(device) * float(scheduler.init_noise_sigma)  # (B, C, H, W)
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    extra = {"generator": generators} if takes_generator else {}
    clock = StepClock(device)

    denoiser.reset(schedule)
    began = time.perf_counter()
    for timestep in watch(scheduler.timesteps):
        noisy = scheduler.scale_model_input(latents, timestep)
        with clock.step(full=denoiser.next_step_is_full):
            prediction = denoiser(noisy.repeat(2, 1, 1, 1) if guided else noisy, timestep, class_labels=labels)
        prediction = prediction.float()
        if guided:
            prediction = mix_guidance(prediction, guidance_scale, latent.channels)
        if not takes_variance(scheduler):
            prediction = prediction[:, : latent.channels]
        latents = scheduler.step(prediction, timestep, latents, **extra).prev_sample
    latents = latents.cpu()  # waits for the device
    if not latents.isfinite().all():
        raise BackendError(
            f"the latents of {manifest.name} are not finite after {schedule.steps} steps in {manifest.precision}; "
            "export it with --precision fp32 or bf16"
        )
    return Trajectory(latents, time.perf_counter() - began, *clock.seconds())


def sample_in_batches(
    denoiser: Steps,
    scheduler: SchedulerMixin,
    steps: int,
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
        timesteps_of(scheduler, steps)  # clears what the scheduler remembers of the batch before
        labels = class_labels[start : start + batch_size]
        seeds = range(seed + start, seed + start + len(labels))
        parts.append(sample(denoiser, scheduler, schedule, labels, seeds, guidance_scale, watch))
    return Trajectory.joined(parts)


def mix_guidance(prediction: Tensor, scale: float, channels: int) -> Tensor:
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
