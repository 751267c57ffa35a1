"""What the demo shows: images of several settings from the same noise, with speed-ups and PSNR, and a conclusion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import as_file, files

import torch
from PIL import Image
from torch import Tensor

from fora_trt.evaluate.bench import Timing
from fora_trt.images.sheet import SheetRow, comparison_sheet
from fora_trt.metrics import latent_psnr
from fora_trt.pipeline import Pipeline
from fora_trt.report.results import BenchRow
from fora_trt.schedule import Schedule

CALIBRATED = "calibrated"
"""Text of the schedule that comes with the digits model; it was calibrated for DDIM with 50 steps and 18 full steps."""


def calibrated_schedule() -> Schedule:
    """The schedule that comes with the digits model."""
    with as_file(files("fora_trt.models") / "digits" / "calibrated-18.json") as path:
        return replace(Schedule.from_file(path), text=CALIBRATED)


SAME = 90.0
"""From this PSNR in dB on, images are called the same: they differ by rounding errors."""


@dataclass(frozen=True)
class Shown:
    """A timed row with the levels of its images (N, H, W, C) from 0 to 255, and its PSNR in dB to no caching.

    `name` is the name of its setting. The PSNR is None for images that are the same as those without caching.
    """

    row: BenchRow
    name: str
    levels: Tensor
    psnr: float | None

    @property
    def title(self) -> str:
        """The setting, and its speed-up over no caching on the same backend."""
        return f"{self.name}, {self.row.speedup:.1f}x"

    @property
    def detail(self) -> str:
        """The full steps and the PSNR."""
        steps = f"{self.row.setting.computed} steps full"
        return steps if self.psnr is None else f"{steps}, PSNR {self.psnr:.1f} dB"


def shown_of(pipeline: Pipeline, timings: Sequence[Timing], rows: Sequence[BenchRow]) -> list[Shown]:
    """The timed rows with their images; all are compared with the first row."""
    found, pixels = [], pipeline.manifest.latents.pixels
    for timing, row in zip(timings, rows, strict=True):
        control = row.setting.control_of is not None
        name = f"{row.setting.steps} steps, best solver" if control else row.setting.label
        close = float(latent_psnr(timing.latents, timings[0].latents, pixels).mean())
        levels = pipeline.decoder.levels(timing.latents, torch.device("cpu"))
        found.append(Shown(row, name, levels, close if close < SAME else None))
    return found


def sheet_of(shown: Sequence[Shown]) -> Image.Image:
    """Labels, images, and differences to the first row."""
    return comparison_sheet([SheetRow(one.title, one.detail, one.levels.numpy()) for one in shown])


def conclusion_of(shown: Sequence[Shown]) -> str:
    """One sentence: the cached row with the smallest difference beside all other rows of about as much time."""
    cached = [one for one in shown if one.row.setting.caches and one.psnr is not None]
    if not cached:
        return "No cached row differs from no caching."
    best = max(cached, key=lambda one: one.psnr or 0)
    others = [one for one in shown if one is not best and one.psnr is not None and one.row.backend == best.row.backend]
    rivals = ", ".join(f"{one.name} {one.psnr:.1f} dB at {one.row.speedup:.1f}x" for one in others)
    return (
        f"The schedule {best.name} is {best.row.speedup:.1f} times as fast as no caching, and its images "
        f"come within {best.psnr:.1f} dB of those (PSNR, higher is closer); from the same noise: {rivals}."
    )
