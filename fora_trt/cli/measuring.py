"""Commands that measure: whether it is right, what it saves, what it costs."""

from __future__ import annotations

import json
from pathlib import Path

import click

from fora_trt.cli.conditioning import conditioning_of, guidance_scale_of
from fora_trt.cli.options import (
    AS_JSON,
    BACKEND,
    BATCH_SIZE,
    BUNDLE,
    CONDITIONING,
    DEVICE,
    ENGINES,
    GUIDANCE_SCALE,
    NEGATIVE_PROMPT,
    SCHEDULER,
    SEED,
    VAE,
    Numbers,
    Words,
)
from fora_trt.cli.terminal import new_table, plan_source, print_found, print_table, say, status, watched
from fora_trt.errors import InputError


@click.command()
@BUNDLE
@BACKEND
@DEVICE
@ENGINES
@click.option("--steps", type=click.IntRange(min=1), default=50, help="Steps of the trajectories.")
@click.option("--cache-intervals", type=Numbers(), default="2,3,5", help="Cache intervals of the trajectories.")
@AS_JSON
def verify(
    bundle: Path,
    backend: str,
    device: str,
    engines: Path,
    steps: int,
    cache_intervals: tuple[int, ...],
    as_json: bool,
) -> None:
    """Compare a bundle with PyTorch: a full and a reuse step, then whole cached trajectories.

    PyTorch runs the checkpoint with hooks, in fp32. Where the checkpoint is no longer at hand, the bundle's full graph
    stands in for it, unfolded and in fp32, and the output says so. Exits with 1 if an error is over the tolerance of
    the bundle's precision.

    \b
    Example:
      fora-trt verify export/digits
    """
    from fora_trt.bundle import Bundle
    from fora_trt.engines.backends import backend_from_name, device_from_name
    from fora_trt.engines.plan_store import PlanSource
    from fora_trt.evaluate.unfolded import reference_from_bundle
    from fora_trt.evaluate.verify import compare_with_pytorch

    chosen = backend_from_name(backend)
    where = device_from_name(device, chosen)
    source = PlanSource(engines, batch=4, report=lambda line: say(as_json, line))
    opened = Bundle.open(bundle)
    reference, told = reference_from_bundle(opened, where)
    comparisons = compare_with_pytorch(opened, chosen.name, where, steps, cache_intervals, source, reference)
    table = new_table(
        f"{bundle} on {chosen.name} ({where}) against {told}", "compared", "maximum error", "relative", "admitted", ""
    )
    done = []
    for one in watched("comparing", as_json)(comparisons):
        done.append(one)
        verdict = "ok" if one.passed else "TOO LARGE"
        error = one.error
        table.add_row(one.what, f"{error.maximum:.2e}", f"{error.relative:.2e}", f"{one.tolerance:.0e}", verdict)
    passed = all(one.passed for one in done)
    if as_json:
        rows = [{"what": one.what, **vars(one.error), "tolerance": one.tolerance, "passed": one.passed} for one in done]
        click.echo(json.dumps({"backend": chosen.name, "reference": told, "passed": passed, "comparisons": rows}))
    else:
        print_table(table)
    if not passed:
        raise click.ClickException(f"{bundle} differs from {told} by more than its precision admits")


