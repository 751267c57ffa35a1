"""One interface to TensorRT and TensorRT-RTX: the imported module and its log, installation checks, and the GPU."""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from fora_trt.engines.backends import how_to_install
from fora_trt.errors import BackendError, first_line
from fora_trt.interruption import unmasked

TENSORRT, TENSORRT_RTX = "tensorrt", "tensorrt-rtx"
_MODULES = {TENSORRT: "tensorrt", TENSORRT_RTX: "tensorrt_rtx"}
_OLDEST = {TENSORRT: (10, 14), TENSORRT_RTX: (1, 4)}  # TensorRT supports the operator Attention since 10.14
_EXTRAS = {TENSORRT: "gpu", TENSORRT_RTX: "rtx"}


@dataclass(frozen=True)
class Gpu:
    """Name and compute capability (`8.9`) of a GPU."""

    name: str
    compute_capability: str


@dataclass
class Log:
    """Messages of the library since the last `clear`; TensorRT logs errors instead of raising them."""

    errors: list[str] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)

    def clear(self) -> None:
        """Delete all messages."""
        self.errors.clear()
        self.layers.clear()

    def reason(self) -> str:
        """The errors in one line."""
        lines = [re.sub(r"\s+", " ", error).strip() for error in self.errors]
        return "; ".join(dict.fromkeys(lines)) or "no error was logged"


@dataclass(frozen=True)
class Library:
    """TensorRT or TensorRT-RTX. Their interfaces are nearly equal; code for the differences checks `is_rtx`."""

    backend: str
    module: Any
    log: Log = field(default_factory=Log)

    @property
    def is_rtx(self) -> bool:
        """Whether this is TensorRT-RTX, which builds without a GPU and compiles kernels when an engine is loaded."""
        return self.backend == TENSORRT_RTX

    @property
    def version(self) -> str:
        """The version with all four parts; a plan runs only with the version that built it."""
        return str(self.module.__version__)

    @cached_property
    def logger(self) -> Any:
        """The logger, created once per process, because the library ignores any later logger."""
        trt, log = self.module, self.log

        class Logger(trt.ILogger):  # type: ignore[misc,name-defined] # the base class is known only at run time
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity <= trt.ILogger.ERROR:  # lower values are more severe
                    log.errors.append(message)
                elif "LayerType: " in message:
                    log.layers.append(message)

        return Logger()


@cache
def library_from_name(backend: str) -> Library:
    """Import the library of a backend. Raises `BackendError` that names the package to install."""
    if problem := installation_problem(backend):
        raise BackendError(f"the backend {backend} cannot be used: {problem}")
    library = Library(backend, import_module(_MODULES[backend]))
    if tuple(map(int, library.version.split(".")[:2])) < _OLDEST[backend]:
        wanted = ".".join(map(str, _OLDEST[backend]))
        raise BackendError(f"{backend} {library.version} is too old; pip install -U '{backend}>={wanted}'")
    return library


def library_for_building(backend: str, gpu: Gpu | None) -> Library:
    """The library of a backend; for `auto`, TensorRT if it can build here, else TensorRT-RTX. Raises `BackendError`."""
    if backend != "auto":
        return library_from_name(backend)
    if gpu is not None and installation_problem(TENSORRT) is None:
        return library_from_name(TENSORRT)
    if installation_problem(TENSORRT_RTX) is None:
        return library_from_name(TENSORRT_RTX)
    raise BackendError(
        f"plans need TensorRT; {how_to_install('gpu')} on the machine whose GPU will run them, "
        f"or {how_to_install('rtx')} to build for GeForce and workstation GPUs on any machine"
    )


def installation_problem(backend: str) -> str | None:
    """Why the library cannot be imported, and how to fix that; None if it can."""
    remedy = how_to_install(_EXTRAS[backend])
    if find_spec(_MODULES[backend]) is None:
        return f"{backend} is not installed; {remedy}"
    try:
        with unmasked():
            import_module(_MODULES[backend])
    except (ImportError, OSError) as error:  # a shared library is missing
        return f"{backend} is installed but cannot be loaded ({first_line(error)}); {remedy} again"
    return None


def gpu_problem(backend: str) -> str | None:
    """Why the library cannot run on this machine, and how to fix that; None if it can."""
    if problem := installation_problem(backend):
        return problem
    gpu = first_gpu()
    if gpu is None:
        builds = "; it can build plans on this machine" if backend == TENSORRT_RTX else ""
        return f"{backend} needs an NVIDIA GPU, and torch finds none{builds}"
    try:
        library = library_from_name(backend)
    except BackendError as error:  # too old
        return str(error)
    if library.is_rtx and gpu.compute_capability not in supported_capabilities(library):
        return unsupported(gpu.compute_capability)
    return None


def unsupported(capability: str) -> str:
    """The message for a GPU that TensorRT-RTX does not support."""
    return (
        f"tensorrt-rtx does not support GPUs of compute capability {capability} "
        f"(only GeForce and workstation GPUs); use --backend {TENSORRT}"
    )


def supported_capabilities(library: Library) -> tuple[str, ...]:
    """The compute capabilities that this version of TensorRT-RTX supports, as `8.9`."""
    names = re.findall(r"\bSM(\d+)(\d)\b", " ".join(library.module.ComputeCapability.__members__))
    return tuple(f"{major}.{minor}" for major, minor in names)


def first_gpu() -> Gpu | None:
    """The first GPU, which `auto` selects; None if there is none. Imports torch only if a driver is installed."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    import torch

    return gpu_of(torch.device("cuda:0")) if torch.cuda.is_available() else None


def gpu_of(device: Any) -> Gpu:
    """Name and compute capability of a CUDA device of torch."""
    import torch

    properties = torch.cuda.get_device_properties(device)
    return Gpu(properties.name, f"{properties.major}.{properties.minor}")
