"""The command `demo`: export, verify and run the digits model, in about a minute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fora_trt.cli.export import export
from fora_trt.cli.options import (
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
from fora_trt.cli.terminal import new_table, plan_source, print_table, status
from fora_trt.cli.verify import verify

if TYPE_CHECKING:
    from rich.table import Table

    from fora_trt.evaluate.bench import Benchmark
    from fora_trt.evaluate.pictures import Shown
    from fora_trt.pipeline import Pipeline
    from fora_trt.report.results import Bench

CONTROLLED = "fora:3"
"""The schedule that gets an equal-time control: fewer steps, no caching."""

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
) -> None:
    """Export, verify and run the digits model: FORA, fewer steps, and a calibrated schedule, from the same noise.

    Prints a table and a conclusion, and writes one image with the digits of every row and their differences. The
    calibrated schedule comes with the model and is for 50 steps; with other steps it is left out.

    \b
    Example:
      fora-trt demo -o digits-demo.png
    """
    if cache_intervals[0] != 1:
        raise click.BadParameter(
            "the first must be 1 (no caching): all others are compared with it", param_hint="--cache-intervals"
        )
    from fora_trt.engines.backends import AUTO, backend_from_name
    from fora_trt.evaluate.pictures import conclusion_of, sheet_of, shown_of
    from fora_trt.images.save import check_new, free_name, save_image, writable_file
    from fora_trt.report.tables import scheduler_label

    if backend != AUTO and not backend_from_name(backend).builds:
        refuse_given(WITHOUT_PLANS.format(backend), "engines")
    context = click.get_current_context()
    if not is_given("output"):
        refuse_given("without -o, a new file is written", "force")
        output = free_name(output)
    check_new(output, force)
    writable_file(output)
    context.invoke(export, source="digits", name="digits", out=out, force=True)
    bundle = out / "digits"
    context.invoke(verify, bundle=bundle, backend=backend, device=device, engines=engines)
    settings = {"steps": steps, "backend": backend, "device": device, "engines": engines}
    pipeline = pipeline_of(bundle, False, **settings)
    benchmark = _timed(pipeline, cache_intervals, repeats)
    (timings,) = benchmark.rows.values()
    found = benchmark.result()
    shown = shown_of(pipeline, timings, found.rows)
    print_table(_table(found, shown, f"10 digits ({pipeline.device}), median of {repeats} (fastest to slowest)"))
    save_image(sheet_of([one for one in shown if one.row.backend == pipeline.backend.name]), output)
    click.echo(f"wrote {output}: the images of each row, from the same noise, and their differences")
    for one in shown:
        if one.row.setting.control_of is not None:
            click.echo(f"{one.name}: {scheduler_label(one.row.setting)}, no caching, in the time of {CONTROLLED}")
    click.echo(conclusion_of(shown))


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
    with plan_source(Path(config.engines), 20, False) as plans:
        targets, _ = targets_of(pipeline, [backend], schedules, lambda name: pipeline.device, plans, [EAGER])
    kept = [replace(one, controls=tuple({CONTROLLED}.intersection(one.controls))) for one in targets]
    benchmark = Benchmark(pipeline, kept, solved=True)
    with status(False, "demo") as tell:
        for stage in benchmark.measure(conditioning_of_classes(pipeline.manifest, range(10)), repeats):
            tell(stage)
    return benchmark


def _table(found: Bench, shown: Sequence[Shown], title: str) -> Table:
    columns = ("", "full steps", "seconds", "ideal", "speed-up", "over PyTorch", "PSNR to no cache")
    table = new_table(title, *columns)
    for one in shown:
        row = one.row
        table.add_row(
            f"{row.backend}, {one.name}",
            f"{row.setting.full_steps} of {row.setting.steps}",
            f"{row.seconds:.2f} ({row.fastest:.2f} to {row.slowest:.2f})",
            f"{row.ideal_speedup:.2f}x",
            f"{row.speedup:.2f}x",
            f"{found.over_eager(row):.2f}x",
            "same" if one.psnr is None else f"{one.psnr:.1f} dB",
        )
    return table
