"""Compares a bundle on a backend with PyTorch: single steps of all graphs, then whole cached trajectories."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fora_trt.bundle import Bundle, GraphError, TrajectoryError
from fora_trt.contract import FULL, LATENTS, TIMESTEP
from fora_trt.evaluate.eager_fora import EagerFora
from fora_trt.evaluate.rate import flops_per_second
from fora_trt.evaluate.unfolded import reference_from_bundle
from fora_trt.export.check import GRAPH_TOLERANCE
from fora_trt.export.statistics import graph_statistics
from fora_trt.models.examples import example_inputs
from fora_trt.pipeline import Pipeline
from fora_trt.plan import FULL_STEP, REUSE_STEP, Step
from fora_trt.runtime.denoiser import Denoiser
from fora_trt.runtime.interface import Predictor
from fora_trt.runtime.variants import networks_of
from fora_trt.sampling.conditioning import example_conditioning
from fora_trt.sampling.guidance import Guidance
from fora_trt.schedule import NONE, Schedule

MEASURED_STEPS, MEASURED_SCHEDULES = 50, (NONE, "fora:3")
"""Steps and schedules of the trajectories whose error is recorded in the manifest."""

GUIDANCE_SCALE = 1.5
"""Guidance scale of the compared trajectories."""

TRAJECTORY_TOLERANCE = {"fp32": 1e-3, "fp16": 1e-1, "bf16": 5e-1}
"""Tolerance by precision: largest error divided by the largest value of the reference, which computes in fp32."""


@dataclass(frozen=True)
class Comparison:
    """One comparison: its name, its error, and the tolerance for the relative error."""

    what: str
    error: GraphError
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance; NaN is not."""
        return self.error.relative <= self.tolerance


def compare_with_pytorch(
    pipeline: Pipeline, schedules: Sequence[str], reference: Predictor | None = None
) -> Iterator[Comparison]:
    """Compare a step of each graph on seeded inputs, then trajectories of two images, with eager FORA in fp32.

    Trajectories have the configuration's number of steps and each of the schedules; they are guided if the model has
    unconditional inputs. As in a trajectory, each step has other latents and another timestep than the step that
    computed the features that it reads. `reference` defaults to that of `reference_from_bundle`. Raises `BackendError`.
    """
    bundle, precision = pipeline.bundle, pipeline.manifest.precision
    running = pipeline.start(2, Guidance(GUIDANCE_SCALE))
    reference = reference or reference_from_bundle(bundle, pipeline.device)[0]
    networks = [*zip(networks_of(running), networks_of(reference), strict=True)]
    for number, (denoiser, plain) in enumerate(networks):
        assert isinstance(denoiser, Denoiser)
        where = f" of variant {number}" if number else ""
        for graph, error in graph_errors(denoiser, plain, batch=2):
            yield Comparison(f"{graph} graph{where}", error, GRAPH_TOLERANCE[precision])
    if not pipeline.manifest.denoises_all_latents:  # no trajectory without the loop of its own pipeline
        return
    for schedule, error in trajectory_errors(pipeline, pipeline.over(reference), schedules):
        named = f"{pipeline.config.steps} steps, {schedule}"
        yield Comparison(named, error, TRAJECTORY_TOLERANCE[precision])


def trajectory_errors(
    pipeline: Pipeline, reference: Pipeline, schedules: Sequence[str]
) -> Iterator[tuple[str, GraphError]]:
    """For each schedule the error of the final latents, with the same noise and scheduler as the reference."""
    given = example_conditioning(pipeline.manifest, 2)
    scale = 1.0 if given.unconditional is None else GUIDANCE_SCALE
    plain = pipeline.sampling(schedule=NONE)
    for schedule in schedules:
        samplings = plain.with_schedule(schedule), reference.sampling(plain.steps, schedule)
        latents = [
            one.sampler(sampling)(given, [0, 1], scale).latents
            for one, sampling in zip((pipeline, reference), samplings, strict=True)
        ]
        yield schedule, GraphError.between(*latents)


def graph_errors(denoiser: Denoiser, reference: Predictor, batch: int) -> Iterator[tuple[str, GraphError]]:
    """The errors of a full step, of all partial steps and of a reuse step, in this order; inputs differ by step."""
    manifest, device = denoiser.manifest, denoiser.device
    latents: list[Tensor] = []
    timesteps: list[Tensor] = []
    conditioning: dict[str, Tensor] = {}
    plan = (FULL_STEP, *map(Step, manifest.partial_graphs), REUSE_STEP)
    for seed in range(len(plan), 0, -1):
        conditioning = example_inputs(manifest.inputs, manifest.conditioning, batch, seed)
        latents.insert(0, conditioning.pop(LATENTS).to(device))
        timesteps.insert(0, conditioning.pop(TIMESTEP, torch.zeros(1))[:1].to(device))
    given = {name: value.to(device) for name, value in conditioning.items()}
    runs = [one.begin(plan, torch.cat(timesteps), given, [batch]) for one in (denoiser, reference)]
    for number, step in enumerate(plan):
        with torch.inference_mode():
            predictions = [
                run.at(number, batch).predict(run.offsets[number], latents[number], timesteps[number], **given)
                for run in runs
            ]
            error = GraphError.between(*predictions)
        yield step.graph, error


def measured_trajectories(
    bundle: Bundle, backend: str, device: torch.device, within_seconds: float
) -> TrajectoryError | None:
    """Error of whole trajectories of a bundle in half precision against PyTorch in fp32.

    None if its arithmetic would take longer than `within_seconds` on this device. Raises `BackendError`.
    """
    if _seconds_of_trajectories(bundle, device) > within_seconds:
        return None
    pipeline = Pipeline(bundle, steps=MEASURED_STEPS, backend=backend, device=str(device))
    reference = pipeline.over(EagerFora(bundle, device))
    return TrajectoryError(MEASURED_STEPS, backend, dict(trajectory_errors(pipeline, reference, MEASURED_SCHEDULES)))


def _seconds_of_trajectories(bundle: Bundle, device: torch.device) -> float:
    """Estimated time of `measured_trajectories`, at the rate of a large fp32 matrix product on this device."""
    rate = flops_per_second(device)
    full_steps = sum(Schedule.from_text(text, MEASURED_STEPS).full_steps for text in MEASURED_SCHEDULES)
    guided_images, runs = 4, 2
    return graph_statistics(bundle.graph_path(FULL)).flops * guided_images * full_steps * runs / rate
