"""Which backends and extras work on this machine, and the command that installs what is missing."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import Requirement

from fora_trt.engines.backends import best_first, how_to_install, installed_version

EXTRAS = {
    "cpu": "for ONNX Runtime",
    "gpu": "for an NVIDIA GPU",
    "rtx": "to build for GeForce and workstation GPUs",
    "text": "for --prompt",
    "report": "for quality, and reports of bench",
    "serve": "for serve, and for --workers",
}
"""The extras of the package for users, and what each is for."""


@dataclass(frozen=True)
class Finding:
    """One line of the report: the item, its state, and how to fix it (empty if nothing is wrong)."""

    what: str
    found: str
    remedy: str = ""


def findings() -> list[Finding]:
    """Check Python, the GPU, every backend and extra, and the weights of metrics.

    Imports torch, and compiles a test kernel if a compiler is present.
    """
    import torch

    from fora_trt import __version__

    report = [
        Finding("fora-trt", __version__),
        Finding("Python", platform.python_version()),
        Finding("torch", torch.__version__),
    ]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            memory = gpu.total_memory / 2**30
            report.append(Finding("GPU", f"{gpu.name}, {memory:.0f} GiB, sm{gpu.major}{gpu.minor}"))
    else:
        build = torch.version.cuda
        report.append(
            Finding(
                "GPU",
                "none usable by torch",
                "the CPU is used" + ("" if build else "; this torch was built without CUDA"),
            )
        )
    for backend in best_first():
        remedy = backend.remedy()
        found = backend.found() or ("not installed" if remedy else "installed under another name")
        report.append(Finding(f"backend {backend.name}", found, remedy or ""))
    return [*report, *_extras(), *_weights()]


def _extras() -> Iterator[Finding]:
    """The packages of each extra, and those that are missing or too old."""
    try:
        needed = [Requirement(text) for text in metadata.requires("fora-trt") or ()]
    except metadata.PackageNotFoundError:
        yield Finding("extras", "unknown", "fora-trt runs without being installed; pip install it to see its extras")
        return
    for extra, purpose in EXTRAS.items():
        own = [one for one in needed if _is_of(one, extra) and not _is_of(one, "")]
        found = {one: installed_version(one.name) for one in own}
        bad = [one for one, version in found.items() if version is None or not one.specifier.contains(version)]
        if extra == "cpu" and bad and installed_version("onnxruntime-gpu"):
            continue  # which has the CPU's too
        there = ", ".join(f"{one.name} {version}" for one, version in found.items() if version)
        missing = " and ".join(f"{one.name}{one.specifier}" for one in bad)
        remedy = f"{purpose}, needs {missing}: {how_to_install(extra)}" if bad else ""
        yield Finding(f"extra {extra}", there or "not installed", remedy)


def _is_of(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is not None and requirement.marker.evaluate({"extra": extra})


def _weights() -> Iterator[Finding]:
    """The weights of the metrics of `quality`, which are never downloaded."""
    from fora_trt.evaluate.features import INCEPTION_URL
    from fora_trt.metrics import lpips_problem

    problem = lpips_problem((256, 256, 3))
    yield Finding("weights for LPIPS", "none" if problem else "found", problem or "")
    package = installed_version("torch-fidelity")
    install = "" if package else "pip install torch-fidelity; "
    yield Finding(
        "weights for Fréchet",
        f"torch-fidelity {package}" if package else "torch-fidelity is not installed",
        f"{install}give --inception-weights FILE, from {INCEPTION_URL}",
    )
