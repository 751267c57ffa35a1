"""Windows of a forecast whose full steps add their part to the sums that reuse steps will read.

As in `forecast.py`, a reuse step reads a weighted sum over several full steps. Here each full step multiplies what it
folds by its weight and adds it to the sum, so a reuse step reads one sum, as with FORA. It takes an engine that
accumulates and one sum for each reuse step of the plan.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fora_trt.contract import FULL, REUSE, TensorSpec, of_window
from fora_trt.engines.base import BASE, WEIGHTS, Engine
from fora_trt.runtime.buffers import Buffers, Memory
from fora_trt.runtime.layout import Fold, Layout
from fora_trt.runtime.window import Binding, KeepingWindow, folded_of


class AccumulatingWindow(KeepingWindow):
    """Engines bound for forecasts; the sums of all reuse steps of a plan are in one tensor (`total`, B, ...).

    The full engine has a binding for each different `Fold`, the reuse engine one for each reuse step. A full step must
    run once and in order: what it adds stays.
    """

    def __init__(self, engines: Mapping[str, Engine], memory: Memory, rows: int, total: int) -> None:
        full, reuse = engines[FULL], engines[REUSE]
        outputs = [full.outputs[of_window(name)] for name in folded_of(full, reuse)]
        self.kept = Buffers(outputs, total, memory, lambda batch: 0, prefix="sums.")
        self._folds: list[Fold] = []
        self._fold = self._number = 0
        super().__init__(engines, memory, rows)

    def begin(self, layout: Layout) -> None:
        """Start a trajectory; bindings of another plan's folds are dropped."""
        super().begin(layout)
        folds = [*dict.fromkeys(fold for fold in layout.folds if fold is not None)]
        if not {*folds} <= {*self._folds}:
            self._folds = folds
            self._launches = {binding: one for binding, one in self._launches.items() if binding.graph == REUSE}

    def select(self, step: int) -> None:
        super().select(step)
        offset, fold = self._layout.offsets[step], self._layout.folds[step]
        self._number = self._layout.numbers[step] - max(offset - 1, 0)
        if fold is not None:
            self._fold = self._folds.index(fold)

    def run(self, offset: int, turn: int = 0, rows: int | None = None) -> None:
        self._launch(offset)()

    def _bind(self) -> None:
        """Bindings depend on the plan: they are made when a step first runs."""

    def _buffered(self) -> list[TensorSpec]:
        return [one for one in super()._buffered() if of_window(one.name) not in self.full.outputs]

    def _binding(self, offset: int, turn: int, rows: int) -> Binding:
        return Binding(self.graph, self._fold) if offset == 0 else Binding(REUSE, self._number + offset - 1)

    def _bound(self, binding: Binding) -> dict[str, Tensor]:
        tensors, sums = self.buffers.tensors, self.kept.tensors
        if binding.graph == REUSE:
            return {**tensors, **{name: sums[of_window(name)][binding.number] for name in self._folded}}
        fold = self._folds[binding.number]
        rows = len(fold.weights)
        bound = {name: one[:rows] if name in self._of_window else one for name, one in tensors.items()}
        for name, one in sums.items():
            bound[name] = one[fold.first : fold.first + rows]
            bound[f"{BASE}{name}"] = one[fold.first : fold.first + fold.begun]
            bound[f"{WEIGHTS}{name}"] = torch.tensor(fold.weights)
        return bound
