"""Pipelines of diffusers that were saved with the drop-in in place of their transformer.

`pipe.save_pretrained` writes into `model_index.json` the module and the class of every part. For the drop-in it is this
module, and the class has the name of the transformer that it stands for. `from_pretrained` finds the class there if the
module was imported: diffusers does not import what a file names. The part's folder is a bundle of its own, with the
schedule in use and the transformer's `config.json`.
"""

from __future__ import annotations

from pathlib import Path

import diffusers
import torch
from torch import nn

from fora_trt.bundle import Bundle
from fora_trt.errors import InputError
from fora_trt.presets import usual_text
from fora_trt.runtime.denoiser import load
from fora_trt.runtime.transformer import DenoiserTransformer


class ModelMixin(nn.Module):
    """What `from_pretrained` of a pipeline loads; diffusers looks in this module for a base class of this name."""

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, torch_dtype: torch.dtype | None = None, quantization_config: object = None
    ) -> DenoiserTransformer:
        """The drop-in of a bundle, on the default backend; `torch_dtype` is that of the other parts of the pipeline."""
        if quantization_config is not None:
            raise InputError(f"{folder} is a bundle, whose engines cannot be quantized; leave the transformer out")
        bundle = Bundle.open(folder)
        transformer = load(bundle, schedule=bundle.schedule or usual_text()).as_transformer()
        return transformer if torch_dtype is None else transformer.to(torch_dtype)


def __getattr__(name: str) -> type[ModelMixin]:
    """The class for a transformer of diffusers by its name."""
    stands_for = getattr(diffusers, name, None)
    if not isinstance(stands_for, type) or not issubclass(stands_for, diffusers.ModelMixin):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return type(name, (ModelMixin,), {})
