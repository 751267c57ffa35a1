"""Precomputed conditioning: the conditioning path runs before the loop, one row per step and distinct sample.

Samples with the same timesteps and inputs share rows, such as all those of the null class under guidance.
Shapes: S steps, B samples of a batch (twice the images under guidance), U distinct samples among them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import numpy
import torch
from torch import Tensor

from fora_trt.contract import CONDITIONING, FULL_CONDITIONING, TIMESTEP, TensorSpec, of_window
from fora_trt.engines.base import Engine, Launch
from fora_trt.engines.memory import bytes_of, content_of
from fora_trt.runtime.layout import Layout

MOST_BYTES = 256 * 2**20
"""Limit for the rows and the inputs of their engines; a longer trajectory computes them in several parts."""

ALONE = 2**14
"""Largest number of elements that torch copies in one thread."""


class PrecomputedConditioning:
    """Outputs of the conditioning engines for consecutive steps, and the rows that the current window reads.

    `rows[name]` is (steps * U, ...); outputs of `full_engine` have rows for full steps only. Rows stay at their address
    from trajectory to trajectory as long as they suffice; `generation` changes when they move or another selection is
    in use. `launches` are the engine calls since `begin`. A launch is bound to addresses, so the inputs of the engines
    stay at theirs too: every launch can run again until the next `begin`.
    """

    def __init__(self, engine: Engine, full_engine: Engine | None = None) -> None:
        self.engine, self.full_engine = engine, full_engine
        names = (*engine.inputs, *(full_engine.inputs if full_engine else ()))
        self._names = [name for name in dict.fromkeys(names) if name != TIMESTEP and name not in engine.outputs]
        self._of_full_steps = frozenset(full_engine.outputs if full_engine else ())
        self.rows: dict[str, Tensor] = {}
        self.generation = (0, 0, 0, 0)
        self.launches: list[tuple[Engine, Launch]] = []
        self._inputs: dict[Engine, dict[str, Tensor]] = {}
        self._selections: dict[tuple[int, int, int], _Selection] = {}

    def begin(
        self, timesteps: Tensor, layout: Layout, given: Mapping[str, Tensor], batch: int, window_rows: int
    ) -> None:
        """Compute the rows of a trajectory, or of its first steps if not all fit.

        `timesteps` is (S,) or (S, B), `layout` that of the same steps, `given` the inputs (B, ...) or (1, ...).
        `window_rows` is the number of rows in window tensors.
        """
        full = [offset == 0 for offset in layout.offsets]
        samples = {name: given[name].expand(batch, *given[name].shape[1:]) for name in self._names}
        times = timesteps.cpu().float().reshape(len(timesteps), -1).expand(-1, batch)
        whole = [*samples.values(), times.T]
        keys = [b"".join(content_of(one[k]) for one in whole) for k in range(batch)]
        first_samples = {key: keys.index(key) for key in dict.fromkeys(keys)}
        distinct = torch.tensor([*first_samples.values()])
        self._conditions = {name: one.cpu()[distinct] for name, one in samples.items()}
        self._distinct, self._timesteps, self._full = len(distinct), times[:, distinct], torch.tensor(full)
        engines = [self.engine, *([self.full_engine] if self.full_engine is not None else [])]
        most = MOST_BYTES // (row_bytes(engines) * self._distinct)
        self._steps = min(len(timesteps), max(layout.reach + 1, most))
        self.launches = []  # dropped before the tensors that they are bound to are freed
        self._make_room(self.engine, self._steps)
        if self.full_engine is not None:
            self._make_room(self.full_engine, min(self._steps, sum(full)))
        self._fill(0)
        shape = (layout.longest_window, window_rows, batch)
        if shape not in self._selections:
            self._selections[shape] = _Selection(*shape, self.engine.device)
        self._selection = self._selections[shape]
        self._selection.begin(layout, torch.tensor([[*first_samples].index(key) for key in keys]), self._distinct)
        self.generation = (self.generation[0], *shape)

    def select(self, step: int) -> None:
        """Select the conditioning rows of step number `step` (from 0) and of the rest of its window.

        A call for a later step of the same window does nothing.
        """
        if self._selection.is_in_window(step):
            return
        if self._selection.end_of_rows(step) > self._end or step < self._first:
            self._fill(step)
        self._selection.select(step, self._first * self._distinct, self._first_full * self._distinct)

    def copy(self, engine: Engine, offset: int, tensors: Mapping[str, Tensor], batch: int, ahead_rows: int) -> None:
        """Copy the rows that an engine reads at an offset in the window to its input `tensors` of this batch.

        Of window tensors, the first `ahead_rows` entries are filled.
        """
        selected = self._selection
        for name, rows in self.rows.items():
            if name in engine.inputs:
                here = selected.full if name in self._of_full_steps else selected.window[offset]
                take(rows, here[:batch], tensors[name])
            if (ahead := of_window(name)) in engine.inputs:
                index = selected.ahead[:ahead_rows, :batch].flatten()
                take(rows, index, tensors[ahead][:ahead_rows].flatten(0, 1))

    def _fill(self, first: int) -> None:
        """Compute the rows of as many steps as fit, starting at step `first`."""
        self._first, self._end = first, min(first + self._steps, len(self._timesteps))
        self._first_full = int(self._full[:first].sum())
        steps = self._end - first
        inputs = {TIMESTEP: self._timesteps[first : self._end].flatten()}
        inputs |= {name: one.repeat(steps, *[1] * (one.dim() - 1)) for name, one in self._conditions.items()}
        self._compute(self.engine, inputs)
        if self.full_engine is not None:
            inputs |= {name: one[: steps * self._distinct] for name, one in self.rows.items()}
            wanted = self._full[first : self._end].repeat_interleave(self._distinct)
            read = {name: inputs[name] for name in self.full_engine.inputs}
            self._compute(self.full_engine, {name: one[wanted.to(one.device)] for name, one in read.items()})

    def _compute(self, engine: Engine, inputs: Mapping[str, Tensor]) -> None:
        """Run an engine on all rows of its inputs, in several launches if it supports fewer rows."""
        count = len(next(iter(inputs.values())))
        kept = self._inputs[engine]
        placed = {name: kept[name][:count].copy_(inputs[name]) for name in engine.inputs}
        self.launches += [(engine, launch) for launch in launched(engine, {**self.rows, **placed}, count)]

    def _make_room(self, engine: Engine, steps: int) -> None:
        """Allocate inputs and outputs of an engine for `steps` steps, unless those of an earlier trajectory suffice."""
        rows, kept = steps * self._distinct, self._inputs.setdefault(engine, {})
        if _shortest(self.rows, engine.outputs) < rows:
            self.generation = (self.generation[0] + 1, 0, 0, 0)
            _allocate(self.rows, engine.outputs.values(), rows, engine.device)
        if _shortest(kept, engine.inputs) < rows:
            _allocate(kept, engine.inputs.values(), rows, engine.device)


def precomputed_of(engines: Mapping[str, Engine]) -> PrecomputedConditioning | None:
    """The precomputed conditioning of a bundle's engines by graph; None if the path was not hoisted."""
    engine = engines.get(CONDITIONING)
    return None if engine is None else PrecomputedConditioning(engine, engines.get(FULL_CONDITIONING))


