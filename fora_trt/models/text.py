"""Prompt encoding: how the diffusers pipelines of an architecture turn prompts into transformer inputs.

`sampling/prompts.py` loads the pipeline and checks the prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fora_trt.contract import PROMPT, PROMPT_MASK

Half: TypeAlias = Mapping[str, Tensor]
"""Inputs of the graphs by name, (B, ...) on the CPU."""


@dataclass(frozen=True)
class PromptEncoding:
    """How the pipelines of an architecture encode prompts; both functions take a pipeline with its text encoder.

    `count_tokens` takes the pipeline and a prompt, and returns the number of tokens, including special tokens. `encode`
    takes the pipeline, B prompts, one negative prompt, the number of tokens that the graphs take, and the device of the
    pipeline. It returns the conditional and the unconditional half.
    """

    count_tokens: Callable[[Any, str], int]
    encode: Callable[[Any, Sequence[str], str, int, torch.device], tuple[Half, Half]]


def _count_tokens(pipeline: Any, prompt: str) -> int:
    return len(pipeline.tokenizer(prompt.lower().strip()).input_ids)  # the pipeline normalizes prompts the same way


def _encode(
    pipeline: Any, prompts: Sequence[str], negative_prompt: str, length: int, device: torch.device
) -> tuple[Half, Half]:
    encoded, mask, negative, negative_mask = pipeline.encode_prompt(
        list(prompts),
        negative_prompt=negative_prompt,
        device=device,
        clean_caption=False,  # True would need two more packages
        max_sequence_length=length,
    )
    conditional, unconditional = (
        {PROMPT: embeddings.float().cpu(), PROMPT_MASK: kept.long().cpu()}
        for embeddings, kept in ((encoded, mask), (negative, negative_mask))
    )
    return conditional, unconditional


MASKED_PROMPTS = PromptEncoding(_count_tokens, _encode)
"""For pipelines with one text encoder and a mask: PixArt, and others with the same `encode_prompt`."""
