"""Options and arguments that several commands share, and the types that parse their values."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from fora_trt.cli.terminal import bar, say
from fora_trt.errors import InputError, RoomError
from fora_trt.plan import HIGHEST_ORDER
from fora_trt.presets import DEFAULT_INTERVAL, preset, usual_text
from fora_trt.schedule import NONE, fora_text, with_forecast

if TYPE_CHECKING:
    from fora_trt.evaluate.workers import Workers
    from fora_trt.pipeline import Pipeline
    from fora_trt.sampling.conditioning import Conditioning


Result = TypeVar("Result")


class Numbers(click.ParamType["tuple[int, ...]"]):
    """A list of integers; the base class takes any number of them, comma-separated."""

    name = "N,N,..."
    separator = ","
    counts: tuple[int, ...] = ()  # valid lengths of the list; empty: any length
    refusal = "is not a list of integers such as 3,7,7"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(int(part) for part in str(value).lower().split(self.separator))
        except ValueError:
            numbers = ()
        if not numbers or (self.counts and len(numbers) not in self.counts):
            self.fail(f"{value!r} {self.refusal}", param, ctx)
        if problem := self.problem_of(numbers):
            self.fail(f"{value!r} {problem}", param, ctx)
        return numbers

    def problem_of(self, numbers: tuple[int, ...]) -> str | None:
        """The problem with a list of valid length; None if there is none."""
        return None


class BatchProfile(Numbers):
    """An optimization profile: smallest, tuned-for and largest batch size, separated by colons."""

    name, separator, counts = "MIN:OPT:MAX", ":", (3,)
    refusal = "is not a profile of three integers min:opt:max such as 1:2:16"

    def problem_of(self, numbers: tuple[int, ...]) -> str | None:
        minimum, optimum, maximum = numbers
        rises = 1 <= minimum <= optimum <= maximum
        return None if rises else "is not a valid profile; expected 1 <= min <= opt <= max, such as 1:2:16"


class ImageSize(Numbers):
    """One integer for a square image, or height and width."""

    name, separator, counts = "N|HxW", "x", (1, 2)
    refusal = "is not an image size such as 512, or 512x768 for height and width"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        sides = super().convert(value, param, ctx)
        return sides[0], sides[-1]

    def problem_of(self, numbers: tuple[int, ...]) -> str | None:
        return None if min(numbers) >= 1 else self.refusal


class StepRange(Numbers):
    """A range of steps: the first step and the step after the last, separated by a colon."""

    name, separator, counts = "FIRST:LAST", ":", (2,)
    refusal = "is not a range of two integers such as 5:30"

    def problem_of(self, numbers: tuple[int, ...]) -> str | None:
        first, last = numbers
        return None if 0 <= first < last else "is not a valid range; expected 0 <= first < last, such as 5:30"


class Words(click.ParamType[tuple[str, ...]]):
    """A comma-separated list of words."""

    name = "A,B,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        return value if isinstance(value, tuple) else tuple(part.strip() for part in str(value).split(",") if part)


class KeyValue(click.ParamType[tuple[str, "bool | int | float | str | None"]]):
    """An argument NAME=VALUE; the value is a number, true, false, null, or else a text."""

    name = "NAME=VALUE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Any]:
        if isinstance(value, tuple):
            return value
        name, equals, text = str(value).partition("=")
        if not equals or not name.isidentifier():
            self.fail(f"{value!r} is not NAME=VALUE, such as guidance_scale=1.0", param, ctx)
        try:
            parsed = json.loads(text)
        except ValueError:
            return name, text
        return name, parsed if isinstance(parsed, bool | int | float | None) else text


class Schedulers(Words):
    """A list of schedulers; the settings of one, `dpm-solver++:order=3,spacing=lu`, contain commas too."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        joined: list[str] = []
        for word in super().convert(value, param, ctx):
            if joined and "=" in word and ":" not in word:
                joined[-1] += f",{word}"
            else:
                joined.append(word)
        return tuple(joined)


