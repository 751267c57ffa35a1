"""Measure forecasts that nobody calibrated: schedulers, numbers of steps, speed-ups, orders, densities of full steps.

    python -m benchmarks.presets export/digits cpu-2-cores

The command writes benchmarks/results/presets_<model>_<hardware>_<date>.json. From it follow the order and the exponent
that `--forecast` and `dense` take by default, and the limits outside of which `run` warns.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import click

from benchmarks.readme_tables import RESULTS
from fora_trt.metrics import latent_psnr
from fora_trt.pipeline import Pipeline
from fora_trt.report.environment import environment
from fora_trt.sampling.conditioning import balanced_labels
from fora_trt.schedule import Schedule

SCHEDULERS = ("ddim", "dpm-solver++", "ddpm")
STEPS = (10, 20, 30, 50)
GUIDANCE_SCALES = (1.5, 4.0)
INTERVALS = (2, 3, 5)
ORDERS = (0, 1, 2, 3)
EXPONENTS = (0.0, 0.3, 0.45)
SEED = 9000


@dataclass(frozen=True)
class Point:
    """A schedule and its mean PSNR in dB to no caching, of final latents.

    It has as many full steps as FORA at the interval. FORA itself has the exponent None.
    """

    scheduler: str
    steps: int
    guidance_scale: float
    full_steps: int
    interval: int
    order: int
    exponent: float | None
    psnr: float


def points(pipeline: Pipeline, images: int) -> Iterator[Point]:
    """Every combination, after FORA and the forecast with FORA's positions."""
    given = pipeline.conditioning(balanced_labels(pipeline.manifest, images))
    seeds = range(SEED, SEED + images)
    for scheduler, steps, scale in product(SCHEDULERS, STEPS, GUIDANCE_SCALES):
        plain = pipeline.uncached(scheduler, steps)
        reference = pipeline.sampler(plain)(given, seeds, scale).latents
        for interval, order, exponent in product(INTERVALS, ORDERS, (None, *EXPONENTS)):
            fora = Schedule.fora(plain.nfe, interval)
            dense = None if exponent is None else Schedule.dense(plain.nfe, fora.full_steps, exponent)
            schedule = (dense or fora).with_forecast(order)
            made = pipeline.sampler(plain.with_schedule(schedule))(given, seeds, scale).latents
            found = float(latent_psnr(made, reference, pipeline.manifest.latents.pixels).mean())
            yield Point(scheduler, steps, scale, fora.full_steps, interval, order, exponent, round(found, 2))


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("hardware")
@click.option("--images", type=click.IntRange(min=1), default=16, show_default=True)
def main(bundle: Path, hardware: str, images: int) -> None:
    """Measure BUNDLE; HARDWARE becomes a part of the file name."""
    pipeline = Pipeline(bundle)
    found = []
    for point in points(pipeline, images):
        found.append(point)
        click.echo(f"{point}")
    about = environment()
    path = RESULTS / f"presets_{pipeline.manifest.name}_{hardware}_{about['date']}.json"
    content = {"measured_on": about, "images": images, "points": [asdict(one) for one in found]}
    path.write_text(json.dumps(content) + "\n")
    click.echo(f"wrote {path.name}")


if __name__ == "__main__":
    main()
