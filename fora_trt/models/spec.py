"""What the later stages need to know of a network: tensors at its edges, cache sites, latents, guidance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

BATCH = "batch"
"""Name of the one symbolic dimension: the first of every graph input and output."""

LATENTS, TIMESTEP, CLASS_LABELS, NOISE_PREDICTION = "latents", "timestep", "class_labels", "noise_prediction"
"""Names of the tensors at the edges of both graphs."""

FULL, REUSE = "full", "reuse"
"""Names of the two graphs, of their engines and of their files."""

FEATURE = "feature."
"""A feature is named by this and the module path of its site, in both graphs."""

PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""Precision of a graph -> dtype of its floating-point tensors."""


@dataclass(frozen=True)
class TensorSpec:
    """A named tensor of a graph; dtype as torch spells it, a shape that begins with the symbolic batch."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def sized(self, batch: int) -> tuple[int, ...]:
        """The shape for a given batch size."""
        return tuple(batch if size == BATCH else int(size) for size in self.shape)


@dataclass(frozen=True)
class CacheSite:
    """A module whose output is cached, and the feature that it puts out before its gate is applied."""

    module: str
    kind: str
    feature: TensorSpec


@dataclass(frozen=True)
class LatentSpec:
    """The space that the network denoises in. `scale` divides latents before a VAE decodes them; pixels have no VAE."""

    channels: int
    height: int
    width: int
    scale: float
    pixels: bool
    learned_sigma: bool


@dataclass(frozen=True)
class GuidanceSpec:
    """Classifier-free guidance by a learned null class, one past the last class."""

    num_classes: int
    null_class: int


@dataclass(frozen=True)
class ModelSpec:
    """An architecture as the exporter sees it.

    `call` runs the module on tensors by input name and returns its prediction. `cache_sites` maps the kind of a site
    to patterns over module paths, in which `*` stands for one path component.
    """

    architecture: str
    inputs: tuple[TensorSpec, ...]
    output: TensorSpec
    call: Callable[[torch.nn.Module, Mapping[str, torch.Tensor]], torch.Tensor]
    cache_sites: Mapping[str, tuple[str, ...]]
    latents: LatentSpec
    guidance: GuidanceSpec


@dataclass
class Model:
    """A module ready to be split: in evaluation mode, on the CPU, cast to its precision."""

    source: str
    name: str
    module: torch.nn.Module
    spec: ModelSpec
    config: dict[str, Any]
    precision: str
    scheduler: dict[str, Any]
    vae: str | None = None
    image_size: int | None = None
    labels: dict[int, str] = field(default_factory=dict)
