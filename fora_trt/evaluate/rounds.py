"""The computation of `quality`: for each batch, every setting in turn from the same noise.

Each batch becomes one part of a work folder. Shapes: B images of a batch, S steps; C, H, W are channels, height and
width of the latents; pictures are (B, H, W, channels), levels from 0 to 255 before they are rounded. A model without a
VAE makes no pictures; its latents are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import groupby, islice
from operator import itemgetter
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from fora_trt import metrics
from fora_trt.contract import CLASS_LABELS
from fora_trt.evaluate.candidates import Candidate, evaluations_of, paces_of, reuse_share_of, with_controls
from fora_trt.evaluate.features import Extractor
from fora_trt.evaluate.solvers import closest_solver
from fora_trt.evaluate.work_folder import WorkFolder
from fora_trt.evaluate.workers import Crew
from fora_trt.images.decode import rounded
from fora_trt.pipeline import Pipeline, Sampling
from fora_trt.report.results import Setting
from fora_trt.sampling.conditioning import Conditioning
from fora_trt.sampling.guidance import Guidance
from fora_trt.sampling.loop import Sampler, Trajectory, Watch

PILOT, FIRST_BATCH = 0, 1  # numbers of parts; the parts of the reference images follow those of the batches
REFERENCE_AT_ONCE = 256  # images
CHOSEN_ON = 16  # images on which the solver of a control is chosen

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
        solution: Sampling | None = None,
    ) -> None:
        self._made_of: dict[str, Any] = {
            "pipeline": pipeline,
            "conditioning": conditioning,
            "guidance": guidance,
            "images": images,
            "batch_size": batch_size,
            "seed": seed,
            "extractor": extractor,
            "shape": shape,
            "solution": solution,
        }
        self.candidates, self.extractor, self.batch_size = list(candidates), extractor, batch_size
        self.batches = [range(start, min(start + batch_size, images)) for start in range(0, images, batch_size)]
        self._pipeline, self._conditioning, self._guidance, self._seed = pipeline, conditioning, guidance, seed
        self._solution = solution
        self.metrics = measured_by(pipeline, shape, solution is not None)
        self._each = {name: _comparison(one, pipeline) for name, one in self.metrics.items()}
        self._samplers: dict[Setting, Sampler] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as what it was made of: functions of metrics cannot be pickled."""
        return partial(Rounds, candidates=self.candidates, **self._made_of), ()

    def plan(self, work: WorkFolder, crew: Crew | None = None) -> dict[str, float]:
        """Add the equal-time controls; return, by schedule, the time of a reuse step divided by that of a full step.

        Times are from a pilot run. A control is the solver setting that comes closest to the fine solution, or to no
        caching if there is none, on the first images. The results of the pilot are kept in the work folder for
        `--resume`. Empty without caching. If there is a crew of workers, one of them does the pilot run.
        """
        pilots = self._pilots()
        if not pilots:
            return {}
        if not work.has(PILOT):
            work.write(PILOT, self.pilot() if crew is None else crew.call("pilot"))
        found = work.read(PILOT)
        controls = map(self._pipeline.uncached, found["solvers"].tolist(), found["steps"].tolist())
        self.candidates = with_controls(self.candidates, [*controls])
        return dict(zip(pilots, found["shares"].tolist(), strict=True))

    def pilot(self) -> Arrays:
        """The time of reuse steps by schedule, and names and steps of the solvers of all controls."""
        given = self._given(self.batches[0])
        shares = {n: reuse_share_of(self._pipeline, one, given, self._guidance) for n, one in self._pilots().items()}
        chosen = self._solvers([evaluations_of(pace, shares) for pace in paces_of(self.candidates)])
        names, steps = [one.name for one in chosen], [one.steps for one in chosen]
        arrays = {"shares": [*shares.values()], "solvers": names, "steps": steps}
        return {name: numpy.array(values) for name, values in arrays.items()}

    def _pilots(self) -> dict[str, Candidate]:
        """A candidate for each schedule with caching."""
        return {one.setting.schedule: one for one in self.candidates if one.setting.caches}

    def _solvers(self, evaluations: Sequence[int]) -> list[Sampling]:
        """The best solver setting for each of these numbers of evaluations, on the first images."""
        images = range(min(CHOSEN_ON, self.batches[0].stop))
        given, seeds = self._given(images), self._seeds(images)

        finest = self._solution or self.candidates[0].sampling
        reference = self._pipeline.sampler(finest)(given, seeds, self._guidance).latents
        best = {
            number: closest_solver(self._pipeline, number, given, seeds, self._guidance, reference)
            for number in {*evaluations}
        }
        return [best[number] for number in evaluations]

    def run(self, work: WorkFolder, watch: Watch = iter, watch_steps: Watch = iter, crew: Crew | None = None) -> None:
        """Compute every batch that is missing.

        `watch` wraps (batch, setting) pairs, `watch_steps` the steps of each, for a progress bar. If there is a crew of
        workers, `watch` wraps the batches.
        """
        missing = [number for number in range(len(self.batches)) if not work.has(FIRST_BATCH + number)]
        if not missing:
            return
        if crew is not None:
            for (number, _), arrays in watch(crew.map("batch", [(number, self.candidates) for number in missing])):
                work.write(FIRST_BATCH + number, arrays)
            return
        self._warm_up()
        turns = [(number, turn) for number in missing for turn in range(len(self.candidates))]
        for number, of_batch in groupby(watch(turns), key=itemgetter(0)):
            work.write(
                FIRST_BATCH + number, self._compared(self.batches[number], (turn for _, turn in of_batch), watch_steps)
            )

    def batch(self, number: int, candidates: Sequence[Candidate]) -> Arrays:
        """Results of every setting for one batch; the first one in a process warms up the engines."""
        self.candidates = list(candidates)
        if not self._samplers:
            self._warm_up()
        return self._compared(self.batches[number], range(len(self.candidates)), iter)

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

    def _compared(self, images: range, turns: Iterable[int], watch_steps: Watch) -> Arrays:
        """Results of every setting for these images; the key of an array is `SETTING_NUMBER.NAME`."""
        given, arrays = self._given(images), {}
        plain: dict[tuple[str, int], Tensor] = {}  # (S, B, C, H, W) without caching
        references: dict[bool, Tensor] = {}  # the images without caching, and those of the fine solution
        if self._solution is not None:
            fine = self._pipeline.sampler(self._solution)(given, self._seeds(images), self._guidance, watch_steps)
            references[True] = self._images(fine)
        for turn in turns:
            candidate = self.candidates[turn]
            done, steps = self._observed(candidate, given, images, watch_steps)
            made = self._images(done)
            references.setdefault(False, made)
            each = self._figures(made, references)
            if candidate.setting.control_of is None:
                each["latent_errors"] = metrics.relative_errors(steps, plain.setdefault(candidate.group, steps)).numpy()
            each["seconds"] = numpy.array([done.seconds / len(images)])
            arrays.update({f"{turn}.{name}": array for name, array in each.items()})
        return arrays

    def _images(self, done: Trajectory) -> Tensor:
        """The pictures of a trajectory, or its latents (B, C, H, W) if the model has no VAE."""
        if not self._pipeline.can_decode:
            return done.latents
        return self._pipeline.decoder.pictures(done.latents, self._pipeline.device)

    def _figures(self, made: Tensor, references: dict[bool, Tensor]) -> Arrays:
        each = {"pictures": rounded(made)} if self._pipeline.can_decode else {"latents": made}
        each |= {n: of(made, references[self.metrics[n].to_solution]) for n, of in self._each.items()}
        if self.extractor is not None:
            each["features"] = self.extractor.features(each["pictures"])
            if (classes := self.extractor.classes(each["pictures"])) is not None:
                each["classes"] = classes
        return {name: tensor.numpy() for name, tensor in each.items()}

    def _observed(
        self, candidate: Candidate, given: Conditioning, images: range, watch_steps: Watch
    ) -> tuple[Trajectory, Tensor]:
        """A trajectory and its latents after each step, (S, B, C, H, W), copied to the CPU after the last step."""
        steps: list[Tensor] = []
        done = self._sampler(candidate)(
            given,
            self._seeds(images),
            self._guidance,
            watch_steps,
            observe=lambda latents: steps.append(latents.clone()),
        )
        return done, torch.stack(steps).cpu()

    def _warm_up(self) -> None:
        """Run a few full and reuse steps of every setting, so that its times exclude allocation and graph capture."""
        images = self.batches[0]
        given = self._given(images)
        self._pipeline.start(self.batches[-1].stop, self._guidance)
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


def measured_by(pipeline: Pipeline, shape: tuple[int, ...] | None, solution: bool) -> dict[str, metrics.Metric]:
    """The metrics of each image that `Rounds` measures, by name: of pictures (H, W, C), or of latents without a VAE."""
    return metrics.measured_each(shape, solution) if pipeline.can_decode else metrics.measured_on_latents(solution)


def _comparison(metric: metrics.Metric, pipeline: Pipeline) -> Callable[[Tensor, Tensor], Tensor]:
    """The function of a metric that compares what the pipeline makes: pictures or latents."""
    compare = metric.of_latents
    if pipeline.can_decode and metric.each is not None:
        compare = metric.each(pipeline.device)
    assert compare is not None
    return compare


def _first(count: int) -> Watch:
    """A watch that stops the loop after `count` steps."""
    return lambda steps: islice(steps, count)


ARRAYS = ("pictures", "latents", "features", "classes", "latent_errors", "seconds")
"""Names of the arrays in a part, in addition to the metrics: per image, and `seconds` per image of the batch."""
