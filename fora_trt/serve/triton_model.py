"""The model in NVIDIA's Triton server: requests of its Python backend become images of `Batches`.

`model.py` in a model repository gives it Triton's own module and the folder. Triton waits for no answer before it hands
over the next requests, so images join a batch that runs already.
"""

from __future__ import annotations

import json
import random
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy
from pydantic import BaseModel, ConfigDict, ValidationError

from fora_trt.engines.backends import AUTO
from fora_trt.errors import BusyError, InputError
from fora_trt.pipeline import PipelineConfig
from fora_trt.schedule import is_file
from fora_trt.serve.api import INTERNAL, ApiError, Limits, Wanted, unprocessable, wanted_of
from fora_trt.serve.batches import Image, Made
from fora_trt.serve.replica import started
from fora_trt.serve.requests import Served
from fora_trt.untrusted import one_line

BUNDLE, ENGINES, VAE = "bundle", "engines", "vae"
"""Folders in the folder of a model."""

POLL = 0.25
"""Seconds between two looks whether a client went away."""


class ModelSettings(BaseModel):
    """The `parameters` of `config.pbtxt` that are for the model; those of others, such as Triton's own, are ignored.

    `schedule` is a text form, or a file in the folder of the model.
    """

    model_config = ConfigDict(frozen=True)

    backend: str = AUTO
    schedule: str = ""
    scheduler: str | None = None
    timestep_spacing: str | None = None
    steps: int | None = None
    max_wait_ms: float = 0.0
    join: bool = True
    max_prompt: int = 4000
    max_steps: int = 250

    def parameters(self) -> dict[str, str]:
        """As they stand in `config.pbtxt`."""
        given = {name: one for name, one in self.model_dump().items() if one not in (None, "")}
        return {name: json.dumps(one) if isinstance(one, bool) else str(one) for name, one in given.items()}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelSettings:
        """From the configuration that Triton passes to the model. Raises `InputError` for a value that is wrong."""
        given = {name: one["string_value"] for name, one in config.get("parameters", {}).items()}
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            first = error.errors()[0]
            raise InputError(f"the parameter {first['loc'][0]} in config.pbtxt: {one_line(first['msg'])}") from None


def device_of(kind: str, number: str) -> str:
    """The device of an instance by Triton's words for it."""
    return f"cuda:{int(number)}" if kind == "GPU" else "cpu"


def served_of(folder: Path, name: str, config: Mapping[str, Any], device: str) -> Served:
    """What an instance of the model in a folder serves. Raises `InputError`."""
    settings = ModelSettings.from_config(config)
    file = folder / settings.schedule if is_file(settings.schedule) else None
    most = int(config["max_batch_size"])
    pipeline = PipelineConfig(
        folder / BUNDLE,
        schedule=str(file) if file else settings.schedule,
        scheduler=settings.scheduler,
        timestep_spacing=settings.timestep_spacing,
        batch_size=most,
        backend=settings.backend,
        device=device,
        engines=folder / ENGINES,
        vae=str(folder / VAE) if (folder / VAE).is_dir() else None,
    )
    files = () if file is None else (file,)
    return Served(name, pipeline, files, most, settings.max_wait_ms / 1000, settings.join, settings.steps)


@dataclass(frozen=True)
class _Asked:
    """A request: how to answer it, and its images."""

    sender: Any
    seeds: list[int]
    made: list[Future[Made]]


