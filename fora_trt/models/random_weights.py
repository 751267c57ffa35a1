"""Published sizes with seeded random weights, for timing; the weights preserve variance, and gates are not zero."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from fora_trt.errors import ModelError
from fora_trt.models.architectures import PipelineParts, published_sizes
from fora_trt.models.assembly import EmptyModel
from fora_trt.models.options import SourceOptions
from fora_trt.models.parts import vae_at


def empty_of_published_size(options: SourceOptions, name: str) -> EmptyModel:
    """The model of a published size such as `DiT-XL/2`. Raises `ModelError` for an unknown name."""
    known = published_sizes()
    if name not in known:
        raise ModelError(f"unknown model 'random:{name}'; NAME must be one of {', '.join(known)}")
    architecture = known[name]
    options.refuse_all_but(architecture.takes)
    published = architecture.published[name]
    vae, autoencoder = vae_at(options.vae) if options.vae else (None, None)
    config, parts = published.config(options), PipelineParts(published.pipeline, vae, autoencoder)
    spec = architecture.described(config, options, parts)
    module = architecture.empty_module(config)
    architecture.prepare(module, None)
    named = f"random-{name.replace('/', '-')}"
    return EmptyModel(named, module, spec, lambda dtypes: draw_weights(module, dtypes), config, parts=parts)


def draw_weights(module: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Fill a module whose parameters are on the meta device; each tensor is drawn directly in its final dtype."""
    generator = torch.Generator().manual_seed(0)
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