PRECISION = click.Choice(["fp32", "fp16", "bf16"])
BUNDLE = click.argument("bundle", type=click.Path(path_type=Path))
BACKEND = click.option("--backend", default="auto", help="auto, or a name that 'fora-trt doctor' lists.")
DEVICE = click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N.")
ENGINES = click.option(
    "--engines",
    type=click.Path(path_type=Path),
    default="engines",
    help="Folder of TensorRT plans; missing plans are built there. Or one set of plans, which is used as it is.",
)
WITHOUT_PLANS = "no TensorRT plans are loaded with --backend {}"
"""Why `ENGINES` has no effect."""

SCHEDULE_FORMS = (
    "fora:3, even:18, dense:18,0.3, full:0,1,4 or attention:2,feed-forward:3, each also with ,forecast=2; "
    "or a .json file"
)
SCHEDULES = click.option(
    "--schedule",
    "schedules",
    multiple=True,
    help=f"Schedule in addition to the cache intervals: {SCHEDULE_FORMS}. Repeatable.",
)
NEGATIVE_PROMPT = click.option("--negative-prompt", default="", help="Prompt of the unconditional half of guidance.")
CONDITIONING = click.option(
    "--prompt-embeds",
    "--conditioning",
    "conditioning",
    type=click.Path(path_type=Path),
    help="File of model inputs by name, .npz or .safetensors; negative_ NAMES are the unconditional half.",
)
GUIDANCE_SCALE = click.option(
    "--guidance-scale",
    type=click.FloatRange(min=0),
    help="Classifier-free guidance scale; 0 to 1: none.  [default: 1.5 for classes, 4.5 for prompts]",
    show_default=False,
)
SEED = click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), default=0, help="Seed of image 0; image k has this seed plus k."
)
BATCH_SIZE = click.option(
    "--batch-size", type=click.IntRange(min=1), default=64, help="Images that are denoised together."
)
SCHEDULER = click.option(
    "--scheduler",
    help="ddim, ddpm, dpm-solver++:order=3,spacing=lu, ... or a diffusers class.  [default: the model's own]",
    show_default=False,
)
TIMESTEP_SPACING = click.option(
    "--timestep-spacing",
    type=click.Choice(["leading", "linspace", "trailing"]),
    help="How the scheduler spaces its timesteps.  [default: the scheduler's own]",
    show_default=False,
)
GUIDANCE_INTERVAL = click.option(
    "--guidance-interval",
    type=StepRange(),
    help="Guided steps, counted from 0; LAST is excluded.  [default: all]",
    show_default=False,
)
VAE = click.option("--vae", help="Folder or hub id of the VAE.  [default: the model's own]", show_default=False)

CALL = click.option(
    "--call",
    type=KeyValue(),
    multiple=True,
    help="A further argument of the call of a diffusers pipeline, such as true_cfg_scale=4; repeatable.",
)

TRUST_SOURCE = click.option(
    "--trust-source",
    is_flag=True,
    help="Call the factory package.module:factory that the bundle names as its source, to compare with PyTorch.",
)
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")


@dataclass(frozen=True)
class SamplingOptions:
    """The sampling options: one command-line option and one field of `PipelineConfig` each."""

    schedule: str
    steps: int
    guidance_scale: float | None
    guidance_interval: tuple[int, int] | None
    scheduler: str | None
    timestep_spacing: str | None
    batch_size: int
    backend: str
    device: str
    engines: Path
    vae: str | None

    def pipeline(self, bundle: Path) -> Pipeline:
        """The pipeline of a bundle with these settings; it prints a line before each long operation.

        Where neither steps nor a schedule are given, the steps are those of the schedule file in the bundle.
        """
        pipeline = pipeline_of(bundle, **vars(self))
        if not self.schedule:
            _take_scheduled_steps(pipeline)
        return pipeline


def _take_scheduled_steps(pipeline: Pipeline) -> None:
    """Where no number of steps was given, take that of the schedule file in the bundle, if there is one."""
    own = pipeline.bundle.scheduled_steps
    if own is not None and not is_given("steps"):
        pipeline.config = replace(pipeline.config, steps=own)


