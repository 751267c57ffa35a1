"""A sheet that compares images of several settings: labels, the images, and their differences to the first setting.

Shapes: images are H x W pixels with C channels, (H, W, C), levels from 0 to 255.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

FACTOR = 8
"""Differences are shown this many times as large."""

SMALLEST_SIDE, GAP, MARGIN = 64, 6, 28  # pixels: of an image, between images, around all
INK, PALE = (28, 30, 34), (110, 116, 124)
HIGHER, LOWER = np.array((178, 24, 43)), np.array((33, 102, 172))  # where an image is brighter or darker
LARGE, SMALL = 26, 22  # font sizes

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


@dataclass(frozen=True)
class SheetRow:
    """A setting: two lines of text, and its images (N, H, W, C)."""

    title: str
    detail: str
    images: NDArray[np.uint8]


def comparison_sheet(rows: Sequence[SheetRow]) -> Image.Image:
    """The rows below each other; the first is what the others are compared with. Small images are enlarged."""
    count, side_y, side_x = rows[0].images.shape[:3]
    scale = max(1, -(-SMALLEST_SIDE // min(side_y, side_x)))
    large, small = (ImageFont.load_default(size) for size in (LARGE, SMALL))
    column = MARGIN + max(int(font.getlength(text)) for row in rows for font, text in _lines(row, large, small))
    width, height = count * (side_x * scale + GAP) - GAP, side_y * scale + 3 * GAP
    left, right = MARGIN + column, 2 * MARGIN + column + width
    top = MARGIN + 44
    sheet = Image.new("RGB", (right + width + MARGIN, top + len(rows) * height + MARGIN - 3 * GAP), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((left, MARGIN), "from the same noise", PALE, small)
    draw.text((right, MARGIN), f"difference to the first row, {FACTOR} times amplified", PALE, small)
    for number, row in enumerate(rows):
        y = top + number * height
        for (font, text), (ink, shift) in zip(_lines(row, large, small), ((INK, -3), (PALE, 34)), strict=True):
            draw.text((MARGIN, y + shift), text, ink, font)
        for k, (image, reference) in enumerate(zip(row.images, rows[0].images, strict=True)):
            x = k * (side_x * scale + GAP)
            sheet.paste(_enlarged(np.broadcast_to(image, (side_y, side_x, 3)), scale), (left + x, y))
            if number:
                sheet.paste(_enlarged(_difference(image, reference), scale), (right + x, y))
    return sheet


def _lines(row: SheetRow, large: Font, small: Font) -> list[tuple[Font, str]]:
    return [(large, row.title), (small, row.detail)]


def _difference(image: NDArray[np.uint8], reference: NDArray[np.uint8]) -> NDArray[np.float64]:
    """(H, W, C) twice -> (H, W, 3): pale where nothing differs, red where brighter, blue where darker."""
    signed = (image.astype(float) - reference.astype(float)).mean(axis=2, keepdims=True) * FACTOR / 255
    strength = np.abs(signed).clip(0, 1)
    coloured: NDArray[np.float64] = 244 * (1 - strength) + np.where(signed > 0, HIGHER, LOWER) * strength
    return coloured


def _enlarged(levels: NDArray[np.generic], scale: int) -> Image.Image:
    image = Image.fromarray(levels.astype(np.uint8))
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
