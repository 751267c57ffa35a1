"""The search for masks: which cache sites each step computes, from the errors of reuse. No tensors and no network.

Shapes: I cache sites, S steps. `errors` (I, S, S) are those of `site_errors`, `computed` (S, I) says whether a step
computes a site; the first step computes all. `costs` (I,) are the arithmetic of each site.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy
from numpy.typing import NDArray

Computed = NDArray[numpy.bool_]
Numbers = NDArray[numpy.float64]

HALVINGS = 40
LOGARITHMS = (-40.0, 40.0)
"""Natural logarithms of the smallest and the largest threshold or price that are tried."""


def by_threshold(errors: Numbers, threshold: float) -> Computed:
    """SmoothCache's rule for each site: it is computed at a step where the error of reuse exceeds the threshold."""
    sites, steps, _ = errors.shape
    computed = numpy.zeros((steps, sites), dtype=bool)
    computed[0] = True
    last = numpy.zeros(sites, dtype=int)
    for step in range(1, steps):
        computed[step] = errors[numpy.arange(sites), last, step] > threshold
        last[computed[step]] = step
    return computed


def by_squares(errors: Numbers, costs: Numbers, groups: Sequence[Sequence[int]], price: float) -> Computed:
    """The masks that minimize the squared errors plus `price` times the costs, where sites of a group go together."""
    sites, steps, _ = errors.shape
    computed = numpy.zeros((steps, sites), dtype=bool)
    for group in groups:
        own = [*group]
        chosen = cheapest_steps((errors[own] ** 2).sum(0), price * float(costs[own].sum()))
        computed[numpy.ix_(chosen, own)] = True
    return computed


def cheapest_steps(errors: Numbers, price: float) -> list[int]:
    """The steps, from 0 on, with the least sum of the errors (S, S) of all steps and of a price for each computed step.

    By dynamic programming over the step at which the features are computed anew.
    """
    steps = len(errors)
    sums = errors.cumsum(axis=1)
    least, begun = numpy.zeros(steps + 1), numpy.zeros(steps + 1, dtype=int)
    for end in range(1, steps + 1):  # the cheapest way to steps 0 to end - 1; the last computed step is `begun[end]`
        starts = numpy.arange(end)
        ways = least[:end] + price + sums[starts, end - 1] - sums[starts, starts]
        begun[end] = int(ways.argmin())
        least[end] = ways[begun[end]]
    chosen, end = list[int](), steps
    while end:
        end = int(begun[end])
        chosen.append(end)
    return chosen[::-1]


def grouped(errors: Numbers, costs: Numbers, number: int, price: float) -> list[list[int]]:
    """The sites in so many groups of about equal size, by how often they would be computed each for itself."""
    counts = [len(cheapest_steps(own**2, price * float(cost))) for own, cost in zip(errors, costs, strict=True)]
    order = sorted(range(len(counts)), key=lambda site: (counts[site], site))
    return [[int(site) for site in part] for part in numpy.array_split(order, min(number, len(order)))]


def merged(computed: Computed, costs: Numbers, partial: int) -> Computed:
    """The masks with at most `partial` distinct ones besides all sites and none: near masks become their union.

    Each time the two masks are merged whose union adds the least arithmetic, also with the mask of all sites, which the
    first step has. No computed site is dropped.
    """
    masks, of_step = _numbered(computed)
    while True:
        used = [one for one in numpy.unique(of_step) if masks[one].any()]
        if sum(not masks[one].all() for one in used) <= partial:
            return numpy.asarray(masks[of_step])
        own, steps = masks[used].astype(float), numpy.array([(of_step == one).sum() for one in used])
        sizes, common = own @ costs, (own * costs) @ own.T
        added = steps[:, None] * (sizes[None, :] - common)  # to the steps of the first mask by the sites of the second
        added = added + added.T
        numpy.fill_diagonal(added, math.inf)
        first, second = (used[one] for one in divmod(int(added.argmin()), len(used)))
        masks = numpy.vstack([masks, masks[first] | masks[second]])
        of_step[(of_step == first) | (of_step == second)] = len(masks) - 1
        masks, number = _numbered(masks)  # the union may equal another mask
        of_step = number[of_step]


def _numbered(rows: Computed) -> tuple[Computed, NDArray[numpy.intp]]:
    """The distinct rows, and the number of each row among them."""
    distinct, number = numpy.unique(rows, axis=0, return_inverse=True)
    return distinct, number.reshape(-1)


def within(budget: float, arithmetic: Callable[[Computed], float], made: Callable[[float], Computed]) -> Computed:
    """The masks with the most arithmetic within the budget, of those made from thresholds or prices, by bisection.

    The largest value must make masks within the budget.
    """
    low, high = LOGARITHMS
    best = made(math.exp(high))
    assert arithmetic(best) <= budget
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        found = made(math.exp(middle))
        if arithmetic(found) > budget:
            low = middle
            continue
        high = middle
        if arithmetic(found) > arithmetic(best):
            best = found
    return best
