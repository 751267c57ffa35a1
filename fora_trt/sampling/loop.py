"""The sampling loop: from seeds and conditioning to latents, with any predictor and any diffusers scheduler.

Shapes: B images; C, H, W are channels, height and width of the latents. Under guidance the denoiser's batch is 2B, the
conditional half first.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fora_trt.contract import FULL, REUSE
from fora_trt.engines.cuda_graphs import Replay
from fora_trt.errors import BackendError, InputError
from fora_trt.plan import adapted
from fora_trt.runtime.inputs import noise_of
from fora_trt.runtime.interface import Predictor, ReadyStep, Run, overflow_remedy
from fora_trt.sampling.conditioning import Conditioning
from fora_trt.sampling.guidance import Guidance, guided_channels, mix_guidance
from fora_trt.sampling.scheduler_step import SchedulerStep
from fora_trt.sampling.step_noise import StepNoise
from fora_trt.schedule import Schedule

Watch = Callable[[Iterable[Any]], Iterator[Any]]
"""Wraps an iterable, for a progress bar."""


@dataclass
class Trajectory:
    """Latents (B, C, H, W) in fp32 on the CPU, and their times.

    `seconds` is the time of the whole loop; `of_graphs` has one time per step, by graph. On a GPU, a window is launched
    as one CUDA graph; windows of the same length share timing events, so each reports the times of the last of them.
    """

    latents: Tensor
    seconds: float
    of_graphs: dict[str, list[float]] = field(default_factory=dict)

    @property
    def full_seconds(self) -> list[float]:
        """Times of the full steps."""
        return self.of_graphs.get(FULL, [])

    @property
    def reuse_seconds(self) -> list[float]:
        """Times of the reuse steps."""
        return self.of_graphs.get(REUSE, [])

    @staticmethod
    def joined(parts: Sequence[Trajectory]) -> Trajectory:
        """Several batches as one: latents concatenated, times added or concatenated."""
        graphs = dict.fromkeys(graph for part in parts for graph in part.of_graphs)
        return Trajectory(
            torch.cat([part.latents for part in parts]),
            sum(part.seconds for part in parts),
            {graph: [seconds for part in parts for seconds in part.of_graphs.get(graph, ())] for graph in graphs},
        )

    def median_milliseconds(self) -> dict[str, float | None]:
        """Median time of a full, of a reuse and of each kind of partial step; None if there was no such step."""
        kinds = {f"{graph}_step_ms": self.of_graphs.get(graph, []) for graph in (FULL, REUSE, *self.of_graphs)}
        return {name: statistics.median(times) * 1e3 if times else None for name, times in kinds.items()}


class GuidedStep(NamedTuple):
    """A step of a trajectory: its graph, its offset in its window (0 begins one), and whether it is guided."""

    graph: str
    offset: int
    guided: bool


class Sampler:
    """Denoises batches with one denoiser, one scheduler and one schedule.

    A step scales the latents, runs the engine, applies guidance and runs the scheduler step. If all of that stays on
    the GPU, the steps of a window are captured as one CUDA graph per window length and turn, which is kept from batch
    to batch. A trajectory is then one graph launch per window, after a few index updates, without copies to or from the
    host between the first and the last.
    """

    def __init__(self, denoiser: Predictor, scheduler_step: SchedulerStep, schedule: Schedule) -> None:
        assert schedule.steps == scheduler_step.nfe
        self.denoiser, self.scheduler_step, self.schedule = denoiser, scheduler_step, schedule
        self._key: tuple[object, ...] = ()

    @torch.inference_mode()
    def __call__(
        self,
        conditioning: Conditioning,
        seeds: Sequence[int],
        guidance: Guidance | float = 1.0,
        watch: Watch = iter,
        observe: Callable[[Tensor], object] | None = None,
    ) -> Trajectory:
        """Denoise one batch. The noise of image k depends on `seeds[k]` alone, whatever its batch.

        `watch` wraps the steps, for a progress bar. `observe` is called with the latents after each step; they are on
        the device, may not be computed yet, and are valid until it returns. With `observe`, steps are launched one by
        one instead of a window at a time. Raises `InputError` for guidance without unconditional inputs, `BackendError`
        for latents that are not finite.
        """
        guidance = guidance if isinstance(guidance, Guidance) else Guidance(guidance)
        began = time.perf_counter()
        begun = self.begin(conditioning, seeds, guidance)
        at_once = self.denoiser.device.type == "cuda" and observe is None
        lengths = stretches_of(begun.steps) if at_once else dict.fromkeys(range(len(begun.steps)), 1)
        taken: list[TimedStep] = []
        for step, _ in enumerate(watch(begun.steps)):
            if step in lengths:
                taken += begun.launch(step, lengths[step])
            if observe is not None:
                observe(self.scheduler_step.latents)
        latents = self.scheduler_step.latents.cpu()  # waits for the device
        if not latents.isfinite().all():
            raise BackendError(self.begin(conditioning, seeds, guidance).blame())
        seconds = time.perf_counter() - began
        of_graphs: dict[str, list[float]] = {}
        for one in taken:
            of_graphs.setdefault(one.graph, []).append(one.seconds())
        return Trajectory(latents.clone(), seconds, of_graphs)

    def in_batches(
        self,
        conditioning: Conditioning,
        seeds: Sequence[int],
        guidance: Guidance | float,
        batch_size: int,
        watch: Watch = iter,
        observe: Callable[[Tensor], object] | None = None,
    ) -> Trajectory:
        """Denoise any number of images, `batch_size` at a time; image k has the seed `seeds[k]`.

        `watch` wraps the steps of each batch, and the batches if there are several.
        """
        parts, starts = [], range(0, conditioning.images, batch_size)
        for start in watch(starts) if len(starts) > 1 else starts:
            part = conditioning.at(range(start, min(start + batch_size, conditioning.images)))
            parts.append(self(part, seeds[start : start + part.images], guidance, watch, observe))
        return Trajectory.joined(parts)

    def begin(self, conditioning: Conditioning, seeds: Sequence[int], guidance: Guidance) -> BegunTrajectory:
        """Announce a trajectory to the denoiser, draw its noise, and fill the tensors that its steps read.

        The step at which guidance begins runs in full, and a forecast begins anew: the unconditional half has no
        features before it.
        """
        assert len(seeds) == conditioning.images
        guided = [guidance.guides(step) for step in range(self.schedule.steps)]
        given = both_halves(conditioning, any(guided), self.denoiser.manifest.name)
        kinds = {*guided}
        with torch.inference_mode(False), torch.no_grad():  # inference tensors cannot be written outside that mode
            onsets = [step for step in range(1, len(guided)) if guided[step] and not guided[step - 1]]
            plan = adapted(self.schedule.plan, full=onsets, forgotten=onsets) if onsets else self.schedule.plan
            batches = [conditioning.images * (1 + now) for now in kinds]
            run = self.denoiser.begin(plan, self.scheduler_step.timesteps, given, batches)
            memory = self.scheduler_step.begin(self.denoiser.manifest.latents.shape, seeds, self.denoiser.device)
            self._noise = StepNoise(self.denoiser.manifest, seeds)
            self._fill(conditioning.images, given, guidance.scale, frozenset(kinds), (memory, run.generation))
        return BegunTrajectory(self, run, [*map(GuidedStep, run.graphs, run.offsets, guided)])

    def _fill(
        self, images: int, given: Mapping[str, Tensor], scale: float, guided: frozenset[bool], memory: object
    ) -> None:
        """Fill the tensors that a step reads; captured steps are dropped if `memory` or the batch changed."""
        device = self.denoiser.device
        key = (images, guided, memory)
        if key != self._key:
            self._key, self._images, self._guided = key, images, guided
            self._scale = torch.empty((), device=device)
            self._given = {name: tensor.to(device, copy=True) for name, tensor in given.items()}
            self._launches: dict[object, tuple[StepClock, Replay]] = {}
        for name, tensor in given.items():
            self._given[name].copy_(tensor)
        self._scale.fill_(scale)

    def _launch(self, ready: ReadyStep, first: GuidedStep, count: int) -> list[TimedStep]:
        """Run `count` steps of a window from a prepared one on; as a CUDA graph if they could be captured."""
        key = (first.offset, count, first.guided, ready.variant)
        self._ready = ready
        if key not in self._launches:
            steps = [first._replace(graph=REUSE, offset=first.offset + k) if k else first for k in range(count)]
            clock = StepClock([step.graph for step in steps], self.denoiser.device)
            work = partial(self._stretch, clock, steps)
            self._launches[key] = clock, Replay(work, self.denoiser.device, self._is_capturable)
        clock, replay = self._launches[key]
        replay()
        return clock.steps()

    def _stretch(self, clock: StepClock, steps: Sequence[GuidedStep]) -> None:
        for k, step in enumerate(steps):
            clock.mark(k)
            self._step(step)
        clock.mark(len(steps))

    def _step(self, step: GuidedStep) -> None:
        """One step of the loop: scaled latents -> prediction -> guidance -> scheduler step."""
        scheduler_step, manifest = self.scheduler_step, self.denoiser.manifest
        latents = scheduler_step.model_input()  # (B, C, ...)
        if step.guided:
            latents = torch.cat([latents, latents])
        given = {name: tensor[: len(latents)] for name, tensor in self._given.items()}
        for name, tensor in self._noise.next().items():  # both halves of a guided step read the same noise
            given[name] = torch.cat([tensor] * (1 + step.guided)).to(latents.device)
        prediction = self._ready.predict(step.offset, latents, scheduler_step.timestep(), **given).float()
        if not scheduler_step.takes_variance:
            prediction = prediction[:, : manifest.latents.channels]
        if step.guided:
            conditional, unconditional = prediction.chunk(2)
            prediction = mix_guidance(conditional, unconditional, self._scale, guided_channels(manifest))
        scheduler_step.advance(prediction)

    def _is_capturable(self) -> bool:
        """Whether steps can be captured; not if noise is drawn on the host, or if the batch changes.

        The latter rebinds the engines between replays.
        """
        if noise_of(self.denoiser.manifest):
            return False
        return len(self._guided) == 1 and self.scheduler_step.on_device and self._ready.is_capturable()


@dataclass(frozen=True)
class BegunTrajectory:
    """An announced trajectory whose noise is drawn; its steps must run in order."""

    sampler: Sampler
    run: Run
    steps: Sequence[GuidedStep]

    def launch(self, first: int, count: int) -> list[TimedStep]:
        """Launch `count` steps from the `first` on; may return before they are done.

        They must be in one window, and either all guided or all not.
        """
        step = self.steps[first]
        ready = self.run.at(first, self.sampler._images * (1 + step.guided))
        return self.sampler._launch(ready, step, count)

    def blame(self) -> str:
        """Run the steps one by one; return an error message that names the first tensor that is not finite."""
        sampler, culprit = self.sampler, "the latents themselves"
        manifest = sampler.denoiser.manifest
        for number, step in enumerate(self.steps):
            sampler._ready = self.run.at(number, sampler._images * (1 + step.guided))
            sampler._step(step)
            name = sampler.denoiser.first_not_finite()
            if name is not None or not sampler.scheduler_step.latents.isfinite().all():
                culprit = f"{name or culprit}, at step {number} of {len(self.steps)}, a {step.graph} step"
                break
        return (
            f"the latents of {manifest.name} are not finite in {manifest.precision}; the first tensor with such values "
            f"is {culprit}; {overflow_remedy(manifest.precision)}"
        )


def both_halves(conditioning: Conditioning, guided: bool, name: str) -> dict[str, Tensor]:
    """Inputs by name: the conditional half (B, ...), or with guidance both halves (2B, ...)."""
    if guided and conditioning.unconditional is None:
        raise InputError(
            f"classifier-free guidance needs unconditional inputs; none were given for {name}; add them, or turn "
            "guidance off with --guidance-scale 1"
        )
    halves = [conditioning.conditional, *([conditioning.unconditional or {}] if guided else [])]
    return {name: torch.cat([half[name] for half in halves]) for name in conditioning.conditional}


def stretches_of(steps: Sequence[GuidedStep]) -> dict[int, int]:
    """Consecutive steps that can be launched together: first step -> number of steps.

    They are in one window, and either all guided or all not.
    """
    lengths, first = {}, 0
    for number, step in enumerate(steps):
        if step.offset == 0 or step.guided != steps[first].guided:
            first = number
        lengths[first] = number - first + 1
    return lengths


class TimedStep(NamedTuple):
    """A launched step: its graph, and time stamps or CUDA events before and after it."""

    graph: str
    began: Any
    ended: Any

    def seconds(self) -> float:
        """Duration of the step; valid once the device has finished it."""
        if isinstance(self.began, float):
            return float(self.ended - self.began)
        return float(self.began.elapsed_time(self.ended) / 1e3)


class StepClock:
    """Marks the time before and after each of several steps, without waiting for the device.

    On a GPU the marks are events that a CUDA graph can contain; each replay records them again, so they hold the times
    of the last replay.
    """

    def __init__(self, graphs: Sequence[str], device: torch.device) -> None:
        """`graphs` names the graph of each step."""
        self._graphs = graphs
        self._marks: list[Any] = [0.0] * (len(graphs) + 1)
        self._events = device.type == "cuda"
        if self._events:
            self._marks = [torch.cuda.Event(enable_timing=True, external=True) for _ in self._marks]  # type: ignore[no-untyped-call]

    def mark(self, k: int) -> None:
        """Record the time before step `k`, or after the last step."""
        if self._events:
            self._marks[k].record()
        else:
            self._marks[k] = time.perf_counter()

    def steps(self) -> list[TimedStep]:
        """The steps with their current marks."""
        return list(map(TimedStep, self._graphs, self._marks, self._marks[1:]))
