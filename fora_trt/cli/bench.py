"""The command `bench`: measures how much time caching saves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from fora_trt.cli.options import (
    AS_JSON,
    BUNDLE,
    DEVICE,
    ENGINES,
    SCHEDULER,
    SCHEDULES,
    TRUST_SOURCE,
    Numbers,
    Words,
    fitting,
    own_schedule,
    pipeline_of,
    refuse_given,
    schedules_of,
)
from fora_trt.cli.terminal import plan_source, print_found, print_json, say, status
from fora_trt.errors import InputError
from fora_trt.interruption import INTERRUPTED, caught

if TYPE_CHECKING:
    from fora_trt.evaluate.bench import Benchmark


WARM_UPS = 3
"""About how many times each row runs before it is timed."""


@click.command()
@BUNDLE
@click.option(
    "--backends",
    type=Words(),
    default="tensorrt,tensorrt-rtx,onnxruntime",
    help="Backends to time with every schedule; plain PyTorch, eager and compiled, is always timed too.",
)
@click.option(
    "--cache-intervals",
    type=Numbers(),
    default="1,2,3,5,7",
    help="Cache intervals to time; 1 (no caching) is always timed too.",
)
@SCHEDULES
@click.option("--batch-sizes", type=Numbers(), default="1,4,16", help="Batch sizes in images.")
@click.option("--steps", type=click.IntRange(min=1), default=50, help="Denoising steps.")
@click.option("--repeats", type=click.IntRange(min=1), default=10, help="Timed runs of each row, after a warm-up.")
@SCHEDULER
@click.option(
    "--guidance-scale",
    type=click.FloatRange(min=0),
    help="Classifier-free guidance scale; 0 to 1: none.  [default: the model's own]",
)
@click.option("--memory/--no-memory", default=True, help="Measure peak memory, in a separate process per backend.")
@DEVICE
@ENGINES
@TRUST_SOURCE
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the report.  [default: no report]")
@click.option("--force", is_flag=True, help="Replace the latency part of an existing report.")
@AS_JSON
def bench(
    bundle: Path,
    backends: tuple[str, ...],
    cache_intervals: tuple[int, ...],
    schedules: tuple[str, ...],
    batch_sizes: tuple[int, ...],
    steps: int,
    repeats: int,
    scheduler: str | None,
    guidance_scale: float | None,
    memory: bool,
    device: str,
    engines: Path,
    out: Path | None,
    force: bool,
    trust_source: bool,
    as_json: bool,
) -> None:
    """Measure how much time caching saves: every backend with every schedule, and plain PyTorch.

    Each cached row is paired with an equal-time control: fewer steps, no caching. Rows are timed in turn, so that a
    change of the machine's speed affects all alike. Ctrl-C stops the measurement; the results so far are
    printed, and written unless the report has earlier ones.

    \b
    Examples:
      fora-trt bench export/digits --out report
      fora-trt bench export/dit-xl-2-256 --batch-sizes 1,8,32 --out report
      fora-trt bench export/digits --backends onnxruntime --cache-intervals 1,3 --repeats 3 --json
    """
    if out is None:
        refuse_given("without --out no report is written", "force")
    settings = {"steps": steps, "scheduler": scheduler, "guidance_scale": guidance_scale, "engines": engines}
    settings["trust_source"] = trust_source
    pipeline = pipeline_of(bundle, **settings)
    pipeline.manifest.check_one_network("bench")
    from fora_trt.engines.backends import backend_from_name
    from fora_trt.evaluate.bench import Benchmark
    from fora_trt.evaluate.targets import device_of, targets_of
    from fora_trt.report.page import check_report_folder
    from fora_trt.report.results import About

    timed = list(map(backend_from_name, backends))  # rejects a misspelled name before anything is loaded
    if not any(backend.builds for backend in timed):
        refuse_given("no TensorRT plans are loaded with these --backends", "engines")
    schedules = schedules or own_schedule(pipeline)
    texts = schedules_of(fitting(cache_intervals, pipeline.config.steps), schedules)
    taken = [pipeline.sampling(schedule=one).schedule for one in texts]
    if bad := [size for size in batch_sizes if size < 1]:
        raise InputError(f"a batch size is {bad[0]}; at least 1 is needed")
    if out is not None:
        check_report_folder(out, "bench", About.of(pipeline.bundle), force)
    with plan_source(engines, 2 * max(batch_sizes)) as plans:
        targets, absent = targets_of(
            pipeline, backends, taken, lambda name: device_of(name, device), plans,
            report=say,
        )  # fmt: skip
    benchmark = Benchmark(pipeline, targets, absent, memory)
    interrupted = _measured(benchmark, batch_sizes, repeats)
    _show(benchmark, interrupted, out, as_json)


def _has_bench(folder: Path) -> bool:
    """Whether a report has latencies already: those of an interrupted run do not replace them."""
    from fora_trt.report.page import read_report

    there = read_report(folder)
    return there is not None and there.bench is not None


def _measured(benchmark: Benchmark, batch_sizes: tuple[int, ...], repeats: int) -> bool:
    """Measure all batch sizes; return whether Ctrl-C stopped the measurement."""
    from fora_trt.sampling.conditioning import example_conditioning

    try:
        with status("bench") as tell:
            sizes = sorted(set(batch_sizes))
            for at, images in enumerate(sizes):
                for stage in benchmark.measure(example_conditioning(benchmark.pipeline.manifest, images), repeats):
                    begins = benchmark.begins(images)
                    tell(stage, _runs(benchmark, images, sizes[at + 1 :], repeats) if begins else None)
    except KeyboardInterrupt:
        if not benchmark.has_result:
            raise
        caught()
        return True
    return False


def _runs(benchmark: Benchmark, images: int, later: list[int], repeats: int) -> float:
    """Timed runs from here on, in runs of this batch size: those of a larger one take longer, and have a warm-up."""
    rows = len(benchmark.rows[images])
    return rows * (repeats + sum((repeats + WARM_UPS) * size / images for size in later))


def _show(benchmark: Benchmark, interrupted: bool, out: Path | None, as_json: bool) -> None:
    """Print the result and write the report; an interrupted result replaces no earlier one, and ends with 130."""
    from fora_trt.report.environment import environment
    from fora_trt.report.page import write_report
    from fora_trt.report.results import About
    from fora_trt.report.tables import bench_tables

    found = benchmark.result(interrupted)
    kept = interrupted and out is not None and _has_bench(out)
    if as_json:
        print_json({**found.model_dump(mode="json"), "environment": environment()})
    else:
        for one in bench_tables(found):
            print_found(one)
        for missing in found.absent:
            click.echo(f"{missing.backend}: {missing.why}")
        for note in found.notes:
            click.echo(note)
    if out is not None and not kept:  # last: it may fail where the disk is full
        report = write_report(out, About.of(benchmark.pipeline.bundle), environment(), bench=found)
        if not as_json:
            click.echo(f"{report.recommendation}\nwrote {out / 'report.html'}")
    if interrupted:
        unchanged = f"; the report in {out} is unchanged" if kept else ""
        click.echo(f"interrupted: the results above were measured before{unchanged}", err=True)
        click.get_current_context().exit(INTERRUPTED)
