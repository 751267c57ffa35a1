"""Masks: the cache sites that each step of a per-layer schedule computes, and the plan that they make. No tensors.

A step that computes all sites is full, one that computes none is a reuse step, any other is partial: its graph is named
after the sites that it computes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from fora_trt.contract import CacheSite, partial_name
from fora_trt.errors import ScheduleError
from fora_trt.plan import FULL_STEP, REUSE_STEP, Step
from fora_trt.untrusted import shown

ATTENTION, FEED_FORWARD = "attention", "feed-forward"
"""Kinds of cache sites that published routers speak of."""

Masks = Mapping[str, tuple[str, ...]]
"""For the name of each partial graph the module paths of the cache sites that it computes, in their order."""


def plan_of(computed: Sequence[Collection[str]], sites: Sequence[CacheSite]) -> tuple[tuple[Step, ...], Masks]:
    """The plan of steps that each compute these sites, given by module path, and its masks.

    Raises `ScheduleError` for a path that is no site.
    """
    order = [site.module for site in sites]
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

    Sites of a kind without an interval are computed at every step. Raises `ScheduleError` for a kind that no site has.
    """
    kinds = [*dict.fromkeys(site.kind for site in sites)]
    if unknown := [kind for kind in intervals if kind not in kinds]:
        raise ScheduleError(
            f"{unknown[0]!r} is neither a kind of schedule nor one of this model's cache sites, which are of the kinds "
            f"{', '.join(kinds)}"
        )
    remaining = range(steps - 1, -1, -1)
    return [
        {site.module for site in sites if i == steps - 1 or i % intervals.get(site.kind, 1) == 0} for i in remaining
    ]


def by_router(active: Sequence[Collection[int]], sites: Sequence[CacheSite]) -> list[set[str]]:
    """The sites that each step computes by a router of Learning-to-Cache, whose layer 2k is attention k, 2k + 1 MLP k.

    `active` has the numbers of the layers for each step, in the order of execution. Raises `ScheduleError` for a
    network that does not consist of as many attentions as MLPs.
    """
    layers = [[site.module for site in sites if site.kind == kind] for kind in (ATTENTION, FEED_FORWARD)]
    attentions, mlps = layers
    if len(attentions) != len(mlps) or len(attentions) + len(mlps) != len(sites):
        raise ScheduleError(
            f"a router of Learning-to-Cache is for networks with an attention and an MLP in each block; this one has "
            f"{len(attentions)} cache sites of the kind {ATTENTION} and {len(mlps)} of the kind {FEED_FORWARD}"
        )
    return [{layers[number % 2][number // 2] for number in one} for one in active]
