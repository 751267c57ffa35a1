"""A recording stand-in for the inference sessions of the CUDA provider: it computes on the CPU what it is asked to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch

from tests.tensorrt_standin import Recorder

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
NO_FALLBACK = "session.disable_cpu_ep_fallback"
RECORD = "session.record_ep_graph_assignment_info"
NO_WAIT = "disable_synchronize_execution_providers"
REFUSAL = "This session contains graph nodes that are assigned to the default CPU EP"


class Sessions:
    """Takes the place of `onnxruntime.InferenceSession`.

    `options` and `config` are of each session that was made, `starts` says whether the CUDA provider can be started,
    and `on_cpu` whether it leaves nodes to the CPU.
    """

    def __init__(self, recorder: Recorder, patch: pytest.MonkeyPatch) -> None:
        self.recorder, self.starts, self.on_cpu = recorder, True, False
        self.options: list[Mapping[str, str]] = []
        self.config: list[dict[str, str]] = []
        self._real = onnxruntime.InferenceSession
        patch.setattr(onnxruntime, "InferenceSession", self._made)
        patch.setattr(onnxruntime, "__version__", "1.31.1")

    def _made(self, path: Path, options: Any, providers: Sequence[tuple[str, Any]], enable_fallback: bool) -> Session:
        ((name, chosen),) = providers
        assert name == CUDA
        assert enable_fallback is False, "the Python layer falls back to the CPU"
        config = {key: entry_of(options, key) for key in (NO_FALLBACK, RECORD)}
        self.options.append(chosen)
        self.config.append(config)
        if config[NO_FALLBACK] == "1" and (self.on_cpu or not self.starts):
            raise RuntimeError(REFUSAL)
        if not path.read_bytes():
            raise RuntimeError("INVALID_PROTOBUF")
        on_cpu = onnxruntime.SessionOptions()
        on_cpu.add_session_config_entry(RECORD, "1")
        return Session(self.recorder, self._real(path, on_cpu, providers=[CPU]), [CUDA, CPU] if self.starts else [CPU])


class Session:
    """An inference session; what its binding is told about a GPU is on the CPU."""

    def __init__(self, recorder: Recorder, real: Any, providers: Sequence[str]) -> None:
        self._recorder, self._real, self._providers = recorder, real, providers
        self.get_provider_graph_assignment_info = real.get_provider_graph_assignment_info

    def get_providers(self) -> Sequence[str]:
        return self._providers

    def io_binding(self) -> Binding:
        return Binding(self._real.io_binding())

    def run_with_iobinding(self, binding: Binding, options: Any) -> None:
        self._recorder.record("Session", "run", entry_of(options, NO_WAIT))
        self._real.run_with_iobinding(binding.real)


class Binding:
    """An I/O binding to memory of a GPU."""

    def __init__(self, real: Any) -> None:
        self.real = real

    def bind_input(self, name: str, device: str, index: int, element: int, shape: Any, address: int) -> None:
        assert (device, index) == ("cuda", 0)
        self.real.bind_input(name, "cpu", 0, element, shape, address)

    def bind_output(self, name: str, device: str, index: int, element: int, shape: Any, address: int) -> None:
        assert (device, index) == ("cuda", 0)
        self.real.bind_output(name, "cpu", 0, element, shape, address)


class OnGpu:
    """A tensor of the CPU that says it is on a GPU."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.device, self.shape = torch.device("cuda:0"), tensor.shape
        self.is_contiguous, self.data_ptr = tensor.is_contiguous, tensor.data_ptr


def entry_of(options: Any, key: str) -> str:
    """An entry of the configuration of a session or a run; empty where it was not set."""
    read = (
        options.get_run_config_entry if hasattr(options, "get_run_config_entry") else options.get_session_config_entry
    )
    try:
        return str(read(key))
    except RuntimeError:
        return ""
