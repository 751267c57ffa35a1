"""Solver settings that compete with caching: the same time could be spent on fewer steps of one of them.

A control that is a badly set solver proves nothing, so several settings are tried and the best is shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from fora_trt.errors import InputError
from fora_trt.metrics import latent_psnr
from fora_trt.pipeline import Pipeline, Sampling
from fora_trt.sampling.conditioning import Conditioning
from fora_trt.sampling.guidance import Guidance
from fora_trt.sampling.schedulers import is_flow_config

SOLVERS = (
    "ddim",
    "ddim:spacing=trailing",
    "dpm-solver++:order=2",
    "dpm-solver++:order=2,spacing=trailing",
    "dpm-solver++:order=2,spacing=lu",
    "dpm-solver++:order=3,spacing=trailing",
    "dpm-solver++:order=3,spacing=lu",
    "unipc",
    "unipc:spacing=trailing",
)
"""Solver settings for models that predict noise."""

FLOW_SOLVERS = ("euler", "heun")
"""Solver settings for models that were trained by flow matching."""


def solvers_for(pipeline: Pipeline, nfe: int) -> Iterator[Sampling]:
    """The scheduler of the pipeline and all solver settings that the model admits, without caching.

    The number of steps is the largest that needs at most `nfe` evaluations; a setting that needs more is left out.
    """
    given = FLOW_SOLVERS if is_flow_config(pipeline.bundle.scheduler_config) else SOLVERS
    texts = {pipeline.scheduler_text(text): text for text in (*given, pipeline.config.scheduler)}
    for text in texts.values():
        for steps in range(nfe, 0, -1):
            try:
                sampling = pipeline.uncached(text, steps)
            except InputError:
                continue
            if sampling.nfe <= nfe:
                yield sampling
                break


def closest_solver(
    pipeline: Pipeline,
    nfe: int,
    given: Conditioning,
    seeds: Sequence[int],
    guidance: Guidance,
    reference: Tensor,
) -> Sampling:
    """The solver setting with at most `nfe` evaluations whose latents of these images are closest to `reference`."""

    def psnr(sampling: Sampling) -> float:
        made = pipeline.sampler(sampling)(given, seeds, guidance).latents
        return float(latent_psnr(made, reference, pipeline.manifest.latents.pixels).mean())

    return best_solver(pipeline, nfe, psnr)


def best_solver(pipeline: Pipeline, nfe: int, psnr: Callable[[Sampling], float]) -> Sampling:
    """The solver setting with the largest PSNR among those with at most `nfe` evaluations."""
    return max(solvers_for(pipeline, nfe), key=psnr)
