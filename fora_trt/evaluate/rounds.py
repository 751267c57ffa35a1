"""The computation of `quality`: for each batch, every setting in turn from the same noise.

Each batch becomes one part of a work folder. Shapes: B images of a batch, S steps; C, H, W are channels, height and
width of the latents; pictures are (B, H, W, channels), integers from 0 to 255.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby, islice
from operator import itemgetter
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from fora_trt import metrics
from fora_trt.contract import CLASS_LABELS
from fora_trt.evaluate.candidates import Candidate, controls_of, reuse_share_of, with_controls
from fora_trt.evaluate.features import Extractor
from fora_trt.evaluate.work_folder import WorkFolder
from fora_trt.pipeline import Pipeline
from fora_trt.report.results import Setting
from fora_trt.sampling.conditioning import Conditioning
from fora_trt.sampling.guidance import Guidance
from fora_trt.sampling.loop import Sampler, Trajectory, Watch

PILOT, FIRST_BATCH = 0, 1  # numbers of parts; the parts of the reference images follow those of the batches
REFERENCE_AT_ONCE = 256  # images

Arrays = dict[str, NDArray[Any]]


class Rounds:
    """Computes all batches. In every setting image k has the seed `seed` + k; images cycle through the conditioning."""

    def __init__(
        self,
        pipeline: Pipeline,
        candidates: Sequence[Candidate],
        conditioning: Conditioning,
        guidance: Guidance,
        *,
        images: int,
        batch_size: int,
        seed: int,
        extractor: Extractor | None,
        shape: tuple[int, ...] | None,
    ) -> None:
        self.candidates, self.extractor, self.batch_size = list(candidates), extractor, batch_size
        self.batches = [range(start, min(start + batch_size, images)) for start in range(0, images, batch_size)]
        self._pipeline, self._conditioning, self._guidance, self._seed = pipeline, conditioning, guidance, seed
        self.metrics = metrics.measured_each(shape)
        self._each = {name: one.each(pipeline.device) for name, one in self.metrics.items() if one.each is not None}
        self._samplers: dict[Setting, Sampler] = {}

    def plan(self, work: WorkFolder) -> dict[str, float]:
        """Add the equal-time controls; return, by schedule, the time of a reuse step divided by that of a full step.

        The times are from a pilot run, whose result is kept in the work folder for `--resume`. Empty without caching.
        """
        pilots: dict[str, Candidate] = {}
        for one in self.candidates:
            if one.setting.caches:
                pilots.setdefault(one.setting.schedule, one)
        if not pilots:
            return {}
        if not work.has(PILOT):
            given = self._given(self.batches[0])
            shares = {n: reuse_share_of(self._pipeline, one, given, self._guidance) for n, one in pilots.items()}
            steps = controls_of(self.candidates, shares)
            work.write(PILOT, {"shares": numpy.array([*shares.values()]), "steps": numpy.array(steps)})
        found = work.read(PILOT)
        self.candidates = with_controls(self.candidates, found["steps"].tolist())
        return dict(zip(pilots, found["shares"].tolist(), strict=True))

    def run(self, work: WorkFolder, watch: Watch = iter) -> None:
        """Compute every batch that is missing; `watch` wraps (batch, setting) pairs, for a progress bar."""
        missing = [number for number in range(len(self.batches)) if not work.has(FIRST_BATCH + number)]
        if missing:
            self._warm_up()
        turns = [(number, turn) for number in missing for turn in range(len(self.candidates))]
        for number, of_batch in groupby(watch(turns), key=itemgetter(0)):
            work.write(FIRST_BATCH + number, self._compared(self.batches[number], (turn for _, turn in of_batch)))

    def read(self, work: WorkFolder, turn: int) -> Arrays:
        """The arrays of one setting by name, concatenated over all batches."""
        names = {f"{turn}.{name}": name for name in (*ARRAYS, *self.metrics)}
        parts = [work.read(FIRST_BATCH + number, names) for number in range(len(self.batches))]
        return {
            name: numpy.concatenate([part[key] for part in parts]) for key, name in names.items() if key in parts[0]
        }

    def reference_features(self, pictures: NDArray[numpy.uint8], work: WorkFolder, watch: Watch = iter) -> Tensor:
        """Features (N, D) of reference pictures (N, H, W, channels); computed parts are kept for `--resume`."""
        assert self.extractor is not None
        first = FIRST_BATCH + len(self.batches)
        chunks = list(enumerate(range(0, len(pictures), REFERENCE_AT_ONCE), start=first))
        for part, start in watch(chunks):
            if not work.has(part):
                some = torch.from_numpy(pictures[start : start + REFERENCE_AT_ONCE])
                work.write(part, {"features": self.extractor.features(some).numpy()})
        return torch.cat([torch.from_numpy(work.read(part)["features"]) for part, _ in chunks])

    def labels(self) -> NDArray[numpy.int64] | None:
        """The requested class of each image; None for a model without classes."""
        labels = self._conditioning.conditional.get(CLASS_LABELS)
        if labels is None:
            return None
        images = numpy.arange(self.batches[-1].stop)
        return numpy.asarray(labels.numpy()[images % len(labels)])

    def _compared(self, images: range, turns: Iterable[int]) -> Arrays:
        """Results of every setting for these images; the key of an array is `SETTING_NUMBER.NAME`."""
        given, arrays = self._given(images), {}
        plain: dict[tuple[str, int], Tensor] = {}  # (S, B, C, H, W) without caching
        reference = None
        for turn in turns:
            candidate = self.candidates[turn]
            done, steps = self._observed(candidate, given, images)
            pictures = self._pipeline.decoder.levels(done.latents, self._pipeline.device)
            reference = pictures if reference is None else reference
            each = self._figures(pictures, reference)
            if candidate.setting.control_of is None:
                each["latent_errors"] = metrics.relative_errors(steps, plain.setdefault(candidate.group, steps)).numpy()
            each["seconds"] = numpy.array([done.seconds / len(images)])
            arrays.update({f"{turn}.{name}": array for name, array in each.items()})
        return arrays

    def _figures(self, pictures: Tensor, reference: Tensor) -> Arrays:
        each = {"pictures": pictures} | {name: of(pictures, reference) for name, of in self._each.items()}
        if self.extractor is not None:
            each["features"] = self.extractor.features(pictures)
            if (classes := self.extractor.classes(pictures)) is not None:
                each["classes"] = classes
        return {name: tensor.numpy() for name, tensor in each.items()}

    def _observed(self, candidate: Candidate, given: Conditioning, images: range) -> tuple[Trajectory, Tensor]:
        """A trajectory and its latents after each step, (S, B, C, H, W), copied to the CPU after the last step."""
        steps: list[Tensor] = []
        done = self._sampler(candidate)(
            given,
            self._seeds(images),
            self._guidance,
            observe=lambda latents: steps.append(latents.clone()),
        )
        return done, torch.stack(steps).cpu()

    def _warm_up(self) -> None:
        """Run a few full and reuse steps of every setting, so that its times exclude allocation and graph capture."""
        images = self.batches[0]
        given = self._given(images)
        for one in self.candidates:
            few = 2 * (one.sampling.schedule.longest_window + 1) + 2
            self._sampler(one)(given, self._seeds(images), self._guidance, _first(few))

    def _sampler(self, candidate: Candidate) -> Sampler:
        if candidate.setting not in self._samplers:
            self._samplers[candidate.setting] = self._pipeline.sampler(candidate.sampling)
        return self._samplers[candidate.setting]

    def _given(self, images: range) -> Conditioning:
        return self._conditioning.at([image % self._conditioning.images for image in images])

    def _seeds(self, images: range) -> range:
        return range(self._seed + images.start, self._seed + images.stop)


def _first(count: int) -> Watch:
    """A watch that stops the loop after `count` steps."""
    return lambda steps: islice(steps, count)


ARRAYS = ("pictures", "features", "classes", "latent_errors", "seconds")
"""Names of the arrays in a part, in addition to the metrics: per image, and `seconds` per image of the batch."""
