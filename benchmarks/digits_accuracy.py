"""Class accuracy of generated digits, measured by a classifier that is trained on real digits.

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

from fora_trt.bundle import Bundle
from fora_trt.pipeline import Pipeline
from fora_trt.sampling.conditioning import conditioning_of_classes

GUIDANCE_SCALE = 1.5


def digits_accuracy(bundle: Bundle, schedules: Sequence[str], per_class: int = 50) -> dict[str, float]:
    """Fraction of generated digits (`per_class` of each, DDIM, 50 steps) that are classified as requested, by schedule.

    The classifier is a support vector machine. `real` is its accuracy on real digits that it was not trained on.
    """
    data = load_digits()
    seen, held_out, classes, held_out_classes = train_test_split(
        data.data, data.target, test_size=0.25, random_state=0, stratify=data.target
    )
    classifier = SVC(gamma=0.001, C=10).fit(seen, classes)
    labels = [digit for digit in range(10) for _ in range(per_class)]
    pipeline = Pipeline(bundle, scheduler="ddim", steps=50, device="cpu")
    wanted = conditioning_of_classes(bundle.manifest, labels)
    accuracy = {"real": float(classifier.score(held_out, held_out_classes))}
    for schedule in schedules:
        sampler = pipeline.sampler(pipeline.sampling(schedule=schedule))
        done = sampler.in_batches(wanted, range(wanted.images), GUIDANCE_SCALE, batch_size=100)
        accuracy[schedule] = float(np.mean(classifier.predict(_as_data(done.latents)) == labels))
    return accuracy


def _as_data(pixels: Tensor) -> np.ndarray:
    """(B, 1, 8, 8) in [-1, 1] -> (B, 64) as integers from 0 to 16, the format of scikit-learn's digits."""
    levels: np.ndarray = ((pixels + 1) * 8).round().clamp(0, 16).flatten(1).numpy()
    return levels


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
def main(bundle: Path) -> None:
    """Print the accuracy of each schedule as one JSON object."""
    click.echo(json.dumps(digits_accuracy(Bundle.open(bundle), ("none", "fora:2", "fora:3", "fora:5"))))


if __name__ == "__main__":
    main()
