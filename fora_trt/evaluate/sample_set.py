"""Makes a large set of images for evaluation: an archive in the layout of the ADM evaluator, or PNG files.

A model without a VAE makes an archive of latents. Image k has the seed `seed` + k. Interruptions do not change which
images are in which batch.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Literal

import numpy
from numpy.lib import format as npy
from numpy.typing import NDArray
from PIL import Image

from fora_trt.contract import CLASS_LABELS
from fora_trt.errors import InputError
from fora_trt.evaluate.work_folder import WorkFolder, work_folder
from fora_trt.evaluate.workers import Results, Workers, computed_here
from fora_trt.files import Record, write_whole
from fora_trt.images.save import about_image, save_image
from fora_trt.pipeline import Pipeline, Sampling
from fora_trt.report.environment import versions
from fora_trt.report.results import About
from fora_trt.sampling.conditioning import Conditioning
from fora_trt.sampling.guidance import Guidance
from fora_trt.sampling.loop import Sampler, Watch

Layout = Literal["npz", "png"]
"""One archive, or one file per image."""


Batch = tuple[int, range]
"""Number and image indices of a batch."""


class SampleSettings(Record):
    """All settings that determine the images; a folder can only be resumed with the same settings.

    `bundle` and `conditioning` are digests, `steps` is the scheduler's number of steps, `versions` has package
    versions.
    """

    bundle: str
    num_images: int
    conditioning: str
    seed: int
    scheduler: str
    steps: int
    schedule: str
    plan: str
    guidance_scale: float
    guidance_interval: tuple[int, int] | None
    batch_size: int
    backend: str
    device: str
    vae: str | None
    layout: Layout
    versions: dict[str, str]


@dataclass(frozen=True)
class SampleSet:
    """Makes the set; if the conditioning `given` has fewer rows than there are images, the images cycle through it.

    `prompts` has the prompt of each row, if it was made from prompts.
    """

    folder: Path
    settings: SampleSettings
    pipeline: Pipeline
    sampling: Sampling
    guidance: Guidance
    given: Conditioning
    prompts: tuple[str, ...] = ()
    workers: Workers | None = None

    @classmethod
    def of(
        cls,
        folder: Path,
        pipeline: Pipeline,
        sampling: Sampling,
        given: Conditioning,
        num_images: int,
        seed: int,
        layout: Layout,
        prompts: tuple[str, ...] = (),
        workers: Workers | None = None,
    ) -> SampleSet:
        """The set of a pipeline and one of its samplings; starts the engines, unless `workers` make the images.

        Raises `InputError` for a VAE that is missing or does not fit.
        """
        if pipeline.can_decode:
            pipeline.decoder  # noqa: B018 # raises for a missing VAE before anything is computed
        elif layout == "png":
            raise InputError(
                f"{pipeline.manifest.name} has no VAE to decode latents, which do not fit into PNG files; give --vae "
                "FOLDER, or --format npz for the latents"
            )
        config = pipeline.config
        guidance = pipeline.guidance(given, sampling)
        settings = SampleSettings(
            bundle=About.of(pipeline.bundle).sha256,
            num_images=num_images,
            conditioning=given.digest(),
            seed=seed,
            scheduler=sampling.name,
            steps=sampling.steps,
            schedule=sampling.schedule.text,
            plan=sampling.schedule.digest(),
            guidance_scale=guidance.scale,
            guidance_interval=config.guidance_interval,
            batch_size=min(config.batch_size, num_images),
            backend=pipeline.backend.name,
            device=pipeline.device.type,
            vae=config.vae,
            layout=layout,
            versions=versions(),
        )
        made = cls(folder, settings, pipeline, sampling, guidance, given, prompts, workers)
        if workers is None:
            made.sampler  # noqa: B018 # raises for a backend that does not work before the folder is made
        return made

    @cached_property
    def sampler(self) -> Sampler:
        """The sampling loop; the first access starts the engines."""
        self.pipeline.start(self.settings.num_images, self.guidance)
        return self.pipeline.sampler(self.sampling)

    def make(self, resume: bool = False, watch: Watch = iter, watch_steps: Watch = iter) -> Path:
        """Make the images that are missing; return the path of the archive, or of the folder of PNG files.

        `watch` wraps the batches that are missing, `watch_steps` the steps of each that is made in this process, for a
        progress bar.
        Raises `InputError` for a folder that is not empty (without `resume`) or was made with other settings.
        """
        with work_folder(self.folder, self.settings, resume) as work:
            if not self.archive.is_file():
                batches = self._batches()
                missing = [(number, images) for number, images in batches if not self._has(work, number, images)]
                for (number, images), made in watch(self._results(missing, watch_steps)):
                    self._put(work, number, made, images)
                if self.settings.layout == "npz":
                    write_whole(self.archive, lambda file: self._write_archive(file, work, len(batches)))
            work.clear()
        return self.archive if self.settings.layout == "npz" else self.folder

    @property
    def archive(self) -> Path:
        """Path of the archive, of images or of latents."""
        return self.folder / ("samples.npz" if self.pipeline.can_decode else "latents.npz")

    def _batches(self) -> list[Batch]:
        count, size = self.settings.num_images, self.settings.batch_size
        return [(k, range(at, min(at + size, count))) for k, at in enumerate(range(0, count, size))]

    def _results(self, batches: Sequence[Batch], watch_steps: Watch) -> Results[Batch, NDArray[Any]]:
        if self.workers is None or not batches:
            return computed_here(lambda batch: self.made(*batch, watch_steps), batches)
        return self.workers.crew(replace(self, workers=None)).map("made", batches)

    def made(self, number: int, images: range, watch_steps: Watch = iter) -> NDArray[Any]:
        """The pictures of a batch, (B, H, W, 3), a grey one with three equal channels; or latents (B, C, H, W)."""
        wanted, seeds = self.given.at(self._rows(images)), [self.settings.seed + k for k in images]
        latents = self.sampler(wanted, seeds, self.guidance, watch_steps).latents
        if not self.pipeline.can_decode:
            return latents.numpy()
        levels = self.pipeline.decoder.levels(latents, self.pipeline.device)
        return levels.expand(*levels.shape[:-1], 3).contiguous().numpy()

    def _rows(self, images: range) -> list[int]:
        """The row of the conditioning for each image."""
        return [k % self.given.images for k in images]

    def _picture_path(self, image: int) -> Path:
        return self.folder / f"{image:06d}.png"

    def _has(self, work: WorkFolder, number: int, images: range) -> bool:
        if self.settings.layout == "npz":
            return work.has(number)
        return all(self._picture_path(k).is_file() for k in images)

    def _put(self, work: WorkFolder, number: int, made: NDArray[Any], images: range) -> None:
        if self.settings.layout == "npz":
            work.write(number, {"made": made})
        else:
            for k, picture in zip(images, made, strict=True):
                save_image(Image.fromarray(picture), self._picture_path(k), self._text_of(k))

    def _text_of(self, image: int) -> dict[str, Any]:
        """The settings of an image, for the text of its PNG file."""
        row, labels = image % self.given.images, self.given.conditional.get(CLASS_LABELS)
        label = None if labels is None else int(labels[row])
        one = about_image(image, self.settings.seed, label, self.prompts[row] if self.prompts else None)
        return {**self.settings.model_dump(mode="json"), **one}

    def _write_archive(self, file: IO[bytes], work: WorkFolder, parts: int) -> None:
        """Write the same file as `numpy.savez` with all parts concatenated, but with one part in memory at a time.

        `arr_0` has the pictures (N, H, W, 3) in uint8, or latents (N, C, H, W) in fp32, `arr_1` the labels (N,) in
        int64 if the model has classes.
        """
        first = work.read(0)["made"]
        with zipfile.ZipFile(file, "w") as archive:
            made = (work.read(k)["made"] for k in range(parts))
            _write_array(archive, "arr_0.npy", made, first.dtype, (self.settings.num_images, *first.shape[1:]))
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
