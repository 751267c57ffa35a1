"""Per-layer schedules of the digits model beside schedules of full and reuse steps with the same arithmetic.

    python -m benchmarks.per_layer export/digits cpu-2-cores

Both calibrations search on the same images. Everything is compared with no caching on others, in eager PyTorch. The
command writes benchmarks/results/per-layer_<model>_<hardware>_<date>.json and prints the table of docs/measurements.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.readme_tables import RESULTS, lines_of, newest_content
from fora_trt.evaluate.calibrate import Calibration, Wanted
from fora_trt.evaluate.calibrate_layers import Arithmetic, LayerCalibration
from fora_trt.evaluate.eager_fora import EagerFora
from fora_trt.evaluate.solvers import best_solver
from fora_trt.metrics import latent_psnr
from fora_trt.pipeline import Pipeline, Sampling
from fora_trt.report.environment import environment
from fora_trt.report.tables import Table
from fora_trt.sampling.conditioning import balanced_labels
from fora_trt.sampling.schedulers import SchedulerChoice
from fora_trt.schedule import NONE, Schedule

FULL_STEPS, STEPS, GUIDANCE_SCALE, MOST_GRAPHS = 18, 50, 1.5, 8
CALIBRATION_IMAGES = 16  # of the seeds 0 to 31, of which the second half only chooses the solver
IMAGES, SEED = 64, 7000


def ways_of(bundle: Path, told: Callable[[str], object]) -> Iterator[dict[str, Any]]:
    """Every way, with its number of graphs, its arithmetic in full steps, and its mean PSNR in dB to no caching."""
    pipeline = Pipeline(bundle, scheduler="ddim", guidance_scale=GUIDANCE_SCALE, steps=STEPS)
    eager = EagerFora(pipeline.bundle, torch.device("cpu"))
    plain, arithmetic = pipeline.over(eager), Arithmetic(pipeline.bundle)
    wanted = Wanted(full_steps=FULL_STEPS, images=CALIBRATION_IMAGES)
    given = pipeline.conditioning(balanced_labels(pipeline.manifest, 2 * CALIBRATION_IMAGES))
    calibration, layers = (
        Calibration(pipeline, given, wanted),
        LayerCalibration(plain, given, wanted, MOST_GRAPHS),
    )
    calibrated, found = (_searched(one, told) for one in (calibration, layers))
    others, seeds = pipeline.conditioning(balanced_labels(pipeline.manifest, IMAGES)), range(SEED, SEED + IMAGES)
    uncached = plain.sampling(schedule=NONE)

    def latents(sampling: Sampling) -> Any:
        return plain.sampler(sampling).in_batches(others, seeds, GUIDANCE_SCALE, plain.config.batch_size).latents

    reference = latents(uncached)

    def way(label: str, sampling: Sampling) -> dict[str, Any]:
        schedule = sampling.schedule
        eager.add_graphs(schedule.masks)
        psnr = float(latent_psnr(latents(sampling), reference, plain.manifest.latents.pixels).mean())
        graphs, cost = len({step.graph for step in schedule.plan}), arithmetic.of_schedule(schedule)
        told(f"{label}: {psnr:.1f} dB")
        return {"label": label, "graphs": graphs, "full_steps": round(cost, 2), "psnr": round(psnr, 2)}

    dense = Schedule.dense(STEPS, FULL_STEPS).with_forecast(2)
    yield way("calibrated", uncached.with_schedule(calibrated))
    yield way(dense.text, uncached.with_schedule(dense))
    yield way(f"per-layer ({found.text})", uncached.with_schedule(found))
    yield way("per-layer without a forecast", uncached.with_schedule(found.with_forecast(0)))
    yield way("SmoothCache's rule for each layer", uncached.with_schedule(layers.by_smoothcache()))
    yield way("fora:3", uncached.with_schedule("fora:3"))
    solver = best_solver(plain, FULL_STEPS, lambda one: layers.trials.psnr(one, range(CALIBRATION_IMAGES)))
    yield way(f"{solver.steps} steps of {SchedulerChoice.from_text(solver.name).label}", solver)


def _searched(calibration: Calibration, told: Callable[[str], object]) -> Schedule:
    for line in calibration.run():
        told(line)
    if calibration.best is None:
        raise click.ClickException("the calibration has tried no schedule")
    return calibration.best.schedule


def table_of(content: Mapping[str, Any]) -> list[str]:
    """The table of docs/measurements.md."""
    header = ("setting", "graphs", "arithmetic in full steps", "PSNR")
    rows = [
        (one["label"], str(one["graphs"]), f"{one['full_steps']:.1f}", f"{one['psnr']:.1f} dB")
        for one in content["ways"]
    ]
    return lines_of(Table("", header, tuple(rows), texts=1), header)


def newest() -> dict[str, Any]:
    """The last committed result."""
    return newest_content("per-layer_digits")


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("hardware")
def main(bundle: Path, hardware: str) -> None:
    """Measure BUNDLE; HARDWARE becomes a part of the file name."""
    about = environment()
    content = {
        "environment": about,
        "images": IMAGES,
        "seed": SEED,
        "guidance_scale": GUIDANCE_SCALE,
        "steps": STEPS,
        "ways": list(ways_of(bundle, click.echo)),
    }
    path = RESULTS / f"per-layer_{Pipeline(bundle).manifest.name}_{hardware}_{about['date']}.json"
    path.write_text(json.dumps(content, indent=2) + "\n")
    click.echo("\n".join(table_of(content)))
    click.echo(f"wrote {path.name}")


if __name__ == "__main__":
    main()
