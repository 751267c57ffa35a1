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
    conditioning_in_turn,
    grouped,
    is_given,
    pipeline_of,
    with_room,
    workers_of,
)
from fora_trt.cli.terminal import DISPLAY, new_table, print_json, print_table, watched
from fora_trt.errors import InputError
from fora_trt.interruption import caught

if TYPE_CHECKING:
    from fora_trt.evaluate.calibrate import Calibrated, Calibration
    from fora_trt.pipeline import Pipeline


@click.command()
@BUNDLE
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Schedule file to write, .json.")
@grouped(
    "goal",
    click.option("--full-steps", type=click.IntRange(min=2), help="Number of full steps."),
    click.option("--speedup", type=click.FloatRange(min=1), help="Ideal speed-up: as many full steps as it allows."),
    click.option("--max-loss", type=float, help="PSNR in dB: as few full steps as reach it."),
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
)
@SEED
@PARALLEL
@click.option("--force", is_flag=True, help="Replace an existing schedule file.")
@AS_JSON
def calibrate(
    bundle: Path,
    output: Path,
    goal: dict[str, Any],
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

    \b
    Examples:
      fora-trt calibrate export/digits --full-steps 18 -o digits-18.json
      fora-trt calibrate export/dit-xl-2-256 --speedup 3 --steps 50 -o dit-3x.json
    """
    pipeline = pipeline_of(bundle, **settings)
    from fora_trt.evaluate.calibrate import Calibration, Wanted, read_trials, trials_file
    from fora_trt.files import only_writer
    from fora_trt.images.save import check_new, writable_file
    from fora_trt.report.environment import versions

    if output.suffix != ".json":
        raise click.BadParameter(f"{output} does not end in .json", param_hint="--output")
    writable_file(output)
    check_new(output, force or trials_file(output).exists())  # an interrupted search wrote the best so far
    asked = Wanted(images=num_images, seed=seed, **goal)
    given = conditioning_in_turn(pipeline, wanted, 2 * num_images)
    workers = workers_of(pipeline, parallel)
    identity = _identity(pipeline, asked, given.digest(), settings)
    with only_writer(output, InputError):  # of the trials too
        known = read_trials(trials_file(output), identity)
        calibration = Calibration(pipeline, given, asked, known, watched("denoising"), workers)
        if workers is not None and not is_given("batch_size"):
            pipeline.config = replace(pipeline.config, batch_size=calibration.shared_among(workers.number()))
        found = with_room(pipeline, lambda: _found(calibration, trials_file(output), identity))
        calibration.write(output, found)
        if not found.interrupted:
            trials_file(output).unlink(missing_ok=True)
    if as_json:
        print_json({"output": output, **found.model_dump(mode="json"), "versions": versions()})
    else:
        _show(found, output, calibration.plain.nfe)
    if found.interrupted:
        click.echo("interrupted: this is the best schedule so far; the same command goes on from here", err=True)
        click.get_current_context().exit(130)


def _identity(pipeline: Pipeline, asked: Any, conditioning: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Everything that trials depend on, as values for JSON."""
    kept = ("steps", "guidance_scale", "guidance_interval", "scheduler", "timestep_spacing")
    return json.loads(  # type: ignore[no-any-return] # an object
        json.dumps(
            {
                "model": pipeline.manifest.model.weights_sha256,
                "conditioning": conditioning,
                **asked.model_dump(mode="json"),
                **{name: settings[name] for name in kept},
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


def _show(found: Calibrated, output: Path, nfe: int) -> None:
    """Print the comparison on other images."""
    if found.compared:
        title = f"{found.images} other images; PSNR against no caching"
        table = new_table(title, "setting", "steps", "full steps", "ideal speed-up", "PSNR")
        for row in found.compared:
            speedup = f"{nfe / row.full_steps:.2f}x"
            table.add_row(row.label, str(row.steps), str(row.full_steps), speedup, f"{row.psnr:.1f} dB")
        print_table(table)
    steps = ", ".join(map(str, found.full_steps))
    weights = f"forecast order {found.order}{' with fitted weights' if found.fitted else ''}"
    click.echo(f"full steps {steps}; {weights}; computed as much as {found.spent:.1f} samplings")
    click.echo(f"wrote {output}")