@click.command()
@BUNDLE
@click.option(
    "--backends",
    type=Words(),
    default="tensorrt,tensorrt-rtx,onnxruntime",
    help="What to time at every cache interval; the module in plain PyTorch, eager and compiled, always comes along.",
)
@click.option("--cache-intervals", type=Numbers(), default="1,2,3,5,7", help="1, no caching, always comes along.")
@click.option("--batch-sizes", type=Numbers(), default="1,4,16", help="Images that are denoised together.")
@click.option("--steps", type=click.IntRange(min=1), default=50, help="Denoising steps.")
@click.option("--repeats", type=click.IntRange(min=1), default=10, help="Timed runs of each row, after a warm-up.")
@SCHEDULER
@click.option("--guidance-scale", type=click.FloatRange(min=0), help="Up to 1: none.  [default: the model's usual one]")
@click.option("--memory/--no-memory", default=True, help="Measure peak memory, in a process for each backend.")
@DEVICE
@ENGINES
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the report.  [default: none is written]")
@click.option("--force", is_flag=True, help="Replace the latency in a report that is there.")
@AS_JSON
def bench(
    bundle: Path,
    backends: tuple[str, ...],
    cache_intervals: tuple[int, ...],
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
    as_json: bool,
) -> None:
    """Measure what caching saves: every backend at every cache interval, and what one would use instead.

    Each cached row is followed by a control: the same time spent on fewer steps without caching. Rows are timed in
    turn. Ctrl-C ends it and keeps what was measured.

    \b
    Examples:
      fora-trt bench export/digits --out report
      fora-trt bench export/dit-xl-2-256 --batch-sizes 1,8,32 --out report
      fora-trt bench export/digits --backends onnxruntime --cache-intervals 1,3 --repeats 3 --json
    """
    from fora_trt.bundle import Bundle

    opened = Bundle.open(bundle)
    from fora_trt.engines.backends import backend_from_name
    from fora_trt.evaluate.bench import Benchmark
    from fora_trt.evaluate.circumstances import circumstances
    from fora_trt.evaluate.entrants import device_of, entrants_of
    from fora_trt.evaluate.report import check_report_folder, write_report
    from fora_trt.evaluate.results import About
    from fora_trt.evaluate.tables import bench_tables
    from fora_trt.runtime.conditioning import example_conditioning
    from fora_trt.runtime.schedulers import scheduler_from_config
    from fora_trt.runtime.updates import timesteps_of
    from fora_trt.schedule import Schedule

    for name in backends:
        backend_from_name(name)  # a typing error shows before anything is loaded
    chosen = scheduler_from_config(opened.scheduler_config, scheduler, opened.manifest.latents.learned_sigma)
    for interval in cache_intervals:
        Schedule.static(timesteps_of(chosen, steps), interval)
    if bad := [size for size in batch_sizes if size < 1]:
        raise InputError(f"a batch size is {bad[0]}; at least 1 is needed")
    if out is not None:
        check_report_folder(out, "bench", About.of(opened), force)
    with plan_source(engines, 2 * max(batch_sizes), as_json) as plans:
        entrants, absent = entrants_of(
            opened, backends, cache_intervals, lambda name: device_of(name, device), plans,
            report=lambda stage: say(as_json, stage),
        )  # fmt: skip
    benchmark = Benchmark(opened, entrants, absent, chosen, steps, guidance_scale, plans if memory else None)
    interrupted = False
    try:
        with status(as_json) as tell:
            for images in sorted(set(batch_sizes)):
                for stage in benchmark.measure(example_conditioning(opened.manifest, images), repeats):
                    tell(stage)
    except KeyboardInterrupt:
        interrupted = True
    found = benchmark.result(interrupted)
    if out is not None:
        report = write_report(out, About.of(opened), circumstances(), bench=found)
    if as_json:
        click.echo(found.model_dump_json())
    else:
        for one in bench_tables(found):
            print_found(one)
        for missing in found.absent:
            click.echo(f"{missing.backend}: {missing.why}")
        for note in found.notes:
            click.echo(note)
        if out is not None:
            click.echo(f"{report.recommendation}\nwrote {out / 'report.html'}")
    if interrupted:
        click.echo("interrupted: what is shown was measured before", err=True)
        click.get_current_context().exit(130)


