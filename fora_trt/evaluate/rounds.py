"""The work of `quality`: batch by batch, every setting in turn from the same noise; a part of a work folder for each.

Shapes: B images of a batch, S steps, C, H, W latents; pictures are (B, H, W, channels), levels from 0 to 255.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from fora_trt.evaluate import metrics
from fora_trt.evaluate.candidates import Candidate, controls_of, reuse_share_of, with_controls
from fora_trt.evaluate.features import Extractor
from fora_trt.evaluate.work_folder import WorkFolder
from fora_trt.models.spec import CLASS_LABELS
from fora_trt.runtime.conditioning import Conditioning
from fora_trt.runtime.images import Decoder
from fora_trt.runtime.sampling import Guidance, Sampler, Steps, Trajectory
from fora_trt.runtime.updates import Update

PILOT, FIRST_BATCH = 0, 1  # parts; those of the reference come after the last batch
REFERENCE_AT_ONCE = 256  # images

Arrays = dict[str, NDArray[Any]]
Watch = Callable[[Iterable[Any]], Iterator[Any]]


class Rounds:
    """Image k is made from the seed `seed` + k, as the conditioning's rows say in turn, whatever the setting."""

    def __init__(
        self,
        denoiser: Steps,
        candidates: Sequence[Candidate],
        conditioning: Conditioning,
        guidance: Guidance,
        decoder: Decoder,
        *,
        images: int,
        batch_size: int,
        seed: int,
        extractor: Extractor | None,
        lpips: bool,
    ) -> None:
        self.candidates, self.extractor, self.batch_size = list(candidates), extractor, batch_size
        self.batches = [range(start, min(start + batch_size, images)) for start in range(0, images, batch_size)]
        self._denoiser, self._conditioning, self._guidance, self._seed = denoiser, conditioning, guidance, seed
        self._decoder = decoder
        self._lpips = metrics.lpips(denoiser.device) if lpips else None
        self._samplers: dict[Update, Sampler] = {}

    def plan(self, work: WorkFolder) -> dict[int, float]:
        """Add the controls, in as many steps as the first pilot found; return the time of a reuse step in full ones.

        By cache interval; nothing where nothing is cached.
        """
        intervals = sorted({one.setting.cache_interval for one in self.candidates if one.caches})
        if not intervals:
            return {}
        if not work.has(PILOT):
            given, scheduler = self._given(self.batches[0]), self.candidates[0].scheduler
            shares = {n: reuse_share_of(self._denoiser, scheduler, n, given, self._guidance) for n in intervals}
            steps = controls_of(self.candidates, shares)
            work.write(PILOT, {"shares": numpy.array([*shares.values()]), "steps": numpy.array(steps)})
        found = work.read(PILOT)
        self.candidates = with_controls(self.candidates, found["steps"].tolist())
        return dict(zip(intervals, found["shares"].tolist(), strict=True))

    def run(self, work: WorkFolder, watch: Watch = iter) -> None:
        """Make every batch that is not there yet; `watch` wraps the turns of the settings, for a progress bar."""
        missing = [number for number in range(len(self.batches)) if not work.has(FIRST_BATCH + number)]
        if missing:
            self._warm_up()
        turns = [(number, turn) for number in missing for turn in range(len(self.candidates))]
        for number, of_batch in groupby(watch(turns), key=itemgetter(0)):
            work.write(FIRST_BATCH + number, self._compared(self.batches[number], (turn for _, turn in of_batch)))

    def read(self, work: WorkFolder, turn: int) -> Arrays:
        """What all batches gave for one setting, by name; images in order."""
        names = {f"{turn}.{name}": name for name in ARRAYS}
        parts = [work.read(FIRST_BATCH + number, names) for number in range(len(self.batches))]
        return {
            name: numpy.concatenate([part[key] for part in parts]) for key, name in names.items() if key in parts[0]
        }

    def reference_features(self, pictures: NDArray[numpy.uint8], work: WorkFolder, watch: Watch = iter) -> Tensor:
        """Features (N, D) of the pictures of a reference (N, H, W, channels)."""
        assert self.extractor is not None
        first = FIRST_BATCH + len(self.batches)
        chunks = list(enumerate(range(0, len(pictures), REFERENCE_AT_ONCE), start=first))
        for part, start in watch(chunks):
            if not work.has(part):
                some = torch.from_numpy(pictures[start : start + REFERENCE_AT_ONCE])
                work.write(part, {"features": self.extractor.features(some).numpy()})
        return torch.cat([torch.from_numpy(work.read(part)["features"]) for part, _ in chunks])

    def labels(self) -> NDArray[numpy.int64] | None:
        """The class that was asked for of each image; None for a model without classes."""
        labels = self._conditioning.conditional.get(CLASS_LABELS)
        if labels is None:
            return None
        images = numpy.arange(self.batches[-1].stop)
        return numpy.asarray(labels.numpy()[images % len(labels)])

    def _compared(self, images: range, turns: Iterable[int]) -> Arrays:
        """What every setting gave for these images, each array under the number of the setting and a name."""
        given, arrays = self._given(images), {}
        plain: dict[Update, Tensor] = {}  # (S, B, C, H, W) without caching
        reference = None
        for turn in turns:
            candidate = self.candidates[turn]
            done, steps = self._observed(candidate, given, images)
            pictures = self._decoder.levels(done.latents, self._denoiser.device)
            reference = pictures if reference is None else reference
            each = self._figures(pictures, reference)
            if candidate.setting.control_of is None:
                each["latent_errors"] = metrics.relative_errors(
                    steps, plain.setdefault(candidate.update, steps)
                ).numpy()
            each["seconds"] = numpy.array([done.seconds / len(images)])
            arrays.update({f"{turn}.{name}": array for name, array in each.items()})
        return arrays

    def _figures(self, pictures: Tensor, reference: Tensor) -> Arrays:
        each = {
            "pictures": pictures,
            "psnr": metrics.psnr(pictures, reference),
            "ssim": metrics.ssim(pictures, reference),
        }
        if self._lpips is not None:
            each["lpips"] = self._lpips(pictures, reference)
        if self.extractor is not None:
            each["features"] = self.extractor.features(pictures)
            if (classes := self.extractor.classes(pictures)) is not None:
                each["classes"] = classes
        return {name: tensor.numpy() for name, tensor in each.items()}

    def _observed(self, candidate: Candidate, given: Conditioning, images: range) -> tuple[Trajectory, Tensor]:
        """A trajectory and its latents after each step, (S, B, C, H, W) on the CPU; copied when all are done."""
        steps: list[Tensor] = []
        done = self._sampler(candidate)(
            candidate.schedule,
            given,
            self._seeds(images),
            self._guidance,
            observe=lambda latents: steps.append(latents.clone()),
        )
        return done, torch.stack(steps).cpu()

    def _warm_up(self) -> None:
        """A few steps of every setting, of both kinds: allocations and captures are none of its time."""
        images = self.batches[0]
        given = self._given(images)
        for one in self.candidates:
            few = slice(2 * one.setting.cache_interval + 2)
            self._sampler(one)(
                one.schedule, given, self._seeds(images), self._guidance, lambda steps, few=few: steps[few]
            )

    def _sampler(self, candidate: Candidate) -> Sampler:
        return self._samplers.setdefault(candidate.update, Sampler(self._denoiser, candidate.update))

    def _given(self, images: range) -> Conditioning:
        return self._conditioning.at([image % self._conditioning.images for image in images])

    def _seeds(self, images: range) -> range:
        return range(self._seed + images.start, self._seed + images.stop)


ARRAYS = ("pictures", "psnr", "ssim", "lpips", "features", "classes", "latent_errors", "seconds")
"""What is kept of each image, and the seconds an image took in each batch."""
