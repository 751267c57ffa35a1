"""The sampling loop for images that join and leave: each has its own step, timestep and row of scheduler coefficients.

`Sampler` denoises a batch that begins and ends together; here a window is the unit. An image takes the same numbers
as with `Sampler`, whatever shares its batch.
Shapes: B images, of which G are guided; a batch of the engines is (B + G), the conditional half first. K calls are
remembered by the scheduler; N are the elements of one sample.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor

from fora_trt.bundle import Manifest
from fora_trt.errors import BackendError
from fora_trt.memo import Kept
from fora_trt.plan import Step
from fora_trt.runtime.denoiser import Denoiser
from fora_trt.runtime.interface import overflow_remedy
from fora_trt.runtime.joined import Joined, Track
from fora_trt.runtime.layout import Layout
from fora_trt.runtime.sums import add_rows
from fora_trt.sampling.conditioning import Conditioning
from fora_trt.sampling.guidance import Guidance, guided_channels, mix_guidance
from fora_trt.sampling.loop import both_halves
from fora_trt.sampling.scheduler_step import SchedulerStep, TabulatedStep, drawn
from fora_trt.sampling.step_noise import StepNoise
from fora_trt.schedule import Schedule

_NUMBERS = count()


@dataclass(eq=False)
class Member:
    """An image of a joined batch. `latents` (C, H, W), in fp32 on the CPU, are there when it is done."""

    track: Track
    rows: Tensor  # (S, 4 + 2K), see Coefficients.rows
    draws: Sequence[bool]
    first_scale: float
    takes_variance: bool
    given: dict[str, Tensor]  # (2, ...) if it is guided, else (1, ...)
    scale: float
    generator: torch.Generator
    noise: StepNoise
    number: int = field(default_factory=_NUMBERS.__next__)
    latents: Tensor | None = None

    @property
    def guided(self) -> bool:
        """Whether each step computes an unconditional sample too."""
        return self.scale > 1

    @property
    def full_steps(self) -> int:
        """Number of full steps of the trajectory."""
        return self.track.layout.offsets.count(0)

    @property
    def samples(self) -> int:
        """Rows of the engines' batch."""
        return 1 + self.guided

    @property
    def memory(self) -> int:
        """K."""
        return (self.rows.shape[1] - NUMBERS) // 2


KEPT_LAYOUTS = 64
"""Layouts of schedules that are kept."""

NUMBERS = 4
"""Columns of `Coefficients.rows` before the weights."""


class WindowTimes(NamedTuple):
    """Seconds of the full step of a window and of its reuse steps."""

    full_seconds: float
    reuse_seconds: float


