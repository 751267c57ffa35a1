"""Options and arguments that several commands have, and the types of what is given to them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click


class Numbers(click.ParamType["tuple[int, ...]"]):
    """Whole numbers between separators; here any number of them, between commas."""

    name = "N,N,..."
    separator = ","
    counts: tuple[int, ...] = ()  # how many there may be; any number without one
    refusal = "is not a list of whole numbers such as 3,7,7"

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
        """What is wrong with numbers of the right count."""
        return None


class BatchProfile(Numbers):
    """Least, best and most of a batch, between colons."""

    name, separator, counts = "MIN:OPT:MAX", ":", (3,)
    refusal = "is not three whole numbers such as 1:2:16"

    def problem_of(self, numbers: tuple[int, ...]) -> str | None:
        least, best, most = numbers
        rises = 1 <= least <= best <= most
        return None if rises else "must rise from 1 on: the least batch, the one to tune for, the most"


class ImageSize(Numbers):
    """One whole number for a square, or height and width."""

    name, separator, counts = "N|HxW", "x", (1, 2)
    refusal = "is no image size such as 512, or 512x768 for height and width"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        sides = super().convert(value, param, ctx)
        return sides[0], sides[-1]

    def problem_of(self, numbers: tuple[int, ...]) -> str | None:
        return None if min(numbers) >= 1 else self.refusal


class StepRange(Numbers):
    """First step and the one after the last, between colons."""

    name, separator, counts = "FIRST:LAST", ":", (2,)
    refusal = "is not two whole numbers such as 5:30"

    def problem_of(self, numbers: tuple[int, ...]) -> str | None:
        first, last = numbers
        return None if 0 <= first < last else "must rise, from 0 for the first step"


class Words(click.ParamType[tuple[str, ...]]):
    """Words between commas."""

    name = "A,B,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        return value if isinstance(value, tuple) else tuple(part.strip() for part in str(value).split(",") if part)


PRECISION = click.Choice(["fp32", "fp16", "bf16"])
BUNDLE = click.argument("bundle", type=click.Path(path_type=Path))
BACKEND = click.option("--backend", default="auto", help="auto, or a name that 'fora-trt doctor' lists.")
DEVICE = click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N.")
ENGINES = click.option(
    "--engines",
    type=click.Path(path_type=Path),
    default="engines",
    help="Where TensorRT plans are and are built if missing; or one set of plans, used as it is.",
)
NEGATIVE_PROMPT = click.option("--negative-prompt", default="", help="What not to show.")
CONDITIONING = click.option(
    "--prompt-embeds",
    "--conditioning",
    "conditioning_file",
    type=click.Path(path_type=Path),
    help="Inputs of the model by name, .npz or .safetensors; names with negative_ are the unconditional half.",
)
GUIDANCE_SCALE = click.option(
    "--guidance-scale",
    type=click.FloatRange(min=0),
    help="Classifier-free guidance; up to 1: none.  [default: 1.5 for classes, 4.5 for prompts]",
    show_default=False,
)
SEED = click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), default=0, help="Of the first image; the k-th after it adds k."
)
BATCH_SIZE = click.option(
    "--batch-size", type=click.IntRange(min=1), default=64, help="Images that are denoised together."
)
SCHEDULER = click.option(
    "--scheduler",
    help="ddim, ddpm, dpm-solver++, ... or a diffusers class.  [default: the model's own]",
    show_default=False,
)
TIMESTEP_SPACING = click.option(
    "--timestep-spacing",
    type=click.Choice(["leading", "linspace", "trailing"]),
    help="Which timesteps the scheduler takes.  [default: the scheduler's own]",
    show_default=False,
)
GUIDANCE_INTERVAL = click.option(
    "--guidance-interval",
    type=StepRange(),
    help="Steps that are guided, from 0.  [default: all]",
    show_default=False,
)
VAE = click.option("--vae", help="Folder or hub id of the VAE.  [default: the model's own]", show_default=False)

AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")


def sampling_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """All that says how images are made, whatever they are to be."""
    options = (
        click.option("--steps", type=click.IntRange(min=1), default=50, help="Denoising steps."),
        click.option(
            "--cache-interval",
            type=click.IntRange(min=1),
            default=3,
            help="Full step every N steps; 1: no caching.",
        ),
        GUIDANCE_SCALE,
        GUIDANCE_INTERVAL,
        SCHEDULER,
        TIMESTEP_SPACING,
        SEED,
        BATCH_SIZE,
        BACKEND,
        DEVICE,
        ENGINES,
        VAE,
    )
    for option in reversed(options):  # as decorators in this order would
        command = option(command)
    return command