class Model:
    """The base of `TritonPythonModel`, whose methods Triton calls; `utils` is `triton_python_backend_utils`."""

    folder: ClassVar[Path]
    utils: ClassVar[Any]

    def initialize(self, args: Mapping[str, str]) -> None:
        """Start the engines; missing plans are built. Raises `ForaError`: then Triton does not load the model."""
        config = json.loads(args["model_config"])
        device = device_of(args["model_instance_kind"], args["model_instance_device_id"])
        served = served_of(self.folder, args["model_name"], config, device)
        settings = ModelSettings.from_config(config)
        most = served.max_batch_size
        self._limits = Limits(prompt_characters=settings.max_prompt, images=most, steps=settings.max_steps)
        self.requests, self.batches = started(served)
        self._room = threading.Semaphore(2 * most)  # a batch and the next one; others wait in the queue of Triton
        self._answers = ThreadPoolExecutor(2 * most, thread_name_prefix="answers")

    def execute(self, requests: Sequence[Any]) -> None:
        """Ask for the images of all requests, each of which is answered when its own are made.

        Returns before, as soon as there is room for the next requests. Raises nothing: Triton would fail all of them.
        """
        for request in requests:
            sender = request.get_response_sender()
            try:
                images = self._images(request)
                asked = _Asked(sender, [one.seed for one in images], self._submitted(images))
            except Exception as error:  # of this request alone
                self._refuse(sender, error)
            else:
                self._answers.submit(self._answer, asked)

    def finalize(self) -> None:
        """Answer all requests that were accepted."""
        self.batches.stop()
        self._answers.shutdown()

    def _images(self, request: Any) -> list[Image]:
        """One image for each row of the inputs. Raises `ApiError`."""
        rows = [wanted_of(one, self._limits) for one in rows_of(request)]
        return [image for wanted in rows for image in self._images_of(wanted)]

    def _images_of(self, wanted: Wanted) -> list[Image]:
        return self.requests.images(wanted, random.randrange(2**31) if wanted.seed is None else wanted.seed)

    def _submitted(self, images: Sequence[Image]) -> list[Future[Made]]:
        made: list[Future[Made]] = []
        try:
            for image in images:
                self._room.acquire()
                try:
                    future = self.batches.submit(image)
                except BaseException:
                    self._room.release()
                    raise
                future.add_done_callback(lambda _: self._room.release())
                made.append(future)
        except BaseException:
            _cancel(made)
            raise
        return made

    def _answer(self, asked: _Asked) -> None:
        """Wait for the images of a request and send them; if its client went away, free their places."""
        try:
            made = [self._made(asked.sender, one).picture for one in asked.made]
        except BaseException as error:  # of this request alone
            _cancel(asked.made)
            self._refuse(asked.sender, error)
            return
        image = self.utils.Tensor("image", numpy.stack(made))  # (N, H, W, C)
        seed = self.utils.Tensor("seed", numpy.array(asked.seeds, dtype=numpy.int64)[:, None])  # (N, 1)
        self._send(asked.sender, self.utils.InferenceResponse(output_tensors=[image, seed]))

    def _made(self, sender: Any, future: Future[Made]) -> Made:
        while not wait([future], POLL).done:
            if sender.is_cancelled():
                raise CancelledError
        return future.result()

    def _refuse(self, sender: Any, error: BaseException) -> None:
        """Answer one request with an error. Its message names no path; the log has those that are not the client's."""
        kinds = self.utils.TritonError
        if isinstance(error, ApiError):
            message, code = error.message, kinds.INVALID_ARG
        elif isinstance(error, CancelledError):
            message, code = "the client went away", kinds.CANCELLED
        elif isinstance(error, BusyError):
            message, code = "the model is being unloaded; send the request again", kinds.UNAVAILABLE
        else:
            self.utils.Logger.log_error("".join(traceback.format_exception(error)))
            message, code = INTERNAL, kinds.INTERNAL
        self._send(sender, self.utils.InferenceResponse(error=kinds(message, code)))

    def _send(self, sender: Any, response: Any) -> None:
        try:
            sender.send(response, flags=self.utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        except Exception:  # such as a server that ends: nobody is left to tell
            self.utils.Logger.log_error(traceback.format_exc())


def rows_of(request: Any) -> Iterator[dict[str, Any]]:
    """The fields of each image of a request. Raises `ApiError` for inputs that are not (N, 1), or no text."""
    given = {one.name(): one.as_numpy() for one in request.inputs()}
    if not given:
        raise unprocessable("seed", "the request has no input; give at least one, such as seed")
    rows = {len(values) if values.ndim else 0 for values in given.values()}
    for name, values in given.items():
        if values.ndim != 2 or values.shape[1] != 1 or len(rows) > 1 or not len(values):
            raise unprocessable(name, f"{name} has the shape {[*values.shape]}; (N, 1) is needed, for N images")
    for row in range(rows.pop()):
        yield {name: _value(name, values[row, 0]) for name, values in given.items()}


def _value(name: str, value: Any) -> Any:
    """A value of Python's own; text comes as bytes."""
    plain = value.item() if isinstance(value, numpy.generic) else value
    try:
        return plain.decode() if isinstance(plain, bytes) else plain
    except UnicodeDecodeError:
        raise unprocessable(name, f"{name} is not UTF-8 text") from None


def _cancel(made: Sequence[Future[Made]]) -> None:
    for future in made:
        future.cancel()
