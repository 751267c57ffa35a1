"""The images of several settings beside each other, from the same noise."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from PIL import Image
from torch import Tensor

from fora_trt.bundle import Bundle
from fora_trt.evaluate.bench import Timing
from fora_trt.evaluate.results import BenchRow
from fora_trt.runtime.images import Decoder, grid


def grey_levels_between(one: Tensor, other: Tensor) -> float:
    """Root mean square difference of two batches of pixels in [-1, 1], in grey levels of 255."""
    levels = [(pixels / 2 + 0.5).clamp(0, 1) * 255 for pixels in (one, other)]
    return (levels[0] - levels[1]).square().mean().sqrt().item()


def picture_of(bundle: Bundle, timed: Iterable[tuple[Timing, BenchRow]]) -> Image.Image:
    """The images of each row, with its name and how much faster it is than its backend without caching."""
    decoder, cpu = Decoder(bundle.manifest), torch.device("cpu")
    rows = [(decoder.images(timing.latents, cpu), row) for timing, row in timed]
    labels = [f"{row.backend}, {row.setting.label}: {row.speedup:.1f}x" for _, row in rows]
    return grid([images for images, _ in rows], labels)
