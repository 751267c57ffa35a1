"""The denoiser: it alternates full, partial and reuse engines over a trajectory, on buffers that stay on the device.

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
    CONDITIONING_GRAPHS,
    FULL,
    LATENTS,
    NOISE_PREDICTION,
    REUSE,
    TIMESTEP,
    of_window,
)
from fora_trt.engines.backends import AUTO, backend_from_name, device_from_name
from fora_trt.engines.base import Engine
from fora_trt.engines.options import EngineOptions
from fora_trt.errors import ForaWarning, InputError, ScheduleError
from fora_trt.plan import Plan, depth_of, rows_of
from fora_trt.presets import usual_text
from fora_trt.runtime.access import Access
from fora_trt.runtime.layout import Layout, within
from fora_trt.runtime.precomputed import ConditioningRows, precomputed_of
from fora_trt.runtime.step_by_step import StepByStep
from fora_trt.runtime.transformer import DenoiserTransformer
from fora_trt.runtime.window import Window, folded_of
from fora_trt.runtime.windows import Windows
from fora_trt.schedule import NONE, Schedule, with_forecast


def load(
    bundle: str | Path | Bundle,
    *,
    schedule: Schedule | str | None = None,
    cache_interval: int | None = None,
    forecast: int | None = None,
    backend: str = AUTO,
    device: str | torch.device = AUTO,
    plans: EngineOptions | None = None,
) -> Denoiser:
    """Open a bundle and start its engines.

    `schedule` is a `Schedule` or a text form (`fora:3`). A text form leaves the number of steps open: a diffusers
    pipeline sets it at every call (`as_transformer`), other callers with `reset(schedule)`. `cache_interval=3` is short
    for `schedule="fora:3"`, and with `forecast=2` for `schedule="fora:3,forecast=2"`: reuse steps extrapolate features
    with this order (0 to 3). `forecast=2` alone stands for `dense:every=3,forecast=2`. `backend` is `auto` or a name
    that `fora-trt doctor` lists; `device` is `auto`, `cpu` or `cuda:N`. `plans` names the folder in which the TensorRT
    backends find or build their plans, `engines/` by default. Raises `BundleError` for a damaged bundle and
    `BackendError` if the backend does not work here.
    """
    if [schedule, cache_interval].count(None) != 1 and (schedule is not None or not forecast):
        raise InputError(
            "exactly one of schedule and cache_interval is needed; give "
            'schedule="fora:3", schedule=Schedule.fora(steps, 3) or cache_interval=3'
        )
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    opened.manifest.check_one_network("load")
    chosen = backend_from_name(backend, opened.manifest, str(device))
    where = device if isinstance(device, torch.device) else device_from_name(device, chosen)
    rule = usual_text(cache_interval, forecast) if schedule is None else with_forecast(schedule, forecast)
    denoiser = Denoiser(chosen.engines(opened, where, plans), opened.manifest, chosen.name, rule)
    denoiser.bundle = opened
    return denoiser


class Denoiser(StepByStep):
    """Alternates the engines of one bundle, along an announced trajectory (`begin`) or called step by step.

    It keeps a `Window` per window shape; all are in the same memory. So schedules can alternate without rebinding
    engines.
    """

    def __init__(
        self, engines: Mapping[str, Engine], manifest: Manifest, backend: str, schedule: Schedule | str = NONE
    ) -> None:
        super().__init__(schedule)
        self.engines, self.manifest, self.backend = engines, manifest, backend
        if isinstance(schedule, Schedule):
            self._checked(schedule)
        self.device = engines[FULL].device
        self.precomputed = precomputed_of(engines)
        self.run: EngineRun | None = None
        self.bundle: Bundle | None = None
        self._windows = Windows({graph: one for graph, one in engines.items() if graph not in CONDITIONING_GRAPHS})

    def another(self) -> Denoiser:
        """A second denoiser on the same engines, for another trajectory: it has buffers and a schedule of its own."""
        other = Denoiser(self.engines, self.manifest, self.backend, self.rule)
        other.access = self.access  # one thread at a time may use the engines
        return other

    def begin(
        self,
        plan: Plan,
        timesteps: Tensor,
        conditioning: Mapping[str, Tensor],
        batches: Sequence[int],
        first: int = 0,
    ) -> EngineRun:
        """Announce a trajectory; compute its conditioning and allocate the memory of its largest step.

        `plan` is the plan of the whole trajectory. `timesteps` is (S,), or (S, B) if samples differ, for the S steps
        from number `first` on; those before have run already. `conditioning` has as many rows as the largest of
        `batches`, or one row for all samples. If the engines support fewer rows in window tensors than the plan needs,
        the order of its forecast is lower and longer windows are split by additional full steps, with a warning.
        A run ends with the next `begin`, because both use the same buffers. Raises `InputError` for a batch that does
        not fit the device's memory, `ScheduleError` for a forecast with a bundle that cannot.
        """
        if min(batches) < 1:
            raise InputError(f"the batch is {min(batches)}; at least one latent is needed")
        last = self.run
        known = last is not None and last.plan is plan  # step-by-step calls begin many runs of one plan
        whole = last.whole if last is not None and known else self.layout_of(plan)
        return self.start(whole, whole.part(first, len(timesteps)), plan, timesteps, conditioning, batches)

    def start(
        self,
        whole: Layout,
        layout: Layout,
        plan: Plan,
        timesteps: Tensor,
        conditioning: Mapping[str, Tensor],
        batches: Sequence[int],
    ) -> EngineRun:
        """Announce a trajectory like `begin`, with a layout: that of the whole plan and that of the steps to come."""
        with self.access.alone():
            if self.run is not None:
                self.run.ended = True
            rows = max(whole.rows, self.engines[FULL].shortest_window) if self.folds else 0
            if self.precomputed is not None:
                self.precomputed.begin(timesteps, layout, conditioning, max(batches), rows)
            window = self._windows.prepared(whole, rows, batches)
            window.begin(layout)
            self.run = EngineRun(window, self.precomputed, layout, plan, whole, self.access)
            return self.run

    def layout_of(self, plan: Plan) -> Layout:
        """The layout of a plan, changed if the engines support fewer rows in window tensors than it needs.

        Raises `ScheduleError` for a forecast with a bundle that cannot, and for a graph that the bundle lacks.
        """
        self.manifest.check_graphs({step.graph for step in plan})
        layout = Layout.of(self._supported(plan))
        if layout.weighted and not self.manifest.can_forecast:
            raise ScheduleError(
                f"{self.manifest.name} cannot forecast: its full graph folds values that are not linear in the "
                "features; export it with --optimize conditioning, or leave the forecast out"
            )
        if layout.weighted and not self.folds and any(step.is_partial for step in plan):
            raise ScheduleError(
                f"{self.manifest.name} cannot forecast between partial steps: it does not fold sums; export it with "
                "--optimize fold, or leave the forecast out"
            )
        return layout

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
        tensors = {} if self.window is None else self.window.tensors
        features = [feature.name for feature in self.manifest.features()]
        sums = map(of_window, folded_of(self.engines[FULL], self.engines[REUSE]))
        for name in (LATENTS, *features, *sums, NOISE_PREDICTION):
            if name in tensors and not tensors[name].isfinite().all():
                return name
        return None

    def as_transformer(self, scheduler: Any = None) -> DenoiserTransformer:
        """A replacement for the transformer of a diffusers pipeline.

        Use it as `pipe.transformer = denoiser.as_transformer(pipe)`: it reads the timesteps of a call from the
        scheduler of the pipeline, also if that is replaced later. `as_transformer(pipe.scheduler)` reads them from this
        scheduler; a warning says if the pipeline runs others. Without either, it reads them from the storage behind the
        timestep tensor; on a GPU some pipelines pass a copy, and then the later timesteps are unknown. Raises
        `InputError` for another object.
        """
        return DenoiserTransformer(self, scheduler, self.bundle)

    def _supported(self, plan: Plan) -> Plan:
        """The plan, changed if the engines support fewer rows in window tensors than it needs."""
        limit = self.engines[FULL].longest_window if self.folds else None
        if limit is None or rows_of(plan) <= limit:
            return plan
        supported = within(plan, limit)
        full_steps, wanted = (sum(step.is_full for step in one) for one in (supported, plan))
        orders = depth_of(supported) - 1, depth_of(plan) - 1
        changes = [
            *([f"{full_steps} of {len(plan)} steps run in full instead of {wanted}"] if full_steps > wanted else []),
            *([f"the forecast order is {orders[0]} instead of {orders[1]}"] if orders[0] < orders[1] else []),
        ]
        what = "the plans support sums for at most"
        warn(f"{what} {limit} reuse steps per full step: {' and '.join(changes)}", category=ForaWarning, stacklevel=5)
        return supported


@dataclass
class EngineRun:
    """An announced trajectory: its window, its conditioning, and where each of its steps finds what it reads.

    `whole` is the layout of the whole plan, `layout` that of the steps of the run. `ended` says that another
    trajectory has begun on the same buffers.
    """

    window: Window
    precomputed: ConditioningRows | None
    layout: Layout
    plan: Plan
    whole: Layout
    access: Access
    ended: bool = False

    @property
    def offsets(self) -> Sequence[int]:
        """The offset of each step in its window."""
        return self.layout.offsets

    @cached_property
    def graphs(self) -> Sequence[str]:
        """The graph of each step."""
        layout = self.layout
        return [REUSE if offset else graph for offset, graph in zip(layout.offsets, layout.graphs, strict=True)]

    @property
    def generation(self) -> object:
        """Changes when captured steps become invalid."""
        return self.window.generation, None if self.precomputed is None else self.precomputed.generation

    def at(self, step: int, batch: int) -> EngineStep:
        """Prepare step number `step` (from 0) and the rest of its window. Steps must run in order.

        Raises `InputError` if another trajectory has begun.
        """
        with self.access.alone():
            if self.ended:
                raise InputError(
                    "another trajectory has begun on this denoiser; a denoiser runs one trajectory at a time"
                )
            self.window.prepare(batch)
            self.window.select(step)
            if self.precomputed is not None:
                self.precomputed.select(step)
            return EngineStep(self, step)


@dataclass(frozen=True)
class EngineStep:
    """A prepared step of a run."""

    run: EngineRun
    step: int

    @property
    def variant(self) -> tuple[str, int]:
        """The graph that begins the step's window, and which of the window's bindings it uses."""
        return self.run.layout.graphs[self.step], self._turn

    @property
    def _turn(self) -> int:
        return self.run.layout.windows[self.step] % self.run.window.turns

    def predict(self, offset: int, latents: Tensor, timestep: Tensor | float, **conditioning: Tensor) -> Tensor:
        """Run the engine for an offset in the window; return the prediction, which is a buffer of the window."""
        with self.run.access.alone():
            return self._predict(offset, latents, timestep, conditioning)

    def _predict(
        self, offset: int, latents: Tensor, timestep: Tensor | float, conditioning: Mapping[str, Tensor]
    ) -> Tensor:
        window, precomputed = self.run.window, self.run.precomputed
        buffers = window.buffers.tensors
        buffers[LATENTS].copy_(latents)
        if TIMESTEP in buffers:
            buffers[TIMESTEP].copy_(torch.as_tensor(timestep))
        for name, value in conditioning.items():
            if name in buffers:
                buffers[name].copy_(value)
        rows = self._rows()
        if precomputed is not None:
            precomputed.copy(window.engine_at(offset), offset, buffers, window.batch, rows)
        window.run(offset, self._turn, rows)
        return buffers[NOISE_PREDICTION]

    def _rows(self) -> int:
        """Number of rows of window tensors that a full step computes: only those that are read, if that is cheap."""
        window, layout = self.run.window, self.run.layout
        if not window.full.any_window or not window.rows:
            return window.rows
        return max(len(layout.readers[self.step]), window.full.shortest_window)

    def is_capturable(self) -> bool:
        """Whether the steps from this one to the end of its window can be captured in a CUDA graph."""
        rest = self.run.offsets[self.step :]
        offsets = [rest[0], *takewhile(lambda offset: offset > 0, rest[1:])]
        return self.run.window.can_capture(offsets, self._turn)
