"""Which backends work on this machine, and the command that installs what is missing."""

from __future__ import annotations

import platform
from dataclasses import dataclass

from fora_trt.engines.backends import BACKENDS, installed_version, onnxruntime_too_old


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was looked at, what was found, and what mends it (empty where all is well)."""

    what: str
    found: str
    remedy: str = ""


def findings() -> list[Finding]:
    """Look at Python, the GPU and every backend; imports torch, and compiles a kernel if it can."""
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
                "none that torch can use",
                "the CPU is used" + ("" if build else "; this torch was built without CUDA"),
            )
        )
    for backend in BACKENDS.values():
        problem = backend.problem()
        versions = [f"{name} {version}" for name in backend.distributions if (version := installed_version(name))]
        found = ", ".join(versions) or ("not installed" if problem else "installed under another name")
        if problem is None and backend.name == "onnxruntime":
            import onnxruntime

            from fora_trt.engines.weighted_sum import kernel_library

            providers = [name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers()]
            found += " on " + ", ".join(name for name in ("CUDA", "CPU") if name in providers)
            problem = onnxruntime_too_old("cuda" if "CUDA" in providers else "cpu")
            found += "" if kernel_library() else "; slower folded sums, there is no C compiler (cc, or CC=...)"
        report.append(Finding(f"backend {backend.name}", found, problem or ""))
    return report
