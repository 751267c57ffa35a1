"""The drop-in for diffusers pipelines: a module with the transformer's signature and config that runs a denoiser."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from fora_trt.bundle import Bundle
from fora_trt.call import CallReader, TimeMap
from fora_trt.contract import LATENTS, PRECISIONS, TIMESTEP
from fora_trt.errors import BackendError, InputError, NotOfEnginesError, ShapeError
from fora_trt.runtime.follow import Follower, are_now, step_of_view
from fora_trt.runtime.inputs import check_latents, checked_timestep, inputs_of
from fora_trt.runtime.interface import overflow_remedy
from fora_trt.runtime.step_by_step import StepByStep
from fora_trt.schedule import Schedule

NESTED = "added_cond_kwargs"
"""A transformer argument that is a dictionary of further inputs (PixArt: resolution and aspect ratio)."""

REMEDY = (
    "call the pipeline as at the export (height, width, frames, max_sequence_length; use_resolution_binning=False for "
    "PixArt), or export again for this call"
)

SAVED = "fora_trt.saved_pipeline"
"""The module from which diffusers loads the drop-in of a saved pipeline."""

MOST_SLOTS = 8
"""Largest number of calls in one step; a further call at the same timestep begins a new trajectory."""


class DenoiserTransformer(nn.Module):
    """Replaces `pipe.transformer`.

    A pipeline may call its transformer several times a step, for example with the prompt and with the negative prompt.
    Each of these calls is a *slot* with a trajectory and buffers of its own. `cache_context` names it, else it is the
    number of the call in its step. `scheduler` is the pipeline, whose scheduler may be replaced later, or its
    scheduler; `runtime/follow.py` says what it is for.
    """

    def __init__(self, denoiser: StepByStep, scheduler: Any = None, bundle: Bundle | None = None) -> None:
        super().__init__()
        self.denoiser = denoiser
        self._stands_for = denoiser.manifest.model.architecture
        self.config = FrozenDict(denoiser.manifest.model.config)
        self.dtype: torch.dtype = getattr(torch, PRECISIONS[denoiser.manifest.precision])
        pipeline = denoiser.manifest.pipeline
        self._call = None if pipeline is None else pipeline.call
        self._bundle = bundle
        constants = {} if bundle is None else bundle.constants
        self._reader = None if self._call is None else CallReader(self._call, constants)
        self.__module__ = SAVED
        for name, value in (self._call.attributes if self._call else {}).items():
            if not hasattr(self, name):
                setattr(self, name, value)
        self._scheduler = _scheduler_of(scheduler)
        self._slots: dict[str, Follower] = {}
        self._context: str | None = None
        self._count = 0
        self._moment: object = None

    @property  # type: ignore[misc] # typeshed has an attribute
    def __class__(self) -> type:
        """The transformer's own class: pipelines of diffusers check it, in `from_pretrained(transformer=...)` too."""
        named = getattr(diffusers, vars(self).get("_stands_for", ""), None)
        return named if isinstance(named, type) else DenoiserTransformer

    def __getattr__(self, name: str) -> Any:
        """Raises `NotOfEnginesError` for what the transformer's own class has, such as `enable_cache`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            kind = self.__class__
            if kind is DenoiserTransformer or not hasattr(kind, name):
                raise
        raise NotOfEnginesError(
            f"the transformer of this pipeline runs engines, which have no {name}: it changes or reads layers; put the "
            f"original {kind.__name__} back for it, and export again to have its effect in a bundle"
        )

    def to(self, *args: Any, **kwargs: Any) -> DenoiserTransformer:
        """Note the dtype in which the pipeline gives its tensors; engines stay in their precision on their device."""
        _, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        self.dtype = dtype or self.dtype
        return self

    def follow(self, scheduler: Any) -> None:
        """Read timesteps from another pipeline or scheduler. Raises `InputError` for another object."""
        self._scheduler = _scheduler_of(scheduler)
        self._slots.clear()

    def use_schedule(self, schedule: Schedule | str) -> None:
        """Run the trajectories from the next on with another schedule or text form."""
        for denoiser in (self.denoiser, *(slot.denoiser for slot in self._slots.values())):
            denoiser.rule = schedule

    @property
    def full_steps(self) -> int:
        """Number of full steps that all slots have run so far."""
        return sum(slot.denoiser.taken.full for slot in self._slots.values())

    @property
    def reuse_steps(self) -> int:
        """Number of reuse steps that all slots have run so far."""
        return sum(slot.denoiser.taken.reuse for slot in self._slots.values())

    @property
    def partial_steps(self) -> int:
        """Number of partial steps that all slots have run so far."""
        return sum(slot.denoiser.taken.partial for slot in self._slots.values())

    @property
    def device(self) -> torch.device:
        """The device of the engines."""
        return self.denoiser.device

    @contextmanager
    def cache_context(self, name: str, **_: Any) -> Iterator[None]:
        """Name the calls within the block, as pipelines of diffusers do; calls with one name are one trajectory."""
        before, self._context = self._context, name
        try:
            yield
        finally:
            self._context = before

    def forward(self, *args: Any, **kwargs: Any) -> Transformer2DModelOutput | tuple[Tensor] | Tensor:
        """The transformer's own call; the prediction belongs to the caller.

        Raises `ShapeError` for inputs or shapes that were not exported, `InputError` for other invalid inputs,
        `BackendError` for a prediction that is not finite.
        """
        manifest = self.denoiser.manifest
        try:
            given, as_object = self._given(args, kwargs)
            latents = given.pop(LATENTS)
            check_latents(manifest, latents, self.device)
            timestep = checked_timestep(_of_samples(given.pop(TIMESTEP), len(latents)), len(latents))
            slot = self._slot(timestep)
            times = slot.follow(timestep)
            prediction = slot.denoiser(latents, times, **given)
        except ShapeError as error:
            raise ShapeError(f"{error}; {REMEDY}") from None
        if not prediction.isfinite().all():
            raise BackendError(
                f"{manifest.name} outputs values that are not finite in {manifest.precision}, first in tensor "
                f"{slot.denoiser.first_not_finite()}; {overflow_remedy(manifest.precision)}"
            )
        owned = prediction.to(latents.dtype, copy=True)
        if as_object:
            return Transformer2DModelOutput(sample=owned)
        return owned if self._call is not None and self._call.bare else (owned,)

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
        """Write the bundle with the schedule to a folder; `from_pretrained` of the saved pipeline loads it again.

        Raises `InputError` if the folder holds anything else, or the predictor has no bundle.
        """
        if self._bundle is None:
            raise InputError(
                "the transformer of this pipeline runs no bundle that could be saved; put the original one back"
            )
        config = {**self.config, "_class_name": self._stands_for}
        self._bundle.copy(Path(save_directory), self.denoiser.rule, config)

    def _given(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
        """The graph inputs of a call by name, and whether it asks for an output object."""
        if self._reader is not None:
            found = self._reader.inputs(args, kwargs)
            read = {LATENTS, TIMESTEP, *inputs_of(self.denoiser.manifest)}
            as_object = self._reader.spec.returns_dict(args, kwargs)
            return {name: one for name, one in found.items() if name in read}, as_object
        return _by_name(*args, **kwargs)

    def _slot(self, timestep: Tensor) -> Follower:
        """The trajectory that a call belongs to."""
        moment = self._moment_of(timestep)
        again = moment is not None and moment == self._moment and self._count + 1 < MOST_SLOTS
        self._count, self._moment = self._count + 1 if again else 0, moment
        name = str(self._count) if self._context is None else self._context
        if name not in self._slots:
            denoiser = self.denoiser.another() if self._slots else self.denoiser
            self._slots[name] = Follower(denoiser, lambda: self._scheduler(), self._time)
        return self._slots[name]

    @property
    def _time(self) -> TimeMap:
        return TimeMap() if self._call is None else self._call.time

    def _moment_of(self, timestep: Tensor) -> object:
        """Differs between steps, but not between calls of one step, also where a scheduler repeats a timestep.

        None if a call at the same timestep is the next step: the scheduler repeats it, and nothing counts its steps.
        """
        scheduler, viewed = self._scheduler(), step_of_view(timestep)
        counted = tuple(getattr(scheduler, name, None) for name in ("step_index", "counter"))
        if scheduler is not None and viewed is None and not any(one is not None for one in counted):
            times = torch.as_tensor(scheduler.timesteps).cpu()
            if int(are_now(times, timestep, self._time).sum()) > 1:
                return None
        return float(timestep.flatten()[0]), counted, None if viewed is None else viewed.step


def _of_samples(timestep: Any, batch: int) -> Any:
    """Timesteps (B,) of those (B, S) for each token that are equal within a sample; others are returned as given."""
    if not isinstance(timestep, Tensor) or timestep.dim() != 2 or len(timestep) != batch:
        return timestep
    return timestep[:, 0] if bool((timestep == timestep[:, :1]).all()) else timestep


def _by_name(
    hidden_states: Tensor, timestep: Tensor | float, return_dict: bool = True, **conditioning: Any
) -> tuple[dict[str, Any], bool]:
    """The graph inputs in the call of a DiT or a PixArt, and whether it asks for an output object."""
    nested = conditioning.pop(NESTED, None) or {}
    given = {name: value for name, value in {**conditioning, **nested}.items() if value is not None}
    return {LATENTS: hidden_states, TIMESTEP: timestep, **given}, return_dict


def _scheduler_of(given: Any) -> Callable[[], Any]:
    """A function that returns the scheduler in use: that of a pipeline, which may be replaced, or the given one."""
    if given is not None and not hasattr(given, "scheduler") and not hasattr(given, "timesteps"):
        raise InputError(
            f"as_transformer() was given an object of type {type(given).__name__}; give the diffusers pipeline, its "
            "scheduler, or nothing"
        )
    if not hasattr(given, "scheduler"):
        return lambda: given
    pipeline = weakref.ref(given)  # the pipeline holds its transformer
    return lambda: getattr(pipeline(), "scheduler", None)