def pipeline_of(bundle: Path, **settings: Any) -> Pipeline:
    """A pipeline that prints a line before each long operation and shows a progress bar while plans are built."""
    from fora_trt.pipeline import Pipeline

    context = click.get_current_context()
    progress = context.with_resource(bar())
    pipeline = Pipeline(bundle, report=say, progress=progress, **settings)
    if settings.get("trust_source"):
        from fora_trt.models.sources import is_factory

        if not is_factory(pipeline.manifest.model.options.source):
            raise InputError(f"the source of {bundle} is no factory, so no code of it runs; leave --trust-source out")
    if "backend" in settings and not pipeline.backend.builds:
        refuse_given(WITHOUT_PLANS.format(pipeline.backend.name), "engines")
    return pipeline


def is_given(name: str) -> bool:
    """Whether the user gave a parameter of the running command, rather than leaving it at its default."""
    source = click.get_current_context().get_parameter_source(name)
    return source in (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)


def refuse_given(because: str, *names: str) -> None:
    """Refuse the given ones of these parameters, which have no effect for the reason `because`: exit code 2."""
    context = click.get_current_context()
    options = [max(one.opts, key=len) for one in context.command.params if one.name in names and is_given(one.name)]
    if options:
        verb = "has" if len(options) == 1 else "have"
        raise click.UsageError(f"{' and '.join(options)} {verb} no effect: {because}", context)


def with_room(pipeline: Pipeline, work: Callable[[], Result]) -> Result:
    """The result of `work`; if batches of the default size do not fit the memory, it is called again with smaller ones.

    `work` must leave nothing behind when it raises `RoomError`.
    """
    while True:
        try:
            return work()
        except RoomError as error:  # noqa: PERF203 # each batch may be too large
            size = pipeline.config.batch_size
            fewer = min(size, error.batch) * error.fits // error.batch
            if is_given("batch_size") or not 0 < fewer < size:
                raise
            pipeline.config = replace(pipeline.config, batch_size=fewer)
            click.echo(
                f"{min(size, error.batch)} images at once do not fit the memory; {fewer} are made at once", err=True
            )


def resumed(pipeline: Pipeline, folder: Path, resume: bool) -> None:
    """Give a pipeline the batch size of the work that is resumed, if none was given."""
    from fora_trt.evaluate.work_folder import recorded

    size = recorded(folder, "batch_size") if resume and not is_given("batch_size") else None
    if isinstance(size, int) and 0 < size < pipeline.config.batch_size:
        pipeline.config = replace(pipeline.config, batch_size=size)


def fitting(cache_intervals: tuple[int, ...], steps: int) -> tuple[int, ...]:
    """The cache intervals that fit the number of steps, if they are the default; given ones may be refused later."""
    if is_given("cache_intervals"):
        return cache_intervals
    return tuple(one for one in cache_intervals if one <= steps) or (1,)


def schedule_of(cache_interval: int | None, schedule: str | None, forecast: int | None) -> str:
    """The text form of the schedule given by --cache-interval or --schedule, with the order given by --forecast.

    Empty if none of them is given: the bundle may have a schedule.
    """
    if cache_interval is not None and schedule is not None:
        raise InputError("--cache-interval and --schedule exclude each other; give one of them")
    if schedule is not None:
        return with_forecast(schedule, forecast)
    return "" if cache_interval is None and forecast is None else usual_text(cache_interval, forecast)


def own_schedule(pipeline: Pipeline) -> tuple[str, ...]:
    """The schedule of the bundle if it has partial steps: the bundle was exported for it.

    Where no number of steps is given, the configuration takes over that of a schedule file.
    """
    bundle = pipeline.bundle
    if not bundle.schedule or not bundle.manifest.partial_graphs:
        return ()
    _take_scheduled_steps(pipeline)
    fits = bundle.scheduled_steps in (None, pipeline.sampling(schedule=NONE).nfe)
    return (bundle.schedule,) if fits else ()


def schedules_of(cache_intervals: Sequence[int], schedules: Sequence[str], forecast: int = 0) -> list[str]:
    """The text forms of all schedules given by --cache-intervals, --forecast and --schedule, without duplicates.

    With a forecast, each interval also stands for a preset with as many full steps.
    """
    fora = list(map(fora_text, cache_intervals))
    forecasts = [preset(interval, forecast) for interval in cache_intervals if forecast and interval > 1]
    return list(dict.fromkeys([*fora, *forecasts, *schedules]))


