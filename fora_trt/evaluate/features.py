"""Extractors of image features: the built-in digit classifier, or Inception from a local file.

Shapes: B pictures (B, H, W, C), integers from 0 to 255; features (B, D).
"""

from __future__ import annotations

import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from fora_trt.bundle import Manifest
from fora_trt.errors import InputError, ModelError, first_line
from fora_trt.evaluate.digit_classifier import digit_classifier, makes_digits, pixels_of
from fora_trt.files import sha256_of
from fora_trt.models.checkpoint import tensors_from_file
from fora_trt.untrusted import read_npz

INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
"""The weights that define the Fréchet inception distance, in torch-fidelity's form."""

INCEPTION_LAYER = "2048"
INCEPTION_SHAPES = {
    "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
    "Mixed_5b.branch_pool.conv.weight": (32, 192, 1, 1),
    "Mixed_7c.branch_pool.conv.weight": (192, 2048, 1, 1),
    "fc.weight": (1008, 2048),
}
"""Shapes that distinguish the InceptionV3 of the Fréchet inception distance from others, such as torchvision's."""

AT_ONCE = 32  # pictures in one batch of Inception


class Extractor(ABC):
    """Computes image features. `name` is its name in reports, `digest` identifies its weights."""

    name: str
    dimensions: int
    digest: str

    @abstractmethod
    def features(self, pictures: Tensor) -> Tensor:
        """Features (B, D) in fp32, on the CPU."""

    def classes(self, pictures: Tensor) -> Tensor | None:
        """The class that the extractor assigns to each picture, (B,); None for an extractor that is no classifier."""
        return None


class Digits(Extractor):
    """The digit classifier that comes with fora-trt: features of its penultimate layer, and its classes."""

    name, digest = "digit classifier", "built in"

    def __init__(self) -> None:
        self._model = digit_classifier()
        self.dimensions = self._model.features

    def __reduce__(self) -> tuple[Any, ...]:
        return Digits, ()

    @torch.no_grad()
    def features(self, pictures: Tensor) -> Tensor:
        features: Tensor = self._model(pixels_of(pictures))[0]
        return features

    @torch.no_grad()
    def classes(self, pictures: Tensor) -> Tensor:
        logits: Tensor = self._model(pixels_of(pictures))[1]
        return logits.argmax(1)


class Inception(Extractor):
    """The InceptionV3 of torch-fidelity; features are its last pooling layer, as for the Fréchet inception distance."""

    name, dimensions = "InceptionV3", int(INCEPTION_LAYER)

    def __init__(self, weights: Path, device: torch.device) -> None:
        """Load a file of weights. Raises `InputError` for other weights, and if torch-fidelity is missing."""
        network = _network_of_inception()
        tensors = _inception_tensors(weights)
        self.digest, self._device, self._weights = sha256_of(weights), device, weights.absolute()
        try:
            with _safe_copy(tensors) as ours:
                self._model = network("inception-v3-compat", [INCEPTION_LAYER], feature_extractor_weights_path=ours)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{weights} does not fit the InceptionV3 of torch-fidelity: {reason}") from error
        self._model.to(device)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as the path of the weights, which are loaded again where it is unpickled."""
        return Inception, (self._weights, self._device)

    @torch.no_grad()
    def features(self, pictures: Tensor) -> Tensor:
        channels_first = pictures.permute(0, 3, 1, 2).expand(-1, 3, -1, -1)  # grey to RGB
        parts = torch.split(channels_first, AT_ONCE)
        return torch.cat([self._model(part.contiguous().to(self._device))[0].float().cpu() for part in parts])


def extractor_for(manifest: Manifest, inception_weights: Path | None, device: torch.device) -> Extractor | None:
    """Inception if its weights are given, else the digit classifier if the bundle makes digits, else None."""
    if inception_weights is not None:
        return Inception(inception_weights, device)
    return Digits() if makes_digits(manifest) else None


def _network_of_inception() -> Any:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as error:  # RuntimeError if torchvision does not match the installed torch
        raise InputError(
            f"--inception-weights needs torch-fidelity, which cannot be imported here: {first_line(error)}; "
            "pip install torch-fidelity"
        ) from error
    return FeatureExtractorInceptionV3


@contextmanager
def _safe_copy(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """The path of a file with these weights, because torch-fidelity would run code in a pickle of others.

    The file is in memory where the system has such files, else in a temporary folder.
    """
    if hasattr(os, "memfd_create"):
        with os.fdopen(os.memfd_create("inception.pth"), "wb") as file:
            torch.save(tensors, file)
            file.flush()
            yield f"/proc/self/fd/{file.fileno()}"
    else:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "inception.pth")
            torch.save(tensors, path)
            yield str(path)


def _inception_tensors(path: Path) -> dict[str, Tensor]:
    """The weights in a file, read without running code from it. Raises `InputError` for another network's weights."""
    try:
        tensors: Mapping[str, Tensor] = tensors_from_file(path)
    except ModelError as error:
        raise InputError(f"--inception-weights: {error}") from error
    wrong = [name for name, shape in INCEPTION_SHAPES.items() if name not in tensors or tensors[name].shape != shape]
    if wrong:
        name = wrong[0]
        found = (
            f"has shape {list(tensors[name].shape)}, expected {list(INCEPTION_SHAPES[name])}"
            if name in tensors
            else "is missing"
        )
        raise InputError(
            f"{path} does not contain the InceptionV3 weights that define the Fréchet inception distance: "
            f"{name} {found}; give the file {INCEPTION_URL}"
        )
    return dict(tensors)


def reference_pictures(path: Path, shape: tuple[int, ...] | None) -> NDArray[numpy.uint8]:
    """Pictures (N, H, W, C) from `arr_0` of a .npz file in the layout of the ADM evaluator.

    Raises `InputError` unless they have the `shape` (H, W, C) of the bundle's pictures, if that is known.
    """
    try:
        pictures: NDArray[Any] = read_npz(path, ["arr_0"])["arr_0"]
    except (OSError, ValueError, LookupError) as error:
        raise InputError(
            f"{path} cannot be read as reference images: {first_line(error)}; give a .npz file with the array arr_0 in "
            "uint8, (images, height, width, channels)"
        ) from error
    fits = pictures.dtype == numpy.uint8 and pictures.ndim == 4 and len(pictures) > 1
    if not fits or (shape is not None and pictures.shape[1:] != shape):
        wanted = ", ".join(map(str, shape or ("height", "width", "channels")))
        raise InputError(
            f"arr_0 of {path} is {pictures.dtype} with shape {list(pictures.shape)}; a reference for this bundle must "
            f"be uint8 with shape [images, {wanted}] and at least 2 images"
        )
    return pictures
