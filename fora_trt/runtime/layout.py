"""The layout of a plan: in which window each step is, and where a reuse step finds what it reads.

A full step computes window tensors with one row for each reuse step that reads it: those of its own window, and for a
forecast also those of the next ones. No tensors here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fora_trt.contract import FULL
from fora_trt.plan import HIGHEST_ORDER, LATEST, Plan, Step, adapted, depth_of, offsets_of, readers_of, rows_of


@dataclass(frozen=True)
class Read:
    """One term of what a reuse step reads: `weight` times the row `row` that the full step of window `window` wrote."""

    window: int
    row: int
    weight: float


@dataclass(frozen=True)
class Fold:
    """What a full step adds to the sums of the reuse steps that read it, if these are consecutive reuse steps.

    Sums are numbered like the reuse steps of the plan. `first` is the first of them, `weights` has one weight for each;
    the first `begun` sums have terms of earlier full steps already.
    """

    first: int
    begun: int
    weights: tuple[float, ...]

    def part(self, readers: int) -> Fold:
        """The part of the first readers."""
        return Fold(self.first, min(self.begun, readers), self.weights[:readers])


@dataclass(frozen=True)
class Layout:
    """One entry per step of the plan, or of a part of it; `readers` counts steps from the first of the part.

    A window begins with a full or a partial step. `offsets` are counted within a window (0 is its first step),
    `windows` from the first window of the plan; `graphs` names for each step the graph of the first step of its window.
    `readers` has for a first step the reuse steps that read it, in the order of their rows. `reads` has for a reuse
    step what it reads, the latest window first. `numbers` counts the reuse steps of the plan before a step; `folds` has
    for each first step what it adds to sums, or is empty where readers are not consecutive reuse steps. `rows` is the
    largest number of readers of a step, `depth` the largest number of windows that a reuse step reads, and `weighted`
    says whether one reads anything but its own window with weight 1.
    """

    offsets: Sequence[int]
    windows: Sequence[int]
    graphs: Sequence[str]
    readers: Sequence[Sequence[int]]
    reads: Sequence[Sequence[Read]]
    numbers: Sequence[int]
    folds: Sequence[Fold | None]
    rows: int
    depth: int
    weighted: bool

    @classmethod
    def of(cls, plan: Plan) -> Layout:
        """The layout of a whole plan, which begins with a full step."""
        readers = readers_of(plan)
        row_of = [{step: row for row, step in enumerate(steps)} for steps in readers.values()]
        windows: list[int] = []
        for step in plan:
            windows.append((windows[-1] if windows else -1) + step.computes)
        firsts = [step.graph for step in plan if step.computes]
        reads = [
            [Read(window - back, row_of[window - back][number], weight) for back, weight in enumerate(step.weights)]
            for number, (step, window) in enumerate(zip(plan, windows, strict=True))
        ]
        computing_before = [window + (not step.computes) for step, window in zip(plan, windows, strict=True)]
        numbers = [number - computing for number, computing in enumerate(computing_before)]
        return cls(
            offsets_of(plan),
            windows,
            [firsts[window] for window in windows],
            [readers.get(number, []) for number in range(len(plan))],
            reads,
            numbers,
            _folds_of(readers, reads, windows, numbers),
            rows_of(plan),
            depth_of(plan),
            any(step.weights not in ((), LATEST) for step in plan),
        )

    @classmethod
    def ahead(cls, steps: int, distance: int) -> Layout:
        """The layout of full steps only, each of which folds sums for itself and for the `distance` steps after it."""
        readers = [range(step, min(step + distance + 1, steps)) for step in range(steps)]
        nothing: list[list[Read]] = [[]] * steps
        numbers = [0] * steps
        return cls(
            numbers, range(steps), [FULL] * steps, readers, nothing, numbers, [None] * steps, distance + 1, 1, False
        )

    def part(self, first: int, count: int) -> Layout:
        """The layout of `count` steps from step `first` on; readers after them are left out."""
        taken = slice(first, first + count)
        readers = [[step - first for step in steps if step < first + count] for steps in self.readers[taken]]
        folds = [fold and fold.part(len(steps)) for fold, steps in zip(self.folds[taken], readers, strict=False)]
        return Layout(
            self.offsets[taken],
            self.windows[taken],
            self.graphs[taken],
            readers,
            self.reads[taken],
            self.numbers[taken],
            folds,
            self.rows,
            self.depth,
            self.weighted,
        )

    @property
    def reuse_steps(self) -> int:
        """The number of reuse steps up to the last step."""
        return self.numbers[-1] + (self.offsets[-1] > 0)

    @property
    def longest_window(self) -> int:
        """The largest number of reuse steps in a window."""
        return max(self.offsets)

    @property
    def reach(self) -> int:
        """The largest number of steps from a full step to the last step that reads it."""
        return max((steps[-1] - number for number, steps in enumerate(self.readers) if steps), default=0)


def _folds_of(
    readers: Mapping[int, Sequence[int]],
    reads: Sequence[Sequence[Read]],
    windows: Sequence[int],
    numbers: Sequence[int],
) -> list[Fold | None]:
    """`Layout.folds` of a whole plan."""
    folds: list[Fold | None] = [None] * len(windows)
    for full, steps in readers.items():
        begun = [any(read.window < windows[full] for read in reads[step]) for step in steps]
        first = numbers[full]
        consecutive = [numbers[step] for step in steps] == [*range(first, first + len(steps))]
        if not consecutive or begun != sorted(begun, reverse=True):
            return []
        weights = [next(read.weight for read in reads[step] if read.window == windows[full]) for step in steps]
        folds[full] = Fold(first, sum(begun), tuple(weights))
    return folds


def within(plan: Plan, most_rows: int) -> tuple[Step, ...]:
    """The plan for engines whose window tensors have at most `most_rows` rows.

    A longer window is split by additional full steps. Where a forecast needs more rows, its order is lower.
    """
    full, offset = [], 0
    for number, step in enumerate(plan):
        offset = 0 if step.computes or offset == most_rows else offset + 1
        if offset == 0 and not step.computes:
            full.append(number)
    for order in range(HIGHEST_ORDER, -1, -1):
        fitting = adapted(plan, full, order=order)
        if rows_of(fitting) <= most_rows:
            break
    return fitting
