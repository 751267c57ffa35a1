"""Engines of the backend `onnxruntime`: sessions on the CPU or CUDA provider with I/O binding to torch tensors."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from warnings import warn

import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor

from fora_trt.bundle import Bundle
from fora_trt.contract import DTYPES, WINDOW
from fora_trt.engines.backends import release_of
from fora_trt.engines.base import BASE, WEIGHTS, Engine, Launch
from fora_trt.engines.memory import address_of
from fora_trt.engines.onnxruntime.weighted_sum import AccumulateSumsPass, FuseWeightedSumsPass, kernel_library
from fora_trt.errors import BackendError, ForaWarning
from fora_trt.export.join_projections import SeparateProjectionsPass

_CUDA, _CPU = "CUDAExecutionProvider", "CPUExecutionProvider"

THREADS = "OMP_NUM_THREADS"
"""The environment variable with the number of threads; without it, ONNX Runtime takes one for each core."""

SILENT = 4
"""Log level: only fatal errors are printed. All others are raised too."""


class ComputeStream:
    """The CUDA stream on which all sessions of a denoiser compute, ordered with the caller's stream.

    CUDA events order the two streams, so the host never waits. A session stores only the address of the stream, so this
    object must live as long as the session.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call] # torch does not say

    @property
    def address(self) -> str:
        """The address of the stream as a string, for the provider option `user_compute_stream`."""
        return str(self._stream.cuda_stream)

    @contextmanager
    def in_order(self) -> Iterator[None]:
        """Order the work launched in the block after the caller's earlier work and before its later work."""
        caller = torch.cuda.current_stream(self._device)
        if caller.cuda_stream == self._stream.cuda_stream:
            yield
            return
        self._stream.wait_stream(caller)
        try:
            yield
        finally:
            caller.wait_stream(self._stream)


