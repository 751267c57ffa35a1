"""The table of backends: which there are, which work here, and how to make one work."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from fora_trt.engines.plan_store import PlanSource
from fora_trt.engines.tensorrt_library import TENSORRT, TENSORRT_RTX, gpu_problem
from fora_trt.errors import BackendError

if TYPE_CHECKING:
    import torch

    from fora_trt.bundle import Bundle
    from fora_trt.engines.base import Engine


@dataclass(frozen=True)
class Backend:
    """Where engines come from: the distributions it needs one of, the module that makes its engines.

    `problem` says why it cannot be used here and what mends that; None where it works. `has_cuda` tells whether what is
    installed of it can use a GPU that torch can use.
    """

    name: str
    distributions: tuple[str, ...]
    module: str
    problem: Callable[[], str | None]
    has_cuda: Callable[[], bool]

    def engines(self, bundle: Bundle, device: torch.device, source: PlanSource | None = None) -> dict[str, Engine]:
        """An engine for every graph of `bundle`; `source` tells where plans are, for those who need any.

        Raises `BackendError`.
        """
        if problem := self.problem():
            raise BackendError(f"the backend {self.name} cannot be used: {problem}")
        engines: dict[str, Engine] = import_module(self.module).engines_from_bundle(
            bundle, device, source or PlanSource(), self.name
        )
        return engines


ONNXRUNTIMES = ("onnxruntime", "onnxruntime-gpu")
"""Distributions that install the same module, `onnxruntime`."""

OLDEST_ONNXRUNTIME = {"cpu": (1, 23), "cuda": (1, 31)}
"""By type of device. On a GPU earlier releases may run the operator Attention on the CPU without saying so."""


def _onnxruntime_problem() -> str | None:
    folder = _folder_of_onnxruntime()
    if folder is None:
        return "onnxruntime is not installed; pip install 'fora-trt[cpu]', or 'fora-trt[gpu]' for an NVIDIA GPU"
    if all(_versions_in(folder, name) for name in ONNXRUNTIMES):
        return (
            f"onnxruntime and onnxruntime-gpu are both installed in {folder} and overwrite each other's files; "
            "pip uninstall both, then pip install 'fora-trt[cpu]' or 'fora-trt[gpu]'"
        )
    return None


def release_of(version: str) -> tuple[int, int]:
    """The first two numbers of a version."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def onnxruntime_too_old(device_type: str) -> str | None:
    """Why the installed ONNX Runtime cannot be used on `cpu` or `cuda`, and what mends it; None where it can."""
    import onnxruntime

    oldest, installed = OLDEST_ONNXRUNTIME[device_type], str(onnxruntime.__version__)
    if release_of(installed) >= oldest:
        return None
    wanted = ".".join(map(str, oldest))
    if device_type == "cuda":
        return (
            f"onnxruntime {installed} is too old for a GPU: it may run attention on the CPU; "
            f"pip install -U 'onnxruntime-gpu>={wanted}', or give --device cpu"
        )
    return f"onnxruntime {installed} is too old; pip install -U 'onnxruntime>={wanted}'"


def _onnxruntime_has_cuda() -> bool:
    import onnxruntime

    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()


def _folder_of_onnxruntime() -> Path | None:
    """The folder from which an import takes `onnxruntime`; None where it is not installed.

    Of several folders with a complete installation the first on the import path is used, and the others do not matter.
    """
    spec = find_spec("onnxruntime")
    if spec is None or spec.origin is None:  # the second: a folder that an uninstallation left behind
        return None
    return Path(spec.origin).parents[1]


def _versions_in(folder: Path, distribution: str) -> list[str]:
    """The version of a distribution that is installed in this very folder; empty where it is not."""
    return [found.version for found in metadata.distributions(name=distribution, path=[str(folder)])]


def compiler_problem() -> str | None:
    """Why `torch.compile` cannot be used. It writes C++ for a CPU, for a GPU Triton kernels and launchers in C."""
    compilers = [os.environ.get("CXX", ""), "g++", "clang++", "c++", "cl"]
    if not any(map(shutil.which, filter(None, compilers))):
        return "torch.compile needs a C++ compiler; install g++, or name one in the environment variable CXX"
    import torch

    if torch.cuda.is_available() and find_spec("triton") is None:
        return "torch.compile needs triton for a GPU; pip install triton"
    return None


BACKENDS = {
    backend.name: backend
    for backend in (  # best first: the order in which `auto` tries them
        Backend(
            TENSORRT,
            ("tensorrt",),
            "fora_trt.engines.tensorrt_engine",
            lambda: gpu_problem(TENSORRT),
            lambda: True,
        ),
        Backend(
            TENSORRT_RTX,
            ("tensorrt-rtx",),
            "fora_trt.engines.tensorrt_engine",
            lambda: gpu_problem(TENSORRT_RTX),
            lambda: True,
        ),
        Backend(
            "onnxruntime",
            ("onnxruntime", "onnxruntime-gpu"),
            "fora_trt.engines.onnxruntime_engine",
            _onnxruntime_problem,
            _onnxruntime_has_cuda,
        ),
        Backend("torch", ("torch",), "fora_trt.engines.torch_engine", lambda: None, lambda: True),
        Backend("torch-compile", ("torch",), "fora_trt.engines.torch_engine", compiler_problem, lambda: True),
    )
}
AUTO = "auto"


def backend_from_name(name: str) -> Backend:
    """The backend of this name; for `auto` the first that works here. Raises `BackendError`."""
    if name == AUTO:
        return next(backend for backend in BACKENDS.values() if backend.problem() is None)
    if name not in BACKENDS:
        raise BackendError(f"there is no backend {name!r}; known are {AUTO}, {', '.join(BACKENDS)}")
    return BACKENDS[name]


def device_from_name(name: str, backend: Backend) -> torch.device:
    """`auto` is the first GPU where torch has one that the backend can use, else the CPU. Raises `BackendError`."""
    import torch

    if name == AUTO:
        return torch.device("cuda:0" if torch.cuda.is_available() and backend.has_cuda() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BackendError(f"there is no device {name!r}; give cpu, cuda or cuda:1") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BackendError("there is no CUDA device here; give --device cpu, and see 'fora-trt doctor'")
    return device


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution, without importing it; None where it is not installed.

    Of the two distributions of ONNX Runtime, the one whose files another folder on the import path shadows counts as
    not installed.
    """
    if distribution in ONNXRUNTIMES and (folder := _folder_of_onnxruntime()) is not None:
        return next(iter(_versions_in(folder, distribution)), None)
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
