"""Pipelines of diffusers by name, loaded without the bars and the advice of the libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fora_trt.errors import InputError
from fora_trt.quiet import quiet
from fora_trt.untrusted import shown

LOADER = "diffusers.pipelines.pipeline_utils"
"""Module of `DiffusionPipeline`, which would choose the class that the repository names."""


def pipeline_class(name: str, pipeline: str) -> Any:
    """The pipeline class of diffusers with this name. Raises `InputError` for any other name."""
    import diffusers

    with quiet("transformers"):  # it names optional packages when a pipeline is imported
        kind: object = getattr(diffusers, pipeline, None)
    if isinstance(kind, type) and issubclass(kind, diffusers.DiffusionPipeline) and kind.__module__ != LOADER:
        return kind
    raise InputError(
        f"{name} names '{shown(pipeline)}' as its pipeline, which the installed diffusers does not have; update "
        "it, or export again"
    )


def load_pipeline(kind: Any, folder: Path, device: torch.device, variant: str | None, **parts: Any) -> Any:
    """The pipeline of a class in a folder on a device, in fp16 on a GPU and in fp32 on a CPU.

    `parts` take the place of those in the folder. A missing or damaged part can raise any exception.
    """
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging

    of_transformers: Any = logging
    bars = (of_diffusers, of_transformers)
    for one in bars:
        one.disable_progress_bar()
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    try:
        with quiet("transformers"), quiet("diffusers"), quiet("huggingface_hub"):
            return kind.from_pretrained(folder, torch_dtype=dtype, variant=variant, **parts).to(device)
    finally:
        for one in bars:
            one.enable_progress_bar()
