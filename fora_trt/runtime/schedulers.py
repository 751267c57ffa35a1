"""Schedulers of diffusers by name, set up for a model: the table of short names and the learned variance."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import diffusers
from diffusers import SchedulerMixin
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers

from fora_trt.errors import InputError, first_line

SHORT_NAMES = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpm-solver++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "pndm": "PNDMScheduler",
}
FLOW_SHORT_NAMES = {"euler": "FlowMatchEulerDiscreteScheduler", "heun": "FlowMatchHeunDiscreteScheduler"}
"""The same of models that were trained by flow matching, which no other scheduler fits."""


def scheduler_from_config(
    config: Mapping[str, Any], name: str | None, learned_sigma: bool, spacing: str | None = None
) -> SchedulerMixin:
    """The scheduler that `config` names, or another by short name or by diffusers class, over the same noise levels.

    With `learned_sigma` the stochastic DDPM takes its variance from the model; all others do without it. `spacing` is
    leading, linspace or trailing (table 2 of arXiv 2305.08891), or None for what `config` says or the class prefers.
    Raises `InputError` for a name that does not fit the model, and for a spacing that the scheduler does not have.
    """
    flows = str(config.get("_class_name")) in FLOW_SHORT_NAMES.values()
    names = FLOW_SHORT_NAMES if flows else SHORT_NAMES
    wanted = str(config.get("_class_name")) if name is None else names.get(name, name)
    admitted = {*names.values()} if flows else {scheduler.name for scheduler in KarrasDiffusionSchedulers}
    if wanted not in admitted:
        kind = "this model, which was trained by flow matching" if flows else "this model"
        raise InputError(
            f"there is no scheduler {wanted!r} for {kind}; give one of {', '.join(names)}, "
            f"or a diffusers class such as {min(admitted)}"
        )
    learned = learned_sigma and wanted == "DDPMScheduler"
    settings = {**config, "variance_type": "learned_range" if learned else None}
    if not learned:
        del settings["variance_type"]
    chosen = getattr(diffusers, wanted)
    if spacing is not None:
        if "timestep_spacing" not in inspect.signature(chosen.__init__).parameters:
            raise InputError(f"{wanted} has no choice of timesteps; leave --timestep-spacing out")
        settings["timestep_spacing"] = spacing
    try:
        scheduler: SchedulerMixin = chosen.from_config(settings)
    except Exception as error:  # whatever a setting that it does not check leads to
        raise InputError(
            f"{wanted} does not take the settings of this model's scheduler ({type(error).__name__}: "
            f"{first_line(error)}); mend scheduler_config.json of the source and export it again"
        ) from error
    return scheduler
