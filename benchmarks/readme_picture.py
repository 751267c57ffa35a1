"""Draw docs/digits.png: the same ten digits made in four ways, and how far each is from no caching.

    python -m benchmarks.readme_picture

The ways are no caching, FORA, as many steps of the best solver, and the calibrated schedule that comes with the digits.
All start from the same noise. PSNR is computed here; the speed-ups are those of the newest committed result of the
digits in benchmarks/results/. The figures are also kept in the file, under the key `rows`, as JSON.

Shapes: N images of H x W pixels with C channels, (N, H, W, C), levels from 0 to 255.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import as_file, files
from pathlib import Path

import click
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from benchmarks.readme_tables import newest_result
from fora_trt import Pipeline
from fora_trt.images.decode import rounded
from fora_trt.images.sheet import SheetRow, comparison_sheet
from fora_trt.metrics import mean_psnr, psnr
from fora_trt.report.results import QualityRow

PICTURE = Path(__file__).parents[1] / "docs" / "digits.png"
SCHEDULE, CALIBRATED_FILE = "fora:3", "calibrated-18.json"
LABELS = tuple(range(10))
SEED, BACKEND = 0, "onnxruntime"


@dataclass(frozen=True)
class Row:
    """A way, its full steps of how many, its speed-up in the committed result, and its PSNR in dB; None for no caching.

    `setting` names what was measured.
    """

    name: str
    setting: str
    full_steps: int
    nfe: int
    speedup: float
    psnr: float | None

    @property
    def lines(self) -> tuple[str, str]:
        """What stands beside the pictures."""
        steps = f"{self.full_steps} of {self.nfe} full steps"
        if self.psnr is None:
            return self.name, steps
        return f"{self.name}, {self.speedup:.1f}x the speed", f"{steps}, PSNR {self.psnr:.1f} dB"


def measured_rows() -> dict[str, QualityRow]:
    """The rows of the newest committed result by what they are called here; the first is without caching."""
    quality = newest_result("digits")[0].quality
    if quality is None:
        raise click.ClickException("the newest result of the digits has no quality; python -m benchmarks.readme_tables")
    by_name = {row.setting.label: row for row in quality.rows if row.setting.control_of is None}
    control = next(row for row in quality.rows if row.setting.control_of == SCHEDULE)
    return {
        "no caching": quality.rows[0],
        "FORA": by_name[SCHEDULE],
        f"{control.setting.steps} steps, best solver": control,
        "calibrated": by_name[CALIBRATED_FILE],
    }


def pictures_of(bundle: Path, row: QualityRow) -> Tensor:
    """(N, H, W, C): a picture of each digit before it is rounded, from the noise of the same seeds in every way."""
    setting = row.setting
    with as_file(files("fora_trt.models") / "digits" / CALIBRATED_FILE) as calibrated:
        schedule = str(calibrated) if setting.label == CALIBRATED_FILE else setting.schedule
        pipeline = Pipeline(bundle, schedule=schedule, scheduler=setting.scheduler, backend=BACKEND, device="cpu")
        made = pipeline(class_labels=LABELS, steps=setting.steps, seed=SEED)
    return pipeline.decoder.pictures(made.latents, pipeline.device)


def rows_of(pictures: dict[str, Tensor], measured: dict[str, QualityRow]) -> list[Row]:
    """A row for each way; the first is what the others are compared with."""
    plain = measured["no caching"].seconds_per_image
    return [
        Row(
            name,
            row.setting.label,
            row.setting.full_steps,
            row.setting.nfe,
            plain / row.seconds_per_image,
            mean_psnr(psnr(pictures[name], pictures["no caching"])),
        )
        for name, row in measured.items()
    ]


def sheet_of(pictures: dict[str, Tensor], rows: Sequence[Row]) -> Image.Image:
    """The rows below each other: labels, pictures, and differences to the first row."""
    return comparison_sheet(
        [SheetRow(*row.lines, rounded(made).numpy()) for row, made in zip(rows, pictures.values(), strict=True)]
    )


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path), default="export/digits")
def main(bundle: Path) -> None:
    """Draw docs/digits.png with the digits that `fora-trt export digits` wrote to BUNDLE."""
    measured = measured_rows()
    pictures = {name: pictures_of(bundle, row) for name, row in measured.items()}
    rows = rows_of(pictures, measured)
    content = PngInfo()
    content.add_text("rows", json.dumps([asdict(row) for row in rows]))
    sheet = sheet_of(pictures, rows)
    sheet.save(PICTURE, optimize=True, pnginfo=content)
    click.echo(f"wrote docs/{PICTURE.name}: {sheet.width} x {sheet.height} pixels, {PICTURE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
