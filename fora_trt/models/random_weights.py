"""Seeded random weights for an empty module, for timing: unit gain, and gates that are not zero."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn


def draw_weights(module: nn.Module, dtypes: Mapping[str, torch.dtype], seed: int = 0) -> None:
    """Fill a module whose parameters are on the meta device. Every tensor is drawn in its dtype at once."""
    generator = torch.Generator().manual_seed(seed)
    named = {id(parameter): name for name, parameter in module.named_parameters()}
    drawn: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if id(parameter) not in drawn:
                fan_in = parameter[0].numel() if parameter.dim() > 1 else 0
                std = fan_in**-0.5 if fan_in else 0.02
                value = torch.empty(parameter.shape, dtype=dtypes[named[id(parameter)]])
                drawn[id(parameter)] = nn.Parameter(value.normal_(std=std, generator=generator), requires_grad=False)
            setattr(owner, name, drawn[id(parameter)])
