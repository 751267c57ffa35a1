"""Calibration: finds the schedule of a model with which cached images come closest to those without caching.

Positions of the full steps matter most. First a family of schedules is tried (`Schedule.dense` with several exponents,
orders of the forecast), then full steps of the best are moved as long as that helps. Before and after that the weights
of the forecast are fitted by least squares, which gains most where few steps are full. Trials run on a few images, what
is better there on more; the best schedules are compared on all. The result is measured on other images, beside FORA,
schedules that were not calibrated, and fewer steps of the best of several solvers.

Errors are differences of final latents, as PSNR: for pixels of the images before they are rounded, else relative to the
range of the latents without caching.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from fora_trt import __version__
from fora_trt.errors import InputError, RoomError, ScheduleError
from fora_trt.evaluate.least_squares import Observed
from fora_trt.evaluate.solvers import SOLVERS, best_solver
from fora_trt.evaluate.workers import Crew, Workers
from fora_trt.files import Record, write_whole
from fora_trt.metrics import latent_psnr
from fora_trt.pipeline import Pipeline, Sampling
from fora_trt.plan import HIGHEST_ORDER
from fora_trt.runtime.denoiser import Denoiser
from fora_trt.runtime.layout import Layout
from fora_trt.sampling.conditioning import Conditioning
from fora_trt.sampling.guidance import Guidance
from fora_trt.sampling.loop import Watch
from fora_trt.sampling.schedulers import SchedulerChoice
from fora_trt.schedule import NONE, Schedule

BUDGET = 9.5
"""All computation, in trajectories without caching of all calibration images."""

FEW = 4
"""Trials take one of so many images; all only to compare the best."""

EXPONENTS = (0.3, 0.45, 0.15, 0.6, 0.0)
ORDER = 2
HIGHER_ORDER_GAINS = 1.5
"""PSNR in dB that a higher order must gain: it takes more memory and time, and amplifies more."""

GAINS = 0.02
"""PSNR in dB by which a moved full step must be better."""

DAMPINGS = (1e-3, 1e-2, 1e-4)
"""What fitted weights are damped by; see `Observed.fitted`."""

FINALISTS = 4
RUNS, DISTANCES = (1, 2, 3, 5), (-1, 1, -2, 2)
"""Numbers of consecutive full steps that are moved together, and by how many steps."""


class Wanted(Record):
    """What to calibrate for: exactly one of the number of full steps, the speed-up, and the smallest PSNR in dB."""

    full_steps: int | None = None
    speedup: float | None = None
    max_loss: float | None = None
    images: int = 16
    seed: int = 0


class Compared(Record):
    """A setting on images that the calibration did not use; PSNR in dB is the mean over the images.

    `arithmetic` is that of the setting divided by that of no caching; a per-layer calibration has it.
    """

    label: str
    steps: int
    full_steps: int
    psnr: float
    arithmetic: float | None = None


class Calibrated(Record):
    """The result: the full steps and the forecast order of the schedule, and the comparison on other images.

    `fitted` says whether the weights are fitted, not those of Lagrange. `images` is the number of calibration images,
    `spent` what was computed in samplings of them without caching. The best of `compared` comes first; there is none if
    the calibration was interrupted.
    """

    full_steps: tuple[int, ...]
    order: int
    fitted: bool
    images: int
    spent: float
    interrupted: bool
    compared: tuple[Compared, ...]


class Trials:
    """Compares settings with no caching on numbered images, and counts what was computed.

    `known` has the PSNR of earlier trials, by setting and image; it makes an interrupted calibration go on where it
    was. `spent` is in trajectories without caching of all calibration images, from the full steps that a schedule takes
    as long as (`full_steps_of`). `trajectories` computes them.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        plain: Sampling,
        given: Conditioning,
        wanted: Wanted,
        known: dict[str, float],
        watch_steps: Watch = iter,
        workers: Workers | None = None,
    ) -> None:
        self.plain, self.known, self.spent = plain, known, 0.0
        self._pipeline, self._wanted = pipeline, wanted
        self.guidance = pipeline.guidance(given, plain)
        self.trajectories = Trajectories(pipeline, given, self.guidance, wanted.seed)
        self._references: dict[int, Tensor] = {}
        self._watch_steps, self._workers = watch_steps, workers
        self._crew: tuple[int, Crew] | None = None
        self._charged: set[str] = set()
        self.full_steps_of: Callable[[Schedule], float] = lambda schedule: schedule.full_steps

    def psnr(self, sampling: Sampling, images: Sequence[int]) -> float:
        """Mean PSNR in dB of these images; those that are not known are computed at once."""
        what = f"{sampling.name}, {sampling.steps}, {sampling.schedule.digest()}"
        keys = {image: f"{what} on image {image}" for image in images}
        for image, key in keys.items():
            self.charge(key, self.full_steps_of(sampling.schedule))
            self.charge(f"image {image}", self.plain.nfe)
        new = [image for image, key in keys.items() if key not in self.known]
        if new:
            missing = [image for image in new if image not in self._references]
            if missing:
                self._references |= zip(missing, self._latents(self.plain, missing), strict=True)
            reference = torch.stack([self._references[image] for image in new])
            found = latent_psnr(self._latents(sampling, new), reference, self._pipeline.manifest.latents.pixels)
            self.known |= zip([keys[image] for image in new], found.tolist(), strict=True)
        return mean(self.known[key] for key in keys.values())

    def observed(self, images: Sequence[int], ahead: int) -> Observed:
        """What the steps of these images read without caching; `ahead` is the largest distance of steps."""
        self.charge("observed", len(images) * self.plain.nfe)
        if (crew := self._workers_now()) is not None:
            found: Observed = crew.call("observed", self.plain, images, ahead)
            return found
        return self.trajectories.observed(self.plain, images, ahead)

    def _latents(self, sampling: Sampling, images: Sequence[int]) -> Tensor:
        """Final latents (N, C, H, W)."""
        if (crew := self._workers_now()) is None:
            return self.trajectories.latents(sampling, images, self._watch_steps)
        size = self._pipeline.config.batch_size
        batches = [(sampling, images[at : at + size]) for at in range(0, len(images), size)]
        found = {tuple(some): latents for (_, some), latents in crew.map("latents", batches)}
        return torch.cat([found[tuple(some)] for _, some in batches])

    def _workers_now(self) -> Crew | None:
        """The workers, if there are any; they start again if the batch size has changed."""
        size = self._pipeline.config.batch_size
        if self._workers is not None and (self._crew is None or self._crew[0] != size):
            self._crew = size, self._workers.crew(self.trajectories)
        return None if self._crew is None else self._crew[1]

    def charge(self, what: str, evaluations: float) -> None:
        """Count what a trial or a reference image takes, once; also where its result is known from before."""
        if what not in self._charged:
            self._charged.add(what)
            self.spent += evaluations / (self.plain.nfe * self._wanted.images)


