"""A folder with what `bench` and `quality` found: `report.json`, and from it a page, a table for programs and pictures.

Either command writes its part and lets the other one's stand.
"""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Mapping
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock

from fora_trt.errors import InputError
from fora_trt.evaluate.advice import Advice, advice_of, recommendation
from fora_trt.evaluate.plots import ERROR_OVER_STEPS, LATENCY_QUALITY, PLOTS, SPEEDUP, TIME_SPLIT, plots_of
from fora_trt.evaluate.results import REPORT_VERSION, About, Bench, Quality, Report
from fora_trt.evaluate.tables import Table, bench_tables, circumstances_table, labels, last, quality_table, seconds
from fora_trt.folders import read_manifest, sealed
from fora_trt.runtime.outputs import writable_file, write_whole

JSON, CSV, HTML = "report.json", "report.csv", "report.html"
GRID, WORK = "grid.png", "quality"
REPORT_NAMES = (JSON, CSV, HTML, *PLOTS, GRID, WORK)
"""What may stand in the folder of a report: its files, the picture of `quality`, and the folder that it works in."""

Part = Literal["bench", "quality"]
_AGAIN = {"bench": "--force to measure it again", "quality": "--resume to go on with it"}
_NEEDED = ("matplotlib", "jinja2")


def check_report_folder(folder: Path, part: Part, about: About, replace: bool = False) -> None:
    """Raise `InputError` unless `part` can be written there, before hours are spent on measuring it.

    With `replace` the part may be there already (`bench --force`, `quality --resume`), and so may other files.
    """
    check_installed()
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; give a folder for the report")
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    writable_file(nearest / JSON)
    there = read_report(folder)
    if there is not None:
        _check_same(folder, there.about, about)
        if getattr(there, part) is not None and not replace:
            raise InputError(f"{folder} holds a {part} of {there.about.name} already; give {_AGAIN[part]}")
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    strange = [name for name in found if name not in REPORT_NAMES and not name.startswith(".")]
    if strange and not replace:
        raise InputError(f"{folder} holds {strange[0]}, which is not of a report; give another folder")


def check_installed() -> None:
    """Raise `InputError` where what draws and writes reports is missing."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise InputError(f"a report needs {' and '.join(missing)}; pip install 'fora-trt[report]'")


def read_report(folder: Path) -> Report | None:
    """The report in `folder`; None where there is none. Raises `InputError` for a damaged or a newer one."""
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
    """Put what was found into the report in `folder`, beside the part that is there, and write all its files.

    `measured_on` is kept for the parts given, `min_psnr` (dB, the stated loss) with `quality`. Raises `InputError`
    for a report of another bundle, and where files cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror or error}); give another folder") from error
    with FileLock(folder / ".report.lock"):  # bench and quality may end at once, and each must see the other's part
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
            f"{folder} holds a report of {there.name} (manifest {there.sha256[:12]}) and not of this {about.name} "
            f"({about.sha256[:12]}); give another folder"
        )


def _write_files(folder: Path, report: Report) -> None:
    """What was measured first: it is whole even if nothing can be drawn of it."""

    def write(name: str, content: bytes) -> None:
        write_whole(folder / name, lambda file: file.write(content))

    write(JSON, sealed(report.model_dump(mode="json")).encode())
    write(CSV, as_csv(report).encode())
    check_installed()
    plots = plots_of(report)
    for name, content in plots.items():
        write(name, content)
    write(HTML, as_html(report, plots | _grid_of(folder, report)).encode())


def _grid_of(folder: Path, report: Report) -> dict[str, bytes]:
    """The picture of `quality` as `GRID`, if it is there and stands in this very folder."""
    name = report.quality.grid if report.quality else ""
    if not name or Path(name).name != name or not (folder / name).is_file():
        return {}
    return {GRID: (folder / name).read_bytes()}


def as_csv(report: Report) -> str:
    """One flat table: a line for each row of each part, times in seconds, nothing where a figure was not taken."""
    rows: list[dict[str, Any]] = []
    for row in report.bench.rows if report.bench else ():
        one = row.model_dump(exclude={"setting"})
        own = {"images": one.pop("images"), "seconds_per_image": row.seconds / row.images}
        rows.append({"part": "bench", "backend": one.pop("backend"), **row.setting.model_dump(), **own, **one})
    for found in report.quality.rows if report.quality else ():
        assert report.quality is not None
        one = found.model_dump(exclude={"setting", "latent_errors"})
        own = {"images": report.quality.images, "latent_error": last(found.latent_errors)}
        rows.append({"part": "quality", "backend": report.quality.backend, **found.setting.model_dump(), **own, **one})
    file = io.StringIO()
    writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def as_markdown(report: Report) -> str:
    """Sentence, circumstances and tables, for a README or for `benchmarks/results/`."""
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
        lines += [line for one in bench.absent for line in ("", _plain(f"{one.backend} could not run: {one.why}"))]
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
    """Text that means nothing to Markdown, in one line."""
    for sign, instead in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("`", "\\`")):
        text = text.replace(sign, instead)
    return " ".join(text.split())