class OnnxRuntimeEngine(Engine):
    """An inference session with one I/O binding per set of tensors.

    On the CPU, a launch returns when the step is finished. On a GPU, it returns when the kernels are launched, on the
    stream that all sessions of the denoiser share.

    Launches cannot be captured in a CUDA graph, so `is_capturable` is False. ONNX Runtime frees pinned memory at the
    end of a run, which aborts the process during a capture (microsoft/onnxruntime#32081). The CUDA graphs of the
    provider (`enable_cuda_graph`) are not used either. The ONNX graphs split and concatenate more than 32 tensors, and
    these nodes copy tables of addresses from host memory; a captured copy would read this memory again at every replay.
    It has not been verified on a GPU that the memory outlives the capture; if not, results would be silently wrong.
    """

    def __init__(self, bundle: Bundle, graph: str, device: torch.device, stream: ComputeStream | None) -> None:
        record = bundle.manifest.graphs[graph]
        super().__init__(record.inputs, record.outputs, device)
        # Before 1.32, ReduceSum of an empty tensor wrongly keeps the reduced axis.
        self.shortest_window = 0 if release_of(onnxruntime.__version__) >= (1, 32) else 1
        self.any_window = self.has_threads = device.type == "cpu"
        self._session, self._stream = _session(bundle, graph, device, stream), stream
        given = {one.name for one in self._session.get_inputs()} if device.type == "cpu" else {}
        self._added = [name for name in self.outputs if f"{BASE}{name}" in given]
        self.accumulates = bool(self._added) and self.shortest_window == 0
        self._run_options = onnxruntime.RunOptions()
        self._run_options.log_severity_level = SILENT
        # No CUDA graph. Without this entry, each run would look for it in vain, which takes 0.1 ms.
        self._run_options.add_run_config_entry("gpu_graph_id", "-1")
        if stream is not None:  # without this entry, the session waits for its stream at the end of each run
            self._run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def bind(self, tensors: Mapping[str, Tensor]) -> Launch:
        binding = self._session.io_binding()
        added = self._accumulated(tensors)  # in fp32
        dtypes = {name: spec.dtype for name, spec in {**self.inputs, **self.outputs}.items()}
        inputs = {**{name: tensors[name] for name in self.inputs}, **added}
        outputs = {name: tensors[name] for name in self.outputs}
        for bind, bound in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
            for name, tensor in bound.items():
                assert tensor.is_contiguous() and tensor.device.type == self.device.type
                bind(
                    name,
                    self.device.type,
                    self.device.index or 0,
                    ir.DataType[DTYPES[dtypes.get(name, "float32")]].value,
                    tuple(tensor.shape),
                    address_of(tensor),
                )
        return partial(self._launch, binding, added)

    def _accumulated(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inputs that `AccumulateSumsPass` added; those that are not given mean sums that begin at 0."""
        found: dict[str, Tensor] = {}
        for name in self._added:
            output = tensors[name]
            for key, usual in ((f"{BASE}{name}", output[:0]), (f"{WEIGHTS}{name}", torch.ones(len(output)))):
                found[key] = tensors.get(key, usual)
        return found

    def _launch(self, binding: Any, kept: object) -> None:
        """Run on a binding; `kept` are tensors that it points to."""
        if self._stream is None:
            self._run(binding)
            return
        if torch.cuda.is_current_stream_capturing():  # running would abort the process
            raise BackendError(
                "onnxruntime cannot be captured in a CUDA graph; "
                "run the step outside the capture, or use --backend torch-compile"
            )
        with self._stream.in_order():
            self._run(binding)

    def _run(self, binding: Any) -> None:
        try:
            self._session.run_with_iobinding(binding, self._run_options)
        except Exception as error:  # onnxruntime raises many exception classes
            raise BackendError(f"onnxruntime could not run a step: {error}; use another --backend") from error


def engines_from_bundle(bundle: Bundle, device: torch.device) -> dict[str, Engine]:
    """One engine per graph of the bundle; on a GPU all share one stream. Raises `BackendError`."""
    stream = ComputeStream(device) if device.type == "cuda" else None
    return {name: OnnxRuntimeEngine(bundle, name, device, stream) for name in bundle.manifest.graphs}


def _session(bundle: Bundle, graph: str, device: torch.device, stream: ComputeStream | None) -> Any:
    path = bundle.graph_path(graph)
    if stream is not None:
        return _cuda_session(path, device, stream)
    options = _session_options()
    unwanted = ["SkipLayerNormFusion"]  # on a CPU, slower than the two nodes that it replaces
    try:
        model = _for_cpu(bundle, graph, options)
        return onnxruntime.InferenceSession(model, options, providers=[_CPU], disabled_optimizers=unwanted)
    except Exception as error:
        raise BackendError(f"onnxruntime cannot load {path}: {error}") from error


def _cuda_session(path: Path, device: torch.device, stream: ComputeStream) -> Any:
    """A session whose nodes all run on the GPU, in the precision of the graph. Raises `BackendError`."""
    provider = {
        "device_id": str(device.index or 0),
        "user_compute_stream": stream.address,
        "use_tf32": "0",  # full fp32 precision
    }
    options = _session_options()
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:  # with `enable_fallback`, onnxruntime would retry on the CPU and raise the error of that attempt instead
        return onnxruntime.InferenceSession(path, options, providers=[(_CUDA, provider)], enable_fallback=False)
    except Exception as error:
        reason = _why_not_on_the_gpu(path, provider) or f"onnxruntime cannot load {path}: {error}"
        raise BackendError(reason) from error


def _why_not_on_the_gpu(path: Path, provider: Mapping[str, str]) -> str | None:
    """Why a graph cannot run entirely on the GPU; None if loading failed for another reason."""
    options = _session_options()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    try:
        session = onnxruntime.InferenceSession(path, options, providers=[(_CUDA, provider)], enable_fallback=False)
    except Exception:
        return None
    if _CUDA not in session.get_providers():
        return (
            "onnxruntime could not start its CUDA provider (its log names the missing library); "
            "see 'fora-trt doctor', or give --device cpu"
        )
    parts = [part for part in session.get_provider_graph_assignment_info() if part.ep_name == _CPU]
    operators = sorted({node.op_type for part in parts for node in part.get_nodes()})
    return (
        f"onnxruntime {onnxruntime.__version__} would run {', '.join(operators) or 'a part'} of {path} on the CPU and "
        "copy tensors from and to the GPU at every step; use --backend torch-compile, or give --device cpu"
    )


def _session_options() -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = SILENT
    if THREADS in os.environ:  # which torch reads too
        options.intra_op_num_threads = torch.get_num_threads()
    # The sessions alternate: threads that keep spinning after a run of one session would slow down the other session.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def _for_cpu(bundle: Bundle, graph: str, options: Any) -> Any:
    """The model for a CPU session: the path of the graph, or the bytes of a graph rewritten to run faster on a CPU."""
    path, outputs = bundle.graph_path(graph), bundle.manifest.graphs[graph].outputs
    model = ir.load(path)
    changed = SeparateProjectionsPass()(model).modified
    folds = any(output.shape[0] == WINDOW for output in outputs)
    library = kernel_library() if folds else None
    if folds and library is None:
        warn(
            "the C compiler (cc, or the one that the variable CC names) makes no kernel that works here; folded sums "
            "take operators of onnxruntime, which are slower",
            category=ForaWarning,
            stacklevel=2,
        )
    if library is not None and FuseWeightedSumsPass()(model).modified:
        options.register_custom_ops_library(str(library))
        AccumulateSumsPass()(model)
        changed = True
    if not changed:
        return path
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(bundle.folder))
    return ir.to_proto(model).SerializeToString()
