"""The denoiser: called like the network that it replaces, it alternates a full and a reuse engine on shared buffers.

Shapes: B is the batch of one call (twice the images under guidance), C, H, W are the latents' channels and sides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any
from warnings import warn

import torch
from torch import Tensor

from fora_trt.bundle import Bundle, Manifest
from fora_trt.engines.backends import AUTO, backend_from_name, device_from_name
from fora_trt.engines.base import Engine, Launch
from fora_trt.engines.memory import bytes_of, check_room
from fora_trt.engines.plan_store import PlanSource
from fora_trt.errors import InputError, ScheduleError
from fora_trt.models.examples import default_of
from fora_trt.models.spec import (
    CONDITIONING,
    FULL,
    FULL_CONDITIONING,
    LATENTS,
    NOISE_PREDICTION,
    REUSE,
    TIMESTEP,
    InputSpec,
    of_window,
)
from fora_trt.runtime.conditioning import check_values, inputs_of
from fora_trt.runtime.table import ConditioningTable, take
from fora_trt.schedule import Schedule, places_in_windows

OPEN_STEPS = 1000
"""Length of a schedule whose number of steps nobody said: as many as models are trained with."""

if TYPE_CHECKING:
    from fora_trt.runtime.transformer import DenoiserTransformer


def mend_overflow(precision: str) -> str:
    """What to do about a model that is not finite in this precision."""
    finer = {"fp16": "bf16 or fp32", "bf16": "fp32"}
    return (
        f"export it with --precision {finer[precision]}"
        if precision in finer
        else "its weights or its inputs are too large even for fp32; look at the checkpoint and the guidance scale"
    )


def load(
    bundle: str | Path | Bundle,
    *,
    schedule: Schedule | None = None,
    cache_interval: int | None = None,
    backend: str = AUTO,
    device: str | torch.device = AUTO,
    plans: PlanSource | None = None,
) -> Denoiser:
    """Open a bundle and start its engines.

    `schedule` says which steps are full; `cache_interval` instead of it leaves the number of steps open, for a
    diffusers pipeline that sets it at every call (`as_transformer`), or until `reset(schedule)`. `backend` is `auto`
    or a name that `fora-trt doctor` lists; `device` is `auto`, `cpu` or `cuda:N`. `plans` tells the TensorRT backends
    where their plans are, or are to be built: in `engines/` unless told otherwise.
    Raises `BundleError` for a damaged bundle and `BackendError` where the backend does not work.
    """
    if (schedule is None) == (cache_interval is None):
        raise InputError("load() takes either schedule=Schedule.static(steps, cache_interval) or cache_interval=N")
    schedule = schedule or Schedule.from_first(OPEN_STEPS, cache_interval or 1)
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    chosen = backend_from_name(backend)
    where = device if isinstance(device, torch.device) else device_from_name(device, chosen)
    return Denoiser(chosen.engines(opened, where, plans), opened.manifest, schedule, chosen.name)


class Denoiser:
    """Alternates the engines of one bundle over a schedule.

    It allocates every tensor of the graphs once, for the largest batch so far; a smaller one uses the first rows. What
    the full engine writes is the very memory that the reuse engine reads: tensors are bound by name, and a feature has
    one name in both graphs. Of what the full engine puts out for every reuse step of its window each of those reads its
    part where it is, so the reuse engine is bound once for every place in the window. What a conditioning engine puts
    out before the loop is copied to where the engines read it, a step's rows at a time.

    Steps are told apart by their place in the window: 0 is the full step, k the k-th reuse step behind it.
    """

    def __init__(self, engines: Mapping[str, Engine], manifest: Manifest, schedule: Schedule, backend: str) -> None:
        self._engines, self.full, self.reuse = engines, engines[FULL], engines[REUSE]
        conditioning, of_full_steps = (engines.get(name) for name in (CONDITIONING, FULL_CONDITIONING))
        self.table = None if conditioning is None else ConditioningTable(conditioning, of_full_steps)
        self.manifest = manifest
        self.schedule = schedule
        self.backend = backend
        self.device = self.full.device
        self.buffers: dict[str, Tensor] = {}
        engines_tensors = (self.full.inputs, self.full.outputs, self.reuse.inputs, self.reuse.outputs)
        tensors = {name: one for tensors in engines_tensors for name, one in tensors.items()}
        self._inputs = inputs_of(manifest)
        self._folded = [name for name in self.reuse.inputs if of_window(name) in self.full.outputs]
        self._tensors = {name: one for name, one in tensors.items() if name not in self._folded}
        self._memory: dict[str, Tensor] = {}
        self._allocation = object()
        self._scratch: tuple[int, int] | None = None
        self._batch = self._window = self._step = self._begun = self._summed = self._turned = 0
        self._places: list[int] = []
        self._launches: dict[int, Launch] = {}
        self._rows = self._full_rows = self._here = self._here_full = torch.zeros(0, dtype=torch.int64)
        self._table_memory: object = None
        self._timesteps: Tensor | None = None
        self._followed: dict[str, Tensor] | None = None
        self._sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, latents: Tensor, timestep: Tensor | float, **conditioning: Tensor) -> Tensor:
        """Run the next step of the schedule; return the prediction (B, out_channels, H, W).

        `latents` is (B, C, H, W), `timestep` a scalar or (B,), `conditioning` the model's other inputs by name
        (`class_labels`, (B,)). The result is the denoiser's own buffer, valid until the next call.
        Raises `ScheduleError` past the end of the schedule, `InputError` for what the graphs do not take.
        """
        if self.finished:
            raise ScheduleError(
                f"all {self.schedule.steps} steps of the schedule are done; call reset() before the next trajectory"
            )
        full, batch = self.next_step_is_full, len(latents)
        if not full and batch != self._batch:
            raise ScheduleError(
                f"the batch became {batch} within a trajectory, whose features are for another; call reset() first"
            )
        if self._step == 0:  # once a trajectory: on a GPU this waits for it
            for name in conditioning.keys() & self._inputs.keys():
                check_values(self._inputs[name], conditioning[name], self.manifest.conditioning.get(name, InputSpec()))
        given = self._completed(conditioning, batch)
        place = self._follow(full, torch.as_tensor(timestep), given, batch)
        self.prepare(batch)
        prediction = self.predict(place, latents, timestep, **given)
        self._step += 1
        return prediction

    def begin(
        self, timesteps: Tensor, full: Sequence[bool], conditioning: Mapping[str, Tensor], batch: int
    ) -> list[int]:
        """Say which steps are going to be taken, before the first of them; returns the place of each in its window.

        `timesteps` is (S,), or (S, B) where samples differ, `full` a flag for each step, and `conditioning` has the
        `batch` rows of the largest step. More steps are full than were asked for where a window is longer than the
        engines admit. What timestep and class decide is computed now, so `prepare` comes after this.
        """
        self._places, self._turned = self._short_windows(full), 0
        longest = max(*self._places, self.full.shortest_window)
        window = longest if self._folded else 0
        if window != self._window:
            self._window, self._batch, self._summed, self._allocation = window, 0, 0, object()
        if self.table is not None:
            full = [place == 0 for place in self._places]
            self.table.begin(timesteps, full, conditioning, batch, least=longest + 1)
            self.table.fill(0)
            self._prepare_rows(batch, longest, full)
        return self._places

    def turn_to(self, step: int) -> None:
        """Make ready for a step of those that `begin` was told, counted from 0, and for its window.

        Steps are taken in order; within a window nothing is left to be done.
        """
        place, table = self._places[step], self.table
        self._turned = step
        if table is None or (place > 0 and step > 0):
            return
        behind = step + len(self._here) - place
        if min(behind, len(self._places)) > table.end or step < table.first:
            table.fill(step)
        torch.sub(self._rows[step:behind], table.first * table.distinct, out=self._here[place:])
        torch.sub(self._full_rows[step], table.first_full * table.distinct, out=self._here_full)

    def prepare(self, batch: int) -> object:
        """Let the engines use tensors of this batch; another object than the last time if captured steps are invalid.

        They are when memory moved or an engine was bound anew. Memory only grows. Features of a batch stay
        where they are for a smaller one, which takes their first rows.
        """
        if batch < 1:
            raise InputError(f"the batch is {batch}; at least one latent is needed")
        if batch != self._batch:
            if any(len(self._memory.get(name, ())) < size for name, size in self._sizes(batch).items()):
                self._allocate(batch)
            self._batch, shapes = 0, {name: one.sized(batch, self._window) for name, one in self._tensors.items()}
            memory = self._memory.items()
            self.buffers = {name: one[: math.prod(shapes[name])].view(shapes[name]) for name, one in memory}
            self._launches, self._allocation = {0: self.full.bind(self.buffers)}, object()
            if batch > self._summed:
                self._sum_into_buffers(batch)
            self._launch(1)
            self._batch = batch
        if (scratch := (self.full.scratch_address(), self.reuse.scratch_address())) != self._scratch:
            self._scratch, self._allocation = scratch, object()
        return self._allocation

    def predict(self, place: int, latents: Tensor, timestep: Tensor | float, **conditioning: Tensor) -> Tensor:
        """Run the step at a place in a window, whatever the schedule says, on tensors that were prepared."""
        self._fill(latents, timestep, conditioning)
        engine, buffers, batch = self.reuse if place else self.full, self.buffers, self._batch
        if self.table is not None:
            for name, rows in self.table.rows.items():
                if name in engine.inputs:
                    here = self._here_full if name in self.table.of_full_steps else self._here[place]
                    take(rows, here[:batch], buffers[name])
                if (ahead := of_window(name)) in engine.inputs:
                    take(rows, self._here[1:, :batch].flatten(), buffers[ahead].flatten(0, 1))
        if place == 0 and batch != self._summed:
            self._sum_into_buffers(batch)
        self._launch(place)()
        return buffers[NOISE_PREDICTION]

    def twin(self) -> Denoiser:
        """Another one over the same engines, with tensors of its own: windows of one length do not undo what was
        captured of windows of another.
        """
        return Denoiser(self._engines, self.manifest, self.schedule, self.backend)

    def engine_launches(self) -> dict[bool, Launch]:
        """What runs the full engine, under True, and the reuse engine, as they are bound now."""
        return {True: self._launches[0], False: self._launch(1)}

    def _kind(self, place: int) -> int:
        """Which binding a place in the window uses; without sums to read all reuse steps are alike."""
        return min(place, self._window if self._folded else 1)

    def _launch(self, place: int) -> Launch:
        """The engine as it is bound for a place in the window."""
        kind = self._kind(place)
        if kind not in self._launches:
            sums = {name: one[kind - 1, : len(self.buffers[LATENTS])] for name, one in self._sums.items()}
            self._launches[kind] = self.reuse.bind({**self.buffers, **sums})
        return self._launches[kind]

    def _sum_into_buffers(self, batch: int) -> None:
        """Let reuse steps read what the full engine writes at this batch; a smaller one reads the first rows of it."""
        self._sums, self._summed = {name: self.buffers[of_window(name)] for name in self._folded}, batch
        self._launches, self._allocation = {0: self._launches[0]}, object()

    def is_capturable(self) -> bool:
        """Whether the steps from that of `turn_to` to the end of its window can become parts of a CUDA graph."""
        rest = self._places[self._turned :]
        window = [*rest[:1], *takewhile(lambda place: place > 0, rest[1:])]
        launches = {kind: self._launches.get(kind) for kind in map(self._kind, window)}
        return bool(launches) and all(
            launch is not None and (self.reuse if kind else self.full).can_capture(launch)
            for kind, launch in launches.items()
        )

    def first_not_finite(self) -> str | None:
        """What is not finite after a step: the latents that went in, else the first feature, else the prediction."""
        features = [feature.name for feature in self.manifest.features()]
        for name in (LATENTS, *features, *map(of_window, self._folded), NOISE_PREDICTION):
            if name in self.buffers and not self.buffers[name].isfinite().all():
                return name
        return None

    def reset(self, schedule: Schedule | None = None, timesteps: Tensor | None = None) -> None:
        """Go back to the first step, of another schedule if one is given.

        `timesteps` (S,) are those that the steps are going to be called with. A bundle whose sum is folded into the
        full steps must know them; without them it takes a full step each time.
        """
        self.schedule = schedule or self.schedule
        self._timesteps = None if timesteps is None else torch.as_tensor(timesteps).cpu().float()
        if self._timesteps is not None and self._timesteps.shape != (self.schedule.steps,):
            raise ScheduleError(
                f"there are {self._timesteps.numel()} timesteps for a schedule of {self.schedule.steps} steps"
            )
        self._step, self._followed = 0, None

    @property
    def finished(self) -> bool:
        """Whether every step of the schedule is done."""
        return self._step >= self.schedule.steps

    @property
    def next_step_is_full(self) -> bool:
        """Whether the next call computes every layer."""
        return not self.finished and self.schedule.full[self._step]

    def as_transformer(self, scheduler: Any = None) -> DenoiserTransformer:
        """A stand-in for the transformer of a diffusers pipeline.

        `pipe.transformer = denoiser.as_transformer(pipe.scheduler)`: from the scheduler it knows the steps of a call.
        Without one it reads them off the timestep, which some pipelines copy on a GPU.
        """
        from fora_trt.runtime.transformer import DenoiserTransformer

        return DenoiserTransformer(self, scheduler)

    def _follow(self, full: bool, timestep: Tensor, given: Mapping[str, Tensor], batch: int) -> int:
        """Make ready for a step of which only now is known what it is called with; returns its place in the window."""
        if self.table is None and not self._folded:
            return 0 if full else 1
        now, ahead = timestep.flatten()[:1].cpu().float(), self._timesteps
        alike = bool((timestep == timestep.flatten()[0]).all())
        foreseen = ahead is not None and alike and bool(ahead[self._step] == now)
        told = {name: value.cpu().clone() for name, value in given.items()}
        same = self._followed is not None and all(map(torch.equal, told.values(), self._followed.values()))
        if not (foreseen and same):
            if self._folded and not full:
                warn(
                    "a full step is taken in place of a reuse step: the sum of the features was folded for steps that "
                    "were known before, and this is not one of them; say as_transformer(pipe.scheduler) or "
                    "reset(timesteps=...), and keep the conditioning, or export with --optimize conditioning",
                    stacklevel=3,
                )
                full = True
            following = self.schedule.full[self._step + 1 :]
            if foreseen and ahead is not None:
                self.begin(ahead[self._step :], [full, *following], given, batch)
                self._followed, self._begun = told, self._step
            else:
                self.begin(timestep.reshape(1, -1), [full], given, batch)
                self._followed, self._begun = None, self._step
        self.turn_to(self._step - self._begun)
        return self._places[self._step - self._begun]

    def _short_windows(self, full: Sequence[bool]) -> list[int]:
        """The place of each step in its window, none of which is longer than the engines admit."""
        longest = self.full.longest_window if self._folded else None
        places = places_in_windows(full, longest)
        if (full_steps := places.count(0)) > sum(full):
            warn(
                f"windows of more than {longest} reuse steps do not fit the plans: {full_steps} of {len(places)} steps "
                f"are full instead of {sum(full)}",
                stacklevel=4,
            )
        return places

    def _prepare_rows(self, batch: int, longest: int, full: Sequence[bool]) -> None:
        """Which rows of the table each step reads; the steps of a window behind the last one are read and not used.

        The rows of the window at hand are where every step of it finds them, (longest + 1, B), and (B,) for what only
        its full step reads.
        """
        table = self.table
        assert table is not None
        steps = torch.arange(len(full) + longest).clamp_(max=len(full) - 1)
        self._rows, self._full_rows = (
            (number[:, None] * table.distinct + table.samples).to(self.device)
            for number in (steps, (torch.tensor(full).cumsum(0) - 1).clamp_(min=0))
        )
        if self._here.shape != (here := (longest + 1, batch)) or self._table_memory is not table.memory:
            self._here = torch.zeros(here, dtype=torch.int64, device=self.device)
            self._here_full = torch.zeros(batch, dtype=torch.int64, device=self.device)
            self._table_memory, self._allocation = table.memory, object()

    def _sizes(self, batch: int) -> dict[str, int]:
        return {name: math.prod(one.sized(batch, self._window)) for name, one in self._tensors.items()}

    def _allocate(self, batch: int) -> None:
        # before the new ones: both need not fit
        self.buffers, self._memory, self._sums, self._launches, self._batch, self._summed = {}, {}, {}, {}, 0, 0
        check_room(batch, self.device, self._bytes_of)
        memory: dict[str, Tensor] = {}
        with torch.inference_mode(False):  # tensors made in that mode cannot be written outside it
            for name, size in self._sizes(batch).items():
                dtype = getattr(torch, self._tensors[name].dtype)
                memory[name] = torch.zeros(max(1, size), dtype=dtype, device=self.device)  # all have an address
        self._memory, self._allocation = memory, object()

    def _bytes_of(self, batch: int) -> int:
        scratch = max(engine.scratch_bytes(batch, self._window) for engine in (self.full, self.reuse))
        return bytes_of(self._tensors.values(), batch, self._window) + scratch

    def _fill(self, latents: Tensor, timestep: Tensor | float, conditioning: Mapping[str, Tensor]) -> None:
        """Copy the arguments to their buffers, cast to the graphs' dtypes."""
        buffers = self.buffers
        expected = buffers[LATENTS].shape
        if latents.shape != expected:
            raise InputError(f"latents have shape {tuple(latents.shape)}; this bundle takes {tuple(expected)}")
        buffers[LATENTS].copy_(latents)
        if TIMESTEP in buffers:
            buffers[TIMESTEP].copy_(torch.as_tensor(timestep))
        for name, value in conditioning.items():
            if name in buffers:
                buffers[name].copy_(value)

    def _completed(self, conditioning: Mapping[str, Tensor], batch: int) -> dict[str, Tensor]:
        """The model's other inputs, (B, ...) or (1, ...), with what may be left out."""
        takes = f"takes {', '.join(one.name for one in self.manifest.inputs)}"
        if unknown := conditioning.keys() - self._inputs.keys():
            raise InputError(f"this bundle takes no {min(unknown)!r}; it {takes}")
        completed = {}
        for name, tensor in self._inputs.items():
            told, shape = self.manifest.conditioning.get(name, InputSpec()), tensor.sized(batch)
            value = default_of(tensor, told) if name not in conditioning and told.default else conditioning.get(name)
            if value is None:
                raise InputError(f"{name!r} is missing; this bundle {takes}")
            if value.shape not in (shape, (1, *shape[1:])):
                raise InputError(f"{name!r} has shape {tuple(value.shape)}; this bundle takes {shape}")
            completed[name] = value
        return completed