def about_line(about: About) -> str:
    """Which model it is."""
    return f"{about.architecture} from {about.source}, {about.precision}"


def _machine_lines(report: Report) -> list[str]:
    """Machine, version, commit and day in short, once for all parts that share them."""
    lines = []
    for found in report.measured_on.values():
        cores = f", {found['cores']} cores" if found.get("cores") else ""
        said = (
            found.get("gpu"), f"{found.get('processor') or 'unknown processor'}{cores}",
            f"fora-trt {found.get('fora_trt')}", str(found.get("commit") or "")[:7], found.get("date"),
        )  # fmt: skip
        lines.append(" · ".join(str(part) for part in said if part))
    return list(dict.fromkeys(lines))


def bench_line(bench: Bench) -> str:
    """How latency was taken."""
    stopped = ", interrupted before all were done" if bench.interrupted else ""
    return (
        f"{bench.steps} steps on {bench.device}, guidance {bench.guidance_scale:g}; median of {bench.repeats} "
        f"interleaved runs{stopped}; at best this machine does {bench.peaks.flops / 1e9:,.0f} GFLOP/s and moves "
        f"{bench.peaks.bytes / 1e9:,.0f} GB/s."
    )


def quality_notes(quality: Quality) -> list[str]:
    """Where features are from, and what was left out."""
    features = [f"Features for distance, precision and recall: {quality.features}."] if quality.features else []
    return [*features, *quality.notes]


def as_html(report: Report, pictures: Mapping[str, bytes]) -> str:
    """The page, with its pictures inside: it asks for nothing, from nowhere."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["data_uri"] = lambda png: f"data:image/png;base64,{base64.b64encode(png).decode()}"
    template = environment.from_string((files("fora_trt.evaluate") / "report.html.j2").read_text(encoding="utf-8"))
    advice = advice_of(report, report.min_psnr)
    return template.render(
        report=report,
        about_line=about_line(report.about),
        machine_lines=_machine_lines(report),
        advice=advice,
        tiles=_tiles(report, advice),
        circumstances=circumstances_table(report),
        bench_line=bench_line(report.bench) if report.bench else "",
        bench_tables=bench_tables(report.bench) if report.bench else [],
        quality_table=quality_table(report.quality, advice.row.setting if advice.row else None)
        if report.quality
        else None,
        quality_notes=quality_notes(report.quality) if report.quality else [],
        plots=[(pictures[name], *CAPTIONS[name]) for name in PLOTS if name in pictures],
        grid=pictures.get(GRID),
        grid_rows=labels([row.setting for row in report.quality.rows]) if report.quality else [],
    )


CAPTIONS = {
    LATENCY_QUALITY: (
        "Seconds per image against PSNR, one point a setting",
        "Up and to the left is better. On the Pareto front no other setting is both faster and closer to no caching.",
    ),
    SPEEDUP: (
        "Speed-up over the cache interval, one line a backend",
        "The dashes of the floor take the arithmetic and the bytes of reuse steps into account; the ideal does not.",
    ),
    TIME_SPLIT: (
        "Time of every trajectory, divided into full steps, reuse steps and the rest",
        "Caching replaces full steps by reuse steps; what is outside of the engines it cannot save.",
    ),
    ERROR_OVER_STEPS: (
        "Relative error of the latents after every step, one line a setting",
        "Against the same steps without caching, from the same noise: where along the trajectory caching hurts.",
    ),
}
"""What a picture shows, for those who cannot see it, and how it is read."""


def _tiles(report: Report, advice: Advice) -> list[tuple[str, str]]:
    """The figures of the setting that is recommended."""
    row = advice.row
    if row is None:
        return []
    return [
        ("speed-up", f"{advice.speedup:.2f}x"),
        ("PSNR", "identical" if row.psnr is None else f"{row.psnr:.1f} dB"),
        ("per image", seconds(row.seconds_per_image)),
        ("full steps", f"{row.setting.full_steps} of {row.setting.steps}"),
    ]
