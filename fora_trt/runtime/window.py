"""A window: a full or partial step and the reuse steps after it, as launches of engines on shared buffers.

A step is identified by its offset in the window: 0 is the full or partial step, k the k-th reuse step after it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count
from typing import NamedTuple

from torch import Tensor

from fora_trt.contract import FULL, LATENTS, REUSE, TensorSpec, of_window
from fora_trt.engines.base import Engine, Launch
from fora_trt.errors import InputError
from fora_trt.runtime.buffers import Buffers, Memory
from fora_trt.runtime.layout import Layout

_GENERATIONS = count(1)
"""One counter for all windows, so that no two windows ever have the same generation."""


class Binding(NamedTuple):
    """A set of tensors that the engine of a graph is bound to, by its number; `rows` are those of window tensors."""

    graph: str
    number: int
    rows: int = 0


class Window:
    """Engines bound for windows of up to `rows` reuse steps that read the step before, at one batch size at a time.

    The reuse engine reads the memory that the full engine writes: a tensor has the same name in both graphs. The full
    engine writes the folded sums of all reuse steps of the window into one tensor, and each reuse step reads its own
    slice of it. So the reuse engine has one binding per offset. The engine of a partial step reads features where the
    full engine, or that of another partial step, has written them, and takes the place of the full engine in a window.
    """

    turns = 1
    """Number of bindings of the full engine; consecutive windows use them in turn."""

    def __init__(self, engines: Mapping[str, Engine], memory: Memory, rows: int) -> None:
        """`engines` has those of the steps, by graph. `memory` is that of other windows too; one is used at a time."""
        self.engines, self.rows = engines, rows
        self.full, self.reuse, self.graph = engines[FULL], engines[REUSE], FULL
        self.batch = 0
        self._graphs = {FULL}
        self.generation = next(_GENERATIONS)
        self._folded = folded_of(self.full, self.reuse)
        self._of_window = {name for name, one in {**self.full.inputs, **self.full.outputs}.items() if one.is_of_window}
        self.buffers = Buffers(self._buffered(), rows, memory, self._scratch_bytes, beside=self._kept())
        self._launches: dict[Binding, Launch] = {}
        self._sums: dict[str, Tensor] = {}
        self._summed_batch = 0
        self._scratch: tuple[int, ...] | None = None

    def begin(self, layout: Layout) -> None:
        """Start a trajectory with this layout; engines of graphs that no trajectory before it has had are bound now.

        Scratch memory may move then, so it must be before a step is captured.
        """
        self._layout, self._graphs = layout, {*layout.graphs}
        if self.batch:
            self._bind()
            self._notice_scratch()

    def select(self, step: int) -> None:
        """Select the graph that begins the window of step number `step`, and what the rest of the window reads."""
        self.graph = self._layout.graphs[step]

    def engine_at(self, offset: int) -> Engine:
        """The engine of the step at an offset in the selected window."""
        return self.reuse if offset else self.engines[self.graph]

    def prepare(self, batch: int) -> None:
        """Bind the engines to tensors of this batch size; `generation` changes if captured steps become invalid.

        Memory only grows. If the batch shrinks within a window, features stay at their address and the smaller batch
        reads their first rows.
        """
        if batch < 1:
            raise InputError(f"the batch is {batch}; at least one latent is needed")
        if batch != self.batch:
            before, self.batch = self.batch, 0
            self._resize(batch, before)
            self._renew()
            self._bind()
            self.batch = batch
        self._notice_scratch()

    def _notice_scratch(self) -> None:
        """Change `generation` if the scratch memory of an engine has moved."""
        scratch = tuple(engine.scratch_address() for engine in self.engines.values())
        if scratch != self._scratch:
            self._scratch = scratch
            self._renew()

    def run(self, offset: int, turn: int = 0, rows: int | None = None) -> None:
        """Launch the engine of the step at this offset on the current buffers.

        `turn` is that of the window, `rows` the number of rows that its full step computes (None: all).
        """
        if offset == 0 and self.batch != self._summed_batch:
            self._sum_at(self.batch)
        self._launch(offset, turn, self.rows if rows is None else rows)()

    def free(self) -> None:
        """Drop all tensors, also those of holders of this window; it must be prepared again before it is used."""
        self._launches, self._sums, self._summed_batch, self.batch = {}, {}, 0, 0
        self.buffers.drop()
        self._renew()

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """All tensors that the engines are bound to, by name."""
        return self.buffers.tensors

    def launches(self) -> dict[str, Launch]:
        """The current launches by graph; without room for a sum not that of the reuse graph."""
        launches = {}
        for graph in self.engines:
            if graph != REUSE:
                self.graph = graph
                launches[graph] = self._launch(0, 0, self.rows)
        self.graph = FULL
        return {**launches, REUSE: self._launch(1)} if self._has_reuse else launches

    def can_capture(self, offsets: Sequence[int], turn: int = 0) -> bool:
        """Whether the steps at these offsets have run once and can be captured in a CUDA graph."""
        bindings = {self._binding(offset, turn, self.rows) for offset in offsets}
        launches = {binding: self._launches.get(binding) for binding in bindings}
        return bool(launches) and all(
            launch is not None and self.engines[binding.graph].can_capture(launch)
            for binding, launch in launches.items()
        )

    @property
    def _has_reuse(self) -> bool:
        """Whether a reuse step can run: not without room for a sum."""
        return self.rows > 0 or not self._folded

    def _buffered(self) -> list[TensorSpec]:
        """The tensors that the engines share, without the sums of single steps: those are slices."""
        edges = (edge for engine in self.engines.values() for edge in (engine.inputs, engine.outputs))
        specs = {name: one for tensors in edges for name, one in tensors.items() if name not in self._folded}
        return [*specs.values()]

    def _bind(self) -> None:
        """Bind in advance what a trajectory runs, as far as it is not bound."""
        for graph in sorted(self._graphs):
            self.graph = graph
            for turn in range(self.turns):
                self._launch(0, turn, self.rows)
        if self._has_reuse:
            self._launch(1)

    def _kept(self) -> Buffers | None:
        """Further buffers, which are allocated together with the shared tensors."""
        return None

    def _resize(self, batch: int, before: int) -> None:
        """Give the tensors the shapes of a batch and drop the bindings; `before` is the previous batch, 0 for none."""
        if not self.buffers.have_room(batch):  # drop the bindings to memory that `resize` frees
            self._launches, self._sums, self._summed_batch = {}, {}, 0
        self.buffers.resize(batch)
        self._launches = {}
        if batch > self._summed_batch:
            self._sum_at(batch)

    def _binding(self, offset: int, turn: int, rows: int) -> Binding:
        """The binding that an offset uses; without folded sums all reuse steps share one."""
        return Binding(self.graph, turn, rows) if offset == 0 else Binding(REUSE, min(offset, self.rows) or 1)

    def _launch(self, offset: int, turn: int = 0, rows: int = 0) -> Launch:
        binding = self._binding(offset, turn, rows)
        if binding not in self._launches:
            self._launches[binding] = self.engines[binding.graph].bind(self._bound(binding))
        return self._launches[binding]

    def _bound(self, binding: Binding) -> dict[str, Tensor]:
        """The tensors of a binding, by name."""
        tensors = self.buffers.tensors
        if binding.graph != REUSE:
            return {name: one[: binding.rows] if name in self._of_window else one for name, one in tensors.items()}
        here = slice(len(tensors[LATENTS]))
        return {**tensors, **{name: one[binding.number - 1, here] for name, one in self._sums.items()}}

    def _sum_at(self, batch: int) -> None:
        """Point reuse steps to the sums that the full engine writes at this batch; smaller batches read first rows."""
        self._sums = {name: self.buffers.tensors[of_window(name)] for name in self._folded}
        self._summed_batch = batch
        self._launches = {binding: launch for binding, launch in self._launches.items() if binding.graph != REUSE}
        self._renew()

    def _renew(self) -> None:
        self.generation = next(_GENERATIONS)

    def _scratch_bytes(self, batch: int) -> int:
        return max(engine.scratch_bytes(batch, self.rows) for engine in self.engines.values())


class KeepingWindow(Window):
    """A window that keeps outputs of the full engine, which later windows read, in buffers of their own."""

    kept: Buffers

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        return {**self.buffers.tensors, **self.kept.tensors}

    def free(self) -> None:
        self.kept.drop()
        super().free()

    def _kept(self) -> Buffers:
        return self.kept

    def _resize(self, batch: int, before: int) -> None:
        """As for other windows; what was kept for a larger batch moves to the shape of the smaller one."""
        self._launches = {}
        self.buffers.resize(batch)
        self.kept.resize_keeping(batch)


def folded_of(full: Engine, reuse: Engine) -> list[str]:
    """Names of the folded sums that the full engine computes for the reuse steps of its window; empty if none."""
    return [name for name in reuse.inputs if of_window(name) in full.outputs]
