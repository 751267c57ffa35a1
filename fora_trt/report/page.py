"""The report folder of `bench` and `quality`: `report.json`, and made from it an HTML page, a CSV table and plots.

Each command writes its own part and keeps the other one's.
"""

from __future__ import annotations

import csv
import io
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Literal

from filelock import FileLock

from fora_trt.engines.backends import how_to_install
from fora_trt.errors import InputError, first_line
from fora_trt.files import beside, read_manifest, sealed
from fora_trt.images.save import writable_file
from fora_trt.report.advice import recommendation
from fora_trt.report.drawing import DARK, LIGHT
from fora_trt.report.html import Picture, as_html
from fora_trt.report.plots import grouped, is_plot, plots_of
from fora_trt.report.results import REPORT_VERSION, About, Bench, Quality, Report
from fora_trt.report.tables import last

JSON, CSV, HTML = "report.json", "report.csv", "report.html"
GRID, WORK = "grid.png", "quality"
REPORT_NAMES = (JSON, CSV, HTML, GRID, WORK)
"""Names that a report folder may contain beside the plots; the last two are the image grid and work folder of
`quality`."""

Part = Literal["bench", "quality"]
_AGAIN = {"bench": "--force to measure it again", "quality": "--resume to continue it"}
ROOM = 4 << 20
"""Bytes that a report may take; one with a batch size and a number of steps has less than one MiB."""

_NEEDED = ("matplotlib", "jinja2")


def check_report_folder(folder: Path, part: Part, about: About, replace: bool = False) -> None:
    """Raise `InputError` unless `part` can be written to `folder`; called before the measurement, which may take hours.

    With `replace` (`bench --force`, `quality --resume`) the folder may already contain the part, and other files.
    """
    check_installed()
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; give a folder for the report")
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    writable_file(nearest / JSON)
    _check_room(nearest)
    there = read_report(folder)
    if there is not None:
        _check_same(folder, there.about, about)
        mended = "" if _is_whole(folder) else f", from which {HTML} and the plots are written now"
        if mended:  # the disk was full, or the process killed
            _write_files(folder, there)
        if getattr(there, part) is not None and not replace:
            raise InputError(
                f"{folder} already contains the {part} part of a report of {there.about.name}{mended}; "
                f"give {_AGAIN[part]}"
            )
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    strange = [name for name in found if not (name in REPORT_NAMES or is_plot(name) or name.startswith("."))]
    if strange and not replace:
        raise InputError(f"{folder} contains {strange[0]}, which is not a file of a report; give another folder")


def _check_room(folder: Path) -> None:
    try:
        with TemporaryFile(dir=folder) as file:
            file.write(bytes(ROOM))
    except OSError as error:
        raise InputError(
            f"a report needs {ROOM >> 20} MiB in {folder}, which cannot be written ({error.strerror}); make room, or "
            "give another folder"
        ) from error


def _is_whole(folder: Path) -> bool:
    """Whether the page, which is written last, is of the same results as the JSON file, which is written first."""
    page = folder / HTML
    return page.exists() and page.stat().st_mtime_ns >= (folder / JSON).stat().st_mtime_ns


def check_installed() -> None:
    """Raise `InputError` if matplotlib or jinja2, which a report needs, is missing."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise InputError(f"a report needs {' and '.join(missing)}; {how_to_install('report')}")


def read_report(folder: Path) -> Report | None:
    """The report in `folder`; None if there is none. Raises `InputError` for a damaged or a newer report."""
    if not (folder / JSON).exists():
        return None
    mend = "remove it, or give another folder"
    return read_manifest(folder, Report, REPORT_VERSION, "report", mend, InputError, JSON)


def write_report(
    folder: Path,
    about: About,
    measured_on: dict[str, Any],
    *,
    bench: Bench | None = None,
    quality: Quality | None = None,
    min_psnr: float = 30.0,
) -> Report:
    """Add results to the report in `folder`, keep the other part, and write all files of the report.

    `measured_on` is recorded for the given parts, `min_psnr` (smallest PSNR of a recommended setting, in dB) with
    `quality`. Raises `InputError` for a report of another bundle, and if files cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({first_line(error)}); give another folder") from error
    with FileLock(folder / ".report.lock"):  # bench and quality may finish together; each must read the other's part
        there = read_report(folder)
        if there is not None:
            _check_same(folder, there.about, about)
        given = {name: part for name, part in (("bench", bench), ("quality", quality)) if part is not None}
        parts = {"bench": there.bench, "quality": there.quality} if there else {}
        report = Report(
            format_version=REPORT_VERSION,
            about=about,
            measured_on={**(there.measured_on if there else {}), **dict.fromkeys(given, measured_on)},
            min_psnr=there.min_psnr if there and quality is None else min_psnr,
            **{**parts, **given},
        )
        report = report.model_copy(update={"recommendation": recommendation(report, report.min_psnr)})
        _write_files(folder, report, replaces=any(parts.get(name) is not None for name in given))
        if there is not None:
            _remove_old_plots(folder, report)
    return report


