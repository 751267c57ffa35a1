"""Validates the inputs of a bundle: names, types, shapes, defaults and values. No other module does."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fora_trt.bundle import Manifest
from fora_trt.contract import LATENTS, InputSpec, TensorSpec
from fora_trt.errors import InputError, ShapeError
from fora_trt.models.examples import default_of


def inputs_of(manifest: Manifest) -> dict[str, TensorSpec]:
    """The conditioning inputs of the model, by name: those that stay the same during a trajectory."""
    return {tensor.name: tensor for tensor in manifest.inputs if tensor.role == "conditioning"}


def noise_of(manifest: Manifest) -> dict[str, TensorSpec]:
    """The inputs of the model that are drawn anew at every step, by name."""
    return {tensor.name: tensor for tensor in manifest.inputs if tensor.role == "noise"}


def completed_inputs(
    manifest: Manifest, given: Mapping[str, Tensor], batch: int, values: bool = True, noise: bool = False
) -> dict[str, Tensor]:
    """The conditioning inputs, each (B, ...) or (1, ...); a missing input gets its default.

    With `noise`, those that are drawn at every step too, which must be given.

    Numbers are checked to be in range; those on a GPU only with `values`, because this waits for the device. Raises
    `ShapeError` for an unknown input or a wrong shape, `InputError` for an input that is missing, not a tensor, of
    another kind of numbers, or out of range.
    """
    inputs = inputs_of(manifest) | (noise_of(manifest) if noise else {})
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
        _check_type(tensor, value, spec)
        if value.shape not in (tensor.sized(batch), tensor.sized(1)):
            expected = list(tensor.sized(batch))
            raise ShapeError(f"{name!r} has shape {list(value.shape)}; {manifest.name} takes {expected}")
        if values or value.device.type == "cpu":
            _check_values(tensor, value, spec)
        completed[name] = value
    return completed


def check_latents(manifest: Manifest, latents: Tensor, device: torch.device | None = None) -> None:
    """Raise `ShapeError` unless latents have the exported shape, `InputError` if they are not floats on the device."""
    _check_tensor(LATENTS, latents)
    if not latents.is_floating_point():
        raise InputError(f"latents have the dtype {_dtype_of(latents)}; floating-point numbers are needed")
    expected = [len(latents), *manifest.latents.shape] if latents.dim() else [*manifest.latents.shape]
    if [*latents.shape] != expected:
        raise ShapeError(f"latents have shape {list(latents.shape)}; {manifest.name} takes {expected}")
    if not len(latents):
        raise InputError("the batch is 0; at least one latent is needed")
    if device is not None and (latents.device.type != device.type or None is not device.index != latents.device.index):
        raise InputError(
            f"latents are on {latents.device}, but the engines of {manifest.name} on {device}; move the latents there, "
            f"or load the bundle with device={str(latents.device)!r}"
        )


def checked_timestep(timestep: Any, batch: int) -> Tensor:
    """A timestep as a tensor: a scalar, (1,) or (B,). Raises `InputError` for anything else; values are not read."""
    try:
        tensor = torch.as_tensor(timestep)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"timestep is {_kind_of(timestep)}; give a number, or a tensor of one per latent") from error
    if tensor.shape not in ((), (1,), (batch,)):
        raise InputError(
            f"timestep has shape {list(tensor.shape)}; give one number, or one for each of the {batch} latents"
        )
    if tensor.is_complex() or tensor.dtype == torch.bool:
        raise InputError(f"timestep has the dtype {_dtype_of(tensor)}; real numbers are needed")
    return tensor


def integer_of(what: str, value: Any, least: int | None = None) -> int:
    """A Python integer. Raises `InputError` for another kind of value, and for one below `least`."""
    is_bool = isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")
    try:
        number = operator.index(value)
    except (TypeError, RuntimeError):  # RuntimeError: a tensor of several numbers
        number = None
    if is_bool or number is None:
        raise InputError(f"{what} is {value!r}; an integer is needed")
    if least is not None and number < least:
        raise InputError(f"{what} is {number}; at least {least} is needed")
    return number


def _check_values(tensor: TensorSpec, value: Tensor, spec: InputSpec) -> None:
    """Raise `InputError` if an integer input contains a value that is not an integer or out of range.

    Some engines do not report such a value: they use the nearest row of the embedding table, or count from its end.
    """
    bounds = (0, 2) if tensor.dtype == "bool" else spec.values
    if tensor.is_floating or bounds is None:
        return
    numbers, (low, high) = value.double(), bounds
    invalid = numbers[~((numbers == numbers.round()) & (numbers >= low) & (numbers < high))]
    if invalid.numel():
        raise InputError(
            f"{tensor.name!r} contains {invalid.flatten()[0].item():g}; valid values are integers from {low:g} to "
            f"{high - 1:g}"
        )


def _check_type(tensor: TensorSpec, value: Tensor, spec: InputSpec) -> None:
    """Raise `InputError` unless a value is a tensor of numbers that can mean the values of the input."""
    _check_tensor(tensor.name, value)
    is_mask = tensor.dtype == "bool" or spec.values == (0, 2)
    if value.is_complex() or (value.dtype == torch.bool and not is_mask):
        raise InputError(f"{tensor.name!r} has the dtype {_dtype_of(value)}; give a tensor of {tensor.dtype}")


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise InputError(f"{name!r} is {_kind_of(value)}; give a tensor, such as torch.as_tensor(...)")


def _dtype_of(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _kind_of(value: object) -> str:
    kind = type(value)
    return f"an object of type {kind.__module__}.{kind.__name__}".replace("builtins.", "")
