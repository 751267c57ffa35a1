"""A large set of images for evaluation, as this field does it: an archive in the layout of the ADM evaluator, or PNGs.

Image k has the seed `seed` + k, whatever batch it is in; batches are the same however often the work was interrupted.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy
from numpy.lib import format as npy
from numpy.typing import NDArray
from PIL import Image

from fora_trt.evaluate.work_folder import WorkFolder, work_folder
from fora_trt.folders import Record
from fora_trt.models.spec import CLASS_LABELS
from fora_trt.runtime.conditioning import Conditioning
from fora_trt.runtime.images import Decoder
from fora_trt.runtime.outputs import save_image, write_whole
from fora_trt.runtime.sampling import Guidance, Sampler
from fora_trt.schedule import Schedule


class SampleSettings(Record):
    """All that decides what the images are; a folder is resumed with the same or not at all.

    `bundle` and `conditioning` are digests, `steps` are the scheduler's, `versions` those of what computes.
    """

    bundle: str
    num_images: int
    conditioning: str
    seed: int
    scheduler: str
    timestep_spacing: str | None
    steps: int
    cache_interval: int
    guidance_scale: float
    guidance_interval: tuple[int, int] | None
    batch_size: int
    backend: str
    device: str
    vae: str | None
    layout: Literal["npz", "png"]
    versions: dict[str, str]


@dataclass(frozen=True)
class SampleSet:
    """Makes the set; `given` says what the images are to be, and is taken in turn where it is for fewer of them."""

    folder: Path
    settings: SampleSettings
    sampler: Sampler
    decoder: Decoder
    schedule: Schedule
    guidance: Guidance
    given: Conditioning

    def make(self, resume: bool = False, watch: Callable[[Any], Iterator[Any]] = iter) -> Path:
        """Make what is missing; return the archive, or the folder of PNGs.

        Raises `InputError` for a folder that is not empty, or that cannot be resumed with these settings.
        """
        with work_folder(self.folder, self.settings, resume) as work:
            for left in (*self.folder.glob(".*.png.*"), *self.folder.glob(f".{self.archive.name}.*")):
                left.unlink()  # half a file, of a process that was killed
            if not self.archive.is_file():
                batches = self._batches()
                for number, images in watch(batches):
                    if not self._has(work, number, images):
                        self._put(work, number, self._pictures(images), images)
                if self.settings.layout == "npz":
                    write_whole(self.archive, lambda file: self._write_archive(file, work, len(batches)))
            work.clear()
        return self.archive if self.settings.layout == "npz" else self.folder

    @property
    def archive(self) -> Path:
        """The file that a set in this layout becomes."""
        return self.folder / "samples.npz"

    def _batches(self) -> list[tuple[int, range]]:
        """Number and images of each batch."""
        count, size = self.settings.num_images, self.settings.batch_size
        return [(k, range(at, min(at + size, count))) for k, at in enumerate(range(0, count, size))]

    def _pictures(self, images: range) -> NDArray[numpy.uint8]:
        """(B, H, W, 3); a grey picture becomes three equal channels."""
        wanted, seeds = self.given.at(self._rows(images)), [self.settings.seed + k for k in images]
        latents = self.sampler(self.schedule, wanted, seeds, self.guidance).latents
        levels = self.decoder.levels(latents, self.sampler.denoiser.device)
        pictures: NDArray[numpy.uint8] = levels.expand(*levels.shape[:-1], 3).contiguous().numpy()
        return pictures

    def _rows(self, images: range) -> list[int]:
        """Which of what was given each image is to be."""
        return [k % self.given.images for k in images]

    def _picture_path(self, image: int) -> Path:
        return self.folder / f"{image:06d}.png"

    def _has(self, work: WorkFolder, number: int, images: range) -> bool:
        if self.settings.layout == "npz":
            return work.has(number)
        return all(self._picture_path(k).is_file() for k in images)

    def _put(self, work: WorkFolder, number: int, pictures: NDArray[numpy.uint8], images: range) -> None:
        if self.settings.layout == "npz":
            work.write(number, {"pictures": pictures})
        else:
            for k, picture in zip(images, pictures, strict=True):
                save_image(Image.fromarray(picture), self._picture_path(k))

    def _write_archive(self, file: IO[bytes], work: WorkFolder, parts: int) -> None:
        """What `numpy.savez` would write of all parts joined, with one of them in memory at a time.

        `arr_0` holds the pictures (N, H, W, 3) in uint8, `arr_1` the labels (N,) in int64 where there are classes.
        """
        first = work.read(0)["pictures"]
        with zipfile.ZipFile(file, "w") as archive:
            pictures = (work.read(k)["pictures"] for k in range(parts))
            _write_array(archive, "arr_0.npy", pictures, first.dtype, (self.settings.num_images, *first.shape[1:]))
            if CLASS_LABELS in self.given.conditional:
                rows = self._rows(range(self.settings.num_images))
                labels = self.given.conditional[CLASS_LABELS][rows].numpy()
                _write_array(archive, "arr_1.npy", [labels], labels.dtype, labels.shape)


def _write_array(
    archive: zipfile.ZipFile,
    name: str,
    parts: Iterable[NDArray[Any]],
    dtype: numpy.dtype[Any],
    shape: tuple[int, ...],
) -> None:
    header = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    with archive.open(name, "w", force_zip64=True) as entry:
        npy.write_array_header_1_0(entry, header)
        for part in parts:
            entry.write(part.tobytes())
