"""Stand-in of the batching core: images are made one after another, in a thread."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from numpy import uint8
from numpy.typing import NDArray

from fora_trt.pipeline import Pipeline, Sampling
from fora_trt.sampling.conditioning import Conditioning
from fora_trt.sampling.guidance import Guidance


@dataclass(frozen=True)
class Image:
    """One image to make; `given` is the conditioning of one image."""

    sampling: Sampling
    given: Conditioning
    seed: int
    guidance: Guidance


@dataclass(frozen=True)
class Made:
    """A picture, (H, W, 1 or 3), and how many of its steps ran in full."""

    picture: NDArray[uint8]
    full_steps: int


@dataclass(frozen=True)
class Counts:
    """What a replica has done since it started, and what it holds now.

    `batches` has the number of full steps by how many images they computed.
    """

    batches: dict[int, int]
    full_seconds: float
    reuse_seconds: float
    pictures: int
    waiting: int
    running: int


class Batches:
    """Makes images with one pipeline, in a thread."""

    def __init__(self, pipeline: Pipeline, most: int, max_wait: float, join: bool) -> None:
        self.pipeline = pipeline
        self._pool = ThreadPoolExecutor(1)
        self._lock = threading.Lock()
        self._batches: dict[int, int] = {}
        self._full_seconds = self._reuse_seconds = 0.0
        self._pictures = self._running = 0
        self._open: set[Future[Made]] = set()

    def submit(self, image: Image) -> Future[Made]:
        """Queue an image; cancelling the future frees its place."""
        future = self._pool.submit(self._make, image)
        with self._lock:
            self._open.add(future)
        future.add_done_callback(self._close)
        return future

    def counts(self) -> Counts:
        """The counts so far."""
        with self._lock:
            waiting = max(0, len(self._open) - self._running)
            done = self._full_seconds, self._reuse_seconds, self._pictures
            return Counts({**self._batches}, *done, waiting, self._running)

    def stop(self) -> None:
        """End the thread; images that wait are cancelled."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _close(self, future: Future[Made]) -> None:
        with self._lock:
            self._open.discard(future)

    def _make(self, image: Image) -> Made:
        with self._lock:
            self._running += 1
        try:
            done = self.pipeline.sampler(image.sampling)(image.given, [image.seed], image.guidance)
            picture = self.pipeline.decoder.levels(done.latents, self.pipeline.device)[0].numpy()
        finally:
            with self._lock:
                self._running -= 1
        with self._lock:
            self._batches[1] = self._batches.get(1, 0) + len(done.full_seconds)
            self._full_seconds += sum(done.full_seconds)
            self._reuse_seconds += sum(done.reuse_seconds)
            self._pictures += 1
        return Made(picture, len(done.full_seconds))
