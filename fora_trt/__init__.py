"""FORA caching for diffusion transformers: two graphs, two engines, one runtime that alternates between them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fora_trt.errors import ForaError
from fora_trt.schedule import Schedule

if TYPE_CHECKING:
    from fora_trt.runtime.denoiser import Denoiser, load

__version__ = "0.1.0"
__all__ = ["Denoiser", "ForaError", "Schedule", "__version__", "load"]


def __getattr__(name: str) -> Any:
    """Import the runtime, and with it torch, only when it is asked for."""
    if name in ("Denoiser", "load"):
        from fora_trt.runtime import denoiser

        return getattr(denoiser, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
