"""What a batch of images is to be: the inputs of the model beside latents and timestep, and those without guidance.

Shapes: B images; every tensor begins with B.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fora_trt.bundle import Manifest
from fora_trt.engines.memory import content_of
from fora_trt.errors import InputError, first_line
from fora_trt.models.examples import default_of, example_inputs
from fora_trt.models.spec import CLASS_LABELS, LATENTS, PROMPT, PROMPT_MASK, TIMESTEP, InputSpec, TensorSpec

NEGATIVE = "negative_"
"""In a file, what begins so belongs to the unconditional half."""

FILE_NAMES = {"prompt_embeds": PROMPT, "prompt_attention_mask": PROMPT_MASK}
"""How diffusers calls what it gives to its transformers as other names."""


@dataclass(frozen=True)
class Conditioning:
    """Inputs by name for `images` images, and for their unconditional half; None where there is no guidance."""

    images: int
    conditional: Mapping[str, Tensor]
    unconditional: Mapping[str, Tensor] | None

    def at(self, images: Sequence[int]) -> Conditioning:
        """Some of the images, in this order; an image may be named more than once."""
        rows = torch.tensor(images, dtype=torch.int64)
        halves = [
            None if half is None else {name: tensor[rows] for name, tensor in half.items()}
            for half in (self.conditional, self.unconditional)
        ]
        return Conditioning(len(images), halves[0] or {}, halves[1])

    def digest(self) -> str:
        """SHA-256 of all of it, so that work on it is not gone on with on something else."""
        digest = hashlib.sha256()
        for half in (self.conditional, self.unconditional or {}):
            for name, tensor in sorted(half.items()):
                digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
                digest.update(content_of(tensor))
        return digest.hexdigest()


def inputs_of(manifest: Manifest) -> dict[str, TensorSpec]:
    """The inputs of the model beside latents and timestep, by name."""
    return {tensor.name: tensor for tensor in manifest.inputs if tensor.name not in (LATENTS, TIMESTEP)}


def conditioning_of_classes(manifest: Manifest, class_labels: Sequence[int]) -> Conditioning:
    """A class for each image. Raises `InputError` for a class that the model does not have."""
    check_labels(class_labels, manifest)
    assert manifest.guidance is not None
    null = manifest.guidance.null_class
    labels = torch.tensor(list(class_labels))
    without = None if null is None else {CLASS_LABELS: torch.full_like(labels, null)}
    return conditioning_of_tensors(manifest, len(labels), {CLASS_LABELS: labels}, without)


def balanced_labels(manifest: Manifest, count: int) -> list[int]:
    """Every class in turn, so that each is there as often as any other. Raises `InputError` for a model without."""
    check_labels([], manifest)
    assert manifest.guidance is not None
    return [k % manifest.guidance.num_classes for k in range(count)]


def drawn_labels(manifest: Manifest, count: int, seed: int) -> list[int]:
    """Classes drawn at random, each as likely as any other. Raises `InputError` for a model without."""
    check_labels([], manifest)
    assert manifest.guidance is not None
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(manifest.guidance.num_classes, (count,), generator=generator).tolist()


def check_labels(class_labels: Iterable[int], manifest: Manifest) -> None:
    """Raise `InputError` for a class that the model does not have."""
    if manifest.guidance is None:
        raise InputError(f"{manifest.name} has no classes; it takes {', '.join(inputs_of(manifest)) or 'noise alone'}")
    last = manifest.guidance.num_classes - 1
    for label in class_labels:
        if not 0 <= label <= last:
            raise InputError(f"there is no class {label}; {manifest.name} has the classes 0 to {last}")


def way_to_condition(manifest: Manifest) -> str | None:
    """The options of `run` that say what this model is to make; None for one that needs nothing said."""
    told = manifest.conditioning
    needed = [name for name in inputs_of(manifest) if told.get(name, InputSpec()).default is None]
    if not needed:
        return None
    if manifest.text is not None:
        return "--prompt, or --prompt-embeds FILE"
    return "--class-labels" if needed == [CLASS_LABELS] else f"--conditioning FILE with {', '.join(needed)}"


def conditioning_of_tensors(
    manifest: Manifest, images: int, given: Mapping[str, Tensor], negative: Mapping[str, Tensor] | None
) -> Conditioning:
    """Whatever the model takes, (B, ...) or (1, ...) by name; an input with a default may be left out.

    Raises `InputError` for one that is missing, unknown, or of another shape.
    """
    inputs = inputs_of(manifest)
    halves = [None if half is None else _completed(manifest, inputs, images, half) for half in (given, negative)]
    return Conditioning(images, halves[0] or {}, halves[1])


def _completed(
    manifest: Manifest, inputs: Mapping[str, TensorSpec], images: int, given: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    if unknown := given.keys() - inputs.keys():
        raise InputError(f"{manifest.name} takes no {min(unknown)!r}; it takes {', '.join(inputs) or 'noise alone'}")
    completed = {}
    for name, tensor in inputs.items():
        told = manifest.conditioning.get(name, InputSpec())
        value = given.get(name)
        if value is None and told.default is not None:
            value = default_of(tensor, told)
        if value is None:
            raise InputError(f"{name!r} is missing; {manifest.name} takes {', '.join(inputs)}")
        shape = tensor.sized(images)
        if value.shape != shape and value.shape != tensor.sized(1):
            raise InputError(f"{name!r} has shape {list(value.shape)}; {manifest.name} takes {list(shape)}")
        check_values(tensor, value, told)
        completed[name] = value.expand(shape).to(getattr(torch, tensor.dtype))
    return completed


def check_values(tensor: TensorSpec, value: Tensor, told: InputSpec) -> None:
    """Raise `InputError` for numbers that are not whole or out of bounds where whole ones are taken.

    Not every engine notices: some take the nearest row of a table, or count from its end.
    """
    if tensor.dtype != "int64" or told.values is None:
        return
    numbers, (low, high) = value.double(), told.values
    odd = numbers[~((numbers == numbers.round()) & (numbers >= low) & (numbers < high))]
    if odd.numel():
        raise InputError(
            f"{tensor.name!r} holds {odd.flatten()[0].item():g}; it takes whole numbers from {low:g} to {high - 1:g}"
        )


def conditioning_from_file(manifest: Manifest, path: Path) -> Conditioning:
    """Tensors of a .safetensors or .npz file by the names of the inputs, or by those that diffusers has for prompts.

    Names that begin with `negative_` are the unconditional half. Raises `InputError`.
    """
    tensors = _read(path)
    named = {key: FILE_NAMES.get(key.removeprefix(NEGATIVE), key.removeprefix(NEGATIVE)) for key in tensors}
    given = {named[key]: value for key, value in tensors.items() if not key.startswith(NEGATIVE)}
    negative = {named[key]: value for key, value in tensors.items() if key.startswith(NEGATIVE)}
    if not given:
        raise InputError(f"{path} holds no tensor for {manifest.name}, which takes {', '.join(inputs_of(manifest))}")
    images = max(len(value) if value.dim() else 1 for value in given.values())
    if not images:
        raise InputError(f"{path} is for no image: its tensors have a first size of 0")
    for half in (given, negative):
        if PROMPT in half and PROMPT_MASK in inputs_of(manifest) and PROMPT_MASK not in half:
            half[PROMPT_MASK] = torch.ones(half[PROMPT].shape[:2], dtype=torch.int64)
    return conditioning_of_tensors(manifest, images, given, negative or None)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".npz":
            with numpy.load(path, allow_pickle=False) as content:
                return {name: torch.from_numpy(content[name]) for name in content.files}
        if path.suffix == ".safetensors":
            return dict(load_file(path))
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read: {first_line(error)}") from error
    raise InputError(f"{path} is neither a .npz nor a .safetensors file; write one with numpy.savez or safetensors")


def example_conditioning(manifest: Manifest, images: int) -> Conditioning:
    """Seeded inputs for a comparison, with an unconditional half where the model has a use for one."""
    if manifest.guidance is not None:
        classes = manifest.guidance.num_classes
        if inputs_of(manifest).keys() == {CLASS_LABELS}:
            return conditioning_of_classes(manifest, [(1 + 6 * k) % classes for k in range(images)])
    tensors = inputs_of(manifest).values()
    halves = [example_inputs(tensors, manifest.conditioning, images, seed) for seed in (1, 2)]
    return Conditioning(images, halves[0], halves[1] if manifest.text is not None else None)


def usual_guidance_scale(manifest: Manifest, given: Conditioning) -> float:
    """What a model is used with where nobody says: 4.5 for text, 1.5 for classes, none without a second half."""
    if given.unconditional is None:
        return 1.0
    return 4.5 if manifest.text is not None else 1.5
