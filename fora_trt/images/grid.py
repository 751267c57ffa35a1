"""Arranges images in rows and columns."""

from __future__ import annotations

from collections.abc import Sequence

import numpy
from PIL import Image, ImageDraw, ImageFont

SMALLEST_SIDE, GAP = 64, 4  # pixels: smaller images are enlarged; between images
WHITE = 255


def grid(rows: Sequence[Sequence[Image.Image]], labels: Sequence[str] | None = None) -> Image.Image:
    """Images of one size in rows, with a label at the left of each row; small images are enlarged without smoothing."""
    first = rows[0][0]
    factor = max(1, -(-SMALLEST_SIDE // min(first.size)))
    width, height, gap = first.width * factor, first.height * factor, GAP
    font, margin = _font(height), _margin(labels or (), height)
    columns = max(map(len, rows))
    mode = "RGB" if first.mode == "RGB" else "L"
    sheet = Image.new(mode, (margin + columns * (width + gap), gap + len(rows) * (height + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, row in enumerate(rows):
        top = gap + i * (height + gap)
        if labels:
            draw.text((2 * gap, top + height / 2), labels[i], fill="black", font=font, anchor="lm")
        for j, image in enumerate(row):
            larger = image.resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(larger, (margin + j * (width + gap), top))
    return sheet


def _font(height: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=max(14, height // 5))


def _margin(labels: Sequence[str], height: int) -> int:
    """Pixels to the left of the images, which are `height` pixels high."""
    font = _font(height)
    return GAP + max((int(font.getlength(label)) + 2 * GAP for label in labels), default=0)


def rows_of(sheet: Image.Image, labels: Sequence[str], columns: int) -> list[Image.Image] | None:
    """The inverse of `grid`: each row of a sheet without its label, with transparent gaps between its images.

    `columns` is the number of images of a row. None if the sheet was not made by `grid` with these labels.
    """
    height, rest = divmod(sheet.height - GAP, max(1, len(labels)))
    margin = _margin(labels, height - GAP)
    width, over = divmod(sheet.width - margin, columns)
    if rest or over or min(height, width) <= GAP:
        return None
    rows = []
    for top in range(GAP, sheet.height, height):
        row = numpy.array(sheet.crop((margin, top, sheet.width, top + height)).convert("RGBA"))
        between = numpy.ones(row.shape[:2], dtype=bool)  # whether a pixel is outside the images
        for left in range(0, columns * width, width):
            between[:-GAP, left : left + width - GAP] = False
        if (row[between] != WHITE).any():
            return None
        row[between] = 0
        rows.append(Image.fromarray(row[:-GAP, :-GAP]))
    return rows


def square_grid(images: Sequence[Image.Image]) -> Image.Image:
    """All images in a grid that is square, or has fewer rows than columns."""
    columns = next(n for n in range(1, len(images) + 1) if n * n >= len(images))
    return grid([images[start : start + columns] for start in range(0, len(images), columns)])
