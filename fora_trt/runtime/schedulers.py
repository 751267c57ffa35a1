"""Schedulers of diffusers by name, set up for a model: the table of short names and the learned variance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import diffusers
from diffusers import SchedulerMixin
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers

from fora_trt.errors import InputError

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


def scheduler_from_config(config: Mapping[str, Any], name: str | None, learned_sigma: bool) -> SchedulerMixin:
    """The scheduler that `config` names, or another by short name or by diffusers class, over the same noise levels.

    With `learned_sigma` the stochastic DDPM takes its variance from the model; all others do without it.
    Raises `InputError` for a name that DiT pipelines do not admit.
    """
    wanted = str(config.get("_class_name")) if name is None else SHORT_NAMES.get(name, name)
    admitted = {scheduler.name for scheduler in KarrasDiffusionSchedulers}
    if wanted not in admitted:
        raise InputError(
            f"there is no scheduler {wanted!r} for this model; give one of {', '.join(SHORT_NAMES)}, "
            f"or a diffusers class such as {min(admitted)}"
        )
    learned = learned_sigma and wanted == "DDPMScheduler"
    settings = {**config, "variance_type": "learned_range" if learned else None}
    if not learned:
        del settings["variance_type"]
    scheduler: SchedulerMixin = getattr(diffusers, wanted).from_config(settings)
    return scheduler
