"""The registry of backends: list them, choose one that works on this machine, and say how to install another.

A backend is a subclass of `Backend`. It is registered in its package under `fora_trt/engines/`, or in a package outside
fora-trt.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib import metadata
from typing import TYPE_CHECKING

from fora_trt.errors import BackendError
from fora_trt.registry import Registry

if TYPE_CHECKING:
    import torch

    from fora_trt.bundle import Bundle, Manifest
    from fora_trt.engines.base import Engine
    from fora_trt.engines.options import EngineOptions

AUTO = "auto"


class Backend(ABC):
    """A source of engines.

    `distributions` are alternative Python packages of which one must be installed. `compiles` is true if the first run
    compiles and takes long, `builds` if engines are built for a largest batch. The backend name `auto` selects the
    backend with the highest `preference` that works on this machine and can run the bundle.
    """

    name: str
    distributions: tuple[str, ...] = ()
    preference: int = 0
    compiles: bool = False
    builds: bool = False

    @abstractmethod
    def problem(self) -> str | None:
        """Why the backend cannot be used on this machine, and how to fix that; None if it works."""

    @abstractmethod
    def engines_of(self, bundle: Bundle, device: torch.device, options: EngineOptions) -> dict[str, Engine]:
        """An engine for every graph of `bundle`. Raises `BackendError`."""

    def has_cuda(self) -> bool:
        """Whether the installed version of the backend supports CUDA."""
        return True

    def refusal(self, manifest: Manifest, device_type: str) -> str | None:
        """Why the backend cannot run a bundle on `cpu` or `cuda`, and what to do instead; None if it can."""
        return None

    def versions(self) -> dict[str, str]:
        """Versions of the installed packages in `distributions`."""
        found = {name: installed_version(name) for name in self.distributions}
        return {name: version for name, version in found.items() if version is not None}

    def found(self) -> str:
        """The installed packages with versions, for `fora-trt doctor`; empty if none is installed."""
        return ", ".join(f"{name} {version}" for name, version in self.versions().items())

    def remedy(self) -> str | None:
        """What does not work and how to fix it, for `fora-trt doctor`; None if everything works."""
        return self.problem()

    def engines(self, bundle: Bundle, device: torch.device, options: EngineOptions | None = None) -> dict[str, Engine]:
        """Check the backend and make an engine for every graph of `bundle`. Raises `BackendError`."""
        from fora_trt.engines.options import EngineOptions

        if problem := self.problem() or self.refusal(bundle.manifest, device.type):
            raise BackendError(f"the backend {self.name} cannot be used: {problem}")
        return self.engines_of(bundle, device, options or EngineOptions())


BACKENDS: Registry[Backend] = Registry("backend", BackendError, __package__)


def best_first() -> list[Backend]:
    """All backends in the order in which `auto` tries them."""
    return sorted(BACKENDS.values(), key=lambda backend: -backend.preference)


def backend_from_name(name: str, manifest: Manifest | None = None, device: str = AUTO) -> Backend:
    """The backend of this name; for `auto`, the best one that works on this machine and can run the bundle, if given.

    Raises `BackendError` for an unknown name.
    """
    if name != AUTO and name not in BACKENDS:
        known = ", ".join(one.name for one in best_first())
        raise BackendError(f"unknown backend {name!r}; choose one of {AUTO}, {known}")
    if name != AUTO:
        return BACKENDS[name]
    working = [one for one in best_first() if one.problem() is None]
    if manifest is None:
        return working[0]
    fitting = (one for one in working if one.refusal(manifest, device_from_name(device, one).type) is None)
    return next(fitting, working[0])


def device_from_name(name: str, backend: Backend) -> torch.device:
    """The device of this name; `auto` is the first GPU if torch and the backend can use it, else the CPU.

    Raises `BackendError` for an unknown device, and for a GPU if there is none.
    """
    import torch

    if name == AUTO:
        return torch.device("cuda:0" if torch.cuda.is_available() and backend.has_cuda() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BackendError(f"unknown device {name!r}; give a name such as cpu, cuda or cuda:1") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BackendError("torch finds no CUDA device; give --device cpu, or see 'fora-trt doctor'")
    return device


def how_to_install(extra: str) -> str:
    """The command that installs an extra of fora-trt; ONNX Runtime for the CPU and for GPUs exclude each other."""
    command = f"pip install 'fora-trt[{extra}]'"
    clashes = extra == "gpu" and installed_version("onnxruntime") is not None
    return f"pip uninstall onnxruntime, then {command}" if clashes else command


def release_of(version: str) -> tuple[int, int]:
    """The first two numbers of a version string."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution, without importing it; None if it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
