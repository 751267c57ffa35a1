"""The last step of loading a model, for every kind of source: find cache sites, place weights, add casts.

Each kind of source provides an `EmptyModel`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fora_trt.errors import ModelError
from fora_trt.models.architectures import Config, PipelineParts
from fora_trt.models.block_sites import paths_in_half
from fora_trt.models.checkpoint import depth_of, place_weights
from fora_trt.models.options import SourceOptions
from fora_trt.models.precision import HalfPrecision, dtypes_of_parameters
from fora_trt.models.sites import find_sites
from fora_trt.models.spec import DEFAULT_SCHEDULER, Model, ModelSpec

Fill: TypeAlias = Callable[[Mapping[str, torch.dtype]], None]
"""Fills a module with its weights, given the dtype of each parameter by name. Raises `ModelError`."""


@dataclass(frozen=True)
class EmptyModel:
    """A module without weights (or with weights that are not cast yet), and `fill`, which places and casts them.

    `scheduler` is the scheduler configuration of the source; None to use that of the spec. `parts` is None if it is
    unknown how latents relate to images. `notes` are sentences for the user about choices and guesses.
    """

    name: str
    module: nn.Module
    spec: ModelSpec
    fill: Fill
    config: Config = field(default_factory=dict)
    scheduler: Mapping[str, Any] | None = None
    parts: PipelineParts | None = None
    notes: tuple[str, ...] = ()


def half_and_kept(
    module: nn.Module, spec: ModelSpec, sites: Sequence[str], precision: str
) -> tuple[list[str], tuple[str, ...]]:
    """Paths of what computes in half precision, and patterns of the layers outside the sites that stay in fp32."""
    return paths_in_half(module, sites), spec.fp32_in_bf16 if precision == "bf16" else ()


def model_from_empty(empty: EmptyModel, options: SourceOptions, precision: str) -> Model:
    """Find the cache sites, place the weights in the dtypes that `precision` and the sites require, and add casts.

    Raises `ExportError` for cache sites that do not exist, `ModelError` for weights or a VAE that do not fit.
    """
    module, spec = empty.module, empty.spec
    _check_vae(spec, empty.parts)
    sites = find_sites(module, spec.cache_sites, options.cache, options.exclude or ())
    paths, kept = half_and_kept(module, spec, [path for path, _ in sites], precision)
    empty.fill(dtypes_of_parameters(module, precision, paths, kept))
    # that of a pipeline that was watched has the shift for the exported size
    scheduler = (spec.pipeline and spec.scheduler) or empty.scheduler or spec.scheduler or DEFAULT_SCHEDULER
    half = None if precision == "fp32" else HalfPrecision(module, precision, paths, kept)
    return Model(
        options=options,
        name=empty.name,
        module=module.eval().requires_grad_(False),
        spec=spec,
        sites=sites,
        config={key: value for key, value in sized(empty.config, spec).items() if not key.startswith("_")},
        precision=precision,
        half=half,
        scheduler=dict(scheduler),
        vae=empty.parts.vae if empty.parts else None,
        image_size=_image_size(spec, empty.parts),
        notes=empty.notes,
    )


def _check_vae(spec: ModelSpec, parts: PipelineParts | None) -> None:
    """Raise `ModelError` for a VAE whose latents have another number of channels than the network."""
    assert spec.latents is not None
    channels = ((parts and parts.autoencoder) or {}).get("latent_channels")
    if parts and parts.vae and channels is not None and channels != spec.latents.channels:
        raise ModelError(
            f"the VAE {parts.vae.where!r} has {channels} latent channels, the network {spec.latents.channels}; give "
            "--vae the VAE that the network was trained with"
        )


def sized(config: Config, spec: ModelSpec) -> dict[str, Any]:
    """The configuration with `sample_size` set to that of the spec's latents; pipelines read their image size from it.

    Latents that are not square leave `sample_size` unchanged.
    """
    assert spec.latents is not None
    size = spec.latents.shape[1:]
    square = len(size) == 2 and len(set(size)) == 1
    changed = {"sample_size": size[-1]} if square and "sample_size" in config else {}
    return {**config, **changed}


def _image_size(spec: ModelSpec, parts: PipelineParts | None) -> tuple[int, int] | None:
    """Height and width of the images in pixels; None if unknown."""
    assert spec.latents is not None
    size = spec.latents.shape[1:]
    factor = 1 if spec.latents.pixels else parts.vae_factor if parts else None
    return (size[0] * factor, size[1] * factor) if factor and len(size) == 2 else None


def placing(module: nn.Module, tensors: Mapping[str, Tensor], config: Config, source: str) -> Fill:
    """A `Fill` that places `tensors`, which have the names of the module's parameters, one at a time."""
    sizes = [key for key in ("num_layers", "num_attention_heads", "attention_head_dim") if key in config]
    listed = ", ".join(f"{key} {config[key]}" for key in sizes) or "no sizes"
    depth = depth_of(tensors)
    blocks = f" and the weights have {depth} blocks (num_layers)" if depth else ""
    fits = f"the configuration has {listed}{blocks}; use weights and configuration of one model"
    return lambda dtypes: place_weights(module, tensors, dtypes, repr(source), fits)
