"""Routers of Learning-to-Cache (arXiv 2406.01733): which layers of a DiT each step computes.

Its files hold a number for each step and layer; the sigmoid of it is the weight of the computed output in training. At
inference a layer is computed if that exceeds a threshold. Only every second step consults its router, the others
compute everything. Steps are counted from the last one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from fora_trt.contract import CacheSite
from fora_trt.errors import ModelError, ScheduleError
from fora_trt.schedule import KINDS, Schedule, ScheduleKind

USAGE = "l2c:FILE[,threshold=T]"
ATTENTION, FEED_FORWARD = "attention", "feed-forward"
"""The kinds of cache sites that routers speak of."""

THRESHOLD = 0.1
"""The threshold of the authors' commands."""


def schedule_of(steps: int, arguments: str, sites: Sequence[CacheSite]) -> Schedule:
    """The schedule of `FILE[,threshold=T]`; it has as many steps as the file, whatever `steps` is."""
    text = f"{L2C.name}:{arguments}"
    path, _, option = arguments.partition(",")
    name, _, value = option.partition("=")
    if not path or (option and name != "threshold"):
        raise ScheduleError(f"the schedule {text!r} has not the form {USAGE}")
    try:
        threshold = float(value) if option else THRESHOLD
    except ValueError:
        raise ScheduleError(f"{value!r} in the schedule {text!r} is not a number; give {USAGE}") from None
    if not 0 < threshold < 1:
        raise ScheduleError(f"the threshold in the schedule {text!r} is not between 0 and 1, as sigmoids are")
    active = active_layers(Path(path), threshold, len(sites))
    return Schedule.of_masks(sites_of(active, sites), sites, text)


def sites_of(active: Sequence[Collection[int]], sites: Sequence[CacheSite]) -> list[set[str]]:
    """The sites that each step computes, given the numbers of layers: layer 2k is attention k, 2k + 1 MLP k.

    Raises `ScheduleError` for a network that does not consist of as many attentions as MLPs.
    """
    layers = [[site.module for site in sites if site.kind == kind] for kind in (ATTENTION, FEED_FORWARD)]
    attentions, mlps = layers
    if len(attentions) != len(mlps) or len(attentions) + len(mlps) != len(sites):
        raise ScheduleError(
            f"a router of Learning-to-Cache is for networks with an attention and an MLP in each block; this one has "
            f"{len(attentions)} cache sites of the kind {ATTENTION} and {len(mlps)} of the kind {FEED_FORWARD}"
        )
    return [{layers[number % 2][number // 2] for number in one} for one in active]


def active_layers(path: Path, threshold: float, layers: int) -> list[list[int]]:
    """The layers that each step computes, in the order of execution, by a file that the authors' training wrote.

    Raises `ScheduleError` for a file without routers, or with those of a network that has not this number of layers.
    """
    import torch
    from torch import Tensor

    from fora_trt.models.checkpoint import content_of_file

    try:
        content = content_of_file(path)
    except ModelError as error:
        raise ScheduleError(f"the router cannot be read: {error}") from error
    routers = content.get("routers") if isinstance(content, Mapping) else None
    if not isinstance(routers, Mapping) or not routers:
        raise ScheduleError(f"{path} contains no 'routers'; give the file of a router of Learning-to-Cache")
    steps: list[list[int]] = []
    for number in range(len(routers)):
        scores = routers.get(f"{number}.prob")
        if not isinstance(scores, Tensor) or scores.dim() != 1 or not scores.isfinite().all():
            raise ScheduleError(
                f"{path} has no vector of finite numbers '{number}.prob' among its {len(routers)} routers"
            )
        if len(scores) != layers:
            raise ScheduleError(
                f"the routers in {path} are for {len(scores)} layers; this network has {layers} cache sites"
            )
        consulted = number % 2 == 0
        active = (scores.float().sigmoid() > threshold) if consulted else torch.ones(layers, dtype=torch.bool)
        steps.append(active.nonzero().flatten().tolist())
    if len(steps) % 2:
        raise ScheduleError(f"{path} has routers for {len(steps)} steps; the first step must be one without a router")
    return steps[::-1]


L2C = KINDS.register(ScheduleKind("l2c", USAGE, make_for=schedule_of, reads_file=True))
