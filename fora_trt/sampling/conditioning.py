"""Conditioning of a batch of images: the model's inputs except latents and timestep, and their unconditional half.

Shapes: B images; the first dimension of every tensor is B.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from fora_trt.bundle import Manifest
from fora_trt.contract import CLASS_LABELS, PROMPT, PROMPT_MASK, InputSpec
from fora_trt.downloads import is_safetensors, problem_of
from fora_trt.engines.memory import content_of
from fora_trt.errors import InputError, first_line
from fora_trt.models.examples import example_inputs
from fora_trt.runtime.inputs import completed_inputs, inputs_of, integer_of
from fora_trt.untrusted import read_npz

NEGATIVE = "negative_"
"""Prefix of tensors in a file that belong to the unconditional half."""

FILE_NAMES = {"prompt_embeds": PROMPT, "prompt_attention_mask": PROMPT_MASK}
"""Names of prompt tensors in diffusers pipelines, and the transformer inputs that they become."""


@dataclass(frozen=True)
class Conditioning:
    """Inputs by name for `images` images, and those of their unconditional half; None without guidance."""

    images: int
    conditional: Mapping[str, Tensor]
    unconditional: Mapping[str, Tensor] | None

    def at(self, images: Sequence[int]) -> Conditioning:
        """The conditioning of these image indices, in this order; an index may occur more than once."""
        rows = torch.tensor(images, dtype=torch.int64)
        halves = [
            None if half is None else {name: tensor[rows] for name, tensor in half.items()}
            for half in (self.conditional, self.unconditional)
        ]
        return Conditioning(len(images), halves[0] or {}, halves[1])

    @staticmethod
    def joined(parts: Sequence[Conditioning]) -> Conditioning:
        """The conditioning of all images of the parts; all of them have unconditional inputs, or none has."""
        halves = [
            None if half[0] is None else {name: torch.cat([one[name] for one in half if one]) for name in half[0]}
            for half in ([one.conditional for one in parts], [one.unconditional for one in parts])
        ]
        return Conditioning(sum(one.images for one in parts), halves[0] or {}, halves[1])

    def digest(self) -> str:
        """SHA-256 of all tensors, so that interrupted work is not resumed with other conditioning."""
        digest = hashlib.sha256()
        for half in (self.conditional, self.unconditional or {}):
            for name, tensor in sorted(half.items()):
                digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
                digest.update(content_of(tensor))
        return digest.hexdigest()


def conditioning_of_classes(manifest: Manifest, class_labels: Sequence[int]) -> Conditioning:
    """Conditioning of class labels, one per image. Raises `InputError` for a class that the model does not have."""
    try:
        given = [] if isinstance(class_labels, str) else list(class_labels)
    except TypeError:
        given = []
    if not given:
        raise InputError(f"class_labels is {class_labels!r}; give integers in a list, one for each image")
    check_labels(given, manifest)
    assert manifest.guidance is not None
    null = manifest.guidance.null_class
    labels = torch.tensor([int(label) for label in given])
    without = None if null is None else {CLASS_LABELS: torch.full_like(labels, null)}
    return conditioning_of_tensors(manifest, len(labels), {CLASS_LABELS: labels}, without)


def balanced_labels(manifest: Manifest, count: int) -> list[int]:
    """`count` labels that cycle through all classes. Raises `InputError` for a model without classes."""
    check_labels([], manifest)
    assert manifest.guidance is not None
    return [k % manifest.guidance.num_classes for k in range(count)]


def drawn_labels(manifest: Manifest, count: int, seed: int) -> list[int]:
    """`count` labels drawn uniformly at random. Raises `InputError` for a model without classes."""
    check_labels([], manifest)
    assert manifest.guidance is not None
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(manifest.guidance.num_classes, (count,), generator=generator).tolist()


def check_labels(class_labels: Iterable[int], manifest: Manifest) -> None:
    """Raise `InputError` for a class that the model does not have."""
    if manifest.guidance is None:
        inputs = ", ".join(inputs_of(manifest)) or "no conditioning"
        raise InputError(f"{manifest.name} has no classes; it takes {inputs}")
    last = manifest.guidance.num_classes - 1
    for label in class_labels:
        if integer_of("a class label", label) not in range(last + 1):
            raise InputError(f"there is no class {label}; {manifest.name} has the classes 0 to {last}")


def way_to_condition(manifest: Manifest) -> str | None:
    """The options of `fora-trt run` that give this model its conditioning; None for a model that needs none."""
    specs = manifest.conditioning
    needed = [name for name in inputs_of(manifest) if specs.get(name, InputSpec()).default is None]
    if not needed:
        return None
    if manifest.text is not None:
        return "--prompt, or --prompt-embeds FILE"
    return "--class-labels" if needed == [CLASS_LABELS] else f"--conditioning FILE with {', '.join(needed)}"


def conditioning_of_tensors(
    manifest: Manifest, images: int, given: Mapping[str, Tensor], negative: Mapping[str, Tensor] | None
) -> Conditioning:
    """Conditioning from input tensors by name, (B, ...) or (1, ...); an input with a default may be missing.

    Raises `InputError` for an input that is missing or unknown, or has a wrong shape.
    """
    halves = [None if half is None else _expanded(manifest, images, half) for half in (given, negative)]
    return Conditioning(images, halves[0] or {}, halves[1])


def _expanded(manifest: Manifest, images: int, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All inputs of one half, (B, ...), in the dtypes of the graphs."""
    inputs = inputs_of(manifest)
    return {
        name: value.expand(inputs[name].sized(images)).to(getattr(torch, inputs[name].dtype))
        for name, value in completed_inputs(manifest, given, images).items()
    }


