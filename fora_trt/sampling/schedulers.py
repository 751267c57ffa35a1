"""Creates diffusers schedulers for a model: the table of short names, the learned variance, the timestep spacing."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import diffusers
from diffusers import SchedulerMixin

from fora_trt.bundle import MOST_TIMESTEPS
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


FLOW = "FlowMatch"
"""Beginning of the class names of schedulers for flow matching."""

WITH_VARIANCE = ("DDPMScheduler", "DDPMParallelScheduler", "UnCLIPScheduler")
"""Schedulers whose noise has the variance that `variance_type` says."""

LEARNED = ("learned", "learned_range")
"""Values of `variance_type` for networks that predict a variance."""

SPACINGS = ("leading", "linspace", "trailing")
"""Timestep spacings of diffusers (table 2 of arXiv 2305.08891)."""

SPACING_FLAGS = {"karras": "use_karras_sigmas", "lu": "use_lu_lambdas"}
"""Further spacings: noise levels of arXiv 2206.00364, and timesteps uniform in log-SNR of arXiv 2206.00927."""

USAGE = "NAME[:order=K][,spacing=S]"


@dataclass(frozen=True)
class SchedulerChoice:
    """A diffusers class, and settings of it in place of the model's: the order of the solver, the timestep spacing.

    The text form is `dpm-solver++:order=3,spacing=lu`: a short name or class, a colon, and the settings. Raises
    `InputError` for a text that is not of this form.
    """

    name: str
    order: int | None = None
    spacing: str | None = None

    @classmethod
    def from_text(cls, text: str, names: Mapping[str, str] | None = None) -> SchedulerChoice:
        """Parse a text form; `names` has the class of each short name."""
        name, _, words = text.partition(":")
        settings: dict[str, str] = {}
        for word in words.split(",") if words else ():
            key, _, value = word.partition("=")
            if key not in ("order", "spacing") or key in settings:
                raise InputError(f"{word!r} in the scheduler {text!r} is not understood; the form is {USAGE}")
            settings[key] = value
        order, spacing = settings.get("order"), settings.get("spacing")
        if order is not None and order not in ("1", "2", "3"):
            raise InputError(f"'order={order}' in the scheduler {text!r} is not an order; give 1, 2 or 3")
        if spacing is not None and spacing not in (*SPACINGS, *SPACING_FLAGS):
            known = ", ".join((*SPACINGS, *SPACING_FLAGS))
            raise InputError(f"'spacing={spacing}' in the scheduler {text!r} is not known; give one of {known}")
        return cls((names or {}).get(name, name), None if order is None else int(order), spacing)

    @property
    def text(self) -> str:
        """The text form with the name of the class."""
        return _with_settings(self.name, self)

    @property
    def label(self) -> str:
        """The text form with the short name, or the class name without the suffix `Scheduler`."""
        short = {name: short for names in (SHORT_NAMES, FLOW_SHORT_NAMES) for short, name in names.items()}
        return _with_settings(short.get(self.name, self.name.removesuffix("Scheduler")), self)

    def settings_for(self, scheduler: type[SchedulerMixin]) -> dict[str, Any]:
        """The settings as arguments of the class. Raises `InputError` for one that the class does not have."""
        known = inspect.signature(scheduler.__init__).parameters
        settings: dict[str, Any] = {}
        if self.order is not None:
            if "solver_order" not in known:
                raise InputError(f"{self.name} has a fixed order; leave order={self.order} out")
            settings["solver_order"] = self.order
        if self.spacing is not None:
            flag = SPACING_FLAGS.get(self.spacing)
            if (flag or "timestep_spacing") not in known:
                raise InputError(f"{self.name} has no timestep spacing {self.spacing!r}; leave it out")
            settings |= {one: one == flag for one in SPACING_FLAGS.values() if one in known}
            settings |= {} if flag else {"timestep_spacing": self.spacing}
        return settings


def _with_settings(name: str, choice: SchedulerChoice) -> str:
    given = {"order": choice.order, "spacing": choice.spacing}
    words = ",".join(f"{key}={value}" for key, value in given.items() if value is not None)
    return f"{name}:{words}" if words else name


def scheduler_choice(config: Mapping[str, Any], text: str | None, spacing: str | None = None) -> SchedulerChoice:
    """The scheduler of `config` (None), or the one of a text form, such as `ddim` or `dpm-solver++:order=3,spacing=lu`.

    `spacing` is the spacing that was given beside it. Raises `InputError` for a scheduler that does not fit the model.
    """
    flows = is_flow_config(config)
    names = FLOW_SHORT_NAMES if flows else SHORT_NAMES
    choice = SchedulerChoice.from_text(str(config.get("_class_name")) if text is None else text, names)
    if not _is_scheduler(choice.name) or choice.name.startswith(FLOW) is not flows:
        kind = "this model, which was trained by flow matching" if flows else "this model"
        raise InputError(
            f"there is no scheduler {choice.name!r} for {kind}; give one of {', '.join(names)}, "
            f"or a diffusers class such as {min(names.values())}"
        )
    if spacing is not None and choice.spacing is not None:
        raise InputError(f"the scheduler {text!r} has a spacing already; give it there or with --timestep-spacing")
    return choice if spacing is None else replace(choice, spacing=spacing)


def _is_scheduler(name: str) -> bool:
    """Whether diffusers has a scheduler of this name that steps from a prediction, a timestep and the latents alone."""
    found: Any = getattr(diffusers, name, None) if name.isidentifier() else None
    try:
        step = getattr(found, "step", None)
    except ImportError as error:  # diffusers' stand-in for a class whose packages are missing
        raise InputError(first_line(error)) from error
    if not (isinstance(found, type) and issubclass(found, SchedulerMixin) and hasattr(found, "set_timesteps") and step):
        return False
    needed = [
        one.name
        for one in inspect.signature(step).parameters.values()
        if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD
    ]
    return needed == ["self", "model_output", "timestep", "sample"]


def is_flow_config(config: Mapping[str, Any]) -> bool:
    """Whether the model of this scheduler was trained by flow matching."""
    return str(config.get("_class_name")).startswith(FLOW)


def fine_solver(config: Mapping[str, Any]) -> str:
    """The solver that a fine solution is computed with: one without noise of its own."""
    return "euler" if is_flow_config(config) else "ddim"


def scheduler_from_config(
    config: Mapping[str, Any], name: str | None, learned_sigma: bool, spacing: str | None = None
) -> SchedulerMixin:
    """The scheduler that `scheduler_choice` chooses, with the noise levels and all other settings of `config`.

    With `learned_sigma` DDPM uses the variance that the model predicts, unless `config` has a fixed variance; all other
    schedulers ignore it. Raises `InputError` for settings that the scheduler does not support.
    """
    choice = scheduler_choice(config, name, spacing)
    chosen = getattr(diffusers, choice.name)
    settings = {**config, **_variance(config, choice.name, learned_sigma), **choice.settings_for(chosen)}
    _check_noise_levels(settings)
    try:
        scheduler: SchedulerMixin = chosen.from_config(settings)
    except Exception as error:  # an invalid setting that diffusers does not check can raise anything
        raise InputError(
            f"{choice.text} does not support the settings of this model's scheduler ({type(error).__name__}: "
            f"{first_line(error)}); correct scheduler_config.json of the source and export it again"
        ) from error
    return scheduler


def _variance(config: Mapping[str, Any], name: str, learned_sigma: bool) -> dict[str, str | None]:
    """The `variance_type` of a scheduler. Raises `InputError` for a learned one if the model predicts no variance."""
    own = config.get("variance_type")
    if name not in WITH_VARIANCE:
        return {"variance_type": None} if own in LEARNED else {}
    if own in LEARNED and not learned_sigma:
        raise InputError(
            f"the scheduler configuration has the variance_type {own!r}, but the network predicts no variance; set it "
            "to fixed_small in scheduler_config.json"
        )
    return {"variance_type": "learned_range"} if own is None and learned_sigma else {}


def _check_noise_levels(settings: Mapping[str, Any]) -> None:
    """Raise `InputError` for noise levels that no scheduler can use."""
    mend = "correct scheduler_config.json of the source and export it again"
    steps = settings.get("num_train_timesteps", 1000)
    if type(steps) is not int or not 1 <= steps <= MOST_TIMESTEPS:
        raise InputError(
            f"the scheduler's num_train_timesteps is {steps!r}; an integer from 1 to {MOST_TIMESTEPS} is needed; {mend}"
        )
    for key in ("beta_start", "beta_end"):
        value = settings.get(key, 0.5)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
            raise InputError(f"the scheduler's {key} is {value!r}; a number between 0 and 1 is needed; {mend}")
    if settings.get("rescale_betas_zero_snr") and settings.get("prediction_type", "epsilon") == "epsilon":
        raise InputError(
            "the scheduler has rescale_betas_zero_snr, so its first step is pure noise, from which a network that "
            "predicts the noise (prediction_type epsilon) tells nothing about the image; set one of the two otherwise "
            "in scheduler_config.json"
        )
