"""Measure the models of the README on this machine: what caching saves, and of the digits what it costs.

    python -m benchmarks.readme_tables cpu-2-cores
    python -m benchmarks.readme_tables h100 dit-xl-2-256 dit-xl-2-512

writes benchmarks/results/<model>_<hardware>_<date>.json and .md, and prints the tables of the README.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from benchmarks.digits_accuracy import digits_accuracy
from fora_trt.bundle import Bundle
from fora_trt.evaluate.report import as_markdown, read_report
from fora_trt.evaluate.results import Report
from fora_trt.evaluate.tables import Table, bench_tables, quality_table

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Measured:
    """A model, as `export`, `bench` and `quality` are told."""

    export: tuple[str, ...]
    bench: tuple[str, ...]
    quality: tuple[str, ...] | None = None


MODELS = {
    "digits": Measured(
        ("digits",), ("--batch-sizes", "10", "--cache-intervals", "1,2,3,5,7"), ("--num-images", "1000")
    ),
    "dit-s-2": Measured(
        ("random:DiT-S/2",),
        ("--batch-sizes", "1", "--cache-intervals", "1,3,5", "--backends", "onnxruntime,torch-compile"),
    ),
    "dit-b-2": Measured(("random:DiT-B/2",), ("--batch-sizes", "1", "--cache-intervals", "1,2,3,5,7")),
    "dit-xl-2-256": Measured(("random:DiT-XL/2", "--precision", "fp16"), ("--batch-sizes", "1,4,8,16,32")),
    "dit-xl-2-512": Measured(
        ("random:DiT-XL/2", "--precision", "fp16", "--image-size", "512"), ("--batch-sizes", "1,4,8,16,32")
    ),
}
OF_THE_CPU = ("digits", "dit-s-2", "dit-b-2")

SHOWN = ("backend", "setting", "full steps", "ideal", "speed-up", "of ideal", "over PyTorch", "time", "peak memory")
"""Columns of a latency table in the README; the result has more."""


def measure(name: str, repeats: int) -> Report:
    """Export, time and compare one model, in the current folder."""
    model = MODELS[name]
    _fora("export", *model.export, "--name", name, "--force")
    _fora("bench", f"export/{name}", *model.bench, "--repeats", str(repeats), "--out", name)
    if model.quality is not None:
        _fora("quality", f"export/{name}", *model.quality, "--out", name)
    report = read_report(Path(name))
    if report is None:
        raise click.ClickException(f"nothing was written for {name}")
    return report


def _fora(*arguments: str) -> None:
    click.echo(f"fora-trt {' '.join(arguments)}", err=True)
    subprocess.run([sys.executable, "-m", "fora_trt", *arguments], check=True)


def readme_lines(report: Report) -> list[str]:
    """The tables of the README: latency at the smallest batch, and quality."""
    lines: list[str] = []
    if report.bench is not None:
        lines += [*_lines_of(bench_tables(report.bench)[0], SHOWN), ""]
    if report.quality is not None:
        table = quality_table(report.quality)
        lines += _lines_of(table, table.header)
    return lines


def _lines_of(table: Table, columns: tuple[str, ...]) -> list[str]:
    places = [k for k, heading in enumerate(table.header) if heading in columns]
    marks = tuple("---" if k < table.texts else "--:" for k in range(len(table.header)))
    return [f"| {' | '.join(cells[k] for k in places)} |" for cells in (table.header, marks, *table.rows)]


@click.command()
@click.argument("hardware")
@click.argument("models", nargs=-1, type=click.Choice(list(MODELS)))
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True)
def main(hardware: str, models: tuple[str, ...], repeats: int) -> None:
    """Measure MODELS (by default those for a CPU); HARDWARE is a word for the names of the files."""
    RESULTS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # so that no path of this machine gets into a result
        for name in models or OF_THE_CPU:
            report = measure(name, repeats)
            date = next(iter(report.measured_on.values()))["date"]
            stem = RESULTS / f"{name}_{hardware}_{date}"
            content: dict[str, Any] = report.model_dump(mode="json")
            text = as_markdown(report)
            if name == "digits":
                content["accuracy"] = digits_accuracy(Bundle.open(f"export/{name}"), (1, 3, 5))
                read = ", ".join(f"{value:.1%} ({what})" for what, value in content["accuracy"].items())
                text += f"\nRead as the class that was asked for by a support vector machine: {read}\n"
            stem.with_suffix(".json").write_text(json.dumps(content, indent=2) + "\n")
            stem.with_suffix(".md").write_text(text)
            click.echo("\n".join(readme_lines(report)))
            click.echo(f"wrote {stem.name}.json and .md")


if __name__ == "__main__":
    main()