def grouped(name: str, *options: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator that adds options to a command and passes their values to it as one dictionary `name`."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(command)
        def taking(**given: Any) -> Any:
            own = {key: given.pop(key) for key in keys}
            return command(**given, **{name: own})

        decorated: Callable[..., Any] = taking
        for option in reversed(options):  # the order in which stacked decorators apply
            decorated = option(decorated)
        keys = [parameter.name for parameter in decorated.__click_params__[-len(options) :]]  # type: ignore[attr-defined] # of click
        return decorated

    return decorate


INPUTS_IN_TURN = grouped(
    "wanted",
    click.option("--prompt", multiple=True, help="Prompt; repeatable. The images cycle through all prompts."),
    NEGATIVE_PROMPT,
    CONDITIONING,
)
"""The inputs of many images; `conditioning_in_turn` takes their values."""


PARALLEL = grouped(
    "parallel",
    click.option(
        "--workers",
        type=click.IntRange(min=1),
        help="Compute in so many processes, each with its own GPU or its share of the cores.  [default: this process]",
        show_default=False,
    ),
    click.option(
        "--ray-address",
        metavar="HOST:PORT",
        help="Run the workers on this Ray cluster; by default one for each GPU, or each machine without GPUs. All "
        "machines need the bundle in the same folder.",
    ),
)
"""Where the parts of long work are computed; `workers_of` takes their values."""


def workers_of(pipeline: Pipeline, parallel: dict[str, Any]) -> Workers | None:
    """The workers of `PARALLEL`, which end with the command; None if it computes in its own process."""
    if parallel["workers"] is None and parallel["ray_address"] is None:
        return None
    if ":" in pipeline.config.device:
        raise click.UsageError(f"--device {pipeline.config.device} names one GPU, and Ray assigns GPUs; give cuda")
    from fora_trt.evaluate.workers import Workers

    workers = Workers(parallel["workers"], parallel["ray_address"], pipeline.device, say)
    return click.get_current_context().with_resource(workers)


def conditioning_in_turn(pipeline: Pipeline, wanted: dict[str, Any], images: int) -> Conditioning:
    """The conditioning of `INPUTS_IN_TURN`: prompts or a file, or else all classes in turn for this many images."""
    from fora_trt.sampling.conditioning import balanced_labels

    without_classes = wanted["prompt"] or wanted["conditioning"] or pipeline.manifest.guidance is None
    return pipeline.conditioning(None if without_classes else balanced_labels(pipeline.manifest, images), **wanted)


def sampling_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of `SamplingOptions` to a command and pass them to it as its parameter `sampling`."""

    @wraps(command)
    def taking(sampling: dict[str, Any], **given: Any) -> Any:
        schedule = schedule_of(*(sampling.pop(name) for name in ("cache_interval", "schedule", "forecast")))
        return command(sampling=SamplingOptions(schedule=schedule, **sampling), **given)

    decorated: Callable[..., Any] = grouped(
        "sampling",
        click.option(
            "--steps",
            type=click.IntRange(min=1),
            default=50,
            help="Denoising steps.  [default: those of a schedule file in the bundle, or 50]",
            show_default=False,
        ),
        click.option(
            "--cache-interval",
            type=click.IntRange(min=1),
            help=f"A full step every N steps; 1: no caching.  [default: the bundle's schedule, or {DEFAULT_INTERVAL}]",
            show_default=False,
        ),
        click.option("--schedule", help=f"Schedule instead of --cache-interval: {SCHEDULE_FORMS}."),
        click.option(
            "--forecast",
            type=click.IntRange(0, HIGHEST_ORDER),
            help="Order in which reuse steps extrapolate: 1 linear, 2 quadratic, 3 cubic; 0 is FORA. Alone it also "
            f"places the full steps: dense:every={DEFAULT_INTERVAL}.  [default: 0]",
            show_default=False,
        ),
        GUIDANCE_SCALE,
        GUIDANCE_INTERVAL,
        SCHEDULER,
        TIMESTEP_SPACING,
        BATCH_SIZE,
        BACKEND,
        DEVICE,
        ENGINES,
        VAE,
    )(taking)
    return decorated
