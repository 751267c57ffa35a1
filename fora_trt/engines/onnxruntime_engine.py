"""The `onnxruntime` backend: the graphs on the CPU or CUDA provider, bound to the addresses of torch tensors."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import onnx_ir as ir
import onnxruntime
import torch
from onnx import TensorProto
from torch import Tensor

from fora_trt.bundle import Bundle
from fora_trt.engines.base import Engine, Launch
from fora_trt.engines.memory import address_of
from fora_trt.engines.weighted_sum import FuseWeightedSumsPass, kernel_library
from fora_trt.errors import BackendError
from fora_trt.export.join_projections import SeparateProjectionsPass
from fora_trt.models.spec import WINDOW

_ELEMENT_TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "int64": TensorProto.INT64,
}


class OnnxRuntimeEngine(Engine):
    """An inference session, with an IO binding for every set of tensors. A launch returns when the step is done."""

    def __init__(self, bundle: Bundle, graph: str, device: torch.device) -> None:
        record = bundle.manifest.graphs[graph]
        super().__init__(record.inputs, record.outputs, device)
        self._session = _session(bundle, graph, device)

    def bind(self, tensors: Mapping[str, Tensor]) -> Launch:
        binding = self._session.io_binding()
        for bind, names in ((binding.bind_input, self.inputs), (binding.bind_output, self.outputs)):
            for name, spec in names.items():
                tensor = tensors[name]
                assert tensor.is_contiguous() and tensor.device.type == self.device.type
                bind(
                    name,
                    self.device.type,
                    self.device.index or 0,
                    _ELEMENT_TYPES[spec.dtype],
                    tuple(tensor.shape),
                    address_of(tensor),
                )
        return partial(self._run, binding)

    def _run(self, binding: Any) -> None:
        if self.device.type == "cuda":  # the session has a stream of its own and waits for it at its end
            torch.cuda.current_stream(self.device).synchronize()
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime raises many kinds, all with one sentence
            raise BackendError(f"onnxruntime failed: {error}") from error


def engines_from_bundle(bundle: Bundle, device: torch.device, *_: object) -> dict[str, Engine]:
    """One engine per graph of the bundle."""
    if bundle.manifest.precision == "bf16" and device.type == "cpu":
        raise BackendError(
            "onnxruntime has no bfloat16 kernels for the CPU; use --backend torch, or export with --precision fp32"
        )
    return {name: OnnxRuntimeEngine(bundle, name, device) for name in bundle.manifest.graphs}


def _session(bundle: Bundle, graph: str, device: torch.device) -> Any:
    provider: Any = "CPUExecutionProvider"
    unwanted = ["SkipLayerNormFusion"]  # slower there than the two nodes that it replaces
    if device.type == "cuda":
        provider, unwanted = ("CUDAExecutionProvider", {"device_id": device.index or 0}), []
    options = onnxruntime.SessionOptions()
    # The sessions alternate: threads of the one that spin after its run would slow the other one down.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        model = _for_cpu(bundle, graph, options) if device.type == "cpu" else bundle.graph_path(graph)
        session = onnxruntime.InferenceSession(model, options, providers=[provider], disabled_optimizers=unwanted)
    except Exception as error:
        raise BackendError(f"onnxruntime cannot load {bundle.graph_path(graph)}: {error}") from error
    if device.type == "cuda" and session.get_providers()[0] != "CUDAExecutionProvider":
        raise BackendError("onnxruntime could not start its CUDA provider; see 'fora-trt doctor', or give --device cpu")
    return session


def _for_cpu(bundle: Bundle, graph: str, options: Any) -> Any:
    """The graph as ONNX Runtime is to read it: its file, or what is different where another form is faster there."""
    path, outputs = bundle.graph_path(graph), bundle.manifest.graphs[graph].outputs
    model = ir.load(path)
    changed = SeparateProjectionsPass()(model).modified
    library = kernel_library() if any(output.shape[0] == WINDOW for output in outputs) else None
    if library is not None and FuseWeightedSumsPass()(model).modified:
        options.register_custom_ops_library(str(library))
        changed = True
    if not changed:
        return path
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(bundle.folder))
    return ir.to_proto(model).SerializeToString()
