"""Compare a bundle on a backend with PyTorch: each graph once, then whole cached trajectories."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from fora_trt.bundle import Bundle, GraphError
from fora_trt.engines.plan_store import PlanSource
from fora_trt.evaluate.eager_fora import EagerFora
from fora_trt.export.split import example_inputs
from fora_trt.models.spec import FULL, REUSE
from fora_trt.runtime.denoiser import Denoiser, load
from fora_trt.runtime.sampling import Sampler
from fora_trt.runtime.schedulers import scheduler_from_config
from fora_trt.runtime.updates import update_from_scheduler
from fora_trt.schedule import Schedule

GRAPH_TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1}
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
) -> Iterator[Comparison]:
    """Compare both graphs on seeded inputs, then trajectories of two guided images, with eager FORA in fp32.

    The reuse graph runs on other latents and timesteps than the features were made from, as it does in a trajectory.
    Raises `BackendError` if the checkpoint is no longer at hand.
    """
    manifest = bundle.manifest
    denoiser = load(bundle, schedule=Schedule.static(steps, 1), backend=backend, device=device, plans=plans)
    reference = EagerFora(bundle, device)
    for graph, error in graph_errors(denoiser, reference, batch=2):
        yield Comparison(f"{graph} graph", error, GRAPH_TOLERANCE[manifest.precision])

    scheduler = scheduler_from_config(bundle.scheduler_config, None, manifest.latents.learned_sigma)
    samplers = [Sampler(one, update_from_scheduler(scheduler, steps)) for one in (denoiser, reference)]
    calls = samplers[0].update.calls
    classes = [1 % manifest.guidance.num_classes, 7 % manifest.guidance.num_classes]
    for interval in cache_intervals:
        schedule = Schedule.static(calls, interval)
        latents = [sampler(schedule, classes, [0, 1], guidance_scale=1.5).latents for sampler in samplers]
        yield Comparison(
            f"{calls} steps, cache interval {interval}",
            GraphError.between(*latents),
            TRAJECTORY_TOLERANCE[manifest.precision],
        )


def graph_errors(denoiser: Denoiser, reference: EagerFora, batch: int) -> Iterator[tuple[str, GraphError]]:
    """The error of the full and then of the reuse graph, on seeded inputs that differ between the two."""
    manifest = denoiser.manifest
    denoiser.prepare(batch)
    for seed, graph in enumerate((FULL, REUSE), start=1):
        inputs = example_inputs(manifest.graphs[FULL].inputs, manifest.guidance, batch, seed)
        placed = {name: value.to(denoiser.device) for name, value in inputs.items()}
        with torch.inference_mode():
            predictions = [one.predict(graph == FULL, **placed) for one in (denoiser, reference)]
            error = GraphError.between(*predictions)
        yield graph, error
