"""The registry of architectures: one entry holds everything that loading, exporting and running need to know.

To add an architecture, write one file in this folder that ends with `ARCHITECTURES.register(Architecture(...))`. A
package outside fora-trt makes the same call in the module that its entry point in the group `fora_trt.plugins` names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor, nn

from fora_trt.contract import Part
from fora_trt.errors import ModelError, first_line
from fora_trt.models.options import SourceOptions
from fora_trt.models.spec import ModelSpec
from fora_trt.models.text import MASKED_PROMPTS, PromptEncoding
from fora_trt.quiet import quiet
from fora_trt.registry import Registry

Config: TypeAlias = Mapping[str, Any]
"""The configuration of a transformer, as its `config.json` holds it."""

VAE_FACTOR = 8
"""Image pixels per latent pixel along a side, for a source without a VAE configuration."""

SIZES = ("num_layers", "num_attention_heads", "attention_head_dim", "in_channels", "sample_size", "patch_size")
"""Keys of a diffusers configuration that hold sizes; diffusers has a default for a missing key."""


@dataclass(frozen=True)
class PipelineParts:
    """The parts of a source besides the transformer; None for a missing part.

    `pipeline` is the class name of the diffusers pipeline, `autoencoder` the configuration of the VAE. `encoder` holds
    the text encoder and its tokenizer.
    """

    pipeline: str | None = None
    vae: Part | None = None
    autoencoder: Config | None = None
    encoder: Part | None = None

    @property
    def vae_factor(self) -> int:
        """Image pixels per latent pixel along a side."""
        return 2 ** (len(self.autoencoder["block_out_channels"]) - 1) if self.autoencoder else VAE_FACTOR


def factors_of(autoencoder: Config | None, scale: float = 1.0) -> tuple[float, float]:
    """Scale and shift of the latents of a VAE; `scale` is that of a configuration without one."""
    found = autoencoder or {}
    return found.get("scaling_factor") or scale, found.get("shift_factor") or 0.0


@dataclass(frozen=True)
class Published:
    """A published model size, which the source `random:NAME` creates with random weights.

    `config` returns the configuration for the image size in the options; `pipeline` is the class name of the pipeline.
    """

    config: Callable[[SourceOptions], dict[str, Any]]
    pipeline: str | None = None


def _unchanged(spec: ModelSpec, options: SourceOptions) -> ModelSpec:
    return spec


def _no_guesses(*_: object) -> list[str]:
    return []


def _no_parts(tensors: Mapping[str, Tensor], options: SourceOptions) -> PipelineParts:
    return PipelineParts()


def _no_set_up(module: nn.Module, tensors: Mapping[str, Tensor], spec: ModelSpec, what: str) -> None:
    """Nothing to set up."""


@dataclass(frozen=True)
class StateDictFormat:
    """A format in which the authors of a model publish the weights alone, as a .pt or .safetensors file.

    - `name`: the authors' model in messages, and the value of the option `architecture`, which selects one of several
      formats with the same tensors.
    - `kinds`: further values of the option `architecture`, for models that the tensors do not tell apart.
    - `recognises`: whether tensors have this format.
    - `config`: the diffusers configuration that follows from the tensors, the options and the file name; its
      `sample_size` is that of the training.
    - `renamed`: the tensors under the names of the diffusers module.
    - `set_up`: sets attributes of the empty module that no configuration can express.
    - `parts`: the parts of the authors' pipeline; its VAE is used unless the option `vae` names one.
    - `adapted`: changes the spec if the authors use the network differently from diffusers.
    - `guesses`: sentences that name what the weights do not tell, the assumed value, and the option for it.
    - `takes`: the source options that have an effect.

    All functions except `recognises` raise `ModelError` for tensors that do not fit.
    """

    name: str
    recognises: Callable[[Mapping[str, Tensor]], bool]
    config: Callable[[Mapping[str, Tensor], SourceOptions, str], dict[str, Any]]
    renamed: Callable[[Mapping[str, Tensor], Config], Mapping[str, Tensor]]
    set_up: Callable[[nn.Module, Mapping[str, Tensor], ModelSpec, str], None] = _no_set_up
    adapted: Callable[[ModelSpec, SourceOptions], ModelSpec] = _unchanged
    parts: Callable[[Mapping[str, Tensor], SourceOptions], PipelineParts] = _no_parts
    kinds: tuple[str, ...] = ()
    guesses: Callable[[ModelSpec, SourceOptions], list[str]] = _no_guesses
    takes: tuple[str, ...] = ("architecture", "image_size")


def _any_configuration(config: Config) -> bool:
    return True


def of_class(norm_type: str, config: Config) -> bool:
    """Whether a configuration is of the class whose name it has, or the older `Transformer2DModel` with this norm.

    Published configurations of DiT and PixArt have the older name; the kind of norm tells them apart.
    """
    return config.get("_class_name") != "Transformer2DModel" or config.get("norm_type") == norm_type


def _nothing_to_prepare(module: nn.Module, tensors: Mapping[str, Tensor] | None) -> None:
    """Nothing to prepare."""


@dataclass(frozen=True)
class Architecture:
    """An entry of the registry of architectures.

    - `class_names`: values of `_class_name` in published configurations, the current class first, then older names.
    - `recognises`: whether a configuration is of this architecture, for older names that several architectures share.
    - `make`: creates the module of a configuration; called with parameters on the meta device. May raise anything.
    - `spec`: describes the module, given the configuration, the source options and the other parts of the source.
    - `guesses`: sentences that name what neither source nor options tell, the assumed value, and the option for it.
    - `ignores`: patterns of tensors that published files contain and the class does not have.
    - `takes`: the source options that have an effect.
    - `published`: published sizes by name.
    - `prepare`: changes a module before its weights are placed; the tensors are None if weights are drawn at random.
    - `state_dicts`: formats in which authors publish the weights alone.
    - `guidance_scale`: default scale of classifier-free guidance, unless the spec has one.
    - `prompts`: how prompts are encoded; None for an architecture without text.
    - `sizes`: keys of the configuration that must hold positive integers.
    - `example`: a hub id for messages.

    All functions except `make` raise `ModelError`.
    """

    name: str
    class_names: tuple[str, ...]
    make: Callable[[Config], nn.Module]
    spec: Callable[[Config, SourceOptions, PipelineParts], ModelSpec]
    recognises: Callable[[Config], bool] = _any_configuration
    guesses: Callable[[ModelSpec, SourceOptions, PipelineParts], list[str]] = _no_guesses
    ignores: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    published: Mapping[str, Published] = field(default_factory=dict)
    prepare: Callable[[nn.Module, Mapping[str, Tensor] | None], None] = _nothing_to_prepare
    state_dicts: tuple[StateDictFormat, ...] = ()
    guidance_scale: float = 1.0
    prompts: PromptEncoding | None = None
    sizes: tuple[str, ...] = SIZES
    example: str | None = None

    def described(self, config: Config, options: SourceOptions, parts: PipelineParts) -> ModelSpec:
        """The spec, completed by the default guidance scale and by the class name, which the manifest records.

        Raises `ModelError` for options that do not fit, and for a configuration without a required key.
        """
        try:
            spec = self.spec(config, options, parts)
        except KeyError as error:
            raise ModelError(f"not a valid {self.class_names[0]} configuration: the key {error} is missing") from error
        scale = self.guidance_scale if spec.guidance_scale is None else spec.guidance_scale
        return dataclasses.replace(spec, architecture=self.class_names[0], guidance_scale=scale)

    def empty_module(self, config: Config) -> nn.Module:
        """The module of a configuration, with parameters on the meta device and buffers on the CPU.

        Raises `ModelError` for an invalid configuration.
        """
        from accelerate import init_empty_weights

        wrong = f"not a valid {self.class_names[0]} configuration"
        for key in self.sizes:
            most = MOST_LAYERS if key == "num_layers" else MOST_CHANNELS
            if key in config and (type(config[key]) is not int or not 1 <= config[key] <= most):
                raise ModelError(f"{wrong}: {key} is {config[key]!r}; a positive integer is needed, at most {most}")
        try:
            with init_empty_weights(include_buffers=False), quiet("diffusers"):
                return self.make(config)
        except Exception as error:  # an invalid value can raise anything
            raise ModelError(f"{wrong}: {first_line(error)}") from error


MOST_LAYERS, MOST_CHANNELS = 1_000, 2**24
"""Largest numbers of layers, and of channels, classes or pixels, that a configuration may have."""

ARCHITECTURES: Registry[Architecture] = Registry("architecture", ModelError, __package__)


def architecture_of(config: Config) -> Architecture | None:
    """The architecture of a published configuration, found by its `_class_name`; None if it is not registered."""
    named = (entry for entry in ARCHITECTURES.values() if config.get("_class_name") in entry.class_names)
    return next((entry for entry in named if entry.recognises(config)), None)


def prompt_encoding(class_name: str) -> PromptEncoding:
    """The prompt encoding of the architecture with this class name, which manifests record.

    A custom network names a diffusers pipeline in its `TextSpec`, which must encode prompts like the PixArt pipelines.
    """
    named = (entry.prompts for entry in ARCHITECTURES.values() if entry.class_names[0] == class_name)
    return next(named, None) or MASKED_PROMPTS


def state_dict_formats() -> list[tuple[Architecture, StateDictFormat]]:
    """The state dict formats of all architectures."""
    return [(entry, form) for entry in ARCHITECTURES.values() for form in entry.state_dicts]


def published_sizes() -> dict[str, Architecture]:
    """The architecture of each published size, by the name that follows `random:` in a source."""
    return {name: entry for entry in ARCHITECTURES.values() for name in entry.published}


def known_sources() -> str:
    """The list of possible sources, for error messages."""
    example = next(entry.example for entry in ARCHITECTURES.values() if entry.example)
    authors = " or ".join(form.name for _, form in state_dict_formats())
    return (
        f"known sources: digits; the folder or hub id of a diffusers pipeline with a transformer, such as {example}; a "
        f"state dict of the {authors} authors (.pt, .safetensors); package.module:factory for a network of your own; "
        f"random:NAME with a published size such as {next(iter(published_sizes()))}; a recipe file such as "
        "export/digits.toml"
    )
