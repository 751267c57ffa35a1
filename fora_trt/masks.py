"""Masks: the cache sites that each step of a per-layer schedule computes, and the plan that they make. No tensors.

A step that computes all sites is full, one that computes none is a reuse step, any other is partial: its graph is named
after the sites that it computes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from fora_trt.contract import CacheSite, partial_name
from fora_trt.errors import ScheduleError
from fora_trt.plan import FULL_STEP, REUSE_STEP, Step, full_by_fora
from fora_trt.untrusted import shown

Masks = Mapping[str, tuple[str, ...]]
"""For the name of each partial graph the module paths of the cache sites that it computes, in their order."""


def plan_of(computed: Sequence[Collection[str]], sites: Sequence[CacheSite]) -> tuple[tuple[Step, ...], Masks]:
    """The plan of steps that each compute these sites, given by module path, and its masks.

    Raises `ScheduleError` for a path that is no site.
    """
    order = [site.module for site in sites]
    if odd := [one for one in computed if isinstance(one, str) or not isinstance(one, Collection)]:
        raise ScheduleError(f"what a step computes is {shown(repr(odd[0]))}; give a collection of module paths")
    if unknown := sorted({path for one in computed for path in one} - {*order}):
        raise ScheduleError(
            f"the schedule computes {shown(unknown[0])}, which is no cache site of this model; its sites are "
            f"{', '.join(order[:3])}, ..."
        )
    steps, masks = [], {}
    for one in computed:
        mask = tuple(path for path in order if path in one)
        if len(mask) == len(order):
            steps.append(FULL_STEP)
        elif not mask:
            steps.append(REUSE_STEP)
        else:
            name = partial_name(mask)
            masks[name] = mask
            steps.append(Step(name))
    return tuple(steps), masks


def by_kind(steps: int, intervals: Mapping[str, int], sites: Sequence[CacheSite]) -> list[set[str]]:
    """The sites that each step computes where each kind of site has FORA's rule at an interval of its own.

    Sites of a kind without an interval are computed at every step.
    """
    full = {site.kind: full_by_fora(steps, intervals.get(site.kind, 1)) for site in sites}
    return [{site.module for site in sites if full[site.kind][number]} for number in range(steps)]
