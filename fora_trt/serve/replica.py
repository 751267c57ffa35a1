"""The deployment of a model: makes the images of requests and encodes them."""

from __future__ import annotations

import asyncio
import base64
import logging
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import count
from threading import Event
from typing import Any, Protocol

import torch

from fora_trt.bundle import Bundle
from fora_trt.diffusers_pipeline import DiffusersPipeline
from fora_trt.errors import BusyError
from fora_trt.images.save import about_image, png_bytes
from fora_trt.pipeline import GUIDED, Pipeline
from fora_trt.report.environment import versions
from fora_trt.serve.api import INTERNAL, ApiError, Wanted, away
from fora_trt.serve.batches import Batches, Counts, Made
from fora_trt.serve.requests import Requests, Served
from fora_trt.serve.whole import WholePipeline

LOG = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Reply:
    """What a replica returns: an answer or an error, and its counts; `number` rises with each reply."""

    replica: str
    number: int
    counts: Counts
    answer: dict[str, Any] | None = None
    error: ApiError | None = None


@dataclass(frozen=True)
class Done:
    """The images of a request and what they were made with."""

    made: Sequence[Made]
    settings: Mapping[str, Any]


class Maker(Protocol):
    """Makes the images of requests."""

    @property
    def works(self) -> bool:
        """Whether this process need not be replaced."""

    @property
    def about(self) -> Mapping[str, str]:
        """What the PNG files say about the model: the digest of its weights and the backend."""

    async def make(self, wanted: Wanted, seed: int) -> Done:
        """The images of a request. If the caller goes away, their places are freed. Raises `ApiError`."""

    def counts(self) -> Counts:
        """What was computed so far."""

    def stop(self) -> None:
        """Make what was asked for, then end."""


def started(served: Served) -> tuple[Requests, Batches]:
    """A model that is ready for its first request. Raises `ForaError` if it cannot be served here."""
    pipeline = Pipeline(served.pipeline)
    pipeline.decoder  # noqa: B018 # raises for a missing VAE before the engines start
    pipeline.start(served.max_batch_size, GUIDED)
    requests = Requests(served, pipeline)
    if requests.encoder is not None:
        requests.encoder.load()
    batches = Batches(pipeline, served.max_batch_size, served.max_wait, served.join)
    pipeline.sampling(requests.default_steps)  # imports what the first request needs
    return requests, batches


class InBatches:
    """Makes images of many requests together, with `fora_trt.Pipeline`."""

    def __init__(self, served: Served) -> None:
        threads = torch.get_num_threads()
        self.requests, self.batches = started(served)
        self.pipeline = self.requests.pipeline
        # Text encoders take long, and need all threads of torch. Those of `Batches` are fewer.
        self._checks = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(threads,))
        self.about = _about(self.pipeline)

    @property
    def works(self) -> bool:
        return self.batches.works

    async def make(self, wanted: Wanted, seed: int) -> Done:
        """See `Maker`."""
        loop = asyncio.get_running_loop()
        images = await loop.run_in_executor(self._checks, self.requests.images, wanted, seed)
        futures = [self.batches.submit(image) for image in images]
        try:
            made = await asyncio.gather(*map(asyncio.wrap_future, futures))
        finally:
            for future in futures:
                future.cancel()
        sampling = images[0].sampling
        settings = {
            "scheduler": sampling.name,
            "steps": sampling.schedule.steps,
            "schedule": sampling.schedule.text,
            "guidance_scale": images[0].guidance.scale,
        }
        return Done(made, settings)

    def counts(self) -> Counts:
        return self.batches.counts()

    def stop(self) -> None:
        self.batches.stop()


class OneByOne:
    """Makes the images of one request after the other, with the diffusers pipeline of a bundle."""

    def __init__(self, served: Served) -> None:
        self.whole = WholePipeline(served)
        self._thread = ThreadPoolExecutor(1)
        self.about = _about(self.whole.pipeline)
        self.works = True

    async def make(self, wanted: Wanted, seed: int) -> Done:
        """See `Maker`."""
        gone = Event()
        try:
            work = partial(self.whole.make, wanted, seed, gone)
            return Done(*await asyncio.get_running_loop().run_in_executor(self._thread, work))
        finally:
            gone.set()

    def counts(self) -> Counts:
        return self.whole.counts

    def stop(self) -> None:
        self._thread.shutdown()


def _about(pipeline: Pipeline | DiffusersPipeline) -> dict[str, str]:
    weights = pipeline.bundle.manifest.model.weights_sha256
    return {"weights_sha256": weights, "backend": pipeline.backend.name}


def maker_of(served: Served) -> Maker:
    """Starts the engines of a model."""
    of_pipeline = Bundle.read(served.pipeline.bundle).manifest.pipeline is not None
    return OneByOne(served) if of_pipeline else InBatches(served)


class Replica:
    """One process with the engines of a model."""

    def __init__(self, served: Served) -> None:
        self.served, self.maker = served, maker_of(served)
        self._id = uuid.uuid4().hex
        self._numbers = count(1)
        self._versions = versions()

    def check_health(self) -> None:
        """Raise if this process had better be replaced; Ray Serve asks."""
        if not self.maker.works:
            raise RuntimeError(f"the images of {self.served.name} fail one after the other")

    async def generate(self, fields: dict[str, Any], seed: int) -> Reply:
        """Make the images of a request. If the caller goes away, their places are freed."""
        wanted = Wanted.model_construct(**fields)
        try:
            done = await self.maker.make(wanted, seed)
            answer = await asyncio.get_running_loop().run_in_executor(None, self._answer, wanted, seed, done)
        except ApiError as error:
            return self._reply(error=error)
        except BusyError:
            return self._reply(error=away())
        except Exception:
            LOG.exception("a request failed")
            return self._reply(error=ApiError(500, INTERNAL))
        return self._reply(answer=answer)

    def _answer(self, wanted: Wanted, seed: int, done: Done) -> dict[str, Any]:
        settings = {"model": self.served.name, **done.settings}
        written = {
            **settings,
            **self.maker.about,
            "images": len(done.made),
            "seed": seed,
            "negative_prompt": wanted.negative_prompt,
            "versions": self._versions,
        }
        prompt = wanted.prompt or None
        data = [
            {
                "b64_json": base64.b64encode(
                    png_bytes(one.picture, {**written, **about_image(k, seed, wanted.class_label, prompt)})
                ).decode(),
                "seed": seed + k,
                "full_steps": one.full_steps,
            }
            for k, one in enumerate(done.made)
        ]
        height, width = done.made[0].picture.shape[:2]
        return {"data": data, "output_format": "png", "size": f"{width}x{height}", **settings}

    def _reply(self, answer: dict[str, Any] | None = None, error: ApiError | None = None) -> Reply:
        return Reply(self._id, next(self._numbers), self.maker.counts(), answer, error)

    def __del__(self) -> None:
        if hasattr(self, "maker"):
            self.maker.stop()
