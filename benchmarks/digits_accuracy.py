"""How many digits can be read as the class that was asked for, by a classifier trained on the real ones.

python benchmarks/digits_accuracy.py export/digits
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC
from torch import Tensor

from fora_trt import Schedule, load
from fora_trt.bundle import Bundle
from fora_trt.runtime.conditioning import conditioning_of_classes
from fora_trt.runtime.sampling import Sampler, sample_in_batches
from fora_trt.runtime.schedulers import scheduler_from_config
from fora_trt.runtime.updates import update_from_scheduler

PER_CLASS = 50


def digits_accuracy(bundle: Bundle, cache_intervals: Sequence[int], guidance_scale: float = 1.5) -> dict[str, float]:
    """Part of 500 digits, 50 per class, DDIM with 50 steps, that is read as asked for; by cache interval.

    `real` is what the classifier, a support vector machine, reads right of the real digits that it was not trained on.
    """
    data = load_digits()
    seen, held_out, classes, held_out_classes = train_test_split(
        data.data, data.target, test_size=0.25, random_state=0, stratify=data.target
    )
    classifier = SVC(gamma=0.001, C=10).fit(seen, classes)
    labels = [digit for digit in range(10) for _ in range(PER_CLASS)]
    denoiser = load(bundle, schedule=Schedule.static(50, 1), device="cpu")
    scheduler = scheduler_from_config(bundle.scheduler_config, "ddim", learned_sigma=True)
    sampler = Sampler(denoiser, update_from_scheduler(scheduler, 50))
    wanted = conditioning_of_classes(bundle.manifest, labels)
    accuracy = {"real": float(classifier.score(held_out, held_out_classes))}
    for interval in cache_intervals:
        schedule = Schedule.static(sampler.update.calls, interval)
        done = sample_in_batches(sampler, schedule, wanted, 0, guidance_scale, batch_size=100)
        accuracy[f"interval {interval}"] = float(np.mean(classifier.predict(_as_data(done.latents)) == labels))
    return accuracy


def _as_data(pixels: Tensor) -> np.ndarray:
    """(B, 1, 8, 8) in [-1, 1] -> (B, 64) in whole levels from 0 to 16, as scikit-learn has them."""
    levels: np.ndarray = ((pixels + 1) * 8).round().clamp(0, 16).flatten(1).numpy()
    return levels


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
def main(bundle: Path) -> None:
    """Print the accuracy at each cache interval as one JSON object."""
    click.echo(json.dumps(digits_accuracy(Bundle.open(bundle), (1, 2, 3, 5))))


if __name__ == "__main__":
    main()
