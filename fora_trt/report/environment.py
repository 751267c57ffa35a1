"""The environment of a measurement: hardware, package versions, commit."""

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
from fora_trt.engines.backends import BACKENDS, installed_version

VERSIONED = ("torch", "diffusers", "onnx", "triton")
"""Packages whose version is recorded, in addition to those of the backends."""


def environment() -> dict[str, Any]:
    """Hardware, versions and commit, as far as they are available; packages that are not installed are left out."""
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
    """Versions of the packages that affect results or times; packages that are not installed are left out."""
    found = {name: version for name in VERSIONED if (version := installed_version(name))}
    found |= {name: version for backend in BACKENDS.values() for name, version in backend.versions().items()}
    return {"fora_trt": __version__, **found, "torch": torch.__version__}


def _commit() -> str | None:
    """The commit of this source tree; None for an installed package."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root)]
    try:
        run = partial(subprocess.run, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True, timeout=10)
        commit = run([*git, "rev-parse", "HEAD"]).stdout.strip()
        sources = [".", ":!benchmarks/results"]  # a new result file does not change the measured code
        changed = run([*git, "status", "--porcelain", "-uno", "--", *sources]).stdout
    except (OSError, subprocess.SubprocessError):  # git is missing or slow, or another user owns the folder
        return None
    return f"{commit}{' with changes' if changed else ''}"
