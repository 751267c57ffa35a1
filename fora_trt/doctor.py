"""Which backends work on this machine, and the command that installs what is missing."""

from __future__ import annotations

import platform
from dataclasses import dataclass

from fora_trt.engines.backends import best_first


@dataclass(frozen=True)
class Finding:
    """One line of the report: the item, its state, and how to fix it (empty if nothing is wrong)."""

    what: str
    found: str
    remedy: str = ""


def findings() -> list[Finding]:
    """Check Python, the GPU and every backend; imports torch, and compiles a test kernel if a compiler is present."""
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
    return report
