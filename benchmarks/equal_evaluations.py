"""Equally many evaluations of the digits model, spent in different ways, and how close each comes to the solution.

    python -m benchmarks.equal_evaluations export/digits cpu-2-cores

The solution is DDIM with 250 steps. Solvers without caching spend all evaluations on steps; FORA, a forecast and
calibrated schedules take more steps, of which as many are full. The command writes
benchmarks/results/evaluations_<model>_<hardware>_<date>.json and prints the table of the README.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from benchmarks.readme_tables import RESULTS, lines_of, newest_content
from fora_trt.evaluate.calibrate import Calibration, Wanted
from fora_trt.evaluate.solvers import solvers_for
from fora_trt.metrics import latent_psnr
from fora_trt.pipeline import Pipeline, Sampling
from fora_trt.report.environment import environment
from fora_trt.report.results import CALIBRATED, FORA, FORECAST
from fora_trt.report.tables import Table
from fora_trt.sampling.conditioning import balanced_labels
from fora_trt.sampling.schedulers import SchedulerChoice
from fora_trt.schedule import Schedule

EVALUATIONS = (8, 11, 18)
SOLUTION_STEPS, STEPS, FINE_STEPS = 250, 50, 200
GUIDANCE_SCALE = 1.5
IMAGES, SEED = 64, 7000
CALIBRATION_IMAGES = 16  # of the seeds 0 to 31, the second half for the figures in the schedule file

SOLVER = "solver"


@dataclass(frozen=True)
class Way:
    """A way to spend evaluations, and its mean PSNR in dB to the solution; `label` names the solver or schedule."""

    evaluations: int
    kind: str
    steps: int
    label: str
    psnr: float


def ways_of(bundle: Path, images: int, told: Callable[[str], object]) -> Iterator[Way]:
    """Every way at every number of evaluations."""
    pipeline = Pipeline(bundle, scheduler="ddim", guidance_scale=GUIDANCE_SCALE)
    given, seeds = pipeline.conditioning(balanced_labels(pipeline.manifest, images)), range(SEED, SEED + images)

    def latents(sampling: Sampling) -> Any:
        return pipeline.sampler(sampling).in_batches(given, seeds, GUIDANCE_SCALE, pipeline.config.batch_size).latents

    solution = latents(pipeline.uncached("ddim", SOLUTION_STEPS))

    def way(number: int, kind: str, sampling: Sampling, label: str) -> Way:
        told(f"{number} evaluations, {kind}: {label}")
        found = float(latent_psnr(latents(sampling), solution, pipeline.manifest.latents.pixels).mean())
        return Way(number, kind, sampling.steps, label, round(found, 2))

    for number in EVALUATIONS:
        for solver in solvers_for(pipeline, number):
            yield way(number, SOLVER, solver, SchedulerChoice.from_text(solver.name).label)
        for steps in (STEPS, FINE_STEPS):
            plain = pipeline.uncached("ddim", steps)
            fora = Schedule.fora_nearest(steps, number)
            if fora.full_steps == number:
                yield way(number, FORA, plain.with_schedule(fora), fora.text)
            dense = Schedule.dense(steps, number).with_forecast(2)
            yield way(number, FORECAST, plain.with_schedule(dense), dense.text)
        calibrated = _calibrated(bundle, FINE_STEPS, number, told)
        yield way(number, CALIBRATED, plain.with_schedule(calibrated), calibrated.text)


def _calibrated(bundle: Path, steps: int, number: int, told: Callable[[str], object]) -> Schedule:
    pipeline = Pipeline(bundle, scheduler="ddim", guidance_scale=GUIDANCE_SCALE, steps=steps)
    given = pipeline.conditioning(balanced_labels(pipeline.manifest, 2 * CALIBRATION_IMAGES))
    calibration = Calibration(pipeline, given, Wanted(full_steps=number, images=CALIBRATION_IMAGES))
    for line in calibration.run():
        told(line)
    found = calibration.so_far()
    return Schedule.of_full_steps(steps, found.full_steps).with_forecast(found.order)


def table_of(ways: Mapping[int, list[Way]]) -> list[str]:
    """The table of the README: one row for each number of evaluations."""

    def best(number: int, kind: str, steps: int | None = None) -> str:
        fitting = [one for one in ways[number] if one.kind == kind and steps in (None, one.steps)]
        return f"{max(one.psnr for one in fitting):.1f} dB" if fitting else ""

    def ddim(number: int) -> str:
        return next(f"{one.psnr:.1f} dB" for one in ways[number] if one.label == "ddim")

    kinds = (f"FORA, {STEPS} steps", f"forecast, {FINE_STEPS} steps", f"calibrated, {FINE_STEPS} steps")
    header = ("evaluations", "DDIM", "best of the solvers", *kinds)
    rows = [
        (
            str(number),
            ddim(number),
            best(number, SOLVER),
            best(number, FORA, STEPS),
            best(number, FORECAST, FINE_STEPS),
            best(number, CALIBRATED, FINE_STEPS),
        )
        for number in ways
    ]
    return lines_of(Table("", header, tuple(rows), texts=0), header)


def newest_ways(model: str = "digits", hardware: str = "cpu-2-cores") -> dict[int, list[Way]]:
    """The last committed result, by number of evaluations."""
    content = newest_content(f"evaluations_{model}_{hardware}")
    ways = [Way(**one) for one in content["ways"]]
    return {number: [one for one in ways if one.evaluations == number] for number in EVALUATIONS}


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("hardware")
@click.option("--images", type=click.IntRange(min=1), default=IMAGES, show_default=True)
def main(bundle: Path, hardware: str, images: int) -> None:
    """Measure BUNDLE; HARDWARE becomes a part of the file name."""
    found = list(ways_of(bundle, images, click.echo))
    about = environment()
    path = RESULTS / f"evaluations_{Pipeline(bundle).manifest.name}_{hardware}_{about['date']}.json"
    content = {
        "measured_on": about,
        "images": images,
        "seed": SEED,
        "guidance_scale": GUIDANCE_SCALE,
        "solution": f"{SOLUTION_STEPS} steps of ddim",
        "ways": [asdict(one) for one in found],
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
    ways = {number: [one for one in found if one.evaluations == number] for number in EVALUATIONS}
    click.echo("\n".join(table_of(ways)))
    click.echo(f"wrote {path.name}")


if __name__ == "__main__":
    main()
