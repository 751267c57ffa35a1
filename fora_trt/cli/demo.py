"""The command `demo`: export, verify and run the digits model, in about a minute."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fora_trt import untrusted
from fora_trt.cli.export import export
from fora_trt.cli.options import (
    AS_JSON,
    BACKEND,
    DEVICE,
    ENGINES,
    WITHOUT_PLANS,
    Numbers,
    is_given,
    pipeline_of,
    refuse_given,
    schedules_of,
)
from fora_trt.cli.terminal import new_table, plan_source, print_json, print_table, status
from fora_trt.cli.verify import verify
from fora_trt.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

    from fora_trt.evaluate.bench import Benchmark
    from fora_trt.evaluate.pictures import Shown
    from fora_trt.pipeline import Pipeline
    from fora_trt.report.results import Bench

CONTROLLED = "fora:3"
"""The schedule that gets an equal-time control: fewer steps, no caching."""

DIGITS = 10
"""Images that are made, one of each class."""

CALIBRATED_STEPS = 50
"""Steps for which the schedule that comes with the digits was calibrated."""


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default="export", help="Folder in which the bundle is written.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default="digits-demo.png", help="Image to write.")
@click.option("--steps", type=click.IntRange(min=5), default=CALIBRATED_STEPS, help="Denoising steps.")
@click.option("--cache-intervals", type=Numbers(), default="1,3", help="Cache intervals; the first must be 1.")
@click.option("--repeats", type=click.IntRange(min=1), default=5, help="Timed runs of each row.")
@BACKEND
@DEVICE
@ENGINES
@click.option("--force", is_flag=True, help="Replace an existing image.")
@AS_JSON
def demo(
    out: Path,
    output: Path,
    steps: int,
    cache_intervals: tuple[int, ...],
    repeats: int,
    backend: str,
    device: str,
    engines: Path,
    force: bool,
    as_json: bool,
) -> None:
    """Export, verify and run the digits model: FORA, fewer steps, and a calibrated schedule, from the same noise.

    Prints a table and a conclusion, and writes one image with the digits of every row and their differences. The
    calibrated schedule comes with the model and is for 50 steps; with other steps it is left out. The digits in --out
    are used if they are there.

    \b
    Example:
      fora-trt demo -o digits-demo.png
    """
    if cache_intervals[0] != 1:
        raise click.BadParameter(
            "the first must be 1 (no caching): all others are compared with it", param_hint="--cache-intervals"
        )
    from fora_trt.engines.backends import backend_from_name
    from fora_trt.evaluate.pictures import conclusion_of, sheet_of, shown_of
    from fora_trt.images.save import check_new, free_name, save_image, writable_file
    from fora_trt.report.tables import scheduler_label

    chosen = backend_from_name(backend)
    if not chosen.builds:
        refuse_given(WITHOUT_PLANS.format(chosen.name), "engines")
    if not is_given("output"):
        refuse_given("without -o, a new file is written", "force")
        output = free_name(output)
    check_new(output, force)
    writable_file(output)
    settings = {"backend": backend, "device": device, "engines": engines}
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        bundle = _digits(out)
        click.get_current_context().invoke(verify, bundle=bundle, **settings)
    pipeline = pipeline_of(bundle, steps=steps, **settings)
    benchmark = _timed(pipeline, cache_intervals, repeats)
    (timings,) = benchmark.rows.values()
    found = benchmark.result()
    shown = shown_of(pipeline, timings, found.rows)
    made_with = _made_with(found, shown)
    save_image(sheet_of([one for one in shown if one.row.backend == pipeline.backend.name]), output, made_with)
    if as_json:
        print_json({"bundle": bundle, "output": output, **made_with})
        return
    print_table(_table(found, shown, f"10 digits ({pipeline.device}), median of {repeats} (fastest to slowest)"))
    click.echo(f"wrote {output}: the images of each row, from the same noise, and their differences")
    for one in shown:
        if one.row.setting.control_of is not None:
            click.echo(f"{one.name}: {scheduler_label(one.row.setting)}, no caching, in the time of {CONTROLLED}")
    click.echo(conclusion_of(shown))


def _digits(out: Path) -> Path:
    """The folder of the digits model, which is exported if it is not there. Raises `InputError` for another bundle."""
    from fora_trt.bundle import Bundle
    from fora_trt.files import MANIFEST

    bundle = out / "digits"
    if not (bundle / MANIFEST).is_file():
        click.get_current_context().invoke(export, source="digits", name="digits", out=out)
        return bundle
    manifest = Bundle.read(bundle).manifest
    source, precision = manifest.model.options.source, manifest.precision
    if (source, precision) != ("digits", "fp32"):
        raise InputError(
            f"{bundle} is a bundle of '{untrusted.shown(source)}' in {precision}, not of the digits in fp32; give "
            "another folder with --out"
        )
    click.echo(f"{bundle} is there and is used", err=True)
    return bundle


def _made_with(found: Bench, shown: Sequence[Shown]) -> dict[str, Any]:
    """The timed rows with their PSNR, which is None for images that are the same, and the environment."""
    from fora_trt.report.environment import environment

    rows = [{"name": one.name, "psnr": one.psnr, **one.row.model_dump(mode="json")} for one in shown]
    return {**found.model_dump(mode="json"), "rows": rows, "environment": environment()}


def _timed(pipeline: Pipeline, cache_intervals: tuple[int, ...], repeats: int) -> Benchmark:
    """Time ten digits at every cache interval and along the calibrated schedule, one control, and eager PyTorch."""
    from fora_trt.evaluate.bench import Benchmark
    from fora_trt.evaluate.pictures import calibrated_schedule
    from fora_trt.evaluate.targets import targets_of
    from fora_trt.report.results import EAGER
    from fora_trt.sampling.conditioning import conditioning_of_classes

    backend, config = pipeline.backend.name, pipeline.config
    schedules = [pipeline.sampling(schedule=text).schedule for text in schedules_of(cache_intervals, ())]
    if config.steps == CALIBRATED_STEPS:
        schedules.append(calibrated_schedule())
    with plan_source(Path(config.engines), 20) as plans:
        targets, _ = targets_of(pipeline, [backend], schedules, lambda name: pipeline.device, plans, [EAGER])
    kept = [replace(one, controls=tuple({CONTROLLED}.intersection(one.controls))) for one in targets]
    benchmark = Benchmark(pipeline, kept, solved=True)
    with status("demo") as tell:
        for stage in benchmark.measure(conditioning_of_classes(pipeline.manifest, range(DIGITS)), repeats):
            tell(stage, len(benchmark.rows[DIGITS]) * repeats if benchmark.begins(DIGITS) else None)
    return benchmark


def _table(found: Bench, shown: Sequence[Shown], title: str) -> Table:
    columns = ("", "full steps", "seconds", "ideal", "speed-up", "over PyTorch", "PSNR to no cache")
    table = new_table(title, *columns)
    for one in shown:
        row = one.row
        table.add_row(
            f"{row.backend}, {one.name}",
            row.setting.computed,
            f"{row.seconds:.2f} ({row.fastest:.2f} to {row.slowest:.2f})",
            f"{row.ideal_speedup:.2f}x",
            f"{row.speedup:.2f}x",
            f"{found.over_eager(row):.2f}x",
            "same" if one.psnr is None else f"{one.psnr:.1f} dB",
        )
    return table
