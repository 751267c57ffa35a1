"""Turns the user's request (class labels, prompts, a file or nothing) into conditioning inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence, Sized
from pathlib import Path

import torch

from fora_trt.bundle import Manifest
from fora_trt.downloads import problem_of, text_of
from fora_trt.errors import InputError, first_line
from fora_trt.sampling.conditioning import (
    Conditioning,
    conditioning_from_file,
    conditioning_of_classes,
    conditioning_of_tensors,
    way_to_condition,
)
from fora_trt.sampling.prompts import conditioning_of_prompts

MOST_NUMBERS = 2**31
"""Most numbers in the latents of all images of one call."""


def conditioning_of(
    manifest: Manifest,
    class_labels: Sequence[int] | None,
    prompts: Sequence[str],
    negative_prompt: str,
    file: Path | None,
    num_images: int | None,
    device: torch.device,
) -> Conditioning:
    """The conditioning of the images, from class labels, prompts or a file, whichever is given.

    Raises `InputError` if the model needs conditioning and none is given, if several kinds are given, or if the model
    does not take the given kind.
    """
    labels = len(class_labels) if isinstance(class_labels, Sized) else 0
    images = max(labels, (num_images or 1) * max(1, len(prompts)))
    if (numbers := images * math.prod(manifest.latents.shape)) > MOST_NUMBERS:
        raise InputError(
            f"the latents of {images} images have {numbers} numbers; the limit of one call is {MOST_NUMBERS}; make "
            "fewer images at a time, or use fora-trt sample"
        )
    options = {
        "--class-labels": class_labels is not None,
        "--prompt": bool(prompts),
        "--prompt-embeds": file is not None,
    }
    given = [option for option, is_given in options.items() if is_given]
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} exclude each other; give one of them")
    if negative_prompt and not prompts:
        raise InputError("--negative-prompt needs --prompt; in a file, store the tensor negative_prompt_embeds instead")
    if not given and (needed := way_to_condition(manifest)):
        raise InputError(f"{manifest.name} needs conditioning inputs; give {needed}")
    if num_images is not None and not prompts and given:
        raise InputError(f"{given[0]} already determines the number of images; leave --num-images out")
    if class_labels is not None:
        return conditioning_of_classes(manifest, class_labels)
    if file is not None:
        return conditioning_from_file(manifest, file)
    if prompts:
        each = [prompt for prompt in prompts for _ in range(num_images or 1)]
        return conditioning_of_prompts(manifest, each, negative_prompt, device)
    return conditioning_of_tensors(manifest, num_images or 1, {}, None)


def lines_of(path: Path) -> tuple[str, ...]:
    """The non-empty lines of a text file."""
    try:
        if problem := problem_of(path, text=True):
            raise InputError(f"{path} {problem}")
        lines = tuple(line.strip() for line in text_of(path).split("\n") if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} cannot be read as text ({first_line(error)}); give a file with one prompt a line"
        ) from error
    if not lines:
        raise InputError(f"{path} contains no prompt; write one per line")
    return lines
