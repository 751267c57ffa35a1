"""Trains the digit classifier of `fora-trt quality`, on three quarters of scikit-learn's digits.

The last quarter is held out. The accuracy on it is printed, and written to the metadata of the weights. Everything is
seeded:

    python benchmarks/train_digit_classifier.py

It takes seconds. Shapes: B images of 1 x 8 x 8 pixels.
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from fora_trt.evaluate.digit_classifier import WEIGHTS, DigitClassifier


def digits_split() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training pixels (B, 1, 8, 8) in [-1, 1], held-out pixels, and the classes of both."""
    data = load_digits()
    seen, held_out, classes, held_out_classes = train_test_split(
        data.images, data.target, test_size=0.25, random_state=0, stratify=data.target
    )
    pixels = [torch.tensor(images, dtype=torch.float32)[:, None] / 8 - 1 for images in (seen, held_out)]
    return pixels[0], pixels[1], torch.tensor(classes), torch.tensor(held_out_classes)


@torch.no_grad()
def accuracy_of(model: DigitClassifier, pixels: Tensor, classes: Tensor) -> float:
    """Fraction of the images (B, 1, 8, 8) that are classified correctly."""
    right: Tensor = model(pixels)[1].argmax(1) == classes
    return right.double().mean().item()


def train(pixels: Tensor, classes: Tensor, epochs: int, batch_size: int, seed: int) -> DigitClassifier:
    """Train with cross-entropy and label smoothing; noise is added to the images, so that it learns noisy ones too."""
    torch.manual_seed(seed)
    model = DigitClassifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    steps = epochs * (len(pixels) // batch_size)
    planned = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    loss_of = nn.CrossEntropyLoss(label_smoothing=0.05)
    for _ in range(epochs):
        order = torch.randperm(len(pixels))
        for pick in order[: len(order) // batch_size * batch_size].view(-1, batch_size):
            noisy = pixels[pick] + 0.1 * torch.randn_like(pixels[pick])
            optimizer.zero_grad(set_to_none=True)
            loss_of(model(noisy)[1], classes[pick]).backward()
            optimizer.step()
            planned.step()
    return model.eval()


@click.command(context_settings={"show_default": True})
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=WEIGHTS, help="File to write.")
@click.option("--epochs", type=click.IntRange(min=1), default=60)
@click.option("--batch-size", type=click.IntRange(min=1), default=64)
@click.option("--seed", type=click.IntRange(min=0), default=0)
def main(out: Path, epochs: int, batch_size: int, seed: int) -> None:
    """Train, write the weights in half precision, and print the accuracy of these weights as one JSON object."""
    seen, held_out, classes, held_out_classes = digits_split()
    model = train(seen, classes, epochs, batch_size, seed)
    weights = {name: tensor.half() for name, tensor in model.state_dict().items()}
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    accuracy = accuracy_of(model, held_out, held_out_classes)
    made = {"format": "pt", "trained_on": f"{len(seen)} digits of scikit-learn", "seed": str(seed)}
    save_file(weights, out, metadata={**made, "held_out": str(len(held_out)), "held_out_accuracy": f"{accuracy:.4f}"})
    click.echo(json.dumps({"file": str(out), "held_out": len(held_out), "held_out_accuracy": accuracy}))


if __name__ == "__main__":
    main()
