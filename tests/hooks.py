"""Caching and forecasts in a few lines: hooks on the modules of a network, which share nothing with the package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fora_trt.plan import Plan


class Hooked:
    """The module with hooks that keep the outputs of its cache sites: a few lines that share nothing with the runtime.

    Each call of the module is a step of the plan.
    """

    def __init__(self, module: nn.Module, sites: Sequence[str], plan: Plan) -> None:
        self.plan, self.calls = plan, 0
        for path in sites:
            site = module.get_submodule(path)
            site.forward = self._forecasting(site.forward)
        module.register_forward_hook(lambda *_: self._count())

    def _count(self) -> None:
        self.calls = (self.calls + 1) % len(self.plan)

    def _forecasting(self, forward: Any) -> Any:
        kept: list[Tensor] = []

        def cached(*args: Any, **kwargs: Any) -> Tensor:
            step = self.plan[self.calls]
            if step.is_full:
                kept.append(forward(*args, **kwargs))
                return kept[-1]
            return sum((kept[-1 - back] * weight for back, weight in enumerate(step.weights)), torch.zeros(()))

        return cached
