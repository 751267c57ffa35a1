"""What Triton's Python backend offers a model, as far as `fora_trt.serve.triton_model` uses it.

After `src/pb_stub.cc`, `src/response_sender.cc` and `src/resources/triton_python_backend_utils.py` of
triton-inference-server/python_backend, for a model that is not decoupled: a sender takes one response, with the final
flag, and refuses another; tensors are arrays, those of text hold bytes; inputs are gone when `execute` has returned.
"""

from __future__ import annotations

import importlib.util
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from google.protobuf import json_format

TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1


class TritonModelException(Exception):  # noqa: N818 # Triton's name
    """What the backend raises at wrong use."""


class TritonError:
    """A message and a code."""

    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG, UNAVAILABLE, UNSUPPORTED, ALREADY_EXISTS, CANCELLED = range(8)

    def __init__(self, message: str, code: int = INTERNAL) -> None:
        assert isinstance(message, str) and isinstance(code, int)
        self._message, self._code = message, code

    def message(self) -> str:
        return self._message

    def code(self) -> int:
        return self._code


class Tensor:
    """A named array."""

    def __init__(self, name: str, values: np.ndarray[Any, Any]) -> None:
        assert isinstance(values, np.ndarray) and values.flags.c_contiguous
        self._name, self.values = name, values

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray[Any, Any]:
        return self.values

    def shape(self) -> list[int]:
        return [*self.values.shape]


class InferenceResponse:
    """Outputs or an error."""

    def __init__(self, output_tensors: Sequence[Tensor] = (), error: TritonError | None = None) -> None:
        self._outputs, self._error = [*output_tensors], error

    def output_tensors(self) -> list[Tensor]:
        return self._outputs

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> Any:
        return self._error


class InferenceResponseSender:
    """Takes the one response of a request; `answered` is set then."""

    def __init__(self) -> None:
        self.responses: list[InferenceResponse] = []
        self.answered, self.cancelled = threading.Event(), False

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        if flags not in (0, TRITONSERVER_RESPONSE_COMPLETE_FINAL):
            raise TritonModelException("Unable to send response. Unsupported flag provided.")
        if self.responses or response is None:
            raise TritonModelException("Unable to send response. Response sender has been closed.")
        self.responses.append(response)
        assert flags == TRITONSERVER_RESPONSE_COMPLETE_FINAL, "a client would wait for ever"
        self.answered.set()

    def is_cancelled(self) -> bool:
        return self.cancelled

    def response(self, seconds: float = 60.0) -> InferenceResponse:
        """The response, when it was sent."""
        assert self.answered.wait(seconds), "no response was sent"
        return self.responses[0]


class InferenceRequest:
    """Inputs by name, with the batch as their first dimension."""

    def __init__(self, **inputs: object) -> None:
        self.sender = InferenceResponseSender()
        self._inputs = [Tensor(name, array_of(values)) for name, values in inputs.items()]

    def inputs(self) -> list[Tensor]:
        return self._inputs

    def get_response_sender(self) -> InferenceResponseSender:
        return self.sender

    def is_cancelled(self) -> bool:
        return self.sender.cancelled

    def gone(self) -> None:
        """Overwrite the memory of the inputs, as the server may after `execute`."""
        for one in self._inputs:
            one.values[...] = b"gone" if one.values.dtype == object else 77


def array_of(values: object) -> np.ndarray[Any, Any]:
    """(N, 1) of a value or a list of values; text becomes bytes."""
    if isinstance(values, np.ndarray):
        return values
    rows = values if isinstance(values, list) else [values]
    if isinstance(rows[0], str | bytes):
        return np.array([[one.encode() if isinstance(one, str) else one] for one in rows], dtype=object)
    return np.array(rows, dtype=np.float64 if isinstance(rows[0], float) else np.int64)[:, None]


class Logger:
    """Keeps what was logged."""

    errors: list[str] = []  # noqa: RUF012 # of the class, as that of Triton

    @staticmethod
    def log_error(message: str) -> None:
        Logger.errors.append(message)


@contextmanager
def loaded(folder: Path, config: Any, monkeypatch: pytest.MonkeyPatch, kind: str = "CPU") -> Iterator[Any]:
    """The model of a folder, its `model.py` imported and initialized as by Triton; `config` is the parsed text."""
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", sys.modules[__name__])
    spec = importlib.util.spec_from_file_location("model_of_triton", folder / "1" / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.TritonPythonModel()
    assert isinstance(module, ModuleType)
    model.initialize(arguments_of(folder, config, kind))
    try:
        yield model
    finally:
        model.finalize()


def arguments_of(folder: Path, config: Any, kind: str = "CPU") -> Mapping[str, str]:
    """The arguments of `initialize`; all values are text."""
    return {
        "model_config": json_format.MessageToJson(config, preserving_proto_field_name=True),
        "model_instance_kind": kind,
        "model_instance_name": f"{config.name}_0_0",
        "model_instance_device_id": "0",
        "model_repository": str(folder),
        "model_version": "1",
        "model_name": config.name,
    }


def executed(model: Any, *requests: InferenceRequest) -> list[InferenceResponse]:
    """The responses of one call of `execute`, after which the inputs are gone."""
    assert model.execute([*requests]) is None
    for request in requests:
        request.gone()
    return [request.sender.response() for request in requests]
