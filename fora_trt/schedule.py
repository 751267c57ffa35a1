"""Which steps of a trajectory are full and which reuse; knows nothing of tensors, models or engines.

The default rule is the one of the FORA authors (arXiv 2407.01425): number the S steps from S-1 (first) down to
0 (last); step i is full when it is the first or when N divides i.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fora_trt.errors import ScheduleError


@dataclass(frozen=True)
class Schedule:
    """One flag per step, in the order in which steps are taken: True is a full step, False a reuse step.

    `cache_interval` is what the flags were made from; None for flags of one's own.
    """

    full: tuple[bool, ...]
    cache_interval: int | None = None

    def __post_init__(self) -> None:
        if not self.full or not self.full[0]:
            raise ScheduleError("a schedule must begin with a full step: there are no features to reuse before it")

    @classmethod
    def static(cls, steps: int, cache_interval: int) -> Schedule:
        """FORA's rule: a full step at least every `cache_interval` steps; 1 means no caching.

        Raises `ScheduleError` unless 1 <= cache_interval <= steps.
        """
        if steps < 1:
            raise ScheduleError(f"the number of steps is {steps}; at least 1 is needed")
        if cache_interval < 1:
            raise ScheduleError(f"the cache interval is {cache_interval}; 1 (no caching) is the smallest")
        if cache_interval > steps:
            raise ScheduleError(
                f"the cache interval {cache_interval} is larger than the number of steps {steps}; "
                f"choose an interval from 1 to {steps}"
            )
        remaining = range(steps - 1, -1, -1)
        return cls(tuple(i == steps - 1 or i % cache_interval == 0 for i in remaining), cache_interval)

    @classmethod
    def from_first(cls, steps: int, cache_interval: int) -> Schedule:
        """A full step every `cache_interval` steps counted from the first, for when their number is not known.

        FORA's own rule counts from the last step, which takes a number of steps to count from.
        """
        if cache_interval < 1:
            raise ScheduleError(f"the cache interval is {cache_interval}; 1 (no caching) is the smallest")
        return cls(tuple(k % cache_interval == 0 for k in range(steps)), cache_interval)

    @property
    def steps(self) -> int:
        """Length of the trajectory."""
        return len(self.full)

    @property
    def full_steps(self) -> int:
        """How many steps compute every layer."""
        return sum(self.full)

    @property
    def ideal_speedup(self) -> float:
        """Speed-up over no caching if a reuse step cost nothing."""
        return self.steps / self.full_steps


def places_in_windows(full: Iterable[bool], longest: int | None = None) -> list[int]:
    """For each step its place in its window: 0 is the full step, k the k-th reuse step behind it.

    Steps may begin within a window; the first one of those is at place 1. A step behind `longest` reuse steps is full.
    """
    places, place = [], 0
    for flag in full:
        place = 0 if flag or place == longest else place + 1
        places.append(place)
    return places
