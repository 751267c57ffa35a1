"""FORA caching for diffusion transformers: two graphs, two engines, one runtime that alternates between them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fora_trt.contract import GuidanceSpec, InputSpec, LatentSpec, TensorSpec
    from fora_trt.diffusers_pipeline import attach
    from fora_trt.errors import ForaError
    from fora_trt.exporting import export
    from fora_trt.models.spec import ModelSpec
    from fora_trt.pipeline import Pipeline, PipelineConfig, PipelineOutput
    from fora_trt.runtime.denoiser import Denoiser, load
    from fora_trt.schedule import Schedule

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
    "attach",
    "export",
    "load",
]

_HOME = {
    "Denoiser": "runtime.denoiser",
    "ForaError": "errors",
    "GuidanceSpec": "contract",
    "InputSpec": "contract",
    "LatentSpec": "contract",
    "ModelSpec": "models.spec",
    "Pipeline": "pipeline",
    "PipelineConfig": "pipeline",
    "PipelineOutput": "pipeline",
    "Schedule": "schedule",
    "TensorSpec": "contract",
    "attach": "diffusers_pipeline",
    "load": "runtime.denoiser",
}


def __getattr__(name: str) -> Any:
    """Import a name when it is asked for: many need torch, and the program handles signals before it imports."""
    if name in _HOME:
        return getattr(import_module(f"fora_trt.{_HOME[name]}"), name)
    if name == "export":  # the stage of this name, which can be called
        return import_module("fora_trt.export")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names, all of which are imported later."""
    return __all__
