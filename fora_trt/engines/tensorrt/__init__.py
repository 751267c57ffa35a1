"""The backends `tensorrt` and `tensorrt-rtx`, which build plans from the graphs and run them on NVIDIA GPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fora_trt.engines.backends import BACKENDS, Backend
from fora_trt.engines.tensorrt.library import TENSORRT, TENSORRT_RTX, gpu_problem

if TYPE_CHECKING:
    import torch

    from fora_trt.bundle import Bundle
    from fora_trt.engines.base import Engine
    from fora_trt.engines.options import EngineOptions


class TensorRTBackend(Backend):
    """TensorRT, whose plans are tuned for the GPU that builds them."""

    name = TENSORRT
    distributions = (TENSORRT,)
    preference = 50
    builds = True

    def problem(self) -> str | None:
        return gpu_problem(self.name)

    def engines_of(self, bundle: Bundle, device: torch.device, options: EngineOptions) -> dict[str, Engine]:
        from fora_trt.engines.tensorrt.engine import engines_from_bundle

        return engines_from_bundle(bundle, device, options, self.name)


class TensorRTRTXBackend(TensorRTBackend):
    """TensorRT-RTX, which builds plans for GeForce and workstation GPUs and needs no GPU for building."""

    name = TENSORRT_RTX
    distributions = (TENSORRT_RTX,)
    preference = 40


BACKENDS.register(TensorRTBackend())
BACKENDS.register(TensorRTRTXBackend())
