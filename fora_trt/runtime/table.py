"""What timestep and class decide, computed before the loop: a row for each step and each distinct sample.

Shapes: S steps, F of them full, B samples of a batch (twice the images under guidance), U distinct ones among them: the
null class of guidance is one, however many images there are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy
import torch
from torch import Tensor

from fora_trt.engines.base import Engine, Launch
from fora_trt.engines.memory import bytes_of, content_of
from fora_trt.models.spec import TIMESTEP, TensorSpec

MOST_BYTES = 256 * 2**20
"""Of a table and of what its engines read; a longer trajectory fills it several times."""

ALONE = 2**14
"""Numbers that torch copies in one thread."""


class ConditioningTable:
    """Outputs of the conditioning engines for a run of steps, a step after the other.

    `rows[name]` is (steps * U, ...); of the engine for what only full steps read it has the full steps alone, and its
    name is in `of_full_steps`. `samples` (B,) tells which of the U each sample is. Rows stay in place from trajectory
    to trajectory as long as there are enough; `memory` is another object when they moved. `launches` are the calls of
    engines since `begin`. A launch knows addresses alone, so the table also keeps the tensors that engines read in
    place: every launch can be run again until the next `begin`.
    """

    def __init__(self, engine: Engine, full_engine: Engine | None = None) -> None:
        self.engine, self.full_engine = engine, full_engine
        names = (*engine.inputs, *(full_engine.inputs if full_engine else ()))
        self._names = [name for name in dict.fromkeys(names) if name != TIMESTEP and name not in engine.outputs]
        self.of_full_steps = frozenset(full_engine.outputs if full_engine else ())
        self.rows: dict[str, Tensor] = {}
        self._inputs: dict[Engine, dict[str, Tensor]] = {}
        self.memory = object()
        self.launches: list[tuple[Engine, Launch]] = []

    def begin(
        self, timesteps: Tensor, full: Sequence[bool], given: Mapping[str, Tensor], batch: int, least: int
    ) -> None:
        """Take up a trajectory: timesteps (S,) or (S, B), which are full, and what conditions its samples, (B, ...).

        A run has `least` steps or more.
        """
        samples = {name: given[name].expand(batch, *given[name].shape[1:]) for name in self._names}
        times = timesteps.cpu().float().reshape(len(timesteps), -1).expand(-1, batch)
        whole = [*samples.values(), times.T]
        keys = [b"".join(content_of(one[k]) for one in whole) for k in range(batch)]
        places = {key: keys.index(key) for key in dict.fromkeys(keys)}
        distinct = torch.tensor([*places.values()])
        self._conditions = {name: one.cpu()[distinct] for name, one in samples.items()}
        self.samples = torch.tensor([[*places].index(key) for key in keys])
        self.distinct, self._timesteps, self._full = len(distinct), times[:, distinct], torch.tensor(full)
        engines = [self.engine, *([self.full_engine] if self.full_engine is not None else [])]
        row = sum(bytes_of((*engine.inputs.values(), *engine.outputs.values()), 1) for engine in engines)
        self.steps = min(len(timesteps), max(least, MOST_BYTES // (row * self.distinct)))
        self.launches = []  # before tensors are freed that they are bound to
        self._make_room(self.engine, self.steps)
        if self.full_engine is not None:
            self._make_room(self.full_engine, min(self.steps, sum(full)))
        self.first = self.end = self.first_full = 0

    def fill(self, first: int) -> None:
        """Compute `steps` steps from `first` on, or as many as there are; `first_full` full ones are before them."""
        self.first, self.end = first, min(first + self.steps, len(self._timesteps))
        self.first_full = int(self._full[:first].sum())
        steps = self.end - self.first
        inputs = {TIMESTEP: self._timesteps[self.first : self.end].flatten()}
        inputs |= {name: one.repeat(steps, *[1] * (one.dim() - 1)) for name, one in self._conditions.items()}
        self._compute(self.engine, inputs)
        if self.full_engine is not None:
            inputs |= {name: one[: steps * self.distinct] for name, one in self.rows.items()}
            wanted = self._full[self.first : self.end].repeat_interleave(self.distinct)
            read = {name: inputs[name] for name in self.full_engine.inputs}
            self._compute(self.full_engine, {name: one[wanted.to(one.device)] for name, one in read.items()})

    def _compute(self, engine: Engine, inputs: Mapping[str, Tensor]) -> None:
        """Call an engine on all rows of its inputs, in as many calls as it needs."""
        count = len(next(iter(inputs.values())))
        kept = self._inputs[engine]
        placed = {name: kept[name][:count].copy_(inputs[name]) for name in engine.inputs}
        most = engine.most_rows or max(count, 1)
        for start in range(0, count, most):
            part = slice(start, min(start + most, count))
            tensors = {name: one[part] for name, one in {**self.rows, **placed}.items()}
            launch = engine.bind(tensors)
            launch()
            self.launches.append((engine, launch))

    def _make_room(self, engine: Engine, steps: int) -> None:
        """Allocate what an engine reads and writes at so many steps, unless it is there from a trajectory before."""
        rows, kept = steps * self.distinct, self._inputs.setdefault(engine, {})
        if _shortest(self.rows, engine.outputs) < rows:
            self.memory = object()
            _allocate(self.rows, engine.outputs.values(), rows, engine.device)
        if _shortest(kept, engine.inputs) < rows:
            _allocate(kept, engine.inputs.values(), rows, engine.device)


def _shortest(tensors: Mapping[str, Tensor], names: Iterable[str]) -> int:
    return min(len(tensors[name]) if name in tensors else 0 for name in names)


def _allocate(tensors: dict[str, Tensor], specs: Iterable[TensorSpec], rows: int, device: torch.device) -> None:
    """Put tensors of so many rows in place of those that are there, which are freed first."""
    specs = list(specs)
    for spec in specs:
        tensors.pop(spec.name, None)
    with torch.inference_mode(False):  # tensors made in that mode cannot be written outside it
        for spec in specs:
            tensors[spec.name] = torch.zeros(spec.sized(rows), dtype=getattr(torch, spec.dtype), device=device)


def take(rows: Tensor, index: Tensor, target: Tensor) -> None:
    """Copy `rows[index]` to `target`, which stays where it is.

    On a CPU in one thread: those of torch go on spinning for a while after they were used, and slow the engine down.
    """
    if rows.device.type == "cpu" and target.numel() > ALONE:
        if rows.dtype == torch.bfloat16:  # numpy has no such numbers; these are copied as they are
            rows, target = rows.view(torch.int16), target.view(torch.int16)
        numpy.take(rows.numpy(), index.numpy(), axis=0, out=target.numpy(), mode="clip")
    else:
        torch.index_select(rows, 0, index, out=target)
