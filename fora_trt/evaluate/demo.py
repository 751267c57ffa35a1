"""The digits at several cache intervals from the same noise: time, speed-up, difference, one picture of all."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from fora_trt.bundle import Bundle
from fora_trt.evaluate.eager_fora import EagerFora
from fora_trt.runtime.denoiser import load
from fora_trt.runtime.images import grid, images_from_latents
from fora_trt.runtime.sampling import Steps, sample, timesteps_of
from fora_trt.runtime.schedulers import scheduler_from_config
from fora_trt.schedule import Schedule

GUIDANCE_SCALE = 1.5
CLASSES = range(10)
CONTROL_INTERVAL = 3


@dataclass(frozen=True)
class Row:
    """One setting: seconds are the median over the repeats, with the fastest and slowest beside it.

    `difference` is the root mean square from the uncached images of the same steps, in grey levels of 255.
    """

    name: str
    steps: int
    full_steps: int
    seconds: float
    fastest: float
    slowest: float
    difference: float
    images: list[Image.Image]


def demo_rows(
    bundle: Bundle, backend: str, device: torch.device, steps: int, cache_intervals: Sequence[int], repeats: int
) -> Iterator[Row]:
    """Measure PyTorch without caching, each cache interval, and an uncached trajectory of fewer steps.

    The last is the control: it takes as many full steps as `CONTROL_INTERVAL` does, about the same time. Interval 1
    is what all are compared with. Rows are interleaved, so that a machine whose speed drifts hits all alike; each
    is run once beforehand to warm up.
    """
    manifest = bundle.manifest
    denoiser = load(bundle, schedule=Schedule.static(steps, 1), backend=backend, device=device)
    control = Schedule.static(steps, CONTROL_INTERVAL).full_steps
    settings: list[tuple[str, Steps, Schedule]] = [
        ("PyTorch, no cache", EagerFora(bundle, device), Schedule.static(steps, 1)),
        *((_name(n), denoiser, Schedule.static(steps, n)) for n in cache_intervals),
        (f"{control} steps, no cache", denoiser, Schedule.static(control, 1)),
    ]
    scheduler = scheduler_from_config(bundle.scheduler_config, None, manifest.latents.learned_sigma)
    seconds: dict[str, list[float]] = {name: [] for name, *_ in settings}
    latents: dict[str, torch.Tensor] = {}
    for repeat in range(repeats + 1):
        for name, steps_of, schedule in settings:
            timesteps_of(scheduler, schedule.steps)
            done = sample(steps_of, scheduler, schedule, CLASSES, CLASSES, GUIDANCE_SCALE)
            latents[name] = done.latents
            if repeat:
                seconds[name].append(done.seconds)
    levels = {name: (value / 2 + 0.5).clamp(0, 1) * 255 for name, value in latents.items()}
    uncached = levels[_name(1)]
    for name, _, schedule in settings:
        times = seconds[name]
        yield Row(
            name,
            schedule.steps,
            schedule.full_steps,
            statistics.median(times),
            min(times),
            max(times),
            (levels[name] - uncached).square().mean().sqrt().item(),
            images_from_latents(latents[name], manifest, device),
        )


def _name(cache_interval: int) -> str:
    return f"interval {cache_interval}"


def picture_of(rows: Sequence[Row]) -> Image.Image:
    """All rows under each other, each with its name."""
    return grid([row.images for row in rows], [row.name for row in rows])
