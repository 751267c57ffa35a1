"""The report folder of `bench` and `quality`: `report.json`, and made from it an HTML page, a CSV table and plots.

Each command writes its own part and keeps the other one's.
"""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Mapping
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Literal

from filelock import FileLock

from fora_trt.engines.backends import how_to_install
from fora_trt.errors import InputError, first_line
from fora_trt.files import beside, read_manifest, sealed
from fora_trt.images.save import writable_file
from fora_trt.metrics import METRICS, SOLUTION_PSNR
from fora_trt.report.advice import Advice, advice_of, recommendation
from fora_trt.report.plots import (
    ERROR_OVER_STEPS,
    LATENCY_QUALITY,
    LATENCY_SOLUTION,
    PLOTS,
    SPEEDUP,
    TIME_SPLIT,
    plots_of,
)
from fora_trt.report.results import REPORT_VERSION, About, Bench, Quality, Report
from fora_trt.report.tables import Table, bench_tables, environment_table, labels, last, quality_table, seconds

JSON, CSV, HTML = "report.json", "report.csv", "report.html"
GRID, WORK = "grid.png", "quality"
REPORT_NAMES = (JSON, CSV, HTML, *PLOTS, GRID, WORK)
"""Names that a report folder may contain: the report's files, and the image grid and work folder of `quality`."""

Part = Literal["bench", "quality"]
_AGAIN = {"bench": "--force to measure it again", "quality": "--resume to continue it"}
ROOM = 4 << 20
"""Bytes that a report may take; a usual one has less than one MiB."""

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
    strange = [name for name in found if name not in REPORT_NAMES and not name.startswith(".")]
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
        _write_files(folder, report)
    return report


def _check_same(folder: Path, there: About, about: About) -> None:
    if there.sha256 != about.sha256:
        raise InputError(
            f"{folder} contains a report of {there.name} (manifest {there.sha256[:12]}), not of this {about.name} "
            f"(manifest {about.sha256[:12]}); give another folder"
        )


def _write_files(folder: Path, report: Report) -> None:
    """Write JSON and CSV first: the results are complete even if plotting fails."""

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

    write(JSON, sealed(report.model_dump(mode="json")).encode())
    write(CSV, as_csv(report).encode())
    check_installed()
    plots = plots_of(report)
    for name, content in plots.items():
        write(name, content)
    write(HTML, as_html(report, plots | _grid_of(folder, report)).encode())


def _grid_of(folder: Path, report: Report) -> dict[str, bytes]:
    """The image grid of `quality` as `GRID`, if the file exists directly in this folder."""
    name = report.quality.grid if report.quality else ""
    if not name or Path(name).name != name or not (folder / name).is_file():
        return {}
    return {GRID: (folder / name).read_bytes()}


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


def as_markdown(report: Report) -> str:
    """Recommendation, environment and tables, for a README or for `benchmarks/results/`."""
    about, bench, quality, advice = report.about, report.bench, report.quality, advice_of(report, report.min_psnr)
    lines = [f"# {_plain(about.name)}", "", f"{_plain(about_line(about))}.", "", f"{_plain(advice.finding)}."]
    lines += ["", "```", advice.command, "```"] if advice.command else []
    lines += ["", _plain(advice.also)] if advice.also else []
    for part, found in report.measured_on.items():
        shown = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in found.items() if value is not None)
        lines += ["", f"Measured for {part}: {_plain(shown)}"]
    if bench is not None:
        lines += ["", "## Latency", "", _plain(bench_line(bench))]
        for table in bench_tables(bench):
            lines += ["", f"{table.title}:", "", *_markdown_table(table)]
        lines += [line for one in bench.absent for line in ("", _plain(f"{one.backend} did not run: {one.why}"))]
        lines += [line for note in bench.notes for line in ("", _plain(note))]
    if quality is not None:
        table = quality_table(quality)
        lines += ["", "## Quality", "", f"{_plain(table.title)}:", "", *_markdown_table(table)]
        lines += [line for note in quality_notes(quality) for line in ("", _plain(note))]
    return "\n".join(lines) + "\n"


def _markdown_table(table: Table) -> list[str]:
    marks = ["---" if k < table.texts else "--:" for k in range(len(table.header))]
    return [f"| {' | '.join(map(_plain, cells))} |" for cells in (table.header, marks, *table.rows)]


