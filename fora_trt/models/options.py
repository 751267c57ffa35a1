"""Options of a source, which recipes contain and manifests record to load the source again."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from itertools import pairwise

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, PositiveInt, field_validator

from fora_trt.contract import BATCH, DTYPES, LATENTS, TIMESTEP, InputSpec, TensorSpec
from fora_trt.errors import ModelError

MEANT_FOR = {
    "architecture": "state dicts in the format of a model's authors and PixArt transformers",
    "num_heads": "state dicts in the format of a model's authors",
    "image_size": "models of images",
    "text_length": "models that take a prompt",
    "inputs": "a network of your own (package.module:factory)",
    "weights": "checkpoints with several sets of weights",
    "frames": "pipelines that make videos",
    "call": "pipelines of diffusers that are watched",
    "component": "pipelines with several transformers",
    "null_class": "state dicts of models with classes",
}
"""The kind of source that each option is for; every source takes `vae`, `cache` and `exclude`."""


def problem_of_ranges(ranges: Sequence[tuple[float, float]]) -> str | None:
    """What is wrong with ranges of timesteps; None if each rises and none overlaps another."""
    for low, high in ranges:
        if not low < high:
            return f"the range of timesteps {low:g} to {high:g} does not rise"
    for (_, high), (low, _) in pairwise(sorted(ranges)):
        if low < high:
            return f"two ranges of timesteps overlap from {low:g} to {high:g}"
    return None


class InputOptions(BaseModel):
    """An input of a custom network: shape of one sample, dtype, and the exclusive upper bound `below` of integers.

    With `drawn`, it is normal noise that is drawn anew at every step.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    shape: tuple[PositiveInt, ...] = ()
    dtype: str = "float32"
    below: PositiveInt | None = None
    drawn: bool = False

    @field_validator("dtype")
    @classmethod
    def _known(cls, dtype: str) -> str:
        if dtype not in DTYPES:
            raise ValueError(f"{dtype!r} is not one of {', '.join(DTYPES)}")
        return dtype


class VariantOptions(BaseModel):
    """Another network for the timesteps from `timesteps[0]` up to, but without, `timesteps[1]`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    timesteps: tuple[FiniteFloat, FiniteFloat]
    cache: tuple[str, ...] | None = None
    exclude: tuple[str, ...] | None = None


class SourceOptions(BaseModel):
    """A source and its options; None means that the source determines the value.

    `image_size` is height and width in pixels. `inputs` are the inputs of a custom network in the order of its call.
    `weights` is `ema`, `raw`, or the name of a set of weights in a checkpoint. `null_class` says whether the last row
    of an embedding table of classes is the null class. `folder` is the folder from which a network is imported.
    `frames` is the number of frames of a video, `call` further arguments of a pipeline when it is watched, `component`
    the transformer of a pipeline with several. `cache` lists kinds of cache sites or patterns over module paths, all
    kinds of the architecture by default, and `exclude` those that are left out. `variants` are other networks for some
    timesteps, which take the same inputs.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    architecture: str | None = None
    image_size: tuple[int, int] | None = None
    num_heads: int | None = Field(None, ge=1)
    text_length: int | None = Field(None, ge=1)
    vae: str | None = None
    weights: str | None = None
    null_class: bool | None = None
    folder: str | None = None
    frames: int | None = Field(None, ge=1)
    call: dict[str, bool | int | float | str | None] | None = None
    component: str | None = None
    cache: tuple[str, ...] | None = None
    exclude: tuple[str, ...] | None = None
    inputs: dict[str, InputOptions] | None = None
    variants: tuple[VariantOptions, ...] = ()

    @field_validator("image_size", mode="before")
    @classmethod
    def _square(cls, size: object) -> object:
        return (size, size) if isinstance(size, int) else size

    @field_validator("inputs")
    @classmethod
    def _begins_as_all_do(cls, inputs: dict[str, InputOptions] | None) -> dict[str, InputOptions] | None:
        fixed = [name for name in (LATENTS, TIMESTEP) if inputs is not None and name in inputs and inputs[name].drawn]
        if fixed:
            raise ValueError(f"{fixed[0]!r} follows from the scheduler and is not drawn at every step")
        if inputs is not None and {LATENTS, TIMESTEP} - inputs.keys():
            raise ValueError(f"the inputs are {', '.join(inputs)}; {LATENTS!r} and {TIMESTEP!r} are needed")
        return inputs

    @field_validator("variants")
    @classmethod
    def _apart(cls, variants: tuple[VariantOptions, ...]) -> tuple[VariantOptions, ...]:
        if problem := problem_of_ranges([one.timesteps for one in variants]):
            raise ValueError(problem)
        return variants

    def of_variant(self, variant: VariantOptions) -> SourceOptions:
        """The options with which the network of a variant is loaded."""
        return self.model_copy(
            update={"source": variant.source, "cache": variant.cache, "exclude": variant.exclude, "variants": ()}
        )

    def words(self) -> Iterator[str]:
        """The options as words of the command `fora-trt export`; only a recipe has `inputs` and `variants`."""
        for name, value in self.model_dump(
            exclude={"source", "folder", "inputs", "variants"}, exclude_none=True
        ).items():
            option = name.replace("_", "-")
            if isinstance(value, bool):
                yield f"--{option}" if value else f"--no-{option}"
            elif isinstance(value, dict):
                for key, one in value.items():
                    yield from (f"--{option}", f"{key}={json.dumps(one)}")
            elif name in ("cache", "exclude"):
                for one in value:
                    yield from (f"--{option}", one)
            else:
                yield from (f"--{option}", "x".join(map(str, value)) if isinstance(value, tuple) else str(value))

    def tensors(self) -> tuple[TensorSpec, ...]:
        """The specs of `inputs`."""
        given = self.inputs or {}
        return tuple(
            TensorSpec(name, one.dtype, (BATCH, *one.shape), "noise" if one.drawn else "conditioning")
            for name, one in given.items()
        )

    def conditioning(self) -> dict[str, InputSpec]:
        """The valid values of the inputs that have an upper bound."""
        given = self.inputs or {}
        return {name: InputSpec(values=(0, one.below)) for name, one in given.items() if one.below is not None}

    def refuse_all_but(self, taken: Collection[str]) -> None:
        """Raise `ModelError` if an option is given that has no effect on this source; `taken` have an effect."""
        for name, kind in MEANT_FOR.items():
            if getattr(self, name) is not None and name not in taken:
                raise ModelError(f"{self.source!r} does not take {name}, which is for {kind}; leave it out")

    def latent_size(self, default: tuple[int, int], factor: int, patch: int) -> tuple[int, int]:
        """Height and width of the latents for `image_size`; without it `default`, the size of the model.

        Along a side, a latent pixel covers `factor` image pixels and a patch covers `patch` latent pixels. Raises
        `ModelError` for an image size that is not a multiple of their product.
        """
        if self.image_size is None:
            return default
        height, width = self.image_size
        if any(side < 1 or side % (factor * patch) for side in (height, width)):
            shown = str(height) if height == width else f"{height} x {width}"
            raise ModelError(
                f"an image size of {shown} does not fit {self.source!r}: give a multiple of {factor * patch}"
            )
        return height // factor, width // factor
