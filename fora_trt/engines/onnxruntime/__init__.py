"""The backend `onnxruntime`: check the installation, its version and devices, and say how to repair it."""

from __future__ import annotations

from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from fora_trt.engines.backends import BACKENDS, Backend, how_to_install, release_of

if TYPE_CHECKING:
    import torch

    from fora_trt.bundle import Bundle, Manifest
    from fora_trt.engines.base import Engine
    from fora_trt.engines.options import EngineOptions

ONNXRUNTIMES = ("onnxruntime", "onnxruntime-gpu")
"""Distributions that install the same module, `onnxruntime`."""

OLDEST_ONNXRUNTIME = {"cpu": (1, 23), "cuda": (1, 31)}
"""Oldest supported version per device type. Earlier ones may silently run Attention on the CPU despite a GPU."""


def _onnxruntime_problem() -> str | None:
    folder = _folder_of_onnxruntime()
    if folder is None:
        return f"onnxruntime is not installed; {how_to_install('cpu')}, or 'fora-trt[gpu]' for an NVIDIA GPU"
    if all(_versions_in(folder, name) for name in ONNXRUNTIMES):
        return (
            f"onnxruntime and onnxruntime-gpu are both installed in {folder} and overwrite each other's files; "
            "pip uninstall onnxruntime onnxruntime-gpu, then pip install 'fora-trt[cpu]' or 'fora-trt[gpu]'"
        )
    return None


def onnxruntime_too_old(device_type: str) -> str | None:
    """Why the installed ONNX Runtime is too old for `cpu` or `cuda`, and how to fix it; None if it is not."""
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
    """The folder from which `onnxruntime` is imported; None if it is not installed.

    If several folders contain an installation, Python imports the first one on the import path; the others are unused.
    """
    spec = find_spec("onnxruntime")
    if spec is None or spec.origin is None:  # origin is None for an empty folder that an uninstall has left
        return None
    return Path(spec.origin).parents[1]


def _versions_in(folder: Path, distribution: str) -> list[str]:
    """The versions of a distribution that are installed in exactly this folder."""
    return [found.version for found in metadata.distributions(name=distribution, path=[str(folder)])]


class OnnxRuntimeBackend(Backend):
    """Inference sessions on the CPU or the CUDA provider."""

    name = "onnxruntime"
    distributions = ONNXRUNTIMES
    preference = 30

    def problem(self) -> str | None:
        return _onnxruntime_problem()

    def has_cuda(self) -> bool:
        return _onnxruntime_has_cuda()

    def refusal(self, manifest: Manifest, device_type: str) -> str | None:
        if problem := onnxruntime_too_old(device_type):
            return problem
        if manifest.precision == "bf16" and device_type == "cpu":
            return (
                "onnxruntime has no bfloat16 kernels for the CPU; use --backend torch, or export with --precision fp32"
            )
        return None

    def versions(self) -> dict[str, str]:
        """Versions of the distributions in the folder that is imported; shadowed installations do not count."""
        folder = _folder_of_onnxruntime()
        found = {} if folder is None else {name: _versions_in(folder, name) for name in ONNXRUNTIMES}
        return {name: versions[0] for name, versions in found.items() if versions}

    def found(self) -> str:
        shown = super().found()
        if self.problem() is not None:
            return shown
        import onnxruntime

        from fora_trt.engines.onnxruntime.weighted_sum import kernel_library

        providers = [name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers()]
        shown = shown or "installed under another name"
        shown += " on " + ", ".join(name for name in ("CUDA", "CPU") if name in providers)
        return shown + ("" if kernel_library() else "; no C compiler (cc, or set CC), so folded sums are slower")

    def remedy(self) -> str | None:
        return self.problem() or onnxruntime_too_old("cuda" if self.has_cuda() else "cpu")

    def engines_of(self, bundle: Bundle, device: torch.device, options: EngineOptions) -> dict[str, Engine]:
        from fora_trt.engines.onnxruntime.engine import engines_from_bundle

        return engines_from_bundle(bundle, device)


BACKENDS.register(OnnxRuntimeBackend())
