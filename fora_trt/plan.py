"""The plan of a trajectory: for each step the graph that runs, and for a reuse step the full steps that it reads.

A forecast is a plan whose reuse steps extrapolate: their weights are those of Lagrange interpolation over the full
steps before them, in the step index. They are exact for features that are polynomials of the order. No tensors here.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from fora_trt.contract import FULL, REUSE
from fora_trt.errors import ScheduleError

LATEST = (1.0,)
"""Weights of FORA: a reuse step reads the last full step with weight 1."""

MOST_STEPS = 10_000
"""Most steps of a trajectory."""

HIGHEST_ORDER = 3
"""Highest order of a forecast; more points amplify differences between the features more than they foresee."""


@dataclass(frozen=True)
class Step:
    """One step: the graph that runs and, for a reuse step, the weights of the steps that it reads.

    A full step computes every cache site, a partial step some of them, a reuse step none. A partial step reads the
    other features where the last step that computed them has left them. `weights[j]` is the weight of the j-th full or
    partial step before a reuse step, the latest first; other steps have no weights.
    """

    graph: str = FULL
    weights: tuple[float, ...] = ()

    @property
    def is_full(self) -> bool:
        """Whether the step computes every layer."""
        return self.graph == FULL

    @property
    def computes(self) -> bool:
        """Whether the step computes cache sites, all or some: it begins a window, and reuse steps read it."""
        return self.graph != REUSE

    @property
    def is_partial(self) -> bool:
        """Whether the step computes some cache sites and not all."""
        return self.computes and not self.is_full


FULL_STEP = Step()
REUSE_STEP = Step(REUSE, LATEST)
"""The two steps of FORA."""

Plan = Sequence[Step]
"""The steps of a trajectory in the order of execution; the first is full."""


def full_by_fora(steps: int, cache_interval: int) -> tuple[bool, ...]:
    """For each step whether FORA's rule makes it full: step i, counted down to 0, if it is the first or N divides i."""
    return tuple(i == steps - 1 or i % cache_interval == 0 for i in range(steps - 1, -1, -1))


def lagrange_weights(full_steps: Sequence[int], step: int) -> tuple[float, ...]:
    """Weights of Lagrange extrapolation from full steps, given by their rising numbers, to a step; the latest first.

    For N full steps they are exact for polynomials of degree N - 1 in the number of the step. Their sum is 1.
    """
    weights = []
    for one in reversed(full_steps):
        weight = 1.0
        for other in full_steps:
            if other != one:
                weight *= (step - other) / (one - other)
        weights.append(weight)
    return tuple(weights)


def forecast(plan: Plan, order: int) -> tuple[Step, ...]:
    """The plan with Lagrange weights of an order; the order is lower where fewer than `order` + 1 full steps precede.

    Order 0 is FORA. Raises `ScheduleError` for another order than 0 to `HIGHEST_ORDER`.
    """
    if not 0 <= order <= HIGHEST_ORDER:
        raise ScheduleError(f"the forecast order is {order}; give 0 (FORA), 1 (linear), 2 (quadratic) or 3 (cubic)")
    computing: list[int] = []
    steps = []
    for number, step in enumerate(plan):
        if step.computes:
            computing.append(number)
            steps.append(step)
        else:
            steps.append(Step(REUSE, lagrange_weights(computing[-1 - order :], number)))
    return tuple(steps)


def adapted(
    plan: Plan, full: Collection[int] = (), forgotten: Collection[int] = (), order: int = HIGHEST_ORDER
) -> tuple[Step, ...]:
    """The plan for a trajectory that deviates from it.

    The steps in `full` run in full as well. After a step in `forgotten`, which must be full, no full step before it can
    be read. A reuse step that can no longer read its full steps, or would read more than `order` + 1, gets Lagrange
    weights over as many full steps as remain, at most as many as it had weights.
    """
    before: list[int] = []
    now: list[int] = []
    steps = []
    for number, step in enumerate(plan):
        if number in forgotten:
            now = []
        if step.computes:
            before.append(number)
        if step.computes or number in full:
            now.append(number)
            steps.append(FULL_STEP if number in full else step)
            continue
        count = min(len(step.weights), order + 1)
        kept = count == len(step.weights) and before[-count:] == now[-count:]
        steps.append(step if kept else Step(REUSE, lagrange_weights(now[-count:], number)))
    return tuple(steps)


def readers_of(plan: Plan) -> dict[int, list[int]]:
    """For each full or partial step, the reuse steps that read it: it folds one sum for each of them."""
    readers: dict[int, list[int]] = {}
    for number, step in enumerate(plan):
        if step.computes:
            readers[number] = []
        for read in [*readers][-len(step.weights) :] if step.weights else ():
            readers[read].append(number)
    return readers


def rows_of(plan: Plan) -> int:
    """The largest number of reuse steps that read one step: the rows of a window tensor."""
    return max(map(len, readers_of(plan).values()))


def offsets_of(plan: Plan) -> list[int]:
    """The offset of each step in its window: 0 is the full or partial step, k the k-th reuse step after it."""
    offsets: list[int] = []
    for step in plan:
        offsets.append(0 if step.computes else (offsets[-1] if offsets else 0) + 1)
    return offsets


def depth_of(plan: Plan) -> int:
    """The largest number of full steps that a reuse step reads; 1 for FORA and without reuse steps."""
    return max(1, *(len(step.weights) for step in plan))
