"""The windows of a denoiser: one for each kind and shape, all in the same memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fora_trt.contract import FULL, REUSE
from fora_trt.engines.base import Engine
from fora_trt.errors import RoomError
from fora_trt.runtime.accumulate import AccumulatingWindow
from fora_trt.runtime.buffers import Memory
from fora_trt.runtime.forecast import ForecastWindow
from fora_trt.runtime.layout import Layout
from fora_trt.runtime.window import Window, folded_of

MOST_WINDOWS = 32
"""Number of windows that are kept; with more, the one that was not used for the longest time is freed."""

KINDS: tuple[type[Window], ...] = (Window, ForecastWindow, AccumulatingWindow)

Shape = tuple[int, ...]
"""The number of a kind, and the arguments of its constructor."""


class Windows:
    """Makes and keeps windows, so that schedules can alternate without rebinding engines."""

    def __init__(self, engines: Mapping[str, Engine]) -> None:
        """`engines` has those of the steps, by graph."""
        self._engines = engines
        self._made: dict[Shape, Window] = {}
        self._memory = Memory(engines[FULL].device, self._free)

    def prepared(self, whole: Layout, rows: int, batches: Sequence[int]) -> Window:
        """The window of a plan, prepared for each batch size; if memory is short, that of the others is freed.

        `rows` is the number of rows of window tensors. Raises `RoomError` for a batch that does not fit.
        """
        shape = self._shape_of(whole, rows)
        window = self._made.pop(shape, None)
        if window is None:
            kind, *sizes = shape
            window = KINDS[kind](self._engines, self._memory, *sizes)
        self._made[shape] = window  # the latest comes last
        if len(self._made) > MOST_WINDOWS:
            self._made.pop(next(iter(self._made))).free()
        try:
            _prepare(window, batches)
        except RoomError:
            if len(self._made) == 1:
                raise
            self._memory.free()
            self._made = {shape: window}
            _prepare(window, batches)
        return window

    def _shape_of(self, whole: Layout, rows: int) -> Shape:
        """A forecast is accumulated where the engine can, unless that keeps many more sums than the other way."""
        if not whole.weighted:
            return KINDS.index(Window), rows
        few = whole.reuse_steps <= 2 * whole.depth * whole.rows
        full, reuse = self._engines[FULL], self._engines[REUSE]
        if folded_of(full, reuse) and full.accumulates and whole.folds and few:
            return KINDS.index(AccumulatingWindow), rows, whole.reuse_steps
        return KINDS.index(ForecastWindow), rows, whole.depth, whole.longest_window

    def _free(self) -> None:
        for window in self._made.values():
            window.free()


def _prepare(window: Window, batches: Sequence[int]) -> None:
    for batch in sorted({*batches}, reverse=True):  # the largest first: it allocates the memory of all
        window.prepare(batch)
