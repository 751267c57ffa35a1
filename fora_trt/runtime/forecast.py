"""Windows of a forecast: a reuse step reads a weighted sum of what the last full steps have kept for it.

A forecast is linear in the features of past full steps, and a folded sum is linear in the features too. So
`sum_j w_j * S_j`, where S_j is the sum that full step j folded with the gates of the reuse step, is the folded sum of
the forecast features: no graph changes, and no feature is kept. Without folded sums, the features are added.
Shapes: D full steps, R rows of window tensors, B is the batch, N the elements of one row of one tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fora_trt.contract import FULL, REUSE, TensorSpec, of_window
from fora_trt.engines.base import Engine
from fora_trt.runtime.buffers import Buffers, Memory
from fora_trt.runtime.layout import Layout, Read
from fora_trt.runtime.sums import add_rows
from fora_trt.runtime.window import Binding, KeepingWindow


class ForecastWindow(KeepingWindow):
    """Engines bound for windows whose reuse steps read the last `depth` full steps, with any weights.

    The full engine has `depth` bindings: windows take turns, so that its outputs of the last `depth` windows stay in
    memory, in one tensor (D, R, B, ...) or (D, B, ...) per output. Before a reuse step, the weighted sum of its rows is
    written to the input of the reuse engine, which has one binding. `longest` is the largest number of reuse steps in a
    window.
    """

    def __init__(self, engines: Mapping[str, Engine], memory: Memory, rows: int, depth: int, longest: int) -> None:
        full, reuse = engines[FULL], engines[REUSE]
        self.turns = depth
        sources = {name: _source_of(name, full) for name in reuse.inputs}
        self._sources = {name: source for name, source in sources.items() if source in full.outputs}
        outputs = [full.outputs[source] for source in self._sources.values()]
        kept = [replace(one, shape=(depth, *one.shape)) for one in outputs]
        self.kept = Buffers(kept, rows, memory, lambda batch: 0, prefix="kept.")
        self._terms = _Terms(longest, depth, rows, full.device)
        super().__init__(engines, memory, rows)

    def begin(self, layout: Layout) -> None:
        super().begin(layout)
        self._terms.begin(layout)

    def select(self, step: int) -> None:
        super().select(step)
        self._terms.select(step)

    def run(self, offset: int, turn: int = 0, rows: int | None = None) -> None:
        if offset:
            self._combine(offset)
        self._launch(offset, turn, self.rows if rows is None else rows)()

    def _combine(self, offset: int) -> None:
        """Write the weighted sums that the reuse step at this offset reads."""
        for name, source in self._sources.items():
            kept = self.kept.tensors[source]
            in_window = source in self._of_window
            rows = (kept.flatten(0, 1) if in_window else kept).flatten(1)  # (D * R, N) or (D, N)
            index = (self._terms.rows if in_window else self._terms.turns)[offset]
            add_rows(rows, index[None], self._terms.weights[offset][None], self.buffers.tensors[name].view(1, -1))

    def _buffered(self) -> list[TensorSpec]:
        edges = (edge for engine in self.engines.values() for edge in (engine.inputs, engine.outputs))
        specs = {name: one for tensors in edges for name, one in tensors.items()}
        return [one for name, one in specs.items() if name in self._sources or name not in self._sources.values()]

    def _binding(self, offset: int, turn: int, rows: int) -> Binding:
        return Binding(self.graph, turn, rows) if offset == 0 else Binding(REUSE, 1)

    def _bound(self, binding: Binding) -> dict[str, Tensor]:
        tensors = self.buffers.tensors
        if binding.graph == REUSE:
            return tensors
        tensors = {**tensors, **{name: one[binding.number] for name, one in self.kept.tensors.items()}}
        return {name: one[: binding.rows] if name in self._of_window else one for name, one in tensors.items()}


class _Terms:
    """The terms that the steps of the current window add up, at fixed addresses for captured steps.

    Each tensor is (longest + 1, D), by offset, the latest full step last: `rows` in window tensors of all turns,
    `turns` for other tensors, and the `weights`. A step that reads fewer full steps has the weight 0 for the row of the
    latest one.
    """

    def __init__(self, longest: int, depth: int, rows: int, device: torch.device) -> None:
        self._depth, self._row_count = depth, rows
        with torch.inference_mode(False):  # tensors made in that mode cannot be written outside it
            shape = longest + 1, depth
            self.rows, self.turns = (torch.zeros(shape, dtype=torch.int64, device=device) for _ in range(2))
            self.weights = torch.zeros(shape, device=device)

    def begin(self, layout: Layout) -> None:
        """Start a trajectory with this layout."""
        self._offsets = layout.offsets
        nothing = Read(0, 0, 0.0)
        filled = []
        for reads in layout.reads:
            rest = replace(reads[0], weight=0.0) if reads else nothing
            filled.append([*[rest] * (self._depth - len(reads)), *reversed(reads)])
        turns = torch.tensor([[read.window % self._depth for read in reads] for reads in filled])
        rows = turns * self._row_count + torch.tensor([[read.row for read in reads] for reads in filled])
        weights = torch.tensor([[read.weight for read in reads] for reads in filled])
        self._all = [tensor.to(self.weights.device) for tensor in (rows, turns, weights)]

    def select(self, step: int) -> None:
        """Select the terms of a step and of the rest of its window; does nothing within a window."""
        offset = self._offsets[step]
        if step > 0 and offset > 0:
            return
        for here, everywhere in zip((self.rows, self.turns, self.weights), self._all, strict=True):
            following = everywhere[step : step + len(here) - offset]
            here[offset : offset + len(following)].copy_(following)


def _source_of(name: str, full: Engine) -> str:
    """The output of the full engine that a tensor of the reuse engine is read from."""
    return of_window(name) if of_window(name) in full.outputs else name
