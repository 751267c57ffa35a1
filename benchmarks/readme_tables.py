"""Measure the models of docs/measurements.md on this machine: what caching saves, and of the digits what it costs.

    python -m benchmarks.readme_tables cpu-2-cores
    python -m benchmarks.readme_tables h100 dit-xl-2-256 dit-xl-2-512

These commands write benchmarks/results/<model>_<hardware>_<date>.json and .md, and print the tables of
docs/measurements.md and the shorter ones of the README.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from benchmarks.digits_accuracy import digits_accuracy
from fora_trt.bundle import Bundle
from fora_trt.report.environment import environment
from fora_trt.report.markdown import as_markdown
from fora_trt.report.page import read_report
from fora_trt.report.results import Report
from fora_trt.report.tables import Table, bench_tables, quality_table

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Measured:
    """The arguments of `export`, `bench` and `quality` for a model; it has no quality table if `quality` is None.

    `calibrated` are the numbers of full steps that the model is calibrated for; all schedules are measured.
    """

    export: tuple[str, ...]
    bench: tuple[str, ...]
    quality: tuple[str, ...] | None = None
    calibrated: tuple[int, ...] = ()


MODELS = {
    "digits": Measured(
        ("digits",),
        ("--batch-sizes", "10", "--cache-intervals", "1,3,5,7"),
        ("--num-images", "256", "--cache-intervals", "3,5,7", "--truth-steps", "250"),
        (18, 11, 8),
    ),
    "dit-s-2": Measured(
        ("random:DiT-S/2",),
        (
            *("--batch-sizes", "1", "--cache-intervals", "1,3,5", "--backends", "onnxruntime,torch-compile"),
            *("--schedule", "fora:3,forecast=2", "--schedule", "dense:11,forecast=2"),
        ),
    ),
    "dit-b-2": Measured(
        ("random:DiT-B/2",),
        (
            *("--batch-sizes", "1", "--cache-intervals", "1,3,5", "--backends", "onnxruntime"),
            *("--schedule", "fora:3,forecast=2", "--schedule", "dense:11,forecast=2"),
        ),
    ),
    "dit-xl-2-256": Measured(("random:DiT-XL/2", "--precision", "fp16"), ("--batch-sizes", "1,4,8,16,32")),
    "dit-xl-2-512": Measured(
        ("random:DiT-XL/2", "--precision", "fp16", "--image-size", "512"), ("--batch-sizes", "1,4,8,16,32")
    ),
}
OF_THE_CPU = ("digits", "dit-s-2", "dit-b-2")

UNSEEN = 5000
"""Seed of the first calibration image: `quality` measures other images."""

SHOWN = ("backend", "setting", "full steps", "ideal", "speed-up", "of ideal", "over PyTorch", "time", "peak memory")
"""Columns of a latency table in docs/measurements.md; the result has more."""

LATENCY_IN_README = ("backend", "setting", "full steps", "ideal", "speed-up", "over PyTorch", "time")
QUALITY_IN_README = ("setting", "full steps", "per image", "speed-up", "PSNR", "as asked")
"""Columns of the tables in the README."""


def measure(name: str, repeats: int) -> Report:
    """Export and measure one model, in the current folder."""
    model = MODELS[name]
    _fora("export", *model.export, "--name", name, "--force")
    schedules: list[str] = []
    for number in model.calibrated:
        chosen = ("--full-steps", str(number), "--seed", str(UNSEEN), "-o", f"calibrated-{number}.json")
        _fora("calibrate", f"export/{name}", *chosen)
        schedules += ["--schedule", f"calibrated-{number}.json"]
    _fora("bench", f"export/{name}", *model.bench, *schedules, "--repeats", str(repeats), "--out", name)
    if model.quality is not None:
        _fora("quality", f"export/{name}", *model.quality, *schedules, "--out", name)
    report = read_report(Path(name))
    if report is None:
        raise click.ClickException(f"fora-trt bench and quality wrote no report for {name}; see their output above")
    return report


def _fora(*arguments: str) -> None:
    click.echo(f"fora-trt {' '.join(arguments)}", err=True)
    subprocess.run([sys.executable, "-m", "fora_trt", *arguments], check=True)


def newest_content(name: str) -> dict[str, Any]:
    """The content of the last committed result file `<name>_<date>.json`; a name may leave the hardware out."""
    content: dict[str, Any] = json.loads(max(RESULTS.glob(f"{name}_*.json")).read_text())
    return content


def write_content(name: str, content: Mapping[str, Any]) -> None:
    """Write the result file `<name>_<date>.json` with the environment of the measurement."""
    about = environment()
    path = RESULTS / f"{name}_{about['date']}.json"
    path.write_text(json.dumps({"environment": about, **content}, indent=2) + "\n")


def newest_result(model: str, hardware: str = "cpu-2-cores") -> tuple[Report, dict[str, Any]]:
    """The last committed result of a model on this kind of machine, and what else its file holds."""
    content = newest_content(f"{model}_{hardware}")
    own = {name: content.pop(name) for name in content.keys() - Report.model_fields.keys()}
    return Report.model_validate(content), own


def measurement_lines(report: Report) -> list[str]:
    """The tables of docs/measurements.md: latency at the smallest batch, and quality."""
    lines: list[str] = []
    if report.bench is not None:
        lines += [*lines_of(bench_tables(report.bench)[0], SHOWN), ""]
    if report.quality is not None:
        table = quality_table(report.quality)
        lines += lines_of(table, table.header)
    return lines


def readme_lines(report: Report) -> list[str]:
    """The rows among which the README chooses: of the quality where it was measured, else of the latency."""
    if report.quality is not None:
        return lines_of(quality_table(report.quality), QUALITY_IN_README)
    return [] if report.bench is None else lines_of(bench_tables(report.bench)[0], LATENCY_IN_README)


def lines_of(table: Table, columns: tuple[str, ...]) -> list[str]:
    """The lines of a table in Markdown, with these columns alone."""
    shown = [k for k, heading in enumerate(table.header) if heading in columns]
    marks = tuple("---" if k < table.texts else "--:" for k in range(len(table.header)))
    return [f"| {' | '.join(cells[k] for k in shown)} |" for cells in (table.header, marks, *table.rows)]


@click.command()
@click.argument("hardware")
@click.argument("models", nargs=-1, type=click.Choice(list(MODELS)))
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True)
def main(hardware: str, models: tuple[str, ...], repeats: int) -> None:
    """Measure MODELS (default: those that fit a CPU); HARDWARE becomes a part of the file names."""
    RESULTS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # relative paths keep the paths of this machine out of the results
        for name in models or OF_THE_CPU:
            report = measure(name, repeats)
            date = next(iter(report.measured_on.values()))["date"]
            stem = RESULTS / f"{name}_{hardware}_{date}"
            content: dict[str, Any] = report.model_dump(mode="json")
            text = as_markdown(report)
            if name == "digits":
                content["accuracy"] = digits_accuracy(Bundle.open(f"export/{name}"), ("none", "fora:3", "fora:5"))
                shares = ", ".join(f"{value:.1%} ({what})" for what, value in content["accuracy"].items())
                text += f"\nClassified as the requested class by a support vector machine: {shares}\n"
            stem.with_suffix(".json").write_text(json.dumps(content, indent=2) + "\n")
            stem.with_suffix(".md").write_text(text)
            click.echo("\n".join([*measurement_lines(report), "", *readme_lines(report)]))
            click.echo(f"wrote {stem.name}.json and .md")


if __name__ == "__main__":
    main()
