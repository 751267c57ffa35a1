"""Requests of a bundle that was exported from a diffusers pipeline: its own loop makes them, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import numpy

from fora_trt.bundle import Bundle
from fora_trt.diffusers_pipeline import DiffusersPipeline
from fora_trt.errors import BusyError, InputError, ScheduleError
from fora_trt.presets import usual_text
from fora_trt.schedule import Schedule
from fora_trt.serve.api import ApiError, Wanted, unprocessable
from fora_trt.serve.batches import Counts, Made
from fora_trt.serve.requests import Served, named_schedule, public, schedules_of

USUAL_STEPS = 50


def pipeline_of(served: Served) -> DiffusersPipeline:
    """The pipeline of a model; nothing is loaded. Raises `InputError` for one that makes no images."""
    config = served.pipeline
    for option in ("vae", "scheduler", "timestep_spacing"):
        if getattr(config, option) is not None:
            raise InputError(
                f"{served.name} has the loop of its own pipeline, in which --{option.replace('_', '-')} has no effect; "
                "leave it out"
            )
    pipeline = DiffusersPipeline(
        Bundle.open(config.bundle), backend=config.backend, device=config.device, engines=Path(config.engines)
    )
    if not pipeline.decodes:
        raise InputError(f"{served.name} has no VAE, so it makes no images that could be served")
    if "num_frames" in pipeline.spec.arguments:
        raise InputError(f"{served.name} makes videos; only images are served: give it to fora-trt run")
    return pipeline


def default_steps(pipeline: DiffusersPipeline) -> int:
    """The steps of a request that names none."""
    return pipeline.bundle.scheduled_steps or USUAL_STEPS


class WholePipeline:
    """Makes the images of a request with the pipeline, `max_batch_size` at once. One thread at a time may use it."""

    def __init__(self, served: Served) -> None:
        """Load the pipeline and start the engines."""
        self.name, self._most, self.pipeline = served.name, served.max_batch_size, pipeline_of(served)
        self.pipeline.start(self._most)
        self.schedules = schedules_of(served, self.pipeline.bundle)
        self.default_steps = default_steps(self.pipeline)
        self.counts = Counts()

    def make(self, wanted: Wanted, seed: int, gone: Event) -> tuple[list[Made], dict[str, Any]]:
        """The images of a request and what they were made with; `gone` says that nobody waits for them.

        Raises `ApiError` for a value that the pipeline does not take, `BusyError` when `gone` is set.
        """
        arguments, steps = self._arguments(wanted), wanted.num_inference_steps or self.default_steps
        schedule = self._schedule(wanted, steps)
        self.pipeline.use_schedule(schedule)
        made: list[Made] = []
        for first in range(0, wanted.images, self._most):
            many = min(self._most, wanted.images - first)
            try:
                result = self.pipeline(
                    [wanted.prompt] if wanted.prompt else (),
                    steps=steps,
                    seed=seed + first,
                    num_images=many,
                    arguments=arguments,
                    watch=_while_wanted(gone),
                )
            except ScheduleError as error:
                raise self._does_not_fit(error, steps) from error
            except InputError as error:
                raise unprocessable(
                    "prompt", public(error, f"{self.name} cannot be called with these values")
                ) from error
            made += [Made(numpy.asarray(one[0].convert("RGB")), result.full_steps) for one in result.pictures]
            counts = self.counts.with_batch(many, result.full_steps)
            self.counts = replace(counts, pictures=counts.pictures + many)
        settings = {
            "pipeline": self.pipeline.spec.name,
            "steps": steps,
            "schedule": schedule if isinstance(schedule, str) else schedule.text,
            "guidance_scale": wanted.guidance_scale,
        }
        return made, settings

    def _arguments(self, wanted: Wanted) -> dict[str, Any]:
        """Arguments of the pipeline's call besides prompt, steps and seed."""
        known, spec = self.pipeline.parameters, self.pipeline.spec
        if wanted.class_label is not None:
            raise unprocessable("class_label", f"{self.name} has no classes; leave class_label out")
        if not wanted.prompt and "prompt" in known:
            raise unprocessable("prompt", f"{self.name} needs prompt")
        if wanted.prompt and "prompt" not in known:
            raise unprocessable("prompt", f"{self.name} takes no prompt; leave prompt out")
        sides = tuple(spec.arguments.get(side) for side in ("height", "width"))
        if wanted.sides is not None and None not in sides and wanted.sides != sides:
            raise unprocessable("size", f"{self.name} makes images of {sides[1]}x{sides[0]}, not {wanted.size}")
        given: dict[str, Any] = {}
        for name in ("negative_prompt", "guidance_scale"):
            value = getattr(wanted, name)
            if value is not None and name not in known:
                raise unprocessable(name, f"{self.name} takes no {name}; leave it out")
            given |= {} if value is None else {name: value}
        return given

    def _schedule(self, wanted: Wanted, steps: int) -> Schedule | str:
        """The schedule of the request; without one that of the bundle if it fits the steps, else the usual one."""
        if wanted.schedule is not None:
            asked = named_schedule(wanted.schedule, self.schedules)
            sites = self.pipeline.bundle.manifest.cache_sites
            try:
                (asked if isinstance(asked, Schedule) else Schedule.from_text(asked, steps, sites)).checked(steps)
            except ScheduleError as error:
                raise self._does_not_fit(error, steps) from error
            return asked
        own = next(iter(self.schedules.values()), None) if self.pipeline.bundle.scheduled_steps == steps else None
        text = self.pipeline.bundle.schedule
        return own or (text if text is not None and not text.endswith(".json") else usual_text())

    def _does_not_fit(self, error: ScheduleError, steps: int) -> ApiError:
        return unprocessable("schedule", public(error, f"this schedule does not fit {self.name} at {steps} steps"))


def _while_wanted(gone: Event) -> Callable[[Iterable[Any]], Iterator[Any]]:
    """A watch that ends the loop when nobody waits for its images."""

    def watch(steps: Iterable[Any]) -> Iterator[Any]:
        for step in steps:
            if gone.is_set():
                raise BusyError("nobody waits for these images")
            yield step

    return watch
