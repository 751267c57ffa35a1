"""A report as one HTML page, which loads nothing from other files or the network, in light and dark colours."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

from PIL import Image

from fora_trt.images.grid import rows_of
from fora_trt.metrics import METRICS, SOLUTION_PSNR
from fora_trt.report.advice import Advice, advice_of
from fora_trt.report.drawing import DARK, LIGHT, Plot
from fora_trt.report.glossary import terms_of
from fora_trt.report.markdown import about_line, bench_line, machine_lines, quality_notes
from fora_trt.report.results import Quality, QualityRow, Report
from fora_trt.report.tables import bench_tables, environment_table, labels, quality_table, seconds

PSNRS = {"psnr", SOLUTION_PSNR}
"""The metrics among the key figures."""

IN_GRID = 8
"""The number of images in a row of the grid of `quality`; fewer if it compares fewer."""

LARGE_GRID, WIDEST = 1 << 20, 1280
"""A grid of more than `LARGE_GRID` bytes is embedded with at most `WIDEST` pixels a row and compressed with losses."""


@dataclass(frozen=True)
class Picture:
    """A plot as a PNG file in light and in dark colours."""

    plot: Plot
    light: bytes
    dark: bytes


@dataclass(frozen=True)
class Strip:
    """A row of the image grid: the name of its setting, speed-up and PSNR, and its images as a data URI."""

    name: str
    detail: str
    uri: str


def as_html(report: Report, pictures: Sequence[Sequence[Picture]], grid: bytes | None = None) -> str:
    """The HTML page with embedded plots, which stand together by group, and the image grid of `quality`."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["data_uri"] = data_uri
    template = environment.from_string((files("fora_trt.report") / "report.html.j2").read_text(encoding="utf-8"))
    advice, quality = advice_of(report, report.min_psnr), report.quality
    metrics = {name for row in quality.rows for name in row.metrics} if quality else set()
    values = {
        "report": report,
        "papers": (LIGHT.paper, DARK.paper),
        "about_line": about_line(report.about),
        "machine_lines": machine_lines(report),
        "advice": advice,
        "tiles": _tiles(advice),
        "environment": environment_table(report),
        "bench_line": bench_line(report.bench) if report.bench else "",
        "bench_tables": bench_tables(report.bench) if report.bench else [],
        "quality_table": quality_table(quality, advice.row.setting if advice.row else None) if quality else None,
        "quality_notes": quality_notes(quality) if quality else [],
        "pictures": pictures,
        "strips": [] if quality is None or grid is None else strips_of(quality, grid),
    }
    terms = terms_of(template.render(values, terms={}), sorted(metrics))
    return template.render(values, terms=terms)


def data_uri(content: bytes, kind: str = "png") -> str:
    """An image file as a URI that contains it."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def strips_of(quality: Quality, grid: bytes) -> list[Strip]:
    """The rows of the image grid, without its white background; a single one for an image of another layout.

    Empty if the file is damaged, or too large for Pillow.
    """
    names = labels([row.setting for row in quality.rows])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            sheet = Image.open(io.BytesIO(grid))
            sheet.load()
    except (OSError, Image.DecompressionBombError):
        return []
    rows, large = rows_of(sheet, names, min(IN_GRID, quality.images)), len(grid) > LARGE_GRID
    if rows is None:
        return [Strip("", f"One row per setting: {'; '.join(names)}", _embedded(sheet, large))]
    return [
        Strip(name, _detail(quality, row), _embedded(image, large))
        for name, row, image in zip(names, quality.rows, rows, strict=True)
    ]


def _detail(quality: Quality, row: QualityRow) -> str:
    """Speed-up and PSNR of a row."""
    if row is quality.rows[0]:
        return "the reference"
    gain = quality.rows[0].seconds_per_image / row.seconds_per_image
    return f"{gain:.2f}x, {METRICS['psnr'].shown(row.psnr)}"


def _embedded(image: Image.Image, large: bool) -> str:
    file = io.BytesIO()
    if not large:
        image.save(file, format="png", optimize=True)
        return data_uri(file.getvalue())
    height = max(1, round(image.height * min(1.0, WIDEST / image.width)))
    image.resize((min(image.width, WIDEST), height), Image.Resampling.LANCZOS).save(file, format="webp", quality=90)
    return data_uri(file.getvalue(), "webp")


def _tiles(advice: Advice) -> list[tuple[str, str]]:
    """Name and value of the key figures of the recommended setting."""
    row = advice.row
    if row is None:
        return []
    return [
        ("speed-up", f"{advice.speedup:.2f}x"),
        *(
            (one.column, one.shown(row.metrics[one.name]))
            for one in METRICS.values()
            if one.name in PSNRS & {*row.metrics}
        ),
        ("per image", seconds(row.seconds_per_image)),
        ("full steps", row.setting.computed),
    ]
