"""From prompts to text embeddings: loads the text encoder of the model's own pipeline, uses it and frees it."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from fora_trt.bundle import Manifest
from fora_trt.contract import TextSpec
from fora_trt.engines.backends import how_to_install
from fora_trt.errors import InputError, ModelError, first_line
from fora_trt.models.architectures import prompt_encoding
from fora_trt.models.checkpoint import preferred, variants_in
from fora_trt.models.diffusers_loading import load_pipeline, pipeline_class
from fora_trt.models.parts import ENCODER_FILES, folder_of
from fora_trt.sampling.conditioning import Conditioning, conditioning_of_tensors


class PromptEncoder:
    """The text encoder of a bundle's pipeline, loaded at the first use or with `load`.

    It computes in fp16 on a GPU, in fp32 on the CPU. Raises `InputError` if the model takes no text.
    """

    def __init__(self, manifest: Manifest, device: torch.device) -> None:
        if manifest.text is None:
            raise InputError(
                f"{manifest.name} takes no prompt; give --class-labels if it has classes, or --conditioning FILE"
            )
        self._manifest, self._text, self._device = manifest, manifest.text, device
        self._encoding = prompt_encoding(manifest.model.architecture)
        self._pipeline: Any = None

    def check(self) -> None:
        """Raise `InputError` if the files of the text encoder or packages for it are missing; loads nothing."""
        _encoder_folder(self._manifest.name, self._text)

    def load(self) -> Any:
        """Load tokenizer and text encoder. Raises `InputError` if they are not available."""
        if self._pipeline is None:
            self._pipeline = _pipeline(self._manifest.name, self._text, self._device)
        return self._pipeline

    def free(self) -> None:
        """Free the memory of the text encoder."""
        self._pipeline = None
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.no_grad()
    def conditioning(self, prompts: Sequence[str], negative_prompt: str) -> Conditioning:
        """Conditioning of one prompt per image and one negative prompt for all.

        Raises `InputError` for a prompt with too many tokens.
        """
        pipeline, text = self.load(), self._text
        for prompt in (*prompts, negative_prompt):
            tokens = self._encoding.count_tokens(pipeline, prompt)
            if tokens > text.length:
                raise InputError(
                    f"the prompt {prompt[:40]!r}... has {tokens} tokens; {self._manifest.name} was exported for at "
                    f"most {text.length}; shorten the prompt, or export again with a larger --text-length"
                )
        halves = self._encoding.encode(pipeline, prompts, negative_prompt, text.length, self._device)
        return conditioning_of_tensors(self._manifest, len(prompts), *halves)


def conditioning_of_prompts(
    manifest: Manifest, prompts: Sequence[str], negative_prompt: str, device: torch.device
) -> Conditioning:
    """Conditioning of one prompt per image and one negative prompt for all; the text encoder is freed after that.

    Raises `InputError` if the model takes no text, its text encoder is not available, or a prompt has too many tokens.
    """
    encoder = PromptEncoder(manifest, device)
    given = encoder.conditioning(prompts, negative_prompt)
    encoder.free()
    return given


def _encoder_folder(name: str, text: TextSpec) -> Path:
    """The folder of the pipeline that the text encoder is in."""
    if text.encoder is None:
        raise InputError(
            f"{name} was exported without access to a text encoder, so it cannot encode a prompt; give --prompt-embeds "
            "FILE, or export it from the folder of the whole pipeline"
        )
    try:
        folder = folder_of(text.encoder, ENCODER_FILES)
    except ModelError as error:
        raise InputError(f"{error}; or give --prompt-embeds FILE") from error
    if missing := [package for package in ("transformers", "sentencepiece") if find_spec(package) is None]:
        raise InputError(
            f"--prompt needs {' and '.join(missing)}; {how_to_install('text')}, or give --prompt-embeds FILE"
        )
    return folder


def _pipeline(name: str, text: TextSpec, device: torch.device) -> Any:
    """The diffusers pipeline with only its tokenizer and text encoder."""
    folder = _encoder_folder(name, text)
    assert text.encoder is not None
    kind, variant = pipeline_class(name, text.pipeline), _variant(folder)
    try:
        return load_pipeline(kind, folder, device, variant, transformer=None, vae=None)
    except Exception as error:  # from many libraries: a missing or damaged file, no network
        raise InputError(
            f"the text encoder in {text.encoder.where!r} cannot be loaded: {first_line(error)}; "
            "download the whole repository, or give --prompt-embeds FILE"
        ) from error


def _variant(folder: Path) -> str | None:
    """The variant of the text encoder's weights. Raises `InputError` if it has none."""
    variants = variants_in(folder / "text_encoder", "pytorch_model") | variants_in(folder / "text_encoder", "model")
    if not variants:
        raise InputError(
            f"the text encoder in {folder} has no weights: text_encoder/model.safetensors was expected; download the "
            "whole repository, or give --prompt-embeds FILE"
        )
    return preferred(variants)
