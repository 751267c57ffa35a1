"""Compare a bundle on a backend with PyTorch: each graph once, then whole cached trajectories."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fora_trt.bundle import Bundle, GraphError, TrajectoryError
from fora_trt.engines.plan_store import PlanSource
from fora_trt.errors import BackendError
from fora_trt.evaluate.eager_fora import EagerFora
from fora_trt.evaluate.unfolded import reference_from_bundle
from fora_trt.export.check import GRAPH_TOLERANCE
from fora_trt.export.statistics import graph_statistics
from fora_trt.folders import write_manifest
from fora_trt.models.examples import example_inputs
from fora_trt.models.spec import FULL, LATENTS, REUSE, TIMESTEP
from fora_trt.runtime.conditioning import example_conditioning
from fora_trt.runtime.denoiser import Denoiser, load
from fora_trt.runtime.sampling import Sampler, Steps
from fora_trt.runtime.schedulers import scheduler_from_config
from fora_trt.runtime.updates import update_from_scheduler
from fora_trt.schedule import Schedule

MEASURED_STEPS, MEASURED_INTERVALS = 50, (1, 3)
"""Of the trajectories whose error a manifest keeps."""

GUIDANCE_SCALE = 1.5
"""Of the trajectories that are compared."""

TRAJECTORY_TOLERANCE = {"fp32": 1e-3, "fp16": 1e-1, "bf16": 5e-1}
"""Largest admitted error relative to PyTorch's largest value, by precision; the reference computes in fp32."""


@dataclass(frozen=True)
class Comparison:
    """One thing compared, its error, and the relative error that is admitted."""

    what: str
    error: GraphError
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the error is admitted; one that is not a number is not."""
        return self.error.relative <= self.tolerance


def compare_with_pytorch(
    bundle: Bundle,
    backend: str,
    device: torch.device,
    steps: int = 50,
    cache_intervals: Sequence[int] = (2, 3, 5),
    plans: PlanSource | None = None,
    reference: Steps | None = None,
) -> Iterator[Comparison]:
    """Compare a full and a reuse step on seeded inputs, then trajectories of two images, with eager FORA in fp32.

    Trajectories are guided where the model has an unconditional half. The reuse graph runs on other latents and
    timesteps than the features were made from, as it does in a trajectory. `reference` is what it is compared with, if
    that was made before: without one `reference_from_bundle` makes it. Raises `BackendError`.
    """
    precision = bundle.manifest.precision
    denoiser = load(bundle, schedule=Schedule.static(steps, 1), backend=backend, device=device, plans=plans)
    reference = reference or reference_from_bundle(bundle, device)[0]
    for graph, error in graph_errors(denoiser, reference, batch=2):
        yield Comparison(f"{graph} graph", error, GRAPH_TOLERANCE[precision])
    for interval, error in trajectory_errors(bundle, denoiser, reference, steps, cache_intervals):
        yield Comparison(f"{steps} steps, cache interval {interval}", error, TRAJECTORY_TOLERANCE[precision])


def trajectory_errors(
    bundle: Bundle, denoiser: Denoiser, reference: Steps, steps: int, cache_intervals: Sequence[int]
) -> Iterator[tuple[int, GraphError]]:
    """Cache interval and error of the last latents, from the same noise and the same scheduler."""
    scheduler = scheduler_from_config(bundle.scheduler_config, None, bundle.manifest.latents.learned_sigma)
    samplers = [Sampler(one, update_from_scheduler(scheduler, steps)) for one in (denoiser, reference)]
    given = example_conditioning(bundle.manifest, 2)
    scale = 1.0 if given.unconditional is None else GUIDANCE_SCALE
    for interval in cache_intervals:
        schedule = Schedule.static(samplers[0].update.calls, interval)
        latents = [sampler(schedule, given, [0, 1], scale).latents for sampler in samplers]
        yield interval, GraphError.between(*latents)


def graph_errors(denoiser: Denoiser, reference: Steps, batch: int) -> Iterator[tuple[str, GraphError]]:
    """The error of a full and then of a reuse step, on seeded inputs: other latents and another timestep."""
    manifest, device = denoiser.manifest, denoiser.device
    latents: list[Tensor] = []
    timesteps: list[Tensor] = []
    conditioning: dict[str, Tensor] = {}
    for seed in (2, 1):
        conditioning = example_inputs(manifest.inputs, manifest.conditioning, batch, seed)
        latents.insert(0, conditioning.pop(LATENTS).to(device))
        timesteps.insert(0, conditioning.pop(TIMESTEP, torch.zeros(1))[:1].to(device))
    given = {name: value.to(device) for name, value in conditioning.items()}
    denoiser.begin(torch.cat(timesteps), [True, False], given, batch)
    denoiser.prepare(batch)
    for place, graph in enumerate((FULL, REUSE)):
        denoiser.turn_to(place)
        with torch.inference_mode():
            predictions = [
                one.predict(place, latents[place], timesteps[place], **given) for one in (denoiser, reference)
            ]
            error = GraphError.between(*predictions)
        yield graph, error


def with_measured_trajectory(
    bundle: Bundle, backend: str, device: torch.device, within_seconds: float, plans: PlanSource | None = None
) -> Bundle:
    """Measure a bundle of half precision over whole trajectories against fp32, and write that into its manifest.

    Nothing is measured if the arithmetic of it would not be done `within_seconds` on this device.
    """
    if _seconds_of_trajectories(bundle, device) > within_seconds:
        return bundle
    reference = EagerFora(bundle, device)
    schedule = Schedule.static(MEASURED_STEPS, 1)
    denoiser = load(bundle, schedule=schedule, backend=backend, device=device, plans=plans)
    errors = dict(trajectory_errors(bundle, denoiser, reference, MEASURED_STEPS, MEASURED_INTERVALS))
    measured = TrajectoryError(MEASURED_STEPS, denoiser.backend, errors)
    manifest = bundle.manifest.model_copy(update={"trajectory_error": measured})
    try:
        write_manifest(bundle.folder, manifest)
    except OSError as error:
        raise BackendError(f"the manifest of {bundle.folder} cannot be written: {error.strerror or error}") from error
    return Bundle(bundle.folder, manifest)


def _seconds_of_trajectories(bundle: Bundle, device: torch.device) -> float:
    """About how long `with_measured_trajectory` computes, if all of it were as fast as a large fp32 matrix product."""
    size = 1024
    matrix, seconds = torch.ones(size, size, device=device), []
    for _ in range(4):  # the first warms up
        began = time.perf_counter()
        (matrix @ matrix).sum().item()  # waits for the device
        seconds.append(time.perf_counter() - began)
    rate = 2 * size**3 / min(seconds[1:])
    full_steps = sum(Schedule.static(MEASURED_STEPS, interval).full_steps for interval in MEASURED_INTERVALS)
    guided_images, runs = 4, 2
    return graph_statistics(bundle.graph_path(FULL)).flops * guided_images * full_steps * runs / rate
