"""From prompts to text embeddings: the text encoder of the model's own pipeline is loaded, used and freed."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch

from fora_trt.bundle import Manifest
from fora_trt.errors import InputError, first_line
from fora_trt.models.spec import PROMPT, PROMPT_MASK, TextSpec
from fora_trt.quiet import quiet
from fora_trt.runtime.conditioning import Conditioning, conditioning_of_tensors


@torch.no_grad()
def conditioning_of_prompts(
    manifest: Manifest, prompts: Sequence[str], negative_prompt: str, device: torch.device
) -> Conditioning:
    """A prompt for each image, the negative one for all. The encoder computes in fp16 on a GPU, in fp32 on the CPU.

    Raises `InputError` where the model takes no text, has no encoder at hand, or a prompt has too many tokens.
    """
    text = manifest.text
    if text is None:
        raise InputError(
            f"{manifest.name} takes no prompt; give --class-labels where it has classes, or --conditioning"
        )
    pipeline = _pipeline(manifest.name, text, device)
    for prompt in (*prompts, negative_prompt):
        tokens = len(pipeline.tokenizer(prompt.lower().strip()).input_ids)
        if tokens > text.length:
            raise InputError(
                f"the prompt {prompt[:40]!r}... has {tokens} tokens, and {manifest.name} was exported for "
                f"{text.length}; shorten it, or export again with --text-length"
            )
    encoded, mask, negative, negative_mask = pipeline.encode_prompt(
        list(prompts),
        negative_prompt=negative_prompt,
        device=device,
        clean_caption=False,  # that would take two more packages
        max_sequence_length=text.length,
    )
    halves = [
        {PROMPT: embeddings.float().cpu(), PROMPT_MASK: kept.long().cpu()}
        for embeddings, kept in ((encoded, mask), (negative, negative_mask))
    ]
    del pipeline, encoded, negative
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return conditioning_of_tensors(manifest, len(prompts), halves[0], halves[1])


def _pipeline(name: str, text: TextSpec, device: torch.device) -> Any:
    """The diffusers pipeline with its tokenizer and text encoder alone."""
    import diffusers

    if text.encoder is None:
        raise InputError(
            f"{name} was exported without a text encoder at hand, so it cannot read a prompt; give --prompt-embeds "
            "FILE, or export it from the folder of the whole pipeline"
        )
    if missing := [package for package in ("transformers", "sentencepiece") if find_spec(package) is None]:
        raise InputError(
            f"a prompt needs {' and '.join(missing)}; pip install 'fora-trt[text]', or give --prompt-embeds"
        )
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging

    of_transformers: Any = logging
    of_diffusers.disable_progress_bar()  # two bars for what takes seconds
    of_transformers.disable_progress_bar()
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    try:
        with quiet("transformers"), quiet("diffusers"), quiet("huggingface_hub"):
            loaded = getattr(diffusers, text.pipeline).from_pretrained(
                text.encoder, transformer=None, vae=None, torch_dtype=dtype
            )
    except Exception as error:  # of many libraries: a file that is missing or damaged, no network
        raise InputError(
            f"the text encoder in {text.encoder!r} cannot be loaded: {first_line(error)}; "
            "download the whole repository, or give --prompt-embeds FILE"
        ) from error
    finally:
        of_diffusers.enable_progress_bar()
        of_transformers.enable_progress_bar()
    return loaded.to(device)
