"""The command `demo`: export, verify and run the digits model, in about a minute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fora_trt.cli.export import export
from fora_trt.cli.options import BACKEND, DEVICE, ENGINES, Numbers, pipeline_of, schedules_of
from fora_trt.cli.terminal import new_table, plan_source, print_table, status
from fora_trt.cli.verify import verify

if TYPE_CHECKING:
    from rich.table import Table

    from fora_trt.evaluate.bench import Benchmark, Timing
    from fora_trt.pipeline import Pipeline
    from fora_trt.report.results import Bench

CONTROLLED = "fora:3"
"""The schedule that gets an equal-time control: fewer steps, no caching."""


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default="export", help="Folder in which the bundle is written.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default="digits-demo.png", help="Image to write.")
@click.option("--steps", type=click.IntRange(min=5), default=50, help="Denoising steps.")
@click.option("--cache-intervals", type=Numbers(), default="1,2,3,5", help="Cache intervals; the first must be 1.")
@click.option("--repeats", type=click.IntRange(min=1), default=5, help="Timed runs of each row.")
@BACKEND
@DEVICE
@ENGINES
def demo(
    out: Path,
    output: Path,
    steps: int,
    cache_intervals: tuple[int, ...],
    repeats: int,
    backend: str,
    device: str,
    engines: Path,
) -> None:
    """Export, verify and run the digits model at several cache intervals, from the same noise.

    Prints a table and writes one image with the digits of every row.

    \b
    Example:
      fora-trt demo -o digits-demo.png
    """
    if cache_intervals[0] != 1:
        raise click.BadParameter(
            "the first must be 1 (no caching): all others are compared with it", param_hint="--cache-intervals"
        )
    from fora_trt.evaluate.pictures import picture_of
    from fora_trt.images.save import save_image, writable_file

    writable_file(output)
    context = click.get_current_context()
    context.invoke(export, source="digits", name="digits", out=out, force=True)
    bundle = out / "digits"
    context.invoke(verify, bundle=bundle, backend=backend, device=device, engines=engines)
    settings = {"steps": steps, "backend": backend, "device": device, "engines": engines}
    pipeline = pipeline_of(bundle, False, **settings)
    benchmark = _timed(pipeline, cache_intervals, repeats)
    (timings,) = benchmark.rows.values()
    found = benchmark.result()
    print_table(_table(found, timings, f"10 digits ({pipeline.device}), median of {repeats} (fastest to slowest)"))
    save_image(picture_of(pipeline, zip(timings, found.rows, strict=True)), output)
    click.echo(f"wrote {output}: the images of each row of the table, from the same noise")


def _timed(pipeline: Pipeline, cache_intervals: tuple[int, ...], repeats: int) -> Benchmark:
    """Time ten digits at every cache interval, one control and eager PyTorch."""
    from fora_trt.evaluate.bench import Benchmark
    from fora_trt.evaluate.targets import targets_of
    from fora_trt.report.results import EAGER
    from fora_trt.sampling.conditioning import conditioning_of_classes

    backend, config = pipeline.backend.name, pipeline.config
    schedules = [pipeline.sampling(schedule=text).schedule for text in schedules_of(cache_intervals, ())]
    with plan_source(Path(config.engines), 20, False) as plans:
        targets, _ = targets_of(pipeline, [backend], schedules, lambda name: pipeline.device, plans, [EAGER])
    kept = [replace(one, controls=tuple({CONTROLLED}.intersection(one.controls))) for one in targets]
    benchmark = Benchmark(pipeline, kept)
    with status(False) as tell:
        for stage in benchmark.measure(conditioning_of_classes(pipeline.manifest, range(10)), repeats):
            tell(stage)
    return benchmark


def _table(found: Bench, timings: Sequence[Timing], title: str) -> Table:
    from fora_trt.evaluate.pictures import grey_levels_between

    columns = ("", "full steps", "seconds", "ideal", "speed-up", "over PyTorch", "difference (0-255)")
    table = new_table(title, *columns)
    for timing, row in zip(timings, found.rows, strict=True):
        table.add_row(
            f"{row.backend}, {row.setting.label}",
            f"{row.setting.full_steps} of {row.setting.steps}",
            f"{row.seconds:.2f} ({row.fastest:.2f} to {row.slowest:.2f})",
            f"{row.ideal_speedup:.2f}x",
            f"{row.speedup:.2f}x",
            f"{found.over_eager(row):.2f}x",
            f"{grey_levels_between(timing.latents, timings[0].latents):.1f}",
        )
    return table