class ConditioningRows(Protocol):
    """What a run asks of precomputed conditioning; see `PrecomputedConditioning`."""

    @property
    def generation(self) -> object:
        """Changes when captured steps become invalid."""

    def select(self, step: int) -> None:
        """Select what step number `step` of the run and the rest of its window read."""

    def copy(self, engine: Engine, offset: int, tensors: Mapping[str, Tensor], batch: int, ahead_rows: int) -> None:
        """Copy what an engine reads at an offset in the window to its input `tensors`."""


def launched(engine: Engine, tensors: Mapping[str, Tensor], count: int) -> list[Launch]:
    """Run a conditioning engine on `count` rows, in several launches if it supports fewer; return the launches."""
    launches, most = [], engine.most_rows or max(count, 1)
    for start in range(0, count, most):
        launches.append(engine.bind({name: one[start : min(start + most, count)] for name, one in tensors.items()}))
        launches[-1]()
    return launches


def row_bytes(engines: Iterable[Engine]) -> int:
    """Bytes of the inputs and outputs of one row of conditioning engines."""
    return sum(bytes_of((*engine.inputs.values(), *engine.outputs.values()), 1) for engine in engines)


class _Selection:
    """Row indices that the steps of the current window read, at fixed addresses for captured steps.

    `window` is (longest + 1, B): the row of each sample at each offset. `ahead` is (R, B): the rows of the R reuse
    steps that read the window's full step. `full` is (B,): rows in the tensors that only full steps read.
    """

    def __init__(self, longest: int, rows: int, batch: int, device: torch.device) -> None:
        with torch.inference_mode(False):  # tensors made in that mode cannot be written outside it
            self.window = torch.zeros(longest + 1, batch, dtype=torch.int64, device=device)
            self.ahead = torch.zeros(rows, batch, dtype=torch.int64, device=device)
            self.full = torch.zeros(batch, dtype=torch.int64, device=device)

    def begin(self, layout: Layout, samples: Tensor, distinct: int) -> None:
        """Start a trajectory: `samples` (B,) are indices of the `distinct` samples.

        In a window shorter than the longest, the unused offsets select rows of later steps or of the last step; unused
        entries of `ahead` select the row of the full step. No step uses their values.
        """
        self._layout, count = layout, len(layout.offsets)
        steps = torch.arange(count + len(self.window) - 1).clamp_(max=count - 1)
        full = [number for number, offset in enumerate(layout.offsets) if offset == 0]
        ahead = torch.tensor(full, dtype=torch.int64)[:, None].repeat(1, len(self.ahead))
        for numbers, step in zip(ahead, full, strict=True):
            readers = layout.readers[step][: len(numbers)]
            numbers[: len(readers)] = torch.tensor(readers)
        ordinals = (torch.tensor([offset == 0 for offset in layout.offsets]).cumsum(0) - 1).clamp_(min=0)
        self._ordinals = ordinals.tolist()
        self._rows, self._ahead, self._full_rows = (
            (number[..., None] * distinct + samples).to(self.window.device) for number in (steps, ahead, ordinals)
        )

    def is_in_window(self, step: int) -> bool:
        """Whether the step belongs to a window whose first step was selected."""
        return step > 0 and self._layout.offsets[step] > 0

    def end_of_rows(self, step: int) -> int:
        """One more than the last step whose rows are selected together with this step."""
        offsets, readers = self._layout.offsets, self._layout.readers[step]
        return max([min(step + len(self.window) - offsets[step], len(offsets)), *(one + 1 for one in readers[-1:])])

    def select(self, step: int, first_row: int, first_full_row: int) -> None:
        """Select the rows of the window from a step on; memory begins with rows `first_row` and `first_full_row`."""
        offset = self._layout.offsets[step]
        rows = self._rows[step : step + len(self.window) - offset]
        torch.sub(rows, first_row, out=self.window[offset:])
        torch.sub(self._full_rows[step], first_full_row, out=self.full)
        if offset == 0 and len(self.ahead):
            torch.sub(self._ahead[self._ordinals[step]], first_row, out=self.ahead)


