"""The sampling loop: from seeds and conditioning to latents, by any denoiser and any diffusers scheduler.

Shapes: B images, C, H, W latents; under guidance the denoiser sees 2B, the conditional half first.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fora_trt.bundle import Manifest
from fora_trt.engines.cuda_graphs import Replay
from fora_trt.errors import BackendError, InputError
from fora_trt.models.spec import FULL, REUSE
from fora_trt.runtime.conditioning import Conditioning
from fora_trt.runtime.denoiser import mend_overflow
from fora_trt.runtime.updates import Update
from fora_trt.schedule import Schedule

Step = tuple[int, bool]
"""The place of a step in its window, 0 for a full one, and whether it is guided."""


class Steps(Protocol):
    """What the loop needs of a denoiser; eager PyTorch with hooks can be one too."""

    manifest: Manifest
    device: torch.device

    def begin(
        self, timesteps: Tensor, full: Sequence[bool], conditioning: Mapping[str, Tensor], batch: int
    ) -> list[int]:
        """Say which steps are going to be taken, and with what; returns the place of each in its window.

        0 is a full step, k the k-th reuse step behind it. More steps may be full than were asked for.
        """

    def turn_to(self, step: int) -> None:
        """Make ready for a step of those, and for all behind it in the same window."""

    def prepare(self, batch: int) -> object:
        """Make ready for calls of this batch; another object than the last time if memory has moved."""

    def predict(self, place: int, latents: Tensor, timestep: Tensor, **conditioning: Tensor) -> Tensor:
        """Run the step at a place in a window, on the current stream."""

    def is_capturable(self) -> bool:
        """Whether `predict` can become a part of a CUDA graph."""

    def first_not_finite(self) -> str | None:
        """Name of the first tensor of the last step, in the order of the network, that is not finite."""


@dataclass
class Trajectory:
    """Latents (B, C, H, W) in fp32 on the CPU, and what they took.

    `seconds` is the whole loop; `full_seconds` and `reuse_seconds` list the denoiser's steps. On a GPU, where a window
    is launched at once, the times of its steps are those in the last window of its length.
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


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance (arXiv 2207.12598) with `scale` over 1, on the steps from `first` up to `last`.

    Steps are counted from 0, `last` is excluded. Guidance on a part of the steps (arXiv 2404.07724) saves the
    unconditional half of the others.
    """

    scale: float = 1.0
    first: int = 0
    last: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.scale < float("inf"):  # not a number is not either
            raise InputError(f"the guidance scale is {self.scale}; give a number from 0 on, up to 1 for no guidance")

    def guides(self, step: int) -> bool:
        """Whether this step has an unconditional half."""
        return self.scale > 1 and self.first <= step and (self.last is None or step < self.last)


class Sampler:
    """Denoises batches with one denoiser and one scheduler.

    A step is the scaling of the latents, the engine, guidance and the scheduler's update. Where all of it stays on the
    device, the steps of a window are captured together as a CUDA graph, one for each length, and kept from batch to
    batch: then a trajectory is a launch for each window, behind a few numbers that say which it is, without a copy to
    or from the host between the first and the last.
    """

    def __init__(self, denoiser: Steps, update: Update) -> None:
        self.denoiser, self.update = denoiser, update
        self._key: tuple[object, ...] = ()

    @torch.inference_mode()
    def __call__(
        self,
        schedule: Schedule,
        conditioning: Conditioning,
        seeds: Sequence[int],
        guidance: Guidance | float = 1.0,
        watch: Any = iter,
        observe: Callable[[Tensor], object] | None = None,
    ) -> Trajectory:
        """Denoise one batch, image k from `seeds[k]` alone, so that it is the same in any batch.

        The schedule has a step for each call of the scheduler (`update.calls`); `watch` wraps them, for a progress
        bar. `observe` is given the latents after each step, on the device, which may not have computed them yet; they
        are valid until it returns, and steps are launched one by one for it. A step at which guidance sets in is a full
        one: the unconditional half has no features before it.
        Raises `InputError` for guidance without an unconditional half, `BackendError` for latents that are not finite.
        """
        guidance = guidance if isinstance(guidance, Guidance) else Guidance(guidance)
        manifest, device = self.denoiser.manifest, self.denoiser.device
        guided = [guidance.guides(step) for step in range(schedule.steps)]
        if any(guided) and conditioning.unconditional is None:
            raise InputError(
                f"guidance needs an unconditional half, and {manifest.name} was given none; give --guidance-scale 1"
            )
        assert schedule.steps == self.update.calls
        assert len(seeds) == conditioning.images
        began = time.perf_counter()
        steps = self.begin(schedule, conditioning, seeds, guidance.scale, guided)
        at_once = device.type == "cuda" and observe is None
        lengths = stretches_of(steps) if at_once else dict.fromkeys(range(len(steps)), 1)
        taken: list[TimedStep] = []
        for step, _ in enumerate(watch(steps)):
            if step in lengths:
                taken += self.launch(step, steps[step : step + lengths[step]])
            if observe is not None:
                observe(self.update.latents)
        latents = self.update.latents.cpu()  # waits for the device
        if not latents.isfinite().all():
            self.begin(schedule, conditioning, seeds, guidance.scale, guided)
            raise BackendError(self._blame(steps))
        seconds = time.perf_counter() - began
        full, reuse = ([one.seconds() for one in taken if (one.place == 0) == first] for first in (True, False))
        return Trajectory(latents.clone(), seconds, full, reuse)

    def begin(
        self,
        schedule: Schedule,
        conditioning: Conditioning,
        seeds: Sequence[int],
        scale: float,
        guided: Sequence[bool],
    ) -> list[Step]:
        """Make ready for the first step of a trajectory; returns of each its place in its window, whether guided."""
        kinds = {*guided}
        halves = [conditioning.conditional, *([conditioning.unconditional or {}] if True in kinds else [])]
        given = {name: torch.cat([half[name] for half in halves]) for name in conditioning.conditional}  # (2B, ...)
        with torch.inference_mode(False), torch.no_grad():  # tensors made in that mode cannot be written outside it
            sets_in = [now and not before for now, before in zip(guided, [guided[0], *guided], strict=False)]
            wanted = [full or sets for full, sets in zip(schedule.full, sets_in, strict=True)]
            most = conditioning.images * (1 + max(guided))
            places = self.denoiser.begin(self.update.timesteps, wanted, given, most)
            for now in sorted(kinds, reverse=True):  # all that any step needs, before the first; the larger first
                memory = self.denoiser.prepare(conditioning.images * (1 + now))
            allocation = self.update.begin(self.denoiser.manifest.latents.shape, seeds, self.denoiser.device)
            self._prepare(conditioning.images, given, scale, frozenset(kinds), (allocation, memory))
        return list(zip(places, guided, strict=True))

    def launch(self, first: int, steps: Sequence[Step]) -> list[TimedStep]:
        """Take steps of a trajectory that was begun, from the `first` on; may return before they are done.

        They are of one window, guided or not alike.
        """
        place, guided = steps[0]
        self.denoiser.prepare(self._images * (1 + guided))
        self.denoiser.turn_to(first)
        key = (place, len(steps), guided)
        if key not in self._launches:
            clock = StepClock(range(place, place + len(steps)), self.denoiser.device)
            work = partial(self._stretch, clock, guided)
            self._launches[key] = clock, Replay(work, self.denoiser.device, self._is_capturable)
        clock, replay = self._launches[key]
        replay()
        return clock.steps()

    def _prepare(
        self, images: int, given: Mapping[str, Tensor], scale: float, guided: frozenset[bool], memory: object
    ) -> None:
        """Fill the tensors that a step reads; captured steps stay as long as those are where they were."""
        device = self.denoiser.device
        key = (images, guided, memory)
        if key != self._key:
            self._key, self._images, self._guided = key, images, guided
            self._scale = torch.empty((), device=device)
            self._given = {name: tensor.to(device, copy=True) for name, tensor in given.items()}
            self._launches: dict[tuple[int, int, bool], tuple[StepClock, Replay]] = {}
        for name, tensor in given.items():
            self._given[name].copy_(tensor)
        self._scale.fill_(scale)

    def _stretch(self, clock: StepClock, guided: bool) -> None:
        for k, place in enumerate(clock.places):
            clock.mark(k)
            self._step(place, guided)
        clock.mark(len(clock.places))

    def _step(self, place: int, guided: bool) -> None:
        update, manifest, count = self.update, self.denoiser.manifest, self._images * (1 + guided)
        latents = update.model_input()  # (B, C, ...)
        if guided:
            latents = torch.cat([latents, latents])
        given = {name: tensor[:count] for name, tensor in self._given.items()}
        prediction = self.denoiser.predict(place, latents, update.timestep(), **given).float()
        if not update.takes_variance:
            prediction = prediction[:, : manifest.latents.channels]
        if guided:
            channels = manifest.guidance.channels if manifest.guidance is not None else None
            prediction = mix_guidance(prediction, self._scale, channels or manifest.latents.channels)
        update.advance(prediction)

    def _is_capturable(self) -> bool:
        """Not while the batch changes: an engine that is bound anew between replays need not be what was captured."""
        return len(self._guided) == 1 and self.update.on_device and self.denoiser.is_capturable()

    def _blame(self, steps: Sequence[Step]) -> str:
        """Take the steps again, one by one, and say which tensor is the first that is not finite."""
        manifest, found = self.denoiser.manifest, "the latents themselves"
        for step, (place, guided) in enumerate(steps):
            self.denoiser.prepare(self._images * (1 + guided))
            self.denoiser.turn_to(step)
            self._step(place, guided)
            name = self.denoiser.first_not_finite()
            if name is not None or not self.update.latents.isfinite().all():
                found = f"{name or found}, at step {step} of {len(steps)}, a {REUSE if place else FULL} step"
                break
        return (
            f"the images of {manifest.name} are not finite in {manifest.precision}: the first tensor that is not is "
            f"{found}; {mend_overflow(manifest.precision)}"
        )


def sample_in_batches(
    sampler: Sampler,
    schedule: Schedule,
    conditioning: Conditioning,
    seed: int,
    guidance: Guidance | float,
    batch_size: int,
    watch: Any = iter,
) -> Trajectory:
    """Denoise any number of images, `batch_size` at a time; image k has the seed `seed` + k whatever its batch."""
    parts = []
    for start in range(0, conditioning.images, batch_size):
        part = conditioning.at(range(start, min(start + batch_size, conditioning.images)))
        seeds = range(seed + start, seed + start + part.images)
        parts.append(sampler(schedule, part, seeds, guidance, watch))
    return Trajectory.joined(parts)


def mix_guidance(prediction: Tensor, scale: Tensor, channels: int) -> Tensor:
    """(2B, ...) -> (B, ...): pushes the first channels away from the unconditional prediction, leaves the others."""
    conditional, unconditional = prediction.chunk(2)
    if channels == prediction.shape[1]:
        return torch.lerp(unconditional, conditional, scale)
    noise = torch.lerp(unconditional[:, :channels], conditional[:, :channels], scale)
    return torch.cat([noise, conditional[:, channels:]], dim=1)


def stretches_of(steps: Sequence[Step]) -> dict[int, int]:
    """Steps that can be taken at once: of one window, guided or not alike. Their number by the first of them."""
    lengths, first = {}, 0
    for step, (place, guided) in enumerate(steps):
        if place == 0 or guided != steps[first][1]:
            first = step
        lengths[first] = step - first + 1
    return lengths


class TimedStep(NamedTuple):
    """A step that was launched: its place in the window, and marks of a clock before and behind it."""

    place: int
    began: Any
    ended: Any

    def seconds(self) -> float:
        """How long it took; ask when the device is done."""
        if isinstance(self.began, float):
            return float(self.ended - self.began)
        return float(self.began.elapsed_time(self.ended) / 1e3)


class StepClock:
    """Marks the time before and behind each of a few steps, without waiting for the device.

    On a GPU by events that a CUDA graph can hold: a replay sets them anew, so they tell of the last one.
    """

    def __init__(self, places: Sequence[int], device: torch.device) -> None:
        self.places = places
        self._marks: list[Any] = [0.0] * (len(places) + 1)
        self._events = device.type == "cuda"
        if self._events:
            self._marks = [torch.cuda.Event(enable_timing=True, external=True) for _ in self._marks]  # type: ignore[no-untyped-call]

    def mark(self, k: int) -> None:
        """It is now before step `k`, or behind the last."""
        if self._events:
            self._marks[k].record()
        else:
            self._marks[k] = time.perf_counter()

    def steps(self) -> list[TimedStep]:
        """The steps as they were taken now."""
        return list(map(TimedStep, self.places, self._marks, self._marks[1:]))
