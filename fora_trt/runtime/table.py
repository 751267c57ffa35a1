"""What timestep and class decide, computed before the loop: a row for each step and each distinct sample.

Shapes: S steps, B samples of a batch (twice the images under guidance), U distinct ones among them: the null class of
guidance is one, however many images there are.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy
import torch
from torch import Tensor

from fora_trt.engines.base import Engine
from fora_trt.engines.memory import bytes_of
from fora_trt.models.spec import TIMESTEP

MOST_BYTES = 256 * 2**20
"""Of a table; a longer trajectory fills it several times."""


class ConditioningTable:
    """Outputs of the conditioning engine for a run of steps; `rows[name]` is (steps * U, ...), a step after the other.

    `samples` (B,) tells which of the U each sample is. Tables stay in place from trajectory to trajectory as long as
    they are large enough; `memory` is another object when they moved. `calls` counts those of the engine, and `launch`
    does the last one again.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine, self._names = engine, [name for name in engine.inputs if name != TIMESTEP]
        self.rows: dict[str, Tensor] = {}
        self.memory = object()
        self.calls = 0

    def begin(self, timesteps: Tensor, given: Mapping[str, Tensor], batch: int, least: int) -> None:
        """Take up a trajectory: timesteps (S,) or (S, B), and what conditions its samples, (B, ...).

        A run has `least` steps or more.
        """
        samples = {name: given[name].expand(batch, *given[name].shape[1:]) for name in self._names}
        times = timesteps.cpu().float().reshape(len(timesteps), -1).expand(-1, batch)
        whole = [*samples.values(), times.T]
        keys = [b"".join(one[k].cpu().contiguous().numpy().tobytes() for one in whole) for k in range(batch)]
        places = {key: keys.index(key) for key in dict.fromkeys(keys)}
        distinct = torch.tensor([*places.values()])
        self._conditions = {name: one.cpu()[distinct] for name, one in samples.items()}
        self.samples = torch.tensor([[*places].index(key) for key in keys])
        self.distinct, self._timesteps = len(distinct), times[:, distinct]
        row = bytes_of(self.engine.outputs.values(), 1)
        self.steps = min(len(timesteps), max(least, MOST_BYTES // (row * self.distinct)))
        if self._rows_held() < self.steps * self.distinct:
            self._allocate(self.steps * self.distinct)
        self.first = self.end = self.calls = 0

    def fill(self, first: int) -> None:
        """Compute `steps` steps from `first` on, or as many as there are."""
        self.first, self.end = first, min(first + self.steps, len(self._timesteps))
        steps, count = self.end - self.first, (self.end - self.first) * self.distinct
        inputs = {TIMESTEP: self._timesteps[self.first : self.end].flatten()}
        inputs |= {name: one.repeat(steps, *[1] * (one.dim() - 1)) for name, one in self._conditions.items()}
        specs, device = self.engine.inputs, self.engine.device
        placed = {name: inputs[name].to(device, getattr(torch, spec.dtype)) for name, spec in specs.items()}
        most = self.engine.most_rows or count
        for start in range(0, count, most):
            part = slice(start, min(start + most, count))
            tensors = {name: one[part] for tensors in (placed, self.rows) for name, one in tensors.items()}
            self.launch = self.engine.bind(tensors)
            self.launch()
            self.calls += 1

    def _rows_held(self) -> int:
        return min((len(one) for one in self.rows.values()), default=0)

    def _allocate(self, rows: int) -> None:
        self.rows, self.memory = {}, object()
        with torch.inference_mode(False):  # tensors made in that mode cannot be written outside it
            for spec in self.engine.outputs.values():
                dtype = getattr(torch, spec.dtype)
                self.rows[spec.name] = torch.zeros(spec.sized(rows), dtype=dtype, device=self.engine.device)


def take(rows: Tensor, index: Tensor, target: Tensor) -> None:
    """Copy `rows[index]` to `target`, which stays where it is.

    On a CPU in one thread: those of torch go on spinning for a while after they were used, and slow the engine down.
    """
    if rows.device.type == "cpu":
        numpy.take(rows.numpy(), index.numpy(), axis=0, out=target.numpy(), mode="clip")
    else:
        torch.index_select(rows, 0, index, out=target)
