"""Where results go: checked before the work begins, written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

import numpy
from PIL import Image
from torch import Tensor

from fora_trt.errors import InputError
from fora_trt.runtime.images import square_grid


def writable_file(path: Path) -> None:
    """Raise `InputError` unless a file can be made at `path`; leaves nothing behind."""
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the name of a file")
    _probe(path.parent, path)


def writable_images(path: Path) -> None:
    """The same for pictures: a file with the suffix of a picture format, or a folder that is made if need be."""
    if not _is_folder(path):
        if path.suffix.lower() not in Image.registered_extensions():
            raise InputError(f"{path} has no suffix of a picture format; give a .png, or a folder")
        writable_file(path)
    elif path.exists():
        _probe(path, path)
    else:
        _probe(path.parent, path)


def save_images(images: Sequence[Image.Image], path: Path) -> None:
    """A grid of all in one file, or a file each, `0000.png` and so on, in a folder."""
    if not _is_folder(path):
        save_image(square_grid(images), path)
        return
    path.mkdir(exist_ok=True)
    for k, image in enumerate(images):
        save_image(image, path / f"{k:04d}.png")


def save_image(image: Image.Image, path: Path) -> None:
    """Write one picture in the format of its suffix."""
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


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write beside `path` and rename, so that a full disk leaves no half of a file."""
    beside = None
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        beside = Path(name)
        with os.fdopen(handle, "wb") as file:
            write(file)
        beside.chmod(0o644)
        beside.replace(path)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}; give another path") from error
    finally:
        if beside is not None:
            beside.unlink(missing_ok=True)
