"""What a figure was measured on: hardware, versions, commit."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fora_trt import __version__
from fora_trt.engines.backends import installed_version

VERSIONED = ("diffusers", "onnx", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "triton")


def circumstances() -> dict[str, Any]:
    """Hardware, versions and commit, as far as they can be known; packages that are not installed are left out."""
    about = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = next((line.split(":")[1].strip() for line in about.splitlines() if line.startswith("model name")), "")
    return {
        "processor": cpu or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
        "fp32": "without TF32" if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **versions(),
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


def versions() -> dict[str, str]:
    """Of what computes; packages that are not installed are left out."""
    found = {name: version for name in VERSIONED if (version := installed_version(name))}
    return {"fora_trt": __version__, "torch": torch.__version__, **found}


def _commit() -> str | None:
    """The commit of this source tree; None for a package that was installed."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root)]
    try:
        run = partial(subprocess.run, capture_output=True, text=True, check=True)
        commit = run([*git, "rev-parse", "HEAD"]).stdout.strip()
        sources = [".", ":!benchmarks/results"]  # a result that was written over is no change of what is measured
        changed = run([*git, "status", "--porcelain", "-uno", "--", *sources]).stdout
    except (OSError, subprocess.CalledProcessError):  # no git, or not its owner
        return None
    return f"{commit}{' with changes' if changed else ''}"
