"""Precomputed conditioning of samples that join and leave: each has rows of its own, for its next steps.

`PrecomputedConditioning` computes the rows of a batch that begins and ends together. Here a sample brings its rows
along: the engines run once for those that are new, or whose rows end.
Shapes: B samples, S steps of a trajectory, R rows of window tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fora_trt.contract import CONDITIONING, FULL_CONDITIONING, TIMESTEP, of_window
from fora_trt.engines.base import Engine
from fora_trt.runtime.layout import Layout
from fora_trt.runtime.precomputed import MOST_BYTES, launched, row_bytes

Rows = dict[str, dict[int, Tensor]]
"""Rows of one sample by name and step; those of the full steps' engine for full steps only."""


class JoinedConditioning:
    """Rows of the conditioning engines for up to `most` samples; together they take at most `MOST_BYTES` if possible.

    `generation` never changes: windows of samples that join are not captured.
    """

    generation = 0

    def __init__(self, engines: Mapping[str, Engine], most: int) -> None:
        self._engine, self._full_engine = engines[CONDITIONING], engines.get(FULL_CONDITIONING)
        both = [self._engine, *([] if self._full_engine is None else [self._full_engine])]
        names = dict.fromkeys(name for engine in both for name in engine.inputs)
        self._names = [name for name in names if name != TIMESTEP and name not in self._engine.outputs]
        self._most_steps = max(1, MOST_BYTES // (row_bytes(both) * most))
        self._samples: list[Rows] = []
        self._steps: Sequence[Sequence[int]] = []

    def arrange(self, sources: Sequence[int | None]) -> None:
        """The samples of the next windows: where each was before, None for a new one."""
        before = self._samples
        self._samples = [{} if one is None else before[one] for one in sources]

    def begin(
        self,
        steps: Sequence[Sequence[int]],
        layouts: Sequence[Layout],
        timesteps: Tensor,
        given: Mapping[str, Tensor],
    ) -> None:
        """Compute what the next window reads and is not there yet.

        `steps` are those of the window, of each sample by the number of the step in its trajectory, all equally many.
        `timesteps` is (B, S), `given` the inputs (B, ...); both are on the CPU.
        """
        self._steps = steps
        missing = [k for k, one in enumerate(steps) if not self._has(k, one)]
        if missing:
            self._fill({k: self._ahead(steps[k], layouts[k]) for k in missing}, layouts, timesteps, given)

    def _has(self, sample: int, steps: Sequence[int]) -> bool:
        """Whether a sample has the rows of these steps."""
        rows = self._samples[sample]
        return bool(rows) and rows[next(iter(self._engine.outputs))].keys() >= {*steps}

    def _ahead(self, steps: Sequence[int], layout: Layout) -> range:
        """The steps to compute for a sample that lacks those of its next window: with later ones, if there is room."""
        first, last = min(steps), max(steps)
        return range(first, max(last + 1, min(first + self._most_steps, len(layout.offsets))))

    def _fill(
        self, ranges: Mapping[int, range], layouts: Sequence[Layout], timesteps: Tensor, given: Mapping[str, Tensor]
    ) -> None:
        """Replace the rows of these samples by those of these steps."""
        for k in ranges:
            self._samples[k] = {}
        wanted = [(k, step) for k, one in ranges.items() for step in one]
        samples = torch.tensor([k for k, _ in wanted])
        inputs = {TIMESTEP: timesteps[samples, torch.tensor([step for _, step in wanted])]}
        inputs |= {name: given[name][samples] for name in self._names}
        inputs |= self._compute(self._engine, inputs, wanted)
        if self._full_engine is not None:
            full = [number for number, (k, step) in enumerate(wanted) if layouts[k].offsets[step] == 0]
            read = {name: inputs[name] for name in self._full_engine.inputs}
            read = {name: one[torch.tensor(full, device=one.device)] for name, one in read.items()}
            self._compute(self._full_engine, read, [wanted[number] for number in full])

    def _compute(
        self, engine: Engine, inputs: Mapping[str, Tensor], wanted: Sequence[tuple[int, int]]
    ) -> dict[str, Tensor]:
        """Run an engine for these samples and steps, which get its rows."""
        with torch.inference_mode(False):  # tensors made in that mode cannot be written outside it
            placed = {
                name: inputs[name].to(engine.device, getattr(torch, spec.dtype)).contiguous()
                for name, spec in engine.inputs.items()
            }
            outputs = {
                name: torch.empty(spec.sized(len(wanted)), dtype=getattr(torch, spec.dtype), device=engine.device)
                for name, spec in engine.outputs.items()
            }
        launched(engine, {**placed, **outputs}, len(wanted))
        for name, tensor in outputs.items():
            for (k, step), row in zip(wanted, tensor.unbind(), strict=True):
                self._samples[k].setdefault(name, {})[step] = row
        return outputs

    def select(self, step: int) -> None:
        """Do nothing: `begin` says which steps a window has."""

    def copy(self, engine: Engine, offset: int, tensors: Mapping[str, Tensor], batch: int, ahead_rows: int) -> None:
        """Copy the rows that an engine reads at an offset in the window to its input `tensors`.

        Of window tensors, the first `ahead_rows` entries are filled, one for each step after the first.
        """
        samples, steps = self._samples, self._steps
        for name in samples[0]:
            if name in engine.inputs:
                rows = [one[name][own[offset]] for one, own in zip(samples, steps, strict=True)]
                torch.stack(rows, out=tensors[name])
            if (ahead := of_window(name)) in engine.inputs and ahead_rows:
                rows = [
                    one[name][own[number] if number < len(own) else own[0]]
                    for number in range(1, ahead_rows + 1)
                    for one, own in zip(samples, steps, strict=True)
                ]
                torch.stack(rows, out=tensors[ahead][:ahead_rows].flatten(0, 1))
