"""The same noise at several settings: time, speed-up, and difference from no caching; a table's rows and a picture."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor

from fora_trt.bundle import Bundle
from fora_trt.engines.plan_store import PlanSource
from fora_trt.evaluate.eager_fora import EagerFora
from fora_trt.runtime.conditioning import Conditioning
from fora_trt.runtime.denoiser import load
from fora_trt.runtime.images import Decoder, grid
from fora_trt.runtime.sampling import Sampler, Steps, Trajectory
from fora_trt.runtime.schedulers import scheduler_from_config
from fora_trt.runtime.updates import update_from_scheduler
from fora_trt.schedule import Schedule

CONTROL_INTERVAL = 3
"""The cache interval that eager FORA runs at, and that the row of fewer steps is to be compared with."""


@dataclass
class Setting:
    """A row: what runs on which schedule, and a trajectory for every repeat."""

    name: str
    sampler: Sampler
    schedule: Schedule
    trajectories: list[Trajectory] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Median time of a trajectory."""
        return statistics.median(trajectory.seconds for trajectory in self.trajectories)

    @property
    def spread(self) -> tuple[float, float]:
        """Time of the fastest and of the slowest trajectory."""
        times = [trajectory.seconds for trajectory in self.trajectories]
        return min(times), max(times)

    @property
    def latents(self) -> Tensor:
        """What the last trajectory ended at, (B, C, H, W)."""
        return self.trajectories[-1].latents

    def median_milliseconds(self) -> dict[str, float | None]:
        """Median time of a full and of a reuse step, over all repeats."""
        return Trajectory.joined(self.trajectories).median_milliseconds()


def settings_of(
    bundle: Bundle,
    backend: str,
    device: torch.device,
    steps: int,
    cache_intervals: Sequence[int],
    plans: PlanSource | None = None,
    also: Sequence[str] = (),
) -> list[Setting]:
    """What a user would choose between; the first row of the backend is interval 1, which all are compared with.

    PyTorch without caching and as eager FORA, the same of the backends in `also`, the backend at each interval, and
    the backend without caching in so few steps that it takes about as long as at `CONTROL_INTERVAL`.
    """
    scheduler = scheduler_from_config(bundle.scheduler_config, None, bundle.manifest.latents.learned_sigma)
    fewer = Schedule.static(steps, CONTROL_INTERVAL).full_steps
    plain = Schedule.static(steps, 1)

    def sampler(of: Steps, steps: int = steps) -> Sampler:
        return Sampler(of, update_from_scheduler(scheduler, steps))

    others = {"PyTorch": sampler(EagerFora(bundle, device))} | {
        name: sampler(load(bundle, schedule=plain, backend=name, device=device, plans=plans)) for name in also
    }
    denoiser = load(bundle, schedule=plain, backend=backend, device=device, plans=plans)
    cached = sampler(denoiser)
    return [
        *(
            Setting(f"{name}, {label}", other, Schedule.static(steps, interval))
            for name, other in others.items()
            for label, interval in (("no cache", 1), (name_of(CONTROL_INTERVAL), CONTROL_INTERVAL))
        ),
        *(Setting(name_of(interval), cached, Schedule.static(steps, interval)) for interval in cache_intervals),
        Setting(f"{fewer} steps, no cache", sampler(denoiser, fewer), Schedule.static(fewer, 1)),
    ]


def measure(
    settings: Sequence[Setting], conditioning: Conditioning, guidance_scale: float, repeats: int
) -> Iterator[Setting]:
    """Run every setting once to warm up and then `repeats` times; yield each as it finishes a repeat.

    Repeats are interleaved, so that a machine whose speed drifts hits all settings alike.
    """
    for repeat in range(repeats + 1):
        for setting in settings:
            done = setting.sampler(setting.schedule, conditioning, range(conditioning.images), guidance_scale)
            if repeat:
                setting.trajectories.append(done)
            yield setting


def name_of(cache_interval: int) -> str:
    """The row of the backend at this interval."""
    return f"interval {cache_interval}"


def grey_levels_between(one: Tensor, other: Tensor) -> float:
    """Root mean square difference of two batches of pixels in [-1, 1], in grey levels of 255."""
    levels = [(pixels / 2 + 0.5).clamp(0, 1) * 255 for pixels in (one, other)]
    return (levels[0] - levels[1]).square().mean().sqrt().item()


def picture_of(settings: Sequence[Setting], bundle: Bundle, baseline: Setting) -> Image.Image:
    """The images of all settings in rows, each with its name and its speed-up."""
    decoder = Decoder(bundle.manifest)
    rows = [decoder.images(setting.latents, torch.device("cpu")) for setting in settings]
    return grid(rows, [f"{setting.name}: {baseline.seconds / setting.seconds:.1f}x" for setting in settings])
