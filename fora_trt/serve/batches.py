"""Batches of images from many requests, made by one pipeline in a thread of its own. Knows nothing of HTTP and Ray.

With `join` images enter and leave a running batch at window boundaries; without it a batch begins and ends together,
and has images of one scheduler, number of steps, schedule and guidance.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from fora_trt.contract import FULL
from fora_trt.engines.threads import torch_threads
from fora_trt.errors import BackendError, BusyError, ForaError, InputError, RoomError
from fora_trt.memo import Kept
from fora_trt.pipeline import GUIDED, Pipeline, Sampling
from fora_trt.runtime.denoiser import Denoiser
from fora_trt.sampling.conditioning import Conditioning
from fora_trt.sampling.guidance import Guidance
from fora_trt.sampling.joined import JoinedSampler, Member, check_finite
from fora_trt.sampling.loop import Sampler, Watch

MOST_FAILURES = 3
"""Failures in a row, without a reason that is known, after which a process had better be replaced."""


KEPT_SAMPLERS = 8
"""Loops of batches that begin and end together that are kept."""


@dataclass(frozen=True)
class Image:
    """One image to make; `given` has one image."""

    sampling: Sampling
    given: Conditioning
    seed: int
    guidance: Guidance

    @property
    def key(self) -> tuple[object, ...]:
        """What images of a batch have in common that begins and ends together."""
        inputs = tuple((name, *one.shape[1:]) for name, one in sorted(self.given.conditional.items()))
        sampling = self.sampling
        return sampling.name, sampling.steps, sampling.schedule.digest(), self.guidance, inputs


@dataclass(frozen=True)
class Made:
    """An image that was made: (H, W, 3) or (H, W, 1) in uint8, and the number of its full steps."""

    picture: NDArray[numpy.uint8]
    full_steps: int


@dataclass(frozen=True)
class Counts:
    """What was computed since the start, and how many images wait and are computed now.

    `batches` has the number of full steps by how many images they computed.
    """

    batches: dict[int, int] = field(default_factory=dict)
    full_seconds: float = 0.0
    reuse_seconds: float = 0.0
    pictures: int = 0
    waiting: int = 0
    running: int = 0

    def with_batch(self, images: int, full_steps: int, full_seconds: float = 0.0, reuse_seconds: float = 0.0) -> Counts:
        """These counts after so many full steps of a batch."""
        return replace(
            self,
            batches={**self.batches, images: self.batches.get(images, 0) + full_steps},
            full_seconds=self.full_seconds + full_seconds,
            reuse_seconds=self.reuse_seconds + reuse_seconds,
        )


@dataclass(eq=False)
class _Asked:
    """An image that was asked for; `member` is it in a joined batch, None if it cannot join others."""

    image: Image
    member: Member | None
    made: Future[Made] = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)


class _Unwanted(Exception):  # noqa: N818 # not an error
    """Nobody waits for a batch any more."""


class Batches:
    """Makes images, up to `most` at once. The first image of a batch waits at most `max_wait` seconds for others."""

    def __init__(self, pipeline: Pipeline, most: int, max_wait: float, join: bool) -> None:
        """Start the engines and the thread.

        Raises `InputError` for a bundle whose images cannot join, and with `join` `RoomError` if `most` images do not
        fit the device's memory.
        """
        self._pipeline, self._most, self._max_wait = pipeline, most, max_wait
        self._threads = torch.get_num_threads()
        pipeline.start(most, GUIDED)
        self._sampler = self._joined_sampler() if join else None
        self._waiting: list[_Asked] = []
        self._running: list[_Asked] = []
        self._changed = threading.Condition()
        self._stopped, self._failures = False, 0
        self._samplers: Kept[tuple[object, ...], Sampler] = Kept(KEPT_SAMPLERS)
        self._counts = Counts()
        self._thread = threading.Thread(target=self._work, name="batches", daemon=True)
        self._thread.start()

    def submit(self, image: Image) -> Future[Made]:
        """Ask for an image. `cancel` of the future frees its place at the next step or window.

        The future raises what the pipeline raises, such as `BackendError` for latents that are not finite. Raises
        `InputError` or `ScheduleError` for an image that the bundle cannot make, `BusyError` after `stop`.
        """
        asked = _Asked(image, self._member(image))
        with self._changed:
            if self._stopped:
                raise BusyError("this model is being stopped; ask again")
            self._waiting.append(asked)
            self._changed.notify_all()
        return asked.made

    def counts(self) -> Counts:
        """What was computed so far."""
        with self._changed:
            return replace(self._counts, waiting=len(self._waiting), running=len(self._running))

    @property
    def works(self) -> bool:
        """Whether the thread lives and its latest images did not all fail without a reason that is known."""
        return self._thread.is_alive() and self._failures < MOST_FAILURES

    def stop(self) -> None:
        """Make all images that were asked for, then end the thread."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()

    @property
    def _denoiser(self) -> Denoiser:
        denoiser = self._pipeline.denoiser
        assert isinstance(denoiser, Denoiser)
        return denoiser

    def _joined_sampler(self) -> JoinedSampler:
        sampler = JoinedSampler(self._denoiser, 2 * self._most)
        if sampler.problem is not None:
            raise InputError(f"{sampler.problem}; serve it without --join windows")
        if not (usual := self._pipeline.sampling().schedule).masks:
            sampler.make_room([usual])
        return sampler

    def _member(self, image: Image) -> Member | None:
        scheduler_step = image.sampling.scheduler_step
        if self._sampler is None or not self._sampler.takes(scheduler_step, image.sampling.schedule, image.guidance):
            return None
        return self._sampler.member(scheduler_step, image.sampling.schedule, image.given, image.seed, image.guidance)

    def _work(self) -> None:
        with torch_threads(1 if self._denoiser.engines[FULL].has_threads else self._threads):
            self._make_all()

    def _make_all(self) -> None:
        try:
            while self._wait():
                begins = not self._running and self._waiting
                if self._sampler is None or (begins and self._waiting[0].member is None):
                    self._make_together(self._together(), self._most)
                else:
                    self._make_window(self._sampler)
        finally:
            with self._changed:
                self._stopped = True
                left = [*self._waiting, *self._running]
                self._waiting = []
            self._fail(left, BusyError("this model is being stopped; ask again"))

    def _wait(self) -> bool:
        """Wait for work; False when all is done after `stop`."""
        with self._changed:
            self._waiting = [one for one in self._waiting if not one.made.cancelled()]
            self._changed.wait_for(lambda: self._waiting or self._running or self._stopped)
            return bool(self._waiting or self._running)

    def _together(self) -> list[_Asked]:
        """The first image that waits and those like it, when they are enough or the first has waited long enough."""
        with self._changed:
            first = self._waiting[0]

            def alike() -> list[_Asked]:
                return [one for one in self._waiting if one.image.key == first.image.key and not one.made.cancelled()]

            left = first.since + self._max_wait - time.monotonic()
            self._changed.wait_for(lambda: self._stopped or len(alike()) >= self._most, max(0.0, left))
            return self._taken(alike()[: self._most])

    def _taken(self, asked: list[_Asked]) -> list[_Asked]:
        """Take images out of those that wait; they run now."""
        self._waiting = [one for one in self._waiting if one not in asked]
        self._running = [*self._running, *asked]
        return asked

    def _make_together(self, batch: list[_Asked], most: int) -> None:
        """Make images as one batch, or as several if they do not fit the memory."""
        for start in range(0, len(batch), most):
            part = batch[start : start + most]
            try:
                self._make(part)
            except RoomError as error:
                fits = len(part) * error.fits // error.batch
                if 0 < fits < len(part):
                    self._most = fits
                    self._make_together(part, fits)
                else:
                    self._fail(part, error)
            except _Unwanted:
                self._ended(part)
            except BackendError as error:
                if len(part) == 1:
                    self._fail(part, error)
                else:
                    self._make_together(part, 1)  # it may be the fault of one of them
            except Exception as error:  # whoever asked gets it
                self._fail(part, error)

    def _make(self, batch: Sequence[_Asked]) -> None:
        first = batch[0].image
        given = Conditioning.joined([one.image.given for one in batch])
        seeds = [one.image.seed for one in batch]
        done = self._sampler_of(first)(given, seeds, first.guidance, _while_wanted(batch))
        with self._changed:
            self._counts = self._counts.with_batch(
                len(batch), len(done.full_seconds), sum(done.full_seconds), sum(done.reuse_seconds)
            )
        for asked, latents in zip(batch, done.latents, strict=True):
            self._answer(asked, latents, len(done.full_seconds))

    def _sampler_of(self, image: Image) -> Sampler:
        """The loop for images like this one; the latest are kept, because on a GPU they have CUDA graphs."""
        return self._samplers.get(image.key, lambda: self._pipeline.sampler(image.sampling))

    def _make_window(self, sampler: JoinedSampler) -> None:
        """Compute one window of the images that run; before it, some leave and others join."""
        left = [one for one in self._running if one.made.cancelled()]
        try:
            joining = self._joining(sampler, left)
            sampler.change([one.member for one in left if one.member], [one.member for one in joining if one.member])
            self._ended(left)
            if not sampler.members:
                return
            images = len(sampler.members)
            times, done = sampler.window()
            with self._changed:
                self._counts = self._counts.with_batch(images, 1, *times)
            for asked in [one for one in self._running if one.member in done]:
                assert asked.member is not None and asked.member.latents is not None
                self._answer(asked, asked.member.latents, asked.member.full_steps)
        except Exception as error:  # whoever asked gets it
            self._fail(self._running, error)
            self._sampler = self._joined_sampler()

    def _joining(self, sampler: JoinedSampler, left: Sequence[_Asked]) -> list[_Asked]:
        """The images that wait, in the order in which they came, up to the first that does not fit."""
        with self._changed:
            joining: list[_Asked] = []
            gone = [one.member for one in left]
            for asked in self._waiting:
                members = [one.member for one in joining]
                if asked.member is None or not sampler.fits(asked.member, gone, members):
                    break
                joining.append(asked)
            return self._taken(joining)

    def _answer(self, asked: _Asked, latents: Tensor, full_steps: int) -> None:
        """Decode the latents of one image (C, H, W), alone, so that it does not depend on the others."""
        try:
            check_finite(self._pipeline.manifest, latents)
            with torch_threads(self._threads):
                levels = self._pipeline.decoder.levels(latents[None], self._pipeline.device)
        except Exception as error:  # whoever asked gets it
            self._fail([asked], error)
            return
        with self._changed:
            self._failures = 0
            self._counts = replace(self._counts, pictures=self._counts.pictures + 1)
        self._ended([asked])
        with suppress(InvalidStateError):  # cancelled
            asked.made.set_result(Made(levels[0].numpy(), full_steps))

    def _fail(self, failed: Sequence[_Asked], error: Exception) -> None:
        self._failures = 0 if isinstance(error, ForaError) else self._failures + 1
        self._ended(failed)
        for asked in failed:
            with suppress(InvalidStateError):  # cancelled
                asked.made.set_exception(error)

    def _ended(self, ended: Sequence[_Asked]) -> None:
        with self._changed:
            self._running = [one for one in self._running if one not in ended]


def _while_wanted(batch: Sequence[_Asked]) -> Watch:
    """A watch that ends the loop when nobody waits for an image of the batch."""

    def watch(steps: Iterable[Any]) -> Iterator[Any]:
        for step in steps:
            if all(one.made.cancelled() for one in batch):
                raise _Unwanted
            yield step

    return watch
