"""Turns a request into images to make: the only place where values are checked that need the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from fora_trt.bundle import SCHEDULE, Bundle
from fora_trt.contract import CLASS_LABELS
from fora_trt.errors import ForaError, InputError, ScheduleError
from fora_trt.memo import Kept
from fora_trt.pipeline import Pipeline, PipelineConfig, Sampling
from fora_trt.sampling.conditioning import Conditioning
from fora_trt.sampling.guidance import Guidance
from fora_trt.sampling.prompts import PromptEncoder
from fora_trt.schedule import Schedule, is_file, is_text_form, text_forms
from fora_trt.serve.api import Wanted, unprocessable
from fora_trt.serve.batches import Image

KEPT_PROMPTS, KEPT_SAMPLINGS = 16, 64
"""Numbers of encoded prompts, and of schedulers with schedules, that are kept."""


@dataclass(frozen=True)
class Served:
    """A model as a replica serves it; `schedules` are files whose stems a request can name.

    `steps` are those of a request that gives neither steps nor a schedule; None means those of `run`.
    """

    name: str
    pipeline: PipelineConfig
    schedules: tuple[Path, ...] = ()
    max_batch_size: int = 8
    max_wait: float = 0.0
    join: bool = True
    steps: int | None = None


class Requests:
    """Turns requests into images to make. Raises `ApiError` with the name of a value that the model does not take.

    The only place where values are checked that need the model. Messages with a path are replaced.
    """

    def __init__(self, served: Served, pipeline: Pipeline) -> None:
        self.name, self.pipeline = served.name, pipeline
        self.schedules = schedules_of(served, pipeline.bundle)
        text = pipeline.manifest.text is not None
        self.encoder = PromptEncoder(pipeline.manifest, pipeline.device) if text else None
        self._samplings: Kept[tuple[int | None, str | None], Sampling] = Kept(KEPT_SAMPLINGS)
        self._known: Kept[tuple[str, str], Conditioning] = Kept(KEPT_PROMPTS)
        own = None if pipeline.config.schedule else pipeline.bundle.scheduled_steps
        self.default_steps = served.steps or own or pipeline.config.steps

    def images(self, wanted: Wanted, seed: int) -> list[Image]:
        """One image for each of `n`, the first with this seed."""
        self._check_size(wanted)
        sampling = self._sampling(wanted)
        given = self._conditioning(wanted)
        guidance = self._guidance(wanted, given, sampling)
        return [Image(sampling, given.at([k]), seed + k, guidance) for k in range(wanted.images)]

    def _check_size(self, wanted: Wanted) -> None:
        made = self.pipeline.manifest.model.image_size
        if wanted.sides is not None and made is not None and wanted.sides != tuple(made):
            raise unprocessable("size", f"{self.name} makes images of {made[1]}x{made[0]}, not {wanted.size}")

    def _sampling(self, wanted: Wanted) -> Sampling:
        """The sampling of a request; the latest are kept, because tabulating a scheduler takes long."""
        return self._samplings.get((wanted.num_inference_steps, wanted.schedule), lambda: self._new_sampling(wanted))

    def _new_sampling(self, wanted: Wanted) -> Sampling:
        schedule = None if wanted.schedule is None else named_schedule(wanted.schedule, self.schedules)
        own = schedule is None
        steps = wanted.num_inference_steps or (self.default_steps if own else self.pipeline.config.steps)
        try:
            uncached = self.pipeline.sampling(steps, "none")
        except ForaError as error:
            raise unprocessable(
                "num_inference_steps", public(error, f"{self.name} cannot take {steps} steps")
            ) from error
        if own:
            return self.pipeline.sampling(steps)
        try:
            made = uncached.with_schedule(schedule or "none")
            self.pipeline.check_schedule(made.schedule)
        except (InputError, ScheduleError) as error:
            what = f"this schedule does not fit {self.name} with its scheduler at {steps} steps"
            raise unprocessable("schedule", public(error, what)) from error
        return made

    def _conditioning(self, wanted: Wanted) -> Conditioning:
        param, make = self._inputs(wanted)
        try:
            return make()
        except InputError as error:
            raise unprocessable(param, public(error, f"{self.name} does not take this {param}")) from error

    def _inputs(self, wanted: Wanted) -> tuple[str, Callable[[], Conditioning]]:
        """The field that conditions the images, and a function that makes their conditioning."""
        manifest, n = self.pipeline.manifest, wanted.images
        classes, label, prompt = CLASS_LABELS in manifest.conditioning, wanted.class_label, wanted.prompt
        if label is not None:
            if not classes:
                raise unprocessable("class_label", f"{self.name} has no classes; leave class_label out")
            return "class_label", lambda: self.pipeline.conditioning(class_labels=[label] * n)
        if prompt:
            if self.encoder is None:
                remedy = "give class_label" if classes else "leave prompt out"
                raise unprocessable("prompt", f"{self.name} takes no prompt; {remedy}")
            return "prompt", lambda: self._encoded(prompt, wanted.negative_prompt or "").at([0] * n)
        needed = "class_label" if self.encoder is None else "prompt"
        if self.encoder is not None or classes:
            raise unprocessable(needed, f"{self.name} needs {needed}")
        return needed, lambda: self.pipeline.conditioning(num_images=n)

    def _encoded(self, prompt: str, negative_prompt: str) -> Conditioning:
        """The conditioning of one image of a prompt; those of the latest prompts are kept."""
        assert self.encoder is not None
        encoder = self.encoder
        return self._known.get((prompt, negative_prompt), lambda: encoder.conditioning([prompt], negative_prompt))

    def _guidance(self, wanted: Wanted, given: Conditioning, sampling: Sampling) -> Guidance:
        if wanted.guidance_scale is None:
            return self.pipeline.guidance(given, sampling)
        if wanted.guidance_scale > 1 and given.unconditional is None:
            raise unprocessable("guidance_scale", f"{self.name} has no unconditional inputs; give a scale of at most 1")
        return Guidance(float(wanted.guidance_scale))


def check_steps(name: str, steps: int, most: int) -> None:
    """Raise `InputError` if a request that names no steps takes more than requests may."""
    if steps > most:
        raise InputError(
            f"a request to {name} that names no steps takes {steps}, more than --max-steps {most}; "
            f"give --max-steps {steps} or more"
        )


def named_schedule(text: str, schedules: Mapping[str, Schedule]) -> Schedule | str:
    """A text form, or the schedule of this name; never a path."""
    if text in schedules:
        return schedules[text]
    if is_text_form(text):
        return text
    known = ", ".join([text_forms(), *schedules])
    raise unprocessable("schedule", f"there is no such schedule; give one of {known}")


def public(error: ForaError, otherwise: str) -> str:
    """The message of an error if it holds no path, else this sentence."""
    message = str(error)
    return otherwise if any(mark in message for mark in "/\\~") or ".json" in message else message


def schedules_of(served: Served, bundle: Bundle) -> dict[str, Schedule]:
    """The schedules that a request can name: the one in the bundle and the files for this model.

    They are known by their names, so that no message has a path.
    """
    found, model = {}, bundle.manifest.model
    own = [bundle.folder / SCHEDULE] if bundle.manifest.schedule == SCHEDULE else []
    for path in (*own, *served.schedules):
        try:
            made = replace(Schedule.from_file(path, bundle.manifest.cache_sites), text=path.stem)
            bundle.manifest.check_graphs(made.masks)
            made.check_model(model.weights_sha256, model.options.source)
        except ScheduleError:
            continue  # of another model
        found[path.stem] = made
    return found


def checked_schedules(paths: tuple[Path, ...]) -> tuple[Path, ...]:
    """Absolute paths of schedule files. Raises `InputError` for two of one name, `ScheduleError` for an invalid one."""
    stems = [path.stem for path in paths]
    for path in paths:
        if not is_file(str(path)):
            raise InputError(f"--schedule {path} is not a .json file; requests give text forms themselves")
        Schedule.from_file(path)
        if stems.count(path.stem) > 1:
            raise InputError(f"two schedule files are named {path.stem}; requests name them so; rename one")
    return tuple(path.resolve() for path in paths)
