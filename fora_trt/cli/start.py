"""Commands for the first minute: what works here, and all of it on the digits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import click

from fora_trt.cli.bundles import export
from fora_trt.cli.measuring import verify
from fora_trt.cli.options import AS_JSON, BACKEND, DEVICE, ENGINES, Numbers
from fora_trt.cli.terminal import new_table, plan_source, print_table, status


@click.command()
@AS_JSON
def doctor(as_json: bool) -> None:
    """Show which backends work here, their versions, the GPU, and how to install what is missing.

    \b
    Example:
      fora-trt doctor
    """
    from fora_trt.evaluate.doctor import findings

    report = findings()
    if as_json:
        click.echo(json.dumps([vars(finding) for finding in report]))
        return
    table = new_table("", "", "found", "to do", texts=3)
    for finding in report:
        table.add_row(finding.what, finding.found, finding.remedy)
    print_table(table)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default="export", help="Folder to make the bundle in.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default="digits-demo.png", help="The picture.")
@click.option("--steps", type=click.IntRange(min=5), default=50, help="Denoising steps.")
@click.option("--cache-intervals", type=Numbers(), default="1,2,3,5", help="The first must be 1.")
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
    """Export, verify and run the digits at several cache intervals, from the same noise.

    Prints a table and writes one picture that shows all rows.

    \b
    Example:
      fora-trt demo -o digits-demo.png
    """
    if cache_intervals[0] != 1:
        raise click.BadParameter("the first must be 1: all others are compared with it", param_hint="--cache-intervals")
    from fora_trt.runtime.outputs import save_image, writable_file

    writable_file(output)
    context = click.get_current_context()
    context.invoke(export, source="digits", name="digits", out=out, force=True)
    bundle = out / "digits"
    context.invoke(verify, bundle=bundle, backend=backend, device=device, engines=engines)
    from fora_trt.bundle import Bundle
    from fora_trt.engines.backends import backend_from_name, device_from_name
    from fora_trt.evaluate.bench import Benchmark
    from fora_trt.evaluate.entrants import entrants_of
    from fora_trt.evaluate.pictures import grey_levels_between, picture_of
    from fora_trt.evaluate.results import EAGER
    from fora_trt.runtime.conditioning import conditioning_of_classes
    from fora_trt.runtime.schedulers import scheduler_from_config

    opened, chosen = Bundle.open(bundle), backend_from_name(backend)
    where = device_from_name(device, chosen)
    with plan_source(engines, 20, False) as plans:
        entrants, _ = entrants_of(opened, [chosen.name], cache_intervals, lambda name: where, plans, [EAGER])
    kept = [replace(one, controls=tuple({3}.intersection(one.controls))) for one in entrants]
    benchmark = Benchmark(opened, kept, [], scheduler_from_config(opened.scheduler_config, None, True), steps)
    with status(False) as tell:
        for stage in benchmark.measure(conditioning_of_classes(opened.manifest, range(10)), repeats):
            tell(stage)
    (timings,) = benchmark.rows.values()
    bench = benchmark.result()
    table = new_table(
        f"10 digits ({where}), median of {repeats} (fastest to slowest)",
        "", "full steps", "seconds", "ideal", "speed-up", "over PyTorch", "difference of 255",
    )  # fmt: skip
    for timing, row in zip(timings, bench.rows, strict=True):
        table.add_row(
            f"{row.backend}, {row.setting.label}",
            f"{row.setting.full_steps} of {row.setting.steps}",
            f"{row.seconds:.2f} ({row.fastest:.2f} to {row.slowest:.2f})",
            f"{row.ideal_speedup:.2f}x",
            f"{row.speedup:.2f}x",
            f"{bench.over_eager(row):.2f}x",
            f"{grey_levels_between(timing.latents, timings[0].latents):.1f}",
        )
    print_table(table)
    save_image(picture_of(opened, zip(timings, bench.rows, strict=True)), output)
    click.echo(f"wrote {output}: each row of the table, from the same noise")
