"""FORA caching for diffusion transformers: two graphs, two engines, one runtime that alternates between them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fora_trt.contract import GuidanceSpec, InputSpec, LatentSpec, TensorSpec
from fora_trt.errors import ForaError
from fora_trt.schedule import Schedule

if TYPE_CHECKING:
    from fora_trt.models.spec import ModelSpec
    from fora_trt.pipeline import Pipeline, PipelineConfig, PipelineOutput
    from fora_trt.runtime.denoiser import Denoiser, load

__version__ = "0.1.0"
__all__ = [
    "Denoiser",
    "ForaError",
    "GuidanceSpec",
    "InputSpec",
    "LatentSpec",
    "ModelSpec",
    "Pipeline",
    "PipelineConfig",
    "PipelineOutput",
    "Schedule",
    "TensorSpec",
    "__version__",
    "load",
]

_LATER = {
    "Denoiser": "fora_trt.runtime.denoiser",
    "ModelSpec": "fora_trt.models.spec",
    "Pipeline": "fora_trt.pipeline",
    "PipelineConfig": "fora_trt.pipeline",
    "PipelineOutput": "fora_trt.pipeline",
    "load": "fora_trt.runtime.denoiser",
}


def __getattr__(name: str) -> Any:
    """Import what needs torch only when it is asked for."""
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names, also those that are imported later."""
    return __all__
