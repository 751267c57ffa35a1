"""Options for making engines. Imports no torch, so that building plans starts fast."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

Progress = Callable[[float, str], None]
"""Callback for progress: takes the finished fraction, from 0 to 1, and the name of the current phase."""


@dataclass(frozen=True)
class EngineOptions:
    """Options for building engines; only the TensorRT backends build any.

    `folder` contains sets of plans by bundle, or is itself one set, which is then used. `batch` is the largest batch of
    the run; a missing set is built for it. `report` is called with a line before long work, `progress` during it.
    """

    folder: Path = Path("engines")
    batch: int = 2
    report: Callable[[str], None] = field(default=lambda line: None, compare=False)
    progress: Progress = field(default=lambda fraction, phase: None, compare=False)
