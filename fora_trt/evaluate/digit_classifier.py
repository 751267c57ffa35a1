"""A small classifier of 8 x 8 digits; its penultimate layer provides the image features of the digits model.

It replaces Inception, which needs larger images. `benchmarks/train_digit_classifier.py` trains it; its weights come
with fora-trt. Shapes: B images, D features.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fora_trt.bundle import Manifest

WEIGHTS = Path(__file__).with_name("digit_classifier.safetensors")
SHAPE, CLASSES = (1, 8, 8), 10


class DigitClassifier(nn.Module):
    """From pixels in [-1, 1] to features and, by one linear layer, to logits.

    It uses SiLU instead of ReLU: a feature that is zero for all images would make the covariance singular.
    """

    features = 64

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.SiLU(),
            nn.AvgPool2d(2),
            nn.Conv2d(32, 24, 3, padding=1),
            nn.SiLU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(24 * 2 * 2, self.features),
            nn.SiLU(),
        )
        self.head = nn.Linear(self.features, CLASSES)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 1, 8, 8) -> features (B, D), logits (B, 10)."""
        features = self.body(pixels)
        return features, self.head(features)


def digit_classifier() -> DigitClassifier:
    """The trained network that comes with fora-trt, on the CPU."""
    model = DigitClassifier()
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(WEIGHTS).items()})
    return model.eval().requires_grad_(False)


def makes_digits(manifest: Manifest) -> bool:
    """Whether a bundle makes images that the classifier can read: 8 x 8 grey pixels, ten classes."""
    classes = manifest.guidance.num_classes if manifest.guidance is not None else 0
    return manifest.latents.pixels and manifest.latents.shape == SHAPE and classes == CLASSES


def pixels_of(pictures: Tensor) -> Tensor:
    """Pictures (B, 8, 8, 1) from 0 to 255 -> pixels (B, 1, 8, 8) in [-1, 1]."""
    return pictures.permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1
