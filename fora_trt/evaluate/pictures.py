"""One image that compares several settings, from the same noise."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from PIL import Image
from torch import Tensor

from fora_trt.evaluate.bench import Timing
from fora_trt.images.grid import grid
from fora_trt.pipeline import Pipeline
from fora_trt.report.results import BenchRow


def grey_levels_between(one: Tensor, other: Tensor) -> float:
    """Root mean square difference of two batches of pixels in [-1, 1], in grey levels (0-255)."""
    levels = [(pixels / 2 + 0.5).clamp(0, 1) * 255 for pixels in (one, other)]
    return (levels[0] - levels[1]).square().mean().sqrt().item()


def picture_of(pipeline: Pipeline, timed: Iterable[tuple[Timing, BenchRow]]) -> Image.Image:
    """A grid with the images of each row, labelled with its name and its speed-up over no caching."""
    cpu = torch.device("cpu")
    rows = [(pipeline.decoder.images(timing.latents, cpu), row) for timing, row in timed]
    labels = [f"{row.backend}, {row.setting.label}: {row.speedup:.1f}x" for _, row in rows]
    return grid([images for images, _ in rows], labels)
