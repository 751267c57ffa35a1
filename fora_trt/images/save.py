"""Writes images and latents; output paths are checked before the work begins, files are written atomically."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy
from PIL import Image
from torch import Tensor

from fora_trt.errors import InputError
from fora_trt.files import write_whole
from fora_trt.images.grid import square_grid


def writable_file(path: Path) -> None:
    """Raise `InputError` unless a file can be created at `path`; creates nothing."""
    if path.is_dir():
        raise InputError(f"{path} is a folder; give a file name")
    _probe(path.parent, path)


def writable_images(path: Path) -> None:
    """Raise `InputError` unless images can be written to `path`: an image file, or a folder, existing or not."""
    if not _is_folder(path):
        if path.suffix.lower() not in Image.registered_extensions():
            raise InputError(f"{path} does not have the suffix of an image format; give a .png file or a folder")
        writable_file(path)
    elif path.exists():
        _probe(path, path)
    else:
        _probe(path.parent, path)


def save_images(images: Sequence[Image.Image], path: Path) -> None:
    """Write all images as a grid to one file, or separately to a folder as `0000.png`, `0001.png` and so on."""
    if not _is_folder(path):
        save_image(square_grid(images), path)
        return
    path.mkdir(exist_ok=True)
    for k, image in enumerate(images):
        save_image(image, path / f"{k:04d}.png")


def save_image(image: Image.Image, path: Path) -> None:
    """Write one image; the suffix of `path` determines the format."""
    form = Image.registered_extensions()[path.suffix.lower()]
    write_whole(path, lambda file: image.save(file, format=form))


def save_latents(latents: Tensor, path: Path) -> None:
    """Write latents (B, C, H, W) as a .npy file in fp32."""
    write_whole(path, lambda file: numpy.save(file, latents.numpy()))


def _is_folder(path: Path) -> bool:
    return path.is_dir() or path.suffix == ""


def _probe(folder: Path, path: Path) -> None:
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror} ({folder}); give another path") from error