def _check_same(folder: Path, there: About, about: About) -> None:
    if there.sha256 != about.sha256:
        raise InputError(
            f"{folder} contains a report of {there.name} (manifest {there.sha256[:12]}), not of this {about.name} "
            f"(manifest {about.sha256[:12]}); give another folder"
        )


def _write_files(folder: Path, report: Report, replaces: bool = False) -> None:
    """Draw everything, then write all files; JSON and CSV come first, and are written too if drawing fails.

    Drawing takes seconds. An interruption there keeps the earlier report if the new one replaces its results.
    """

    def write(name: str, content: bytes) -> None:
        try:
            with beside(folder / name) as file:
                file.write(content)
        except OSError as error:
            again = "quality --resume" if name == JSON else "the same command, quality with --resume,"
            raise InputError(
                f"{folder / name} cannot be written: {first_line(error)}; make room; {again} writes the report "
                "without measuring again"
            ) from error

    results = {JSON: sealed(report.model_dump(mode="json")).encode(), CSV: as_csv(report).encode()}
    pages: dict[str, bytes] = {}
    try:
        pages = _drawn(report, _grid_of(folder, report))
    except BaseException as error:
        if replaces and not isinstance(error, Exception):
            results.clear()
        raise
    finally:
        for name, content in {**results, **pages}.items():
            write(name, content)


def _drawn(report: Report, grid: bytes | None) -> dict[str, bytes]:
    """The plots and the page, which comes last."""
    check_installed()
    pictures = [
        [Picture(plot, plot.png(LIGHT), plot.png(DARK)) for plot in group] for group in grouped(plots_of(report))
    ]
    plots = {picture.plot.name: picture.light for group in pictures for picture in group}
    return {**plots, HTML: as_html(report, pictures, grid).encode()}


def _remove_old_plots(folder: Path, report: Report) -> None:
    """Remove the plots of batch sizes and numbers of steps that are not in the report any more."""
    names = {plot.name for plot in plots_of(report)}
    for path in folder.iterdir():
        if is_plot(path.name) and path.name not in names:
            path.unlink(missing_ok=True)


def _grid_of(folder: Path, report: Report) -> bytes | None:
    """The image grid of `quality`, if the file exists directly in this folder."""
    name = report.quality.grid if report.quality else ""
    if not name or Path(name).name != name or not (folder / name).is_file():
        return None
    return (folder / name).read_bytes()


def as_csv(report: Report) -> str:
    """One flat table: one line per row of each part, times in seconds, empty cells for values not measured."""
    rows: list[dict[str, Any]] = []
    for row in report.bench.rows if report.bench else ():
        one = row.model_dump(exclude={"setting"})
        own = {"images": one.pop("images"), "seconds_per_image": row.seconds / row.images}
        rows.append({"part": "bench", "backend": one.pop("backend"), **row.setting.model_dump(), **own, **one})
    for found in report.quality.rows if report.quality else ():
        assert report.quality is not None
        one = found.model_dump(exclude={"setting", "latent_errors", "metrics"}) | found.metrics
        own = {"images": report.quality.images, "latent_error": last(found.latent_errors)}
        rows.append({"part": "quality", "backend": report.quality.backend, **found.setting.model_dump(), **own, **one})
    file = io.StringIO()
    writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()
