"""Validates the inputs of a bundle: names, shapes, defaults and values. No other module does."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fora_trt.bundle import Manifest
from fora_trt.contract import LATENTS, TIMESTEP, InputSpec, TensorSpec
from fora_trt.errors import InputError, ShapeError
from fora_trt.models.examples import default_of


def inputs_of(manifest: Manifest) -> dict[str, TensorSpec]:
    """The conditioning inputs of the model, by name: all inputs except latents and timestep."""
    return {tensor.name: tensor for tensor in manifest.inputs if tensor.name not in (LATENTS, TIMESTEP)}


def completed_inputs(
    manifest: Manifest, given: Mapping[str, Tensor], batch: int, values: bool = True
) -> dict[str, Tensor]:
    """The conditioning inputs, each (B, ...) or (1, ...); a missing input gets its default.

    With `values`, numbers are checked to be in range; on a GPU this waits for the device. Raises `ShapeError` for an
    unknown input or a wrong shape, `InputError` for an input that is missing or out of range.
    """
    inputs = inputs_of(manifest)
    takes = f"{manifest.name} takes {', '.join(inputs) or 'no input except latents and timestep'}"
    if unknown := given.keys() - inputs.keys():
        raise ShapeError(f"unknown input {min(unknown)!r}; {takes}")
    completed = {}
    for name, tensor in inputs.items():
        spec = manifest.conditioning.get(name, InputSpec())
        value = given.get(name)
        if value is None and spec.default is not None:
            value = default_of(tensor, spec)
        if value is None:
            raise InputError(f"input {name!r} is missing; {takes}")
        if value.shape not in (tensor.sized(batch), tensor.sized(1)):
            expected = list(tensor.sized(batch))
            raise ShapeError(f"{name!r} has shape {list(value.shape)}; {manifest.name} takes {expected}")
        if values:
            _check_values(tensor, value, spec)
        completed[name] = value
    return completed


def check_latents(manifest: Manifest, latents: Tensor) -> None:
    """Raise `ShapeError` unless latents have the exported shape."""
    expected = [len(latents), *manifest.latents.shape] if latents.dim() else [*manifest.latents.shape]
    if [*latents.shape] != expected:
        raise ShapeError(f"latents have shape {list(latents.shape)}; {manifest.name} takes {expected}")


def _check_values(tensor: TensorSpec, value: Tensor, spec: InputSpec) -> None:
    """Raise `InputError` if an integer input contains a value that is not an integer or out of range.

    Some engines do not report such a value: they use the nearest row of the embedding table, or count from its end.
    """
    if tensor.dtype != "int64" or spec.values is None:
        return
    numbers, (low, high) = value.double(), spec.values
    invalid = numbers[~((numbers == numbers.round()) & (numbers >= low) & (numbers < high))]
    if invalid.numel():
        raise InputError(
            f"{tensor.name!r} contains {invalid.flatten()[0].item():g}; valid values are integers from {low:g} to "
            f"{high - 1:g}"
        )