def conditioning_from_file(manifest: Manifest, path: Path) -> Conditioning:
    """Conditioning from a .safetensors or .npz file; tensor names are input names or diffusers' names for prompts.

    Names that begin with `negative_` belong to the unconditional half. Raises `InputError`.
    """
    tensors = tensors_of_file(path)
    named = {key: FILE_NAMES.get(key.removeprefix(NEGATIVE), key.removeprefix(NEGATIVE)) for key in tensors}
    given = {named[key]: value for key, value in tensors.items() if not key.startswith(NEGATIVE)}
    negative = {named[key]: value for key, value in tensors.items() if key.startswith(NEGATIVE)}
    if not given:
        inputs = ", ".join(inputs_of(manifest))
        raise InputError(f"{path} contains no conditional input; {manifest.name} takes {inputs}")
    images = max(len(value) if value.dim() else 1 for value in given.values())
    if not images:
        raise InputError(f"the tensors of {path} have a first dimension of 0; save at least one image")
    for half in (given, negative):
        if PROMPT in half and PROMPT_MASK in inputs_of(manifest) and PROMPT_MASK not in half:
            half[PROMPT_MASK] = torch.ones(half[PROMPT].shape[:2], dtype=torch.int64)
    return conditioning_of_tensors(manifest, images, given, negative or None)


def tensors_of_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or .npz file by name. Raises `InputError`."""
    try:
        if problem := problem_of(path):
            raise InputError(f"{path} {problem}")
        if is_safetensors(path):
            return dict(load_file(path))
        if zipfile.is_zipfile(path):
            return {name: torch.from_numpy(array) for name, array in read_npz(path).items()}
    except InputError:
        raise
    except Exception as error:  # damaged files can raise anything
        reason = first_line(error) or type(error).__name__
        raise InputError(f"{path} cannot be read: {reason}; write it with numpy.savez or safetensors") from error
    raise InputError(f"{path} is neither a .npz nor a .safetensors file; write one with numpy.savez or safetensors")


def example_conditioning(manifest: Manifest, images: int) -> Conditioning:
    """Seeded inputs for a comparison, with an unconditional half if the model supports guidance."""
    if manifest.guidance is not None:
        classes = manifest.guidance.num_classes
        if inputs_of(manifest).keys() == {CLASS_LABELS}:
            return conditioning_of_classes(manifest, [(1 + 6 * k) % classes for k in range(images)])
    tensors = inputs_of(manifest).values()
    halves = [example_inputs(tensors, manifest.conditioning, images, seed) for seed in (1, 2)]
    return Conditioning(images, halves[0], halves[1] if manifest.text is not None else None)


def usual_guidance_scale(manifest: Manifest, given: Conditioning) -> float:
    """The default guidance scale: the manifest's, or 1 (no guidance) without unconditional inputs."""
    return 1.0 if given.unconditional is None else manifest.guidance_scale
