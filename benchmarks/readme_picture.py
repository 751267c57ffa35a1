"""Draw docs/digits.png: the same ten digits along four schedules, and how far each is from no caching.

    python -m benchmarks.readme_picture

All rows start from the same noise. PSNR is computed here; the speed-ups are those of the newest committed result of the
digits in benchmarks/results/. The figures are also kept in the file, under the key `rows`, as JSON.

Shapes: N images of H x W pixels with C channels, (N, H, W, C), levels from 0 to 255.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from benchmarks.readme_tables import newest_result
from fora_trt import Pipeline
from fora_trt.images.sheet import SheetRow, comparison_sheet
from fora_trt.metrics import mean_psnr, psnr

PICTURE = Path(__file__).parents[1] / "docs" / "digits.png"
SCHEDULES = ("none", "fora:2", "fora:3", "fora:5")
LABELS = tuple(range(10))
STEPS, SEED, BACKEND = 50, 0, "onnxruntime"


@dataclass(frozen=True)
class Row:
    """A schedule, its full steps, its speed-up in the committed result, and its PSNR in dB; None without caching."""

    schedule: str
    full_steps: int
    speedup: float
    psnr: float | None

    @property
    def lines(self) -> tuple[str, str]:
        """What stands beside the pictures."""
        steps = f"{self.full_steps} of {STEPS} full steps"
        if self.psnr is None:
            return "no caching", steps
        return f"{self.schedule}, {self.speedup:.1f}x the speed", f"{steps}, PSNR {self.psnr:.1f} dB"


def pictures_along(bundle: Path, schedule: str) -> Tensor:
    """(N, H, W, C): a picture of each digit, from the noise of the same seeds whatever the schedule."""
    images = Pipeline(bundle, schedule=schedule, backend=BACKEND)(class_labels=LABELS, steps=STEPS, seed=SEED).images
    levels = torch.stack([torch.from_numpy(np.array(image)) for image in images])
    return levels.reshape(*levels.shape[:3], -1)


def rows_of(pictures: dict[str, Tensor]) -> list[Row]:
    """A row for each schedule; the first is what the others are compared with."""
    bench = newest_result("digits")[0].bench
    rows = [row for row in (bench.rows if bench else ()) if row.backend == BACKEND and row.setting.control_of is None]
    measured = {row.setting.schedule: row for row in rows}
    plain = next(iter(pictures.values()))
    return [
        Row(text, measured[text].setting.full_steps, measured[text].speedup, mean_psnr(psnr(made, plain)))
        for text, made in pictures.items()
    ]


def sheet_of(pictures: dict[str, Tensor], rows: Sequence[Row]) -> Image.Image:
    """The rows below each other: labels, pictures, and differences to the first row."""
    return comparison_sheet(
        [SheetRow(*row.lines, made.numpy()) for row, made in zip(rows, pictures.values(), strict=True)]
    )


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path), default="export/digits")
def main(bundle: Path) -> None:
    """Draw docs/digits.png with the digits that `fora-trt export digits` wrote to BUNDLE."""
    pictures = {text: pictures_along(bundle, text) for text in SCHEDULES}
    rows = rows_of(pictures)
    content = PngInfo()
    content.add_text("rows", json.dumps([asdict(row) for row in rows]))
    sheet = sheet_of(pictures, rows)
    sheet.save(PICTURE, optimize=True, pnginfo=content)
    click.echo(f"wrote docs/{PICTURE.name}: {sheet.width} x {sheet.height} pixels, {PICTURE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