@click.command()
@BUNDLE
@click.option("--num-images", type=click.IntRange(min=2), default=1000, help="Images of each setting.")
@click.option("--cache-intervals", type=Numbers(), default="2,3,5", help="Compared with no caching.")
@click.option("--steps", type=Numbers(), default="50", help="Numbers of denoising steps.")
@click.option("--schedulers", type=Words(), help="As for run, between commas.  [default: the model's own]")
@click.option("--prompt", "prompts", multiple=True, help="Given again for more; the images take them in turn.")
@NEGATIVE_PROMPT
@CONDITIONING
@GUIDANCE_SCALE
@SEED
@BATCH_SIZE
@BACKEND
@DEVICE
@ENGINES
@VAE
@click.option(
    "--inception-weights",
    type=click.Path(path_type=Path),
    help="Of the InceptionV3 of torch-fidelity, for the Fréchet distance and the like.",
)
@click.option(
    "--reference", type=click.Path(path_type=Path), help="Images to be as near to: a .npz of the ADM evaluator."
)
@click.option("--min-psnr", type=float, default=30.0, help="dB that the setting which is recommended must keep.")
@click.option("--no-images", is_flag=True, help="Keep the grid alone, not the images of every setting.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the report.")
@click.option("--resume", is_flag=True, help="Go on where this was stopped.")
@AS_JSON
def quality(
    bundle: Path,
    num_images: int,
    cache_intervals: tuple[int, ...],
    steps: tuple[int, ...],
    schedulers: tuple[str, ...] | None,
    prompts: tuple[str, ...],
    negative_prompt: str,
    conditioning_file: Path | None,
    guidance_scale: float | None,
    seed: int,
    batch_size: int,
    backend: str,
    device: str,
    engines: Path,
    vae: str | None,
    inception_weights: Path | None,
    reference: Path | None,
    min_psnr: float,
    no_images: bool,
    out: Path,
    resume: bool,
    as_json: bool,
) -> None:
    """Measure what caching costs: images of every setting against those without caching, from the same noise.

    Beside each cache interval stands no caching in so many steps as take the same time. A model of classes makes all
    of them in turn. Writes a report, a grid, and the images of every setting to --out. What was done when it is
    stopped stays there for --resume.

    \b
    Examples:
      fora-trt quality export/digits --out report/
      fora-trt quality export/dit-xl-2-256 --num-images 200 --schedulers ddim,dpm-solver++ --steps 20,50 --out report/
      fora-trt quality export/dit-xl-2-256 --inception-weights weights-inception-2015-12-05-6726825d.pth --out report/
    """
    from fora_trt.bundle import Bundle

    opened = Bundle.open(bundle)
    from fora_trt.engines.backends import backend_from_name, device_from_name
    from fora_trt.evaluate.circumstances import circumstances
    from fora_trt.evaluate.quality import QualityOptions, measure_quality
    from fora_trt.evaluate.report import check_report_folder, write_report
    from fora_trt.evaluate.results import About
    from fora_trt.evaluate.tables import quality_table
    from fora_trt.runtime.conditioning import balanced_labels

    check_report_folder(out, "quality", About.of(opened), resume)
    where = backend_from_name(backend)
    placed = device_from_name(device, where)
    said = prompts or conditioning_file is not None
    labels = None if said or opened.manifest.guidance is None else tuple(balanced_labels(opened.manifest, num_images))
    given = conditioning_of(opened, labels, prompts, negative_prompt, conditioning_file, None, placed)
    options = QualityOptions(
        images=num_images,
        schedulers=schedulers or (None,),
        steps=steps,
        cache_intervals=cache_intervals,
        guidance_scale=guidance_scale_of(guidance_scale, opened, given),
        seed=seed,
        batch_size=min(batch_size, num_images),
        keep_images=not no_images,
        vae=vae,
    )
    with plan_source(engines, options.batch_size * (2 if options.guidance_scale > 1 else 1), as_json) as plans:
        found = measure_quality(
            opened,
            options,
            given,
            out,
            backend=where.name,
            device=placed,
            plans=plans,
            inception_weights=inception_weights,
            reference=reference,
            resume=resume,
            watch=watched("comparing", as_json),
        )
    report = write_report(out, About.of(opened), circumstances(), quality=found, min_psnr=min_psnr)
    if as_json:
        click.echo(json.dumps({"bundle": str(bundle), "out": str(out), **found.model_dump(mode="json")}))
        return
    print_found(quality_table(found))
    for note in found.notes:
        click.echo(note)
    click.echo(report.recommendation)
    click.echo(f"wrote {out / 'report.html'}, {found.grid}{'' if no_images else ', and the images of every setting'}")