@dataclass(frozen=True)
class Trajectories:
    """Computes numbered images; what `Trials` counts and compares. It can be pickled, for a worker."""

    pipeline: Pipeline
    given: Conditioning
    guidance: Guidance
    seed: int

    def latents(self, sampling: Sampling, images: Sequence[int], watch_steps: Watch = iter) -> Tensor:
        """Final latents (N, C, H, W) of images."""
        given, seeds = self.inputs(images)
        sampler, size = self.pipeline.sampler(sampling), self.pipeline.config.batch_size
        return sampler.in_batches(given, seeds, self.guidance, size, watch_steps).latents

    def observed(self, plain: Sampling, images: Sequence[int], ahead: int) -> Observed:
        """What the steps of images read without caching."""
        given, seeds = self.inputs(images)
        denoiser = self.pipeline.denoiser
        assert isinstance(denoiser, Denoiser)
        return Observed.of(denoiser, plain, given, seeds, self.guidance, self.pipeline.config.batch_size, ahead)

    def inputs(self, images: Sequence[int]) -> tuple[Conditioning, list[int]]:
        """Conditioning and seeds of images."""
        given = self.given.at([image % self.given.images for image in images])
        return given, [self.seed + image for image in images]


@dataclass(frozen=True)
class Found:
    """A schedule and its PSNR in dB on the images of a trial."""

    psnr: float
    schedule: Schedule

    @property
    def positions(self) -> tuple[int, ...]:
        """Numbers of the full steps."""
        return tuple(number for number, full in enumerate(self.schedule.full) if full)