class JoinedSampler:
    """Denoises images that join and leave at window boundaries, up to `most` samples of the engines' batch."""

    def __init__(self, denoiser: Denoiser, most: int) -> None:
        self.members: list[Member] = []
        self._denoiser, self._joined = denoiser, Joined(denoiser, most)
        self._layouts: Kept[tuple[Step, ...], Layout] = Kept(KEPT_LAYOUTS)
        self._shape = denoiser.manifest.latents.shape
        self._state = _State(0, 1, self._shape, denoiser.device)

    @property
    def problem(self) -> str | None:
        """Why images of this bundle cannot join; None if they can."""
        return self._joined.problem

    @staticmethod
    def takes(scheduler_step: SchedulerStep, schedule: Schedule, guidance: Guidance) -> bool:
        """Whether an image with these settings can join: it takes coefficients, all steps alike and none partial."""
        always = guidance.scale <= 1 or (guidance.first == 0 and guidance.last is None)
        return isinstance(scheduler_step, TabulatedStep) and always and not schedule.masks

    def member(
        self, scheduler_step: SchedulerStep, schedule: Schedule, given: Conditioning, seed: int, guidance: Guidance
    ) -> Member:
        """One image, which can join later. Raises `InputError` or `ScheduleError` for what the bundle does not take."""
        assert (
            isinstance(scheduler_step, TabulatedStep)
            and self.takes(scheduler_step, schedule, guidance)
            and given.images == 1
        )
        coefficients, scale = scheduler_step.coefficients, guidance.scale
        return Member(
            Track(self._layout_of(schedule)),
            coefficients.rows(),
            coefficients.draws.tolist(),
            coefficients.first_scale,
            coefficients.takes_variance,
            both_halves(given, scale > 1, self._denoiser.manifest.name),
            scale,
            torch.Generator().manual_seed(seed),
            StepNoise(self._denoiser.manifest, [seed]),
        )

    def _layout_of(self, schedule: Schedule) -> Layout:
        plan = tuple(schedule.plan)
        return self._layouts.get(plan, lambda: self._denoiser.layout_of(plan))

    def make_room(self, schedules: Sequence[Schedule]) -> None:
        """Allocate memory for images with these schedules, while there is no image; others then need not wait for it.

        Raises `RoomError` if the batch does not fit the device's memory.
        """
        self._joined.make_room([*map(self._layout_of, schedules)])

    def fits(
        self, member: Member, leaving: Sequence[Member | None] = (), joining: Sequence[Member | None] = ()
    ) -> bool:
        """Whether an image can join now, after some have left and others have joined.

        There must be a place for it, and room for its windows; room is made only while there is no other image.
        """
        stay = [one for one in self.members if one not in leaving and not one.track.done]
        samples = sum(one.samples for one in [*stay, *filter(None, joining), member])
        return samples <= self._joined.most and (not stay or self._joined.has_room(member.track.layout))

    @torch.inference_mode()
    def change(self, leaving: Sequence[Member] = (), joining: Sequence[Member] = ()) -> None:
        """Let images leave and join; those that are done leave. Each that joins must fit beside the others.

        Raises `RoomError` if the batch does not fit the device's memory; then no image is left.
        """
        stay = [one for one in self.members if one not in leaving and not one.track.done]
        if not joining and len(stay) == len(self.members):
            return
        before, now = self.members, [*stay, *joining]
        self.members = []
        self._joined.arrange(*_arranged(before, now))
        if not now:
            return
        memory = max(one.memory for one in now)
        state = _State(len(now), memory, self._shape, self._denoiser.device)
        state.keep(self._state, [before.index(one) for one in stay])
        for k, member in enumerate(joining, len(stay)):
            state.latents[k] = drawn(self._shape, [member.generator])[0] * member.first_scale
        self._state, self.members = state, now
        self._batch = _Batch(now, memory, self._denoiser.device)

    @torch.inference_mode()
    def window(self) -> tuple[WindowTimes, list[Member]]:
        """Compute one window of all images; return its times, and the images that are done.

        Their latents may not be finite; see `check_finite`.
        """
        members, device, batch = self.members, self._denoiser.device, self._batch
        lengths = [one.track.length for one in members]
        rows = batch.rows([one.track.step for one in members], max(lengths))
        channels = guided_channels(self._denoiser.manifest)
        began = time.perf_counter()
        run = self._joined.window(batch.tracks, batch.timesteps, batch.given)
        marks = []
        for offset, numbers in enumerate(rows):
            active = [k for k, length in enumerate(lengths) if offset < length]
            latents = self._state.latents * _beside(numbers[:, 1], self._state.latents)
            given = {**batch.on_device, **self._step_noise(active, batch)}
            ready = run.at(offset, batch.samples)
            prediction = ready.predict(offset, batch.sampled(latents), batch.sampled(numbers[:, 0]), **given).float()
            self._advance(batch.mixed(prediction, channels), numbers, active, offset)
            if offset == 0:
                _wait_for(device)
                marks.append(time.perf_counter())
        _wait_for(device)
        marks.append(time.perf_counter())
        for member, length in zip(members, lengths, strict=True):
            member.track.step += length
        done = [one for one in members if one.track.done]
        for one in done:
            one.latents = self._state.latents[members.index(one)].cpu()
        return WindowTimes(marks[0] - began, marks[1] - marks[0]), done

    def _step_noise(self, active: Sequence[int], batch: _Batch) -> dict[str, Tensor]:
        """Inputs that are drawn at every step, (B + G, ...); those of images that take no step have no meaning."""
        drawn = {k: self.members[k].noise.next() for k in active}
        return {
            name: batch.sampled(
                torch.cat([drawn.get(k, drawn[active[0]])[name] for k in range(len(self.members))]).to(
                    self._denoiser.device
                )
            )
            for name in drawn[active[0]]
        }

    def _advance(self, prediction: Tensor, numbers: Tensor, active: Sequence[int], offset: int) -> None:
        """The scheduler step of the active images, at this offset in their windows."""
        channels = self._denoiser.manifest.latents.channels
        noise = self._noise(active, offset)
        growth = None
        if any(self.members[k].takes_variance for k in active):
            growth = torch.exp(_beside(numbers[:, 3], prediction) * prediction[:, channels:])
        self._state.advance(prediction[:, :channels], numbers, active, noise, growth)

    def _noise(self, active: Sequence[int], offset: int) -> Tensor | None:
        """New noise of the images whose scheduler draws it at this call, (B, ...); None if none does."""
        drawing = [k for k in active if self.members[k].draws[self.members[k].track.step + offset]]
        if not drawing:
            return None
        noise = torch.zeros(len(self.members), *self._shape)
        for k in drawing:
            noise[k] = drawn(self._shape, [self.members[k].generator])[0]
        return noise.to(self._denoiser.device)


