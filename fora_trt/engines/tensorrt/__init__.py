"""The backends `tensorrt` and `tensorrt-rtx`, which build plans from the graphs and run them on NVIDIA GPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fora_trt.engines.backends import BACKENDS, Backend
from fora_trt.engines.tensorrt.library import TENSORRT, TENSORRT_RTX, gpu_problem

if TYPE_CHECKING:
    import torch

    from fora_trt.bundle import Bundle, Manifest
    from fora_trt.engines.base import Engine
    from fora_trt.engines.options import EngineOptions


DTYPES_OF_TENSORRT = ("float32", "float16", "bfloat16", "int64", "int32", "bool")
"""The dtypes that inputs and outputs can have. TensorRT's parser takes float64 too, but makes it float32."""


class TensorRTBackend(Backend):
    """TensorRT, whose plans are tuned for the GPU that builds them."""

    name = TENSORRT
    distributions = (TENSORRT,)
    preference = 50
    builds = True

    def problem(self) -> str | None:
        return gpu_problem(self.name)

    def refusal(self, manifest: Manifest, device_type: str) -> str | None:
        if device_type != "cuda":
            return f"{self.name} runs on NVIDIA GPUs; give --device cuda, or --backend onnxruntime for the CPU"
        for graph in manifest.graphs.values():
            for tensor in (*graph.inputs, *graph.outputs):
                if tensor.dtype not in DTYPES_OF_TENSORRT:
                    return (
                        f"{self.name} does not support {tensor.dtype}, the dtype of {tensor.name!r} in the graphs of "
                        f"{manifest.name}; use --backend torch-compile, or cast this value in the model to one of "
                        f"{', '.join(DTYPES_OF_TENSORRT)}"
                    )
        return None

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