def _shortest(tensors: Mapping[str, Tensor], names: Iterable[str]) -> int:
    return min(len(tensors[name]) if name in tensors else 0 for name in names)


def _allocate(tensors: dict[str, Tensor], specs: Iterable[TensorSpec], rows: int, device: torch.device) -> None:
    """Allocate tensors with this number of rows; the tensors that they replace are freed first."""
    specs = list(specs)
    for spec in specs:
        tensors.pop(spec.name, None)
    with torch.inference_mode(False):  # inference tensors cannot be written outside inference mode
        for spec in specs:
            tensors[spec.name] = torch.zeros(spec.sized(rows), dtype=getattr(torch, spec.dtype), device=device)


def take(rows: Tensor, index: Tensor, target: Tensor) -> None:
    """Copy `rows[index]` into `target`.

    On a CPU this uses one thread: torch's threads keep spinning after their work and slow down the engine.
    """
    if rows.device.type == "cpu" and target.numel() > ALONE:
        if rows.dtype == torch.bfloat16:  # numpy has no bfloat16; the bits are copied as int16
            rows, target = rows.view(torch.int16), target.view(torch.int16)
        numpy.take(rows.numpy(), index.numpy(), axis=0, out=target.numpy(), mode="clip")
    else:
        torch.index_select(rows, 0, index, out=target)
