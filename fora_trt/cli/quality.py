"""The command `quality`: measures how much caching changes the images."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fora_trt.cli.options import (
    AS_JSON,
    BACKEND,
    BATCH_SIZE,
    BUNDLE,
    DEVICE,
    ENGINES,
    GUIDANCE_SCALE,
    INPUTS_IN_TURN,
    PARALLEL,
    SCHEDULES,
    SEED,
    VAE,
    Numbers,
    Schedulers,
    conditioning_in_turn,
    fitting,
    grouped,
    pipeline_of,
    refuse_given,
    resumed,
    schedules_of,
    with_room,
    workers_of,
)
from fora_trt.cli.terminal import print_found, print_json, status, watched
from fora_trt.plan import HIGHEST_ORDER
from fora_trt.presets import USUAL_ORDER

if TYPE_CHECKING:
    from fora_trt.bundle import Bundle
    from fora_trt.report.results import Quality


@click.command()
@BUNDLE
@click.option("--num-images", type=click.IntRange(min=2), default=1000, help="Number of images per setting.")
@click.option("--cache-intervals", type=Numbers(), default="2,3,5", help="Cache intervals to compare with no caching.")
@click.option(
    "--forecast",
    type=click.IntRange(0, HIGHEST_ORDER),
    default=USUAL_ORDER,
    help="Order of a forecast to compare at each cache interval, with as many full steps (dense:every=N); 0: none.",
)
@SCHEDULES
@click.option("--steps", type=Numbers(), default="50", help="Numbers of denoising steps to compare.")
@click.option(
    "--schedulers",
    type=Schedulers(),
    help="Schedulers to compare, such as ddim,dpm-solver++:order=3.  [default: the model's own]",
)
@INPUTS_IN_TURN
@grouped("settings", GUIDANCE_SCALE, BATCH_SIZE, BACKEND, DEVICE, ENGINES, VAE)
@SEED
@PARALLEL
@grouped(
    "compared",
    click.option(
        "--inception-weights",
        type=click.Path(path_type=Path),
        help="Weights of torch-fidelity's InceptionV3, for Fréchet distance, precision and recall.",
    ),
    click.option(
        "--reference",
        type=click.Path(path_type=Path),
        help="Reference images for a Fréchet distance: a .npz file in the layout of the ADM evaluator.",
    ),
)
@click.option(
    "--truth-steps",
    type=click.IntRange(min=2),
    help="Also compare with a fine solution of so many steps, such as 250.  [default: none]",
    show_default=False,
)
@click.option("--min-psnr", type=float, default=30.0, help="Smallest PSNR of the recommended setting, in dB.")
@click.option("--no-images", is_flag=True, help="Keep only the image grid, not the images of every setting.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the report.")
@click.option("--resume", is_flag=True, help="Continue an interrupted measurement.")
@AS_JSON
def quality(
    bundle: Path,
    num_images: int,
    cache_intervals: tuple[int, ...],
    forecast: int,
    schedules: tuple[str, ...],
    steps: tuple[int, ...],
    schedulers: tuple[str, ...] | None,
    wanted: dict[str, Any],
    settings: dict[str, Any],
    seed: int,
    parallel: dict[str, Any],
    compared: dict[str, Path | None],
    truth_steps: int | None,
    min_psnr: float,
    no_images: bool,
    out: Path,
    resume: bool,
    as_json: bool,
) -> None:
    """Measure how much caching changes images: every setting against no caching, from the same noise.

    Compares FORA, forecasts and your schedules with an equal-time control: fewer steps, no caching, with the best of
    several solvers. A class-conditional model cycles through all its classes. Writes a report, an image grid, and the
    images of every setting to --out. An interrupted measurement continues with --resume.

    \b
    Examples:
      fora-trt quality export/digits --out report/
      fora-trt quality export/dit-xl-2-256 --num-images 200 --schedulers ddim,dpm-solver++ --steps 20,50 --out report/
      fora-trt quality export/dit-xl-2-256 --inception-weights weights-inception-2015-12-05-6726825d.pth --out report/
    """
    pipeline = pipeline_of(bundle, **settings)
    from fora_trt.evaluate.quality import QualityOptions, measure_quality
    from fora_trt.report.environment import environment
    from fora_trt.report.page import WORK, check_report_folder, write_report
    from fora_trt.report.results import About

    about = About.of(pipeline.bundle)
    check_report_folder(out, "quality", about, resume)
    options = QualityOptions(
        images=num_images,
        schedulers=schedulers or (None,),
        steps=steps,
        schedules=_schedules(pipeline.bundle, steps, cache_intervals, forecast, schedules),
        seed=seed,
        keep_images=not no_images,
        truth_steps=truth_steps,
    )
    given, workers = conditioning_in_turn(pipeline, wanted, num_images), workers_of(pipeline, parallel)
    resumed(pipeline, out / WORK, resume)
    ways = {"watch": watched("comparing"), "watch_steps": watched("denoising"), "workers": workers}
    measure = partial(measure_quality, pipeline, options, given, out, resume=resume, **compared, **ways)  # type: ignore[arg-type] # of typed dictionaries
    with status("quality"):
        found = with_room(pipeline, measure)
    report = write_report(out, about, environment(), quality=found, min_psnr=min_psnr)
    if as_json:
        print_json({"bundle": bundle, "out": out, **found.model_dump(mode="json"), "environment": environment()})
    else:
        _show(out, found, report.recommendation, not no_images)


def _show(out: Path, found: Quality, recommendation: str, kept: bool) -> None:
    """Print the result, and what was written."""
    from fora_trt.report.tables import quality_table

    print_found(quality_table(found))
    for note in (*found.notes, recommendation):
        click.echo(note)
    files = [str(out / "report.html"), *filter(None, [found.grid])]
    images = [f"and the {'images' if found.grid else 'latents'} of every setting"] if kept else []
    click.echo(f"wrote {', '.join([*files, *images])}")


def _schedules(
    bundle: Bundle, steps: tuple[int, ...], cache_intervals: tuple[int, ...], forecast: int, given: tuple[str, ...]
) -> tuple[str, ...]:
    """All schedules to compare; by default without a forecast for a bundle that cannot forecast."""
    manifest = bundle.manifest
    if not manifest.can_forecast:
        refuse_given(f"{manifest.name} cannot forecast; export it with --optimize conditioning", "forecast")
        forecast = 0
    own = bundle.scheduled_steps
    if not given and manifest.partial_graphs and bundle.schedule and (own is None or own in steps):
        given = (bundle.schedule,)  # the bundle was exported for it
    return tuple(schedules_of(fitting(cache_intervals, min(steps)), given, forecast))
