"""Solver settings that compete with caching: the same time could be spent on fewer steps of one of them.

A control that is a badly set solver proves nothing, so several settings are tried and the best is shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from diffusers import SchedulerMixin

from fora_trt.errors import InputError
from fora_trt.pipeline import Pipeline, Sampling
from fora_trt.sampling.schedulers import FLOW_SHORT_NAMES, scheduler_from_config


@dataclass(frozen=True)
class Solver:
    """A scheduler with settings: the short name or diffusers class, and arguments that replace those of the model."""

    label: str
    scheduler: str
    settings: Mapping[str, Any] = field(default_factory=dict)


LU, TRAILING = {"use_lu_lambdas": True}, {"timestep_spacing": "trailing"}
SECOND, THIRD = {"solver_order": 2}, {"solver_order": 3}
SOLVERS = (
    Solver("DDIM", "ddim"),
    Solver("DDIM, trailing", "ddim", TRAILING),
    Solver("DPM-Solver++ 2", "dpm-solver++", SECOND),
    Solver("DPM-Solver++ 2, trailing", "dpm-solver++", SECOND | TRAILING),
    Solver("DPM-Solver++ 2, Lu spacing", "dpm-solver++", SECOND | LU),
    Solver("DPM-Solver++ 3, trailing", "dpm-solver++", THIRD | TRAILING),
    Solver("DPM-Solver++ 3, Lu spacing", "dpm-solver++", THIRD | LU),
    Solver("UniPC", "unipc"),
    Solver("UniPC, trailing", "unipc", TRAILING),
)
"""Solver settings for models that predict noise. Lu spacing: timesteps of arXiv 2206.00927, uniform in log-SNR."""

FLOW_SOLVERS = (Solver("Euler", "euler"), Solver("Heun", "heun"))
"""Solver settings for models that were trained by flow matching."""


def solvers_for(pipeline: Pipeline, nfe: int) -> Iterator[tuple[str, Sampling]]:
    """Label and sampling, without caching, of every solver setting that the model admits.

    The number of steps is the largest that needs at most `nfe` evaluations.
    """
    config = pipeline.bundle.scheduler_config
    flows = str(config.get("_class_name")) in FLOW_SHORT_NAMES.values()
    for solver in FLOW_SOLVERS if flows else SOLVERS:
        for steps in range(nfe, 0, -1):
            try:
                sampling = Sampling.of(_scheduler_of(pipeline, solver), steps)
            except InputError:
                continue
            if sampling.nfe <= nfe:
                yield solver.label, sampling
                break


def _scheduler_of(pipeline: Pipeline, solver: Solver) -> SchedulerMixin:
    learned = pipeline.manifest.latents.learned_sigma
    made = scheduler_from_config(pipeline.bundle.scheduler_config, solver.scheduler, learned)
    unset = made.config.get("_use_default_values", [])  # settings of this name would be ignored
    config = {name: value for name, value in made.config.items() if name not in (*unset, "_use_default_values")}
    scheduler: SchedulerMixin = type(made).from_config({**config, **solver.settings})
    return scheduler
