"""The command `calibrate`: finds the schedule of a model."""

from __future__ import annotations

import json
from dataclasses import replace
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
    GUIDANCE_INTERVAL,
    GUIDANCE_SCALE,
    INPUTS_IN_TURN,
    PARALLEL,
    SCHEDULER,
    SEED,
    TIMESTEP_SPACING,
    TRUST_SOURCE,
    conditioning_in_turn,
    grouped,
    is_given,
    pipeline_of,
    refuse_given,
    with_room,
    workers_of,
)
from fora_trt.cli.terminal import DISPLAY, new_table, print_json, print_table, watched
from fora_trt.errors import InputError
from fora_trt.interruption import caught

if TYPE_CHECKING:
    from fora_trt.evaluate.calibrate import Calibrated, Calibration, Wanted
    from fora_trt.evaluate.workers import Workers
    from fora_trt.pipeline import Pipeline
    from fora_trt.sampling.conditioning import Conditioning


@click.command()
@BUNDLE
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Schedule file to write, .json.")
@grouped(
    "goal",
    click.option("--full-steps", type=click.IntRange(min=2), help="Number of full steps."),
    click.option("--speedup", type=click.FloatRange(min=1), help="Ideal speed-up: as many full steps as it allows."),
    click.option("--max-loss", type=float, help="PSNR in dB: as few full steps as reach it."),
)
@grouped(
    "layers",
    click.option("--per-layer", is_flag=True, help="Find the layers that each step computes, in partial steps."),
    click.option(
        "--max-graphs",
        type=click.IntRange(min=2),
        default=8,
        help="Most graphs of a per-layer schedule, the full and the reuse graph among them.",
    ),
)
@click.option("--num-images", type=click.IntRange(min=1), default=16, help="Images of the calibration.")
@INPUTS_IN_TURN
@grouped(
    "settings",
    click.option("--steps", type=click.IntRange(min=3), default=50, help="Denoising steps."),
    GUIDANCE_SCALE,
    GUIDANCE_INTERVAL,
    SCHEDULER,
    TIMESTEP_SPACING,
    BATCH_SIZE,
    BACKEND,
    DEVICE,
    ENGINES,
    TRUST_SOURCE,
)
@SEED
@PARALLEL
@click.option("--force", is_flag=True, help="Replace an existing schedule file.")
@AS_JSON
def calibrate(
    bundle: Path,
    output: Path,
    goal: dict[str, Any],
    layers: dict[str, Any],
    num_images: int,
    wanted: dict[str, Any],
    settings: dict[str, Any],
    seed: int,
    parallel: dict[str, Any],
    force: bool,
    as_json: bool,
) -> None:
    """Find the schedule with which cached images come closest to those without caching, and write it to a file.

    It places the full steps where they help most and chooses the weights of the forecast, for one model, scheduler and
    number of steps. It computes less than ten samplings of its images without caching, and measures the result on other
    images, beside FORA and fewer steps of the best of several solvers. Ctrl-C writes the best schedule so far; the same
    command then goes on where it stopped. With --workers the batches of a trial are shared; without --batch-size there
    is one for each worker. `run`, `sample`, `bench` and `quality` take the file with --schedule.

    With --per-layer a step may compute some layers and read the others from the cache. Its trials run in PyTorch; to
    use the file, export the bundle again with it, so that it has a graph for each kind of step.

    \b
    Examples:
      fora-trt calibrate export/digits --full-steps 18 -o digits-18.json
      fora-trt calibrate export/dit-xl-2-256 --speedup 3 --steps 50 -o dit-3x.json
      fora-trt calibrate export/digits --full-steps 18 --per-layer --max-graphs 8 -o digits-layers.json
    """
    _check_options(layers["per_layer"])
    pipeline = pipeline_of(bundle, **settings)
    pipeline.manifest.check_one_network("calibrate")
    from fora_trt.evaluate.calibrate import Wanted, read_trials, trials_file
    from fora_trt.files import only_writer
    from fora_trt.images.save import check_new, writable_file

    if output.suffix != ".json":
        raise click.BadParameter(f"{output} does not end in .json", param_hint="--output")
    writable_file(output)
    check_new(output, force or trials_file(output).exists())  # an interrupted search wrote the best so far
    asked = Wanted(images=num_images, seed=seed, **goal)
    if layers["per_layer"]:
        pipeline = _in_pytorch(pipeline)
    given = conditioning_in_turn(pipeline, wanted, 2 * num_images)
    workers = workers_of(pipeline, parallel)
    identity = _identity(pipeline, asked, given.digest(), settings, layers)
    with only_writer(output, InputError):  # of the trials too
        known = read_trials(trials_file(output), identity)
        calibration = _calibration(pipeline, given, asked, known, workers, layers)
        if workers is not None and not is_given("batch_size"):
            pipeline.config = replace(pipeline.config, batch_size=calibration.shared_among(workers.number()))
        found = with_room(pipeline, lambda: _found(calibration, trials_file(output), identity))
        calibration.write(output, found)
        if not found.interrupted:
            trials_file(output).unlink(missing_ok=True)
    _show(found, output, calibration, as_json)
    if found.interrupted:
        click.echo("interrupted: this is the best schedule so far; the same command goes on from here", err=True)
        click.get_current_context().exit(130)