class Calibration:
    """One calibration. `run` searches, `result` measures the schedule that it found.

    `known` are the results of an interrupted calibration with the same settings, which are not computed again. `label`
    is the name of the result in the comparison.
    """

    label = "calibrated"

    def __init__(
        self,
        pipeline: Pipeline,
        given: Conditioning,
        wanted: Wanted,
        known: dict[str, float] | None = None,
        watch_steps: Watch = iter,
        workers: Workers | None = None,
    ) -> None:
        """`watch_steps` wraps the steps of each trajectory, for a progress bar. `workers` share the batches of a trial.

        Raises `InputError` or `ScheduleError` for settings that are not possible.
        """
        self.pipeline, self.wanted = pipeline, wanted
        self.plain = pipeline.sampling(schedule=NONE)
        self._check()
        if wanted.images < 1:
            raise InputError(f"the number of images is {wanted.images}; at least 1 is needed")
        self.trials = Trials(pipeline, self.plain, given, wanted, {} if known is None else known, watch_steps, workers)
        self.best: Found | None = None
        self._ranked: list[Found] = []  # each better than the one before
        self._images = range(wanted.images)
        self._few, self._half = range(0, wanted.images, FEW), range(0, wanted.images, FEW // 2)
        self._others = range(wanted.images, 2 * wanted.images)
        self._full_steps = self._number()
        self._weighed: Callable[[Schedule], Schedule] = _unchanged

    def _check(self) -> None:
        if not self.pipeline.manifest.can_forecast:
            raise ScheduleError(
                f"{self.pipeline.manifest.name} cannot forecast, so it cannot be calibrated: its full graph folds "
                "values that are not linear in the features; export it with --optimize conditioning"
            )

    def shared_among(self, workers: int) -> int:
        """The batch size with which a trial of a few images has a batch for each worker."""
        return min(self.pipeline.config.batch_size, -(-len(self._few) // max(workers, 1)))

    def _number(self) -> int:
        """The number of full steps; with `max_loss` it is found later, and 0 until then."""
        wanted, nfe = self.wanted, self.plain.nfe
        if [wanted.full_steps, wanted.speedup, wanted.max_loss].count(None) != 2:
            raise InputError("give exactly one of --full-steps, --speedup and --max-loss")
        if wanted.max_loss is not None:
            return 0
        number = wanted.full_steps if wanted.speedup is None else math.floor(nfe / max(wanted.speedup, 1e-9))
        assert number is not None
        if not 2 <= number < nfe:
            asked = f"the speed-up {wanted.speedup:g}" if wanted.speedup is not None else f"{number} full steps"
            raise InputError(
                f"{asked} is not possible with {nfe} evaluations of the model; give 2 to {nfe - 1} full steps"
            )
        return number

    def run(self) -> Iterator[str]:
        """Search; yield a line before each stage and trial. Stop iterating at any moment to keep the best so far."""
        if not self._full_steps:
            yield from self._search_number()
        yield f"{self._full_steps} full steps: trying a family of schedules"
        fora = [one for one in self._rivals()[:1] if one.full_steps == self._full_steps]
        for schedule in (*map(self._dense, EXPONENTS), *fora):
            yield from self._try(schedule.with_forecast(ORDER), 0.0)
        assert self.best is not None
        base = self.best.schedule
        for order in (0, 1, HIGHEST_ORDER):
            yield from self._try(base.with_forecast(order), HIGHER_ORDER_GAINS if order > ORDER else 0.0)
        for schedule in fora:
            yield from self._try(schedule, 0.0)
        yield "observing what reuse steps should read"
        try:
            observed = self.trials.observed(self._half, 2 * Layout.of(self.best.schedule.plan).reach)
        except RoomError as error:  # it takes more sums at once than any trial
            yield f"weights are not fitted: {error}"
            yield from self._move()
        else:
            yield from self._fit(observed)
            fitted = self.best
            yield from self._move()
            if self.best is not fitted:
                yield from self._fit(observed)
        yield from self._confirm()

    def _search_number(self) -> Iterator[str]:
        """The smallest number of full steps that a schedule of the family needs for the PSNR, by bisection."""
        least, most = 2, self.plain.nfe - 1
        assert self.wanted.max_loss is not None
        while least < most:
            middle = (least + most) // 2
            found = self._measured(self._with_number(middle), self._few).psnr
            yield f"{middle} full steps: {found:.1f} dB"
            least, most = (least, middle) if found >= self.wanted.max_loss else (middle + 1, most)
        self._full_steps = least

    def _with_number(self, full_steps: int) -> Schedule:
        """The schedule that stands for all with this number of full steps."""
        return Schedule.dense(self.plain.nfe, full_steps).with_forecast(ORDER)

    def _dense(self, exponent: float) -> Schedule:
        return Schedule.dense(self.plain.nfe, self._full_steps, exponent).with_forecast(ORDER)

    def _at(self, positions: Sequence[int], order: int) -> Schedule:
        return Schedule.of_full_steps(self.plain.nfe, positions).with_forecast(order)

    def _try(self, schedule: Schedule, gains: float) -> Iterator[str]:
        """Compute a schedule on a few images, and if it is better by `gains` on more; if still, it is the best."""
        found = self._measured(schedule, self._few)
        if self._is_better(found, self._few, gains):
            found = self._measured(schedule, self._half)
            if self._is_better(found, self._half, gains):
                self.best = found
                self._ranked.append(found)
        assert self.best is not None
        yield f"{schedule.text}: {found.psnr:.1f} dB (best {self.best.psnr:.1f} dB)"

    def _measured(self, schedule: Schedule, images: Sequence[int]) -> Found:
        return Found(self.trials.psnr(self.plain.with_schedule(schedule), images), schedule)

    def _is_better(self, found: Found, images: Sequence[int], gains: float) -> bool:
        return self.best is None or found.psnr > self._measured(self.best.schedule, images).psnr + gains

    def _fit(self, observed: Observed) -> Iterator[str]:
        """Fit the weights at the best full steps by least squares; if that helps, at those found later too."""
        assert self.best is not None
        positions, own = self.best.positions, self.best.schedule.depth - 1
        for order in dict.fromkeys((own, HIGHEST_ORDER)):
            schedule = self._at(positions, order)
            for damping in DAMPINGS:
                fit, before = partial(_fitted, observed, damping), self.best
                yield from self._try(fit(schedule), HIGHER_ORDER_GAINS if order > own else GAINS)
                if self.best is not before:
                    self._weighed = fit

    def _move(self) -> Iterator[str]:
        """Move full steps of the best schedule while that helps and the budget lasts."""
        assert self.best is not None
        order, drawn = self.best.schedule.depth - 1, random.Random(self.wanted.seed)
        tried = {self.best.positions}
        moved = True
        while moved:
            moved = False
            for positions in _neighbours(self.best.positions, self.plain.nfe, drawn):
                if positions in tried:
                    continue
                if self.trials.spent > BUDGET - self._reserve():
                    return
                tried.add(positions)
                before = self.best
                yield from self._try(self._weighed(self._at(positions, order)), GAINS)
                if self.best is not before:
                    moved = True
                    break

    def _confirm(self) -> Iterator[str]:
        """Compare the last improvements on all images: on a few of them chance helps too."""
        finalists = []
        for one in self._ranked[-FINALISTS:]:
            found = self._measured(one.schedule, self._images)
            finalists.append(found)
            yield f"{one.schedule.text} on all images: {found.psnr:.1f} dB"
        self.best = max(finalists, key=lambda one: one.psnr)

    def _reserve(self) -> float:
        """What the stages after the search take."""
        share = self._full_steps / self.plain.nfe
        on_few = (2 * len(DAMPINGS) + 1 + len(SOLVERS)) * len(self._few) / self.wanted.images
        on_all = FINALISTS / 2 + 2 + len(self._rivals())  # half the images of finalists are known
        return 2.0 + (on_few + on_all) * share

    def _rivals(self) -> list[Schedule]:
        """FORA at about as many full steps, the same with a forecast, and the schedule of the family without trials."""
        nfe, number = self.plain.nfe, self._full_steps
        fora = Schedule.fora_nearest(nfe, number)
        return [fora, fora.with_forecast(ORDER), self._dense(EXPONENTS[0])]

    def result(self, report: Callable[[str], None] = lambda line: None) -> Calibrated:
        """Measure the best schedule on other images, beside its rivals."""
        assert self.best is not None
        rows = [self._row(self.label, self.plain.with_schedule(self.best.schedule))]
        for rival in self._rivals():
            report(f"measuring {rival.text} on other images")
            rows.append(self._row(rival.text, self.plain.with_schedule(rival)))
        report("choosing the best solver for as many evaluations")
        best = best_solver(self.pipeline, self._full_steps, lambda one: self.trials.psnr(one, self._few))
        rows.append(self._row(SchedulerChoice.from_text(best.name).label, best))
        return self._calibrated(rows)

    def so_far(self) -> Calibrated:
        """The best schedule so far, without a comparison. Raises `InputError` before the first trial."""
        if self.best is None:
            raise InputError("the calibration was interrupted before the first trial; run it again")
        return self._calibrated([], interrupted=True)

    def _calibrated(self, rows: Sequence[Compared], interrupted: bool = False) -> Calibrated:
        assert self.best is not None
        schedule = self.best.schedule
        order = schedule.depth - 1
        return Calibrated(
            full_steps=self.best.positions,
            order=order,
            fitted=schedule != schedule.with_forecast(order),
            images=self.wanted.images,
            spent=round(self.trials.spent, 2),
            interrupted=interrupted,
            compared=tuple(sorted(rows, key=lambda row: -row.psnr)),
        )

    def _row(self, label: str, sampling: Sampling) -> Compared:
        found = self.trials.psnr(sampling, self._others)
        return Compared(
            label=label, steps=sampling.steps, full_steps=sampling.schedule.full_steps, psnr=round(found, 2)
        )

    def write(self, path: Path, found: Calibrated) -> None:
        """Write the schedule file, with what it was made from. Raises `InputError` if it cannot be written."""
        assert self.best is not None
        model, plain = self.pipeline.manifest, self.plain
        made_from = {
            "command": f"fora-trt calibrate, {__version__}",
            "model": {
                "name": model.name,
                "source": model.model.options.source,
                "weights_sha256": model.model.weights_sha256,
            },
            "scheduler": type(plain.scheduler).__name__,
            "timesteps": [round(time, 4) for time in plain.scheduler_step.timesteps.tolist()],
            "guidance_scale": self.trials.guidance.scale,
            "seed": self.wanted.seed,
            **found.model_dump(mode="json", exclude_none=True),
        }
        text = replace(self.best.schedule, made_from=made_from).to_json()
        write_whole(path, lambda file: file.write(text.encode()))


def _unchanged(schedule: Schedule) -> Schedule:
    return schedule


def _fitted(observed: Observed, damping: float, schedule: Schedule) -> Schedule:
    """The schedule with fitted weights."""
    return replace(schedule, plan=observed.fitted(schedule.plan, damping), text=f"{schedule.text}, fitted weights")


def _neighbours(positions: Sequence[int], steps: int, drawn: random.Random) -> list[tuple[int, ...]]:
    """The positions with one or several consecutive full steps moved, in random order; the first stays."""
    moved = set()
    for begin in range(1, len(positions)):
        for count in RUNS:
            for by in DISTANCES:
                taken = range(begin, min(begin + count, len(positions)))
                moved.add(tuple(one + by if k in taken else one for k, one in enumerate(positions)))
    possible = [one for one in sorted(moved) if one[-1] < steps and all(a < b for a, b in pairwise(one))]
    drawn.shuffle(possible)
    return possible


# -- what an interrupted calibration has found -------------------------------------------------------------------------


def trials_file(output: Path) -> Path:
    """The file beside the output that keeps the trials of a calibration until it is finished."""
    return output.with_name(f"{output.name}.trials")


def read_trials(path: Path, settings: Mapping[str, Any]) -> dict[str, float]:
    """The trials of an interrupted calibration. Raises `InputError` if it had other settings or the file is damaged."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        before, known = dict(content["settings"]), {str(key): float(one) for key, one in content["trials"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} cannot be read; remove it to begin anew") from error
    if before != settings:
        differing = sorted(key for key in {*before, *settings} if before.get(key) != settings.get(key))
        raise InputError(
            f"{path} is of an interrupted calibration with another {differing[0]} "
            f"({before.get(differing[0])} instead of {settings.get(differing[0])}); remove it to begin anew, or give "
            "another output"
        )
    return known


def write_trials(path: Path, settings: Mapping[str, Any], known: Mapping[str, float]) -> None:
    """Keep the trials. Raises `InputError` if the file cannot be written."""
    text = json.dumps({"settings": dict(settings), "trials": dict(known)})
    write_whole(path, lambda file: file.write(text.encode()))
