"""FORA caching for diffusion transformers: two graphs, two engines, one runtime that alternates between them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fora_trt.errors import ForaError
from fora_trt.schedule import Schedule

if TYPE_CHECKING:
    from fora_trt.models.spec import GuidanceSpec, InputSpec, LatentSpec, ModelSpec, TensorSpec
    from fora_trt.runtime.denoiser import Denoiser, load

__version__ = "0.1.0"
__all__ = [
    "Denoiser",
    "ForaError",
    "GuidanceSpec",
    "InputSpec",
    "LatentSpec",
    "ModelSpec",
    "Schedule",
    "TensorSpec",
    "__version__",
    "load",
]

_LATER = dict.fromkeys(("Denoiser", "load"), "fora_trt.runtime.denoiser") | dict.fromkeys(
    ("GuidanceSpec", "InputSpec", "LatentSpec", "ModelSpec", "TensorSpec"), "fora_trt.models.spec"
)


def __getattr__(name: str) -> Any:
    """Import the runtime, and with it torch, only when it is asked for."""
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