def _plain(text: str) -> str:
    """Text as one line, with Markdown characters escaped."""
    for sign, instead in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("`", "\\`")):
        text = text.replace(sign, instead)
    return " ".join(text.split())


def about_line(about: About) -> str:
    """Architecture, source and precision of the bundle."""
    return f"{about.architecture} from {about.source}, {about.precision}"


def _machine_lines(report: Report) -> list[str]:
    """Machine, version, commit and date in one line per part; identical lines only once."""
    lines = []
    for found in report.measured_on.values():
        cores = f", {found['cores']} cores" if found.get("cores") else ""
        facts = (
            found.get("gpu"), f"{found.get('processor') or 'unknown processor'}{cores}",
            f"fora-trt {found.get('fora_trt')}", str(found.get("commit") or "")[:7], found.get("date"),
        )  # fmt: skip
        lines.append(" · ".join(str(part) for part in facts if part))
    return list(dict.fromkeys(lines))


def bench_line(bench: Bench) -> str:
    """How latency was measured."""
    stopped = " (the measurement was interrupted)" if bench.interrupted else ""
    return (
        f"{bench.steps} steps on {bench.device}, guidance {bench.guidance_scale:g}; median of {bench.repeats} "
        f"interleaved runs{stopped}; measured peak rates of this machine: {bench.peaks.flops / 1e9:,.0f} GFLOP/s and "
        f"{bench.peaks.bytes / 1e9:,.0f} GB/s."
    )


def quality_notes(quality: Quality) -> list[str]:
    """The source of the image features, and the notes of the measurement."""
    source = quality.features
    features = [f"Image features for Fréchet distance, precision and recall: {source}."] if source else []
    return [*features, *quality.notes]


def as_html(report: Report, pictures: Mapping[str, bytes]) -> str:
    """The HTML page with embedded plots; it loads nothing from other files or the network."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["data_uri"] = lambda png: f"data:image/png;base64,{base64.b64encode(png).decode()}"
    template = environment.from_string((files("fora_trt.report") / "report.html.j2").read_text(encoding="utf-8"))
    advice = advice_of(report, report.min_psnr)
    return template.render(
        report=report,
        about_line=about_line(report.about),
        machine_lines=_machine_lines(report),
        advice=advice,
        tiles=_tiles(report, advice),
        environment=environment_table(report),
        bench_line=bench_line(report.bench) if report.bench else "",
        bench_tables=bench_tables(report.bench) if report.bench else [],
        quality_table=quality_table(report.quality, advice.row.setting if advice.row else None)
        if report.quality
        else None,
        metrics=[one for one in METRICS.values() if _is_measured(report, one.name)],
        quality_notes=quality_notes(report.quality) if report.quality else [],
        plots=[(pictures[name], *CAPTIONS[name]) for name in PLOTS if name in pictures],
        grid=pictures.get(GRID),
        grid_rows=labels([row.setting for row in report.quality.rows]) if report.quality else [],
    )


PSNRS = {"psnr", SOLUTION_PSNR}
"""The metrics among the key figures."""


def _is_measured(report: Report, metric: str) -> bool:
    return report.quality is not None and any(metric in row.metrics for row in report.quality.rows)


CAPTIONS = {
    LATENCY_QUALITY: (
        "Seconds per image against PSNR to no caching, one point per setting",
        "Up and to the left is better; numbers are full steps. No setting is both faster and closer than one on the "
        "Pareto front.",
    ),
    LATENCY_SOLUTION: (
        "Seconds per image against PSNR to the fine solution, one point per setting",
        "The same, against a solution with many more steps: no caching has an error of its own here.",
    ),
    SPEEDUP: (
        "Speed-up of each schedule, one line per backend",
        "The roofline counts the arithmetic and memory traffic of reuse steps; the ideal counts them as free.",
    ),
    TIME_SPLIT: (
        "Time of every trajectory, divided into full steps, reuse steps and overhead",
        "Caching replaces full steps by reuse steps; it does not reduce the overhead, the time outside the engines.",
    ),
    ERROR_OVER_STEPS: (
        "Relative error of the latents after every step, one line per setting",
        "The reference is the same number of steps without caching, from the same noise.",
    ),
}
"""For each plot the text of its `alt` attribute, and its caption."""


def _tiles(report: Report, advice: Advice) -> list[tuple[str, str]]:
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
        ("full steps", f"{row.setting.full_steps} of {row.setting.steps}"),
    ]