def _check_options(per_layer: bool) -> None:
    """Refuse options that have no effect."""
    if per_layer:
        refuse_given("with --per-layer the trials run in PyTorch", "backend", "engines")
        refuse_given("with --per-layer the trials run in this process", "workers", "ray_address")
    else:
        refuse_given("only --per-layer finds partial steps", "max_graphs")
        refuse_given("the trials run the graphs of the bundle; its source is loaded with --per-layer", "trust_source")


def _in_pytorch(pipeline: Pipeline) -> Pipeline:
    """The pipeline with the module that its bundle was exported from."""
    from fora_trt.evaluate.eager_fora import EagerFora
    from fora_trt.evaluate.targets import device_of
    from fora_trt.report.results import EAGER

    return pipeline.over(EagerFora(pipeline.bundle, device_of(EAGER, pipeline.config.device)))


def _calibration(
    pipeline: Pipeline,
    given: Conditioning,
    asked: Wanted,
    known: dict[str, float],
    workers: Workers | None,
    layers: dict[str, Any],
) -> Calibration:
    from fora_trt.evaluate.calibrate import Calibration
    from fora_trt.evaluate.calibrate_layers import LayerCalibration

    if layers["per_layer"]:
        return LayerCalibration(pipeline, given, asked, layers["max_graphs"], known, watched("denoising"))
    return Calibration(pipeline, given, asked, known, watched("denoising"), workers)


def _identity(
    pipeline: Pipeline, asked: Wanted, conditioning: str, settings: dict[str, Any], layers: dict[str, Any]
) -> dict[str, Any]:
    """Everything that trials depend on, as values for JSON."""
    kept = ("steps", "guidance_scale", "guidance_interval", "scheduler", "timestep_spacing")
    return json.loads(  # type: ignore[no-any-return] # an object
        json.dumps(
            {
                "model": pipeline.manifest.model.weights_sha256,
                "conditioning": conditioning,
                **asked.model_dump(mode="json"),
                **{name: settings[name] for name in kept},
                **(layers if layers["per_layer"] else {}),
            }
        )
    )


def _found(calibration: Calibration, trials: Path, identity: dict[str, Any]) -> Calibrated:
    """Search and measure; after Ctrl-C the best schedule so far."""
    from fora_trt.evaluate.calibrate import BUDGET, write_trials

    try:
        with DISPLAY.task("calibrate", BUDGET, nests=False) as task:  # in samplings; it may end earlier
            for line in calibration.run():
                task.update(calibration.trials.spent, line)
                write_trials(trials, identity, calibration.trials.known)
            return calibration.result(lambda line: task.update(calibration.trials.spent, line))
    except KeyboardInterrupt:
        caught()
        write_trials(trials, identity, calibration.trials.known)
        if calibration.best is None:
            raise
        return calibration.so_far()


def _show(found: Calibrated, output: Path, calibration: Calibration, as_json: bool) -> None:
    """Print the comparison on other images."""
    from fora_trt.evaluate.calibrate_layers import LayersCalibrated, export_command
    from fora_trt.report.environment import versions

    if as_json:
        print_json({"output": output, **found.model_dump(mode="json", exclude_none=True), "versions": versions()})
        return

    nfe, layers = calibration.plain.nfe, isinstance(found, LayersCalibrated)
    if found.compared:
        title = f"{found.images} other images; PSNR against no caching"
        cost = "arithmetic" if layers else "ideal speed-up"
        table = new_table(title, "setting", "steps", "full steps", cost, "PSNR")
        for row in found.compared:
            of_row = f"{nfe / row.full_steps:.2f}x" if row.arithmetic is None else f"{row.arithmetic:.1%}"
            table.add_row(row.label, str(row.steps), str(row.full_steps), of_row, f"{row.psnr:.1f} dB")
        print_table(table)
    steps = ", ".join(map(str, found.full_steps))
    weights = f"forecast order {found.order}{' with fitted weights' if found.fitted else ''}"
    click.echo(f"full steps {steps}; {weights}; computed as much as {found.spent:.1f} samplings")
    click.echo(f"wrote {output}")
    if isinstance(found, LayersCalibrated):
        bundle = calibration.pipeline.bundle
        exports = f"{found.graphs} graphs; to export them: {export_command(bundle, str(output))}"
        click.echo(exports if found.graphs > 2 else "no step is partial, so the bundle has all graphs of the schedule")
        if found.advice is not None:
            click.echo(found.advice)
