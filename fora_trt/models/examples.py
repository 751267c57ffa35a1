"""Valid example inputs of a model, for tracing and for comparisons."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fora_trt.contract import TIMESTEP, InputSpec, TensorSpec

TRAINED_TIMESTEPS = 1000
"""Upper bound of scheduler timesteps, from which example timesteps are drawn."""


def example_inputs(
    tensors: Iterable[TensorSpec],
    conditioning: Mapping[str, InputSpec],
    batch: int,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Seeded valid values: normal noise, timesteps and integers drawn from their range, and defaults."""
    generator = torch.Generator().manual_seed(seed)
    values: dict[str, Tensor] = {}
    for tensor in tensors:
        shape, dtype = tensor.sized(batch), getattr(torch, tensor.dtype)
        valid = conditioning.get(tensor.name, InputSpec())
        low, high = valid.values or (0, 2 if dtype == torch.bool else TRAINED_TIMESTEPS)
        if valid.default is not None:
            values[tensor.name] = default_of(tensor, valid).expand(shape).clone()
        elif not dtype.is_floating_point:
            values[tensor.name] = torch.randint(int(low), int(high), shape, generator=generator, dtype=dtype)
        elif tensor.name == TIMESTEP:
            values[tensor.name] = torch.randint(int(high), shape, generator=generator).to(dtype)
        elif valid.values is not None:
            values[tensor.name] = (torch.rand(shape, generator=generator) * (high - low) + low).to(dtype)
        else:
            values[tensor.name] = torch.randn(shape, generator=generator).to(dtype)
    return values


def default_of(tensor: TensorSpec, valid: InputSpec) -> Tensor:
    """The default value of an input for one sample, (1, ...)."""
    assert valid.default is not None
    return torch.tensor(valid.default, dtype=getattr(torch, tensor.dtype)).reshape(tensor.sized(1))
