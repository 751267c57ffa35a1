"""Arranges images in rows and columns."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

SMALLEST_SIDE = 64  # pixels; smaller images are enlarged


def grid(rows: Sequence[Sequence[Image.Image]], labels: Sequence[str] | None = None) -> Image.Image:
    """Images of one size in rows, with a label at the left of each row; small images are enlarged without smoothing."""
    first = rows[0][0]
    factor = max(1, -(-SMALLEST_SIDE // min(first.size)))
    width, height, gap = first.width * factor, first.height * factor, 4
    font = ImageFont.load_default(size=max(14, height // 5))
    margin = gap + max((int(font.getlength(label)) + 2 * gap for label in labels or ()), default=0)
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


def square_grid(images: Sequence[Image.Image]) -> Image.Image:
    """All images in a grid that is square, or has fewer rows than columns."""
    columns = next(n for n in range(1, len(images) + 1) if n * n >= len(images))
    return grid([images[start : start + columns] for start in range(0, len(images), columns)])
