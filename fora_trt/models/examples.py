"""Values that the inputs of a model admit, for tracing and for comparing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fora_trt.models.spec import TIMESTEP, InputSpec, TensorSpec

TRAINED_TIMESTEPS = 1000
"""Upper bound of the timesteps of schedulers, which examples are drawn from."""


def example_inputs(
    tensors: Iterable[TensorSpec],
    conditioning: Mapping[str, InputSpec],
    batch: int,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Seeded values that a model admits: normal noise, timesteps and whole numbers over their range, defaults."""
    generator = torch.Generator().manual_seed(seed)
    values: dict[str, Tensor] = {}
    for tensor in tensors:
        shape, dtype = tensor.sized(batch), getattr(torch, tensor.dtype)
        told = conditioning.get(tensor.name, InputSpec())
        low, high = told.values or (0, TRAINED_TIMESTEPS)
        if told.default is not None:
            values[tensor.name] = default_of(tensor, told).expand(shape).clone()
        elif not dtype.is_floating_point:
            values[tensor.name] = torch.randint(int(low), int(high), shape, generator=generator, dtype=dtype)
        elif tensor.name == TIMESTEP:
            values[tensor.name] = torch.randint(int(high), shape, generator=generator).to(dtype)
        elif told.values is not None:
            values[tensor.name] = (torch.rand(shape, generator=generator) * (high - low) + low).to(dtype)
        else:
            values[tensor.name] = torch.randn(shape, generator=generator).to(dtype)
    return values


def default_of(tensor: TensorSpec, told: InputSpec) -> Tensor:
    """The default of one sample, (1, ...)."""
    assert told.default is not None
    return torch.tensor(told.default, dtype=getattr(torch, tensor.dtype)).reshape(tensor.sized(1))
