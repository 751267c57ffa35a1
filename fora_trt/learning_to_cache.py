"""Routers of Learning-to-Cache (arXiv 2406.01733): which layers of a DiT each step computes.

Its files hold a number for each step and layer; the sigmoid of it is the weight of the computed output in training. At
inference a layer is computed if that exceeds a threshold. Only every second step consults its router, the others
compute everything. Steps are counted from the last one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fora_trt.errors import ModelError, ScheduleError
from fora_trt.models.checkpoint import content_of_file

THRESHOLD = 0.1
"""The threshold of the authors' commands."""


def active_layers(path: Path, threshold: float, layers: int) -> list[list[int]]:
    """The layers that each step computes, in the order of execution, by a file that the authors' training wrote.

    Raises `ScheduleError` for a file without routers, or with those of a network that has not this number of layers.
    """
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