class _Batch:
    """What does not change in a batch of B images, of which G are guided, until another joins or leaves."""

    def __init__(self, members: Sequence[Member], memory: int, device: torch.device) -> None:
        guided = [k for k, one in enumerate(members) if one.guided]
        halves = [*members, *(members[k] for k in guided)]
        self.samples = len(halves)
        self.tracks = [one.track for one in halves]
        self.given = {
            name: torch.stack([one.given[name][int(k >= len(members))] for k, one in enumerate(halves)])
            for name in members[0].given
        }
        self.on_device = {name: one.to(device) for name, one in self.given.items()}
        numbers = torch.zeros(len(members), max(len(one.rows) for one in members), NUMBERS + 2 * memory)
        for table, one in zip(numbers, members, strict=True):
            table[: len(one.rows), : one.rows.shape[1]] = one.rows
        images = torch.tensor([*range(len(members)), *guided])
        self.timesteps = numbers[images, :, 0]  # (B + G, S), on the CPU
        self._numbers, self._images = numbers.to(device), images.to(device)
        own = {k: len(members) + number for number, k in enumerate(guided)}
        self._unconditional = torch.tensor([own.get(k, k) for k in range(len(members))], device=device)
        self._scales = torch.tensor([one.scale if one.guided else 1.0 for one in members], device=device)

    def rows(self, steps: Sequence[int], longest: int) -> Tensor:
        """The scheduler's numbers from a step of each image on, (longest, B, 4 + 2K); later ones have no meaning."""
        index = (torch.tensor(steps) + torch.arange(longest)[:, None]).clamp_(max=self._numbers.shape[1] - 1)
        return self._numbers[torch.arange(len(steps)), index.to(self._numbers.device)]

    def sampled(self, tensor: Tensor) -> Tensor:
        """(B, ...) -> (B + G, ...): those of guided images again."""
        return tensor[self._images]

    def mixed(self, prediction: Tensor, channels: int) -> Tensor:
        """(B + G, ...) -> (B, ...); where an image is not guided, its prediction is mixed with itself."""
        if self.samples == len(self._scales):
            return prediction
        unconditional, scales = prediction[self._unconditional], _beside(self._scales, prediction)
        return mix_guidance(prediction[: len(self._scales)], unconditional, scales, channels)


class _State:
    """What scheduler steps of B images read and write: latents (B, ...), and the calls before, (B, K - 1, 2, N)."""

    def __init__(self, images: int, memory: int, shape: tuple[int, ...], device: torch.device) -> None:
        self.memory = memory
        self.latents = torch.zeros(images, *shape, device=device)
        self._before = torch.zeros(images, memory - 1, 2, math.prod(shape), device=device)

    def keep(self, before: _State, images: Sequence[int]) -> None:
        """Take over these images of another state, as the first ones."""
        if not images:
            return
        here, calls = torch.tensor(images, device=self.latents.device), min(self.memory, before.memory) - 1
        self.latents[: len(images)] = before.latents[here]
        self._before[: len(images), :calls] = before._before[here, :calls]

    def advance(
        self, prediction: Tensor, numbers: Tensor, active: Sequence[int], noise: Tensor | None, growth: Tensor | None
    ) -> None:
        """Update the active images; `numbers` is (B, 4 + 2K)."""
        here = torch.tensor(active, device=self.latents.device)
        now = torch.stack([self.latents.flatten(1), prediction.flatten(1)], 1)  # (B, 2, N)
        calls = torch.cat([now[:, None], self._before], 1) if self.memory > 1 else now[:, None]  # (B, K, 2, N)
        terms = 2 * self.memory
        latents = torch.empty(len(active), *self.latents.shape[1:], device=here.device)
        index = here[:, None] * terms + torch.arange(terms, device=here.device)
        add_rows(calls.view(-1, calls.shape[-1]), index, numbers[here, NUMBERS:], latents.view(len(active), -1))
        if self.memory > 1:
            self._before[here] = calls[here, :-1]
        if noise is not None:
            scale = _beside(numbers[here, 2], latents) * (1.0 if growth is None else growth[here])
            latents.addcmul_(scale, noise[here])
        self.latents[here] = latents


def check_finite(manifest: Manifest, latents: Tensor) -> None:
    """Raise `BackendError` for latents that are not finite."""
    if not latents.isfinite().all():
        raise BackendError(
            f"the latents of {manifest.name} are not finite in {manifest.precision}; "
            f"{overflow_remedy(manifest.precision)}"
        )


def _arranged(before: Sequence[Member], now: Sequence[Member]) -> tuple[list[int | None], list[Layout]]:
    """Where each sample of the engines' batch was before, None for a new one, and its layout."""

    def samples(members: Sequence[Member]) -> list[tuple[int, bool]]:
        return [*((one.number, False) for one in members), *((one.number, True) for one in members if one.guided)]

    there = {sample: k for k, sample in enumerate(samples(before))}
    layouts = {one.number: one.track.layout for one in now}
    return [there.get(sample) for sample in samples(now)], [layouts[number] for number, _ in samples(now)]


def _beside(numbers: Tensor, tensor: Tensor) -> Tensor:
    """(B,) -> (B, 1, ...), to be multiplied with a tensor (B, ...)."""
    return numbers.view(-1, *[1] * (tensor.dim() - 1))


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
