"""Joined trajectories: samples at different steps of different plans share the engines, one window at a time.

All samples are at a full step when a window begins. The full engine computes them as one batch; then each takes the
reuse steps of its own plan up to its next full step. Between windows samples can join and leave. It works because a
plan is known beforehand, and because timesteps, gates and weights belong to a sample, not to a batch.
Shapes: D full steps that a reuse step reads at most, R rows of window tensors, B samples of a batch, N elements of one
sample in one tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from fora_trt.contract import BATCH, CONDITIONING, FULL, REUSE
from fora_trt.engines.base import Engine, Launch
from fora_trt.memo import Kept
from fora_trt.plan import FULL_STEP, REUSE_STEP
from fora_trt.runtime.buffers import Memory
from fora_trt.runtime.denoiser import Denoiser, EngineRun
from fora_trt.runtime.forecast import ForecastWindow
from fora_trt.runtime.joined_conditioning import JoinedConditioning
from fora_trt.runtime.layout import Layout
from fora_trt.runtime.sums import add_rows
from fora_trt.runtime.window import Binding


@dataclass
class Track:
    """Where a sample is: a full step of its plan, by number, and the number of the window that it begins."""

    layout: Layout
    step: int = 0

    @property
    def window(self) -> int:
        """Number of the window that begins with this step."""
        return self.layout.windows[self.step]

    @property
    def length(self) -> int:
        """Number of steps in the window, the full step included."""
        following = self.layout.offsets[self.step + 1 :]
        return 1 + next((k for k, offset in enumerate(following) if offset == 0), len(following))

    @property
    def steps(self) -> list[int]:
        """The full step, then the reuse steps that read it: those of its window first."""
        own = [*range(self.step + 1, self.step + self.length)]
        return [self.step, *own, *(one for one in self.layout.readers[self.step] if one not in own)]

    @property
    def done(self) -> bool:
        """Whether all steps have run."""
        return self.step >= len(self.layout.offsets)


@dataclass(frozen=True)
class Sizes:
    """What windows have room for: rows of window tensors, full steps that are read, reuse steps."""

    rows: int = 0
    depth: int = 1
    longest: int = 0

    def holds(self, other: Sizes) -> bool:
        """Whether there is room for the other."""
        return self.joined(other) == self

    def joined(self, other: Sizes) -> Sizes:
        """The smallest sizes that hold both."""
        return Sizes(max(self.rows, other.rows), max(self.depth, other.depth), max(self.longest, other.longest))


class Joined:
    """The engines of a denoiser, for samples that join and leave between windows.

    `arrange` says which samples the next windows have; it keeps what the full steps before have computed for those
    that stay. Their sizes must be held by `sizes`, which only grow while there is no sample.
    """

    def __init__(self, denoiser: Denoiser, most: int) -> None:
        """`most` is the largest number of samples; memory is allocated for so many."""
        self.denoiser, self.most, self.sizes, self.samples = denoiser, most, Sizes(), 0
        engines = denoiser.engines
        self._engines, self._full = {name: engines[name] for name in (FULL, REUSE)}, engines[FULL]
        self._conditioning = JoinedConditioning(engines, most) if CONDITIONING in engines else None
        self._memory = Memory(denoiser.device, self._drop)
        self._window: JoinedWindow | None = None
        self._count = 0  # windows

    @property
    def problem(self) -> str | None:
        """Why samples of this bundle cannot join; None if they can."""
        outputs = [one for one in self._full.outputs.values() if BATCH in one.shape]
        if all(one.shape.index(BATCH) == one.is_of_window for one in outputs):
            return None
        return f"{self.denoiser.manifest.name} mixes its samples with their tokens, so they cannot join and leave"

    def sizes_of(self, layout: Layout) -> Sizes:
        """The sizes that a layout needs."""
        rows = max(layout.rows, self._full.shortest_window) if self.denoiser.folds else 0
        return Sizes(rows, layout.depth, layout.longest_window)

    def has_room(self, layout: Layout) -> bool:
        """Whether a sample with this layout can join others that stay; where none stays, `arrange` makes room."""
        return self.sizes.holds(self.sizes_of(layout))

    def make_room(self, layouts: Sequence[Layout]) -> JoinedWindow:
        """Allocate memory for samples with these layouts as well, while there is none.

        Raises `RoomError` if `most` samples do not fit the device's memory.
        """
        assert not self.samples
        for layout in layouts:
            self.sizes = self.sizes.joined(self.sizes_of(layout))
        self._drop()
        sizes = self.sizes.rows, self.sizes.depth, self.sizes.longest
        self._window = JoinedWindow(self._engines, self._memory, *sizes)
        self._window.prepare(self.most)  # later the memory does not move
        return self._window

    def arrange(self, sources: Sequence[int | None], layouts: Sequence[Layout]) -> None:
        """The samples of the next windows: where each was before, None for a new one, and their layouts.

        Raises `RoomError` for a batch that does not fit the device's memory; then there is no sample.
        """
        if not sources:
            self.samples = 0
            return
        fits = all(map(self.has_room, layouts))
        assert fits or all(one is None for one in sources), "room is made only while no sample stays"
        self.samples = 0
        window = self._window if fits and self._window is not None else self.make_room(layouts)
        with torch.inference_mode(False), torch.no_grad():
            if self._conditioning is not None:
                self._conditioning.arrange(sources)
            window.arrange([one if layout.depth > 1 else None for one, layout in zip(sources, layouts, strict=True)])
        self.samples = len(sources)

    def window(self, tracks: Sequence[Track], timesteps: Tensor, given: Mapping[str, Tensor]) -> EngineRun:
        """Announce the next window of all samples.

        `timesteps` has those of the whole trajectory of each sample, (B, S); `given` are the conditioning inputs
        (B, ...); both are on the CPU. Step k of the run is the k-th of each window; what it computes for samples whose
        window is shorter has no meaning.
        """
        assert self._window is not None and len(tracks) == self.samples
        steps = [track.steps if self.denoiser.folds else track.steps[: track.length] for track in tracks]
        count = max(map(len, steps))
        layout = _layout(count, self._count)
        with self.denoiser.access.alone(), torch.inference_mode(False), torch.no_grad():
            if self._conditioning is not None:
                steps = [one + one[:1] * (count - len(one)) for one in steps]
                self._conditioning.begin(steps, [track.layout for track in tracks], timesteps, given)
            self._window.read(self._count, tracks)
        self._count += 1
        plan = [FULL_STEP, *[REUSE_STEP] * (count - 1)]
        return EngineRun(self._window, self._conditioning, layout, plan, layout, self.denoiser.access)

    def _drop(self) -> None:
        if self._window is not None:
            self._window.free()


@cache
def _window_layout(count: int) -> Layout:
    return Layout.of([FULL_STEP, *[REUSE_STEP] * (count - 1)])


def _layout(count: int, number: int) -> Layout:
    """The layout of a window of so many steps; its number determines which memory its full step writes."""
    return replace(_window_layout(count), windows=[number] * count)


KEPT_BATCHES = 16
"""Batch sizes for which a window keeps the launches of its engines."""


class JoinedWindow(ForecastWindow):
    """Engines bound for windows in which each sample reads full steps of its own, with weights of its own.

    A sample reads only what was computed for it, so what is kept for a new sample has no meaning.
    """

    def __init__(self, engines: Mapping[str, Engine], memory: Memory, rows: int, depth: int, longest: int) -> None:
        super().__init__(engines, memory, rows, depth, longest)
        self._of_batch: Kept[int, dict[Binding, Launch]] = Kept(KEPT_BATCHES)

    def begin(self, layout: Layout) -> None:
        """Do nothing: `read` says what the samples read."""

    def select(self, step: int) -> None:
        """Do nothing: `read` says what the samples read."""

    def arrange(self, sources: Sequence[int | None]) -> None:
        """Take so many samples; what was kept for those that have a source moves along."""
        moved = {k: one for k, one in enumerate(sources) if one is not None}
        if len(sources) == self.batch:
            moved = {k: one for k, one in moved.items() if k != one}
        here, there = (
            torch.tensor([*one], dtype=torch.int64, device=self.full.device) for one in (moved, moved.values())
        )
        before = {name: one.index_select(self._axis(name), there) for name, one in self.kept.tensors.items() if moved}
        self.prepare(len(sources))
        for name, one in before.items():
            self.kept.tensors[name].index_copy_(self._axis(name), here, one)

    def free(self) -> None:
        self._of_batch = Kept(KEPT_BATCHES)
        super().free()

    def read(self, number: int, tracks: Sequence[Track]) -> None:
        """Select what the samples read in a window, whose `number` counts all windows."""
        depth, row_count, batch = self.turns, self.rows, len(tracks)
        terms = []  # of the full step itself, with a weight of 0, where there are fewer
        lengths = [track.length for track in tracks]
        for offset in range(1, max(lengths)):
            for track, length in zip(tracks, lengths, strict=True):
                reads = track.layout.reads[track.step + offset] if offset < length else []
                some = [((number - track.window + one.window) % depth, one.row, one.weight) for one in reversed(reads)]
                terms.append([*[(number % depth, 0, 0.0)] * (depth - len(some)), *some])
        if not terms:
            return
        table = torch.tensor(terms, dtype=torch.float64).view(-1, batch, depth, 3)
        turns, rows = table[..., 0].long(), table[..., 1].long()
        samples = torch.arange(batch)[:, None]
        device = self.full.device
        self._of_rows = ((turns * row_count + rows) * batch + samples).to(device)  # (offsets, B, D)
        self._of_turns = (turns * batch + samples).to(device)
        self._weights = table[..., 2].float().to(device)

    def _combine(self, offset: int) -> None:
        for name, source in self._sources.items():
            kept = self.kept.tensors[source]
            in_window = source in self._of_window
            table = kept.flatten(0, 2 if in_window else 1).flatten(1)  # (D * R * B, N) or (D * B, N)
            index = (self._of_rows if in_window else self._of_turns)[offset - 1]
            add_rows(table, index, self._weights[offset - 1], self.buffers.tensors[name].flatten(1))

    def _bind(self) -> None:
        """Do nothing: batches change often, and not all bindings are used."""

    def _resize(self, batch: int, before: int) -> None:
        """As for other windows; `arrange` moves what was kept."""
        self.buffers.resize(batch)
        self.kept.resize(batch)
        self._launches = self._of_batch.get(batch, dict)

    def _axis(self, name: str) -> int:
        """The dimension of the samples in a tensor that is kept."""
        return 2 if name in self._of_window else 1
