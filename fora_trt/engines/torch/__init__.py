"""The backends `torch` and `torch-compile`, which run the graphs of a bundle in PyTorch on any device."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from typing import TYPE_CHECKING

from fora_trt.engines.backends import BACKENDS, Backend

if TYPE_CHECKING:
    import torch

    from fora_trt.bundle import Bundle
    from fora_trt.engines.base import Engine
    from fora_trt.engines.options import EngineOptions


def compiler_problem() -> str | None:
    """Why `torch.compile` cannot be used; None if it can. It generates C++ for CPUs, Triton kernels and C for GPUs."""
    compilers = [os.environ.get("CXX", ""), "g++", "clang++", "c++", "cl"]
    if not any(map(shutil.which, filter(None, compilers))):
        return (
            "torch.compile needs a C++ compiler; install g++, or set the environment variable CXX to another compiler"
        )
    import torch

    if torch.cuda.is_available() and find_spec("triton") is None:
        return "torch.compile needs triton for a GPU; pip install triton"
    return None


class TorchBackend(Backend):
    """Eager PyTorch."""

    name = "torch"
    distributions = ("torch",)
    preference = 20

    def problem(self) -> str | None:
        return None

    def engines_of(self, bundle: Bundle, device: torch.device, options: EngineOptions) -> dict[str, Engine]:
        from fora_trt.engines.torch.engine import engines_from_bundle

        return engines_from_bundle(bundle, device, self.compiles)


class TorchCompileBackend(TorchBackend):
    """PyTorch with graphs that Inductor compiles at their first run."""

    name = "torch-compile"
    preference = 10
    compiles = True

    def problem(self) -> str | None:
        return compiler_problem()


BACKENDS.register(TorchBackend())
BACKENDS.register(TorchCompileBackend())
