"""Writes images and latents; output paths are checked before the work begins, files are written atomically."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from fora_trt.errors import InputError
from fora_trt.files import write_whole
from fora_trt.images.grid import square_grid

TEXT = "fora-trt"
"""Keyword of the PNG text with the settings of an image, as JSON."""


def about_image(image: int, seed: int, label: int | None = None, prompt: str | None = None) -> dict[str, Any]:
    """What differs from image to image: its number, seed, and label or prompt; `seed` is that of image 0."""
    inputs = {"class_label": label, "image_prompt": prompt}
    return {
        "image": image,
        "image_seed": seed + image,
        **{name: one for name, one in inputs.items() if one is not None},
    }


def check_new(path: Path, force: bool) -> None:
    """Raise `InputError` if `path` is a file, or a folder that is not empty, and `force` is not given."""
    if force or not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    there = "is a folder with files in it" if path.is_dir() else "already exists"
    raise InputError(f"{path} {there}; give another name, or --force to write over what is there")


def free_name(path: Path) -> Path:
    """`path`, or NAME-2, NAME-3 and so on with the same suffix: the first that does not exist."""
    names = chain([path], (path.with_name(f"{path.stem}-{k}{path.suffix}") for k in count(2)))
    return next(name for name in names if not name.exists())


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


def save_images(
    images: Sequence[Image.Image],
    path: Path,
    settings: Mapping[str, Any] | None = None,
    each: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write all images as a grid to one file, or separately to a folder as `0000.png`, `0001.png` and so on.

    A grid carries the `settings` of all images, a single image also its own entry of `each`. More images of an earlier
    call in the folder are removed, so that it has those of one call.
    """
    if not _is_folder(path):
        save_image(square_grid(images), path, settings)
        return
    path.mkdir(exist_ok=True)
    for k, image in enumerate(images):
        save_image(image, path / f"{k:04d}.png", {**(settings or {}), **(each[k] if each else {})})
    for k in count(len(images)):
        older = path / f"{k:04d}.png"
        if not older.is_file():
            break
        older.unlink()


def save_image(image: Image.Image, path: Path, settings: Mapping[str, Any] | None = None) -> None:
    """Write one image; the suffix of `path` determines the format. A PNG carries the settings as JSON in a text."""
    form = Image.registered_extensions()[path.suffix.lower()]
    options = _with_text(settings) if form == "PNG" else {}
    write_whole(path, lambda file: image.save(file, format=form, **options))


def png_bytes(picture: NDArray[numpy.uint8], settings: Mapping[str, Any] | None = None) -> bytes:
    """A picture (H, W, 1 or 3) as the bytes of a PNG that carries the settings."""
    file = io.BytesIO()
    Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture).save(
        file, format="PNG", **_with_text(settings)
    )
    return file.getvalue()


def _with_text(settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """The option of Pillow that writes settings as a text of a PNG."""
    if not settings:
        return {}
    info = PngInfo()
    info.add_itxt(TEXT, json.dumps(settings))
    return {"pnginfo": info}


def save_videos(videos: Sequence[Sequence[Image.Image]], path: Path, milliseconds: int = 62) -> None:
    """Write the frames of all videos as one animation, a grid a frame, or one animation a video to a folder.

    Raises `InputError` for the suffix of a format that has no animations.
    """
    if _is_folder(path):
        path.mkdir(exist_ok=True)
        for k, frames in enumerate(videos):
            save_videos([frames], path / f"{k:04d}.webp", milliseconds)
        return
    form = Image.registered_extensions().get(path.suffix.lower())
    if form not in ("GIF", "WEBP", "PNG"):
        raise InputError(
            f"{path} does not have the suffix of an animation; give a .webp, .gif or .png file or a folder"
        )
    frames = [square_grid(list(at_once)) if len(at_once) > 1 else at_once[0] for at_once in zip(*videos, strict=True)]
    options: dict[str, Any] = {"save_all": True, "append_images": frames[1:], "duration": milliseconds, "loop": 0}
    write_whole(path, lambda file: frames[0].save(file, format=form, **options))


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
