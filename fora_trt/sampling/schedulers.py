"""Creates diffusers schedulers for a model: the table of short names, the learned variance, the timestep spacing."""

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
"""Short names for models trained by flow matching; they work with no other scheduler."""


def scheduler_from_config(
    config: Mapping[str, Any], name: str | None, learned_sigma: bool, spacing: str | None = None
) -> SchedulerMixin:
    """The scheduler of `config`, or the one called `name` (short name or diffusers class) with the same noise levels.

    With `learned_sigma` DDPM uses the variance that the model predicts; all other schedulers ignore it. `spacing` is
    leading, linspace or trailing (table 2 of arXiv 2305.08891), or None for the value in `config` or the class default.
    Raises `InputError` for a scheduler that does not fit the model, and for a spacing that it does not support.
    """
    flows = str(config.get("_class_name")) in FLOW_SHORT_NAMES.values()
    names = FLOW_SHORT_NAMES if flows else SHORT_NAMES
    wanted = str(config.get("_class_name")) if name is None else names.get(name, name)
    supported = {*names.values()} if flows else {scheduler.name for scheduler in KarrasDiffusionSchedulers}
    if wanted not in supported:
        kind = "this model, which was trained by flow matching" if flows else "this model"
        raise InputError(
            f"there is no scheduler {wanted!r} for {kind}; give one of {', '.join(names)}, "
            f"or a diffusers class such as {min(supported)}"
        )
    learned = learned_sigma and wanted == "DDPMScheduler"
    settings = {**config, "variance_type": "learned_range" if learned else None}
    if not learned:
        del settings["variance_type"]
    chosen = getattr(diffusers, wanted)
    if spacing is not None:
        if "timestep_spacing" not in inspect.signature(chosen.__init__).parameters:
            raise InputError(f"{wanted} has a fixed timestep spacing; leave --timestep-spacing out")
        settings["timestep_spacing"] = spacing
    try:
        scheduler: SchedulerMixin = chosen.from_config(settings)
    except Exception as error:  # an invalid setting that diffusers does not check can raise anything
        raise InputError(
            f"{wanted} does not support the settings of this model's scheduler ({type(error).__name__}: "
            f"{first_line(error)}); correct scheduler_config.json of the source and export it again"
        ) from error
    return scheduler
