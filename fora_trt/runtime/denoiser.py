"""The denoiser: it alternates a full and a reuse engine over a trajectory, on buffers that stay on the device.

`begin` announces a trajectory: it computes the conditioning and allocates memory. After that, a step copies its inputs
and launches one engine. Shapes: B is the batch of one call (twice the images under guidance); C, H, W are channels,
height and width of the latents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any
from warnings import warn

import torch
from torch import Tensor

from fora_trt.bundle import Bundle, Manifest
from fora_trt.contract import (
    CONDITIONING,
    FULL,
    FULL_CONDITIONING,
    LATENTS,
    NOISE_PREDICTION,
    REUSE,
    TIMESTEP,
    of_window,
)
from fora_trt.engines.backends import AUTO, backend_from_name, device_from_name
from fora_trt.engines.base import Engine
from fora_trt.engines.options import EngineOptions
from fora_trt.errors import InputError, RoomError
from fora_trt.runtime.precomputed import PrecomputedConditioning
from fora_trt.runtime.step_by_step import StepByStep
from fora_trt.runtime.transformer import DenoiserTransformer
from fora_trt.runtime.window import Window, folded_of
from fora_trt.schedule import NONE, Schedule, Step, fora_text, offsets_in_windows


def load(
    bundle: str | Path | Bundle,
    *,
    schedule: Schedule | str | None = None,
    cache_interval: int | None = None,
    backend: str = AUTO,
    device: str | torch.device = AUTO,
    plans: EngineOptions | None = None,
) -> Denoiser:
    """Open a bundle and start its engines.

    `schedule` is a `Schedule` or a text form (`fora:3`). A text form leaves the number of steps open: a diffusers
    pipeline sets it at every call (`as_transformer`), other callers with `reset(schedule)`. `cache_interval=3` is short
    for `schedule="fora:3"`. `backend` is `auto` or a name that `fora-trt doctor` lists; `device` is `auto`, `cpu` or
    `cuda:N`. `plans` names the folder in which the TensorRT backends find or build their plans, `engines/` by default.
    Raises `BundleError` for a damaged bundle and `BackendError` if the backend does not work here.
    """
    if (schedule is None) == (cache_interval is None):
        raise InputError(
            "load() needs exactly one of schedule and cache_interval; give "
            'schedule="fora:3", schedule=Schedule.fora(steps, 3) or cache_interval=3'
        )
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    chosen = backend_from_name(backend, opened.manifest, str(device))
    where = device if isinstance(device, torch.device) else device_from_name(device, chosen)
    rule = fora_text(cache_interval) if cache_interval is not None else schedule or NONE
    return Denoiser(chosen.engines(opened, where, plans), opened.manifest, chosen.name, rule)


class Denoiser(StepByStep):
    """Alternates the engines of one bundle, along an announced trajectory (`begin`) or called step by step.

    It keeps one `Window` with its own buffers per window length. So schedules can alternate without rebinding engines.
    """

    def __init__(
        self, engines: Mapping[str, Engine], manifest: Manifest, backend: str, schedule: Schedule | str = NONE
    ) -> None:
        super().__init__(schedule)
        self.engines, self.manifest, self.backend = engines, manifest, backend
        self.device = engines[FULL].device
        conditioning, of_full_steps = (engines.get(name) for name in (CONDITIONING, FULL_CONDITIONING))
        self.precomputed = None if conditioning is None else PrecomputedConditioning(conditioning, of_full_steps)
        self.run: EngineRun | None = None
        self._windows: dict[int, Window] = {}

    def begin(
        self, plan: Sequence[Step], timesteps: Tensor, conditioning: Mapping[str, Tensor], batches: Sequence[int]
    ) -> EngineRun:
        """Announce a trajectory; compute its conditioning and allocate the memory of its largest step.

        `timesteps` is (S,), or (S, B) if samples differ. `conditioning` has as many rows as the largest of `batches`,
        or one row for all samples. A window longer than the engines support is split by additional full steps.
        A run ends with the next `begin`, because both use the same buffers. Raises `InputError` for a batch that does
        not fit the device's memory.
        """
        if min(batches) < 1:
            raise InputError(f"the batch is {min(batches)}; at least one latent is needed")
        if self.run is not None:
            self.run.ended = True
        offsets = self._offsets(plan)
        longest = max(*offsets, self.engines[FULL].shortest_window)
        if self.precomputed is not None:
            self.precomputed.begin(timesteps, offsets, conditioning, max(batches), longest)
        window = self._prepared(longest if self.folds else 0, batches)
        self.run = EngineRun(window, self.precomputed, offsets)
        return self.run

    @property
    def window(self) -> Window | None:
        """The window of the latest trajectory; None before the first."""
        return None if self.run is None else self.run.window

    @cached_property
    def foresees(self) -> bool:
        """Whether timesteps and conditioning must be known before the steps that use them."""
        return self.precomputed is not None or self.folds

    @cached_property
    def folds(self) -> bool:
        """Whether the full engine computes the folded sums of the reuse steps of its window."""
        return bool(folded_of(self.engines[FULL], self.engines[REUSE]))

    def first_not_finite(self) -> str | None:
        """Name of the first non-finite tensor after a step: input latents, features or sums, then the prediction."""
        tensors = {} if self.window is None else self.window.buffers.tensors
        features = [feature.name for feature in self.manifest.features()]
        sums = map(of_window, folded_of(self.engines[FULL], self.engines[REUSE]))
        for name in (LATENTS, *features, *sums, NOISE_PREDICTION):
            if name in tensors and not tensors[name].isfinite().all():
                return name
        return None

    def as_transformer(self, scheduler: Any = None) -> DenoiserTransformer:
        """A replacement for the transformer of a diffusers pipeline.

        Use it as `pipe.transformer = denoiser.as_transformer(pipe.scheduler)`: it reads the timesteps of a call from
        the scheduler. Without a scheduler it reads them from the storage behind the timestep tensor; on a GPU some
        pipelines pass a copy, and then the later timesteps are unknown.
        """
        return DenoiserTransformer(self, scheduler)

    def _offsets(self, plan: Sequence[Step]) -> list[int]:
        """The offset of each step in its window; a window longer than the engines support is split."""
        longest = self.engines[FULL].longest_window if self.folds else None
        offsets, wanted = offsets_in_windows(plan, longest), sum(step.is_full for step in plan)
        if (full_steps := offsets.count(0)) > wanted:
            warn(
                f"the plans support at most {longest} reuse steps per window: {full_steps} of {len(plan)} steps run in "
                f"full instead of {wanted}",
                stacklevel=4,
            )
        return offsets

    def _prepared(self, length: int, batches: Sequence[int]) -> Window:
        """The window of a length, prepared for each batch size; if memory is short, the other windows are freed."""
        if length not in self._windows:
            self._windows[length] = Window(self.engines[FULL], self.engines[REUSE], length)
        window = self._windows[length]
        try:
            self._prepare(window, batches)
        except RoomError:
            others = [one for one in self._windows.values() if one is not window]
            if not others:
                raise
            for other in others:
                other.free()
            self._windows = {length: window}
            self._prepare(window, batches)
        return window

    @staticmethod
    def _prepare(window: Window, batches: Sequence[int]) -> None:
        for batch in sorted({*batches}, reverse=True):  # the largest first: it allocates the memory of all
            window.prepare(batch)


@dataclass
class EngineRun:
    """An announced trajectory: its window, its conditioning, and the offset of each step in its window.

    `ended` says that another trajectory has begun on the same buffers.
    """

    window: Window
    precomputed: PrecomputedConditioning | None
    offsets: Sequence[int]
    ended: bool = False

    @property
    def generation(self) -> object:
        """Changes when captured steps become invalid."""
        return self.window.generation, None if self.precomputed is None else self.precomputed.generation

    def at(self, step: int, batch: int) -> EngineStep:
        """Prepare step number `step` (from 0) and the rest of its window. Steps must run in order.

        Raises `InputError` if another trajectory has begun.
        """
        if self.ended:
            raise InputError("another trajectory has begun on this denoiser; a denoiser runs one trajectory at a time")
        self.window.prepare(batch)
        if self.precomputed is not None:
            self.precomputed.select(step)
        return EngineStep(self, step)


@dataclass(frozen=True)
class EngineStep:
    """A prepared step of a run."""

    run: EngineRun
    step: int

    def predict(self, offset: int, latents: Tensor, timestep: Tensor | float, **conditioning: Tensor) -> Tensor:
        """Run the engine for an offset in the window; return the prediction, which is a buffer of the window."""
        window, precomputed = self.run.window, self.run.precomputed
        buffers = window.buffers.tensors
        buffers[LATENTS].copy_(latents)
        if TIMESTEP in buffers:
            buffers[TIMESTEP].copy_(torch.as_tensor(timestep))
        for name, value in conditioning.items():
            if name in buffers:
                buffers[name].copy_(value)
        if precomputed is not None:
            precomputed.copy(window.reuse if offset else window.full, offset, buffers, window.batch)
        window.run(offset)
        return buffers[NOISE_PREDICTION]

    def is_capturable(self) -> bool:
        """Whether the steps from this one to the end of its window can be captured in a CUDA graph."""
        rest = self.run.offsets[self.step :]
        return self.run.window.can_capture([rest[0], *takewhile(lambda offset: offset > 0, rest[1:])])
