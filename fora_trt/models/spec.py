"""What the later stages need to know of a network: tensors at its edges, cache sites, latents, guidance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    import torch

    from fora_trt.models.options import SourceOptions
    from fora_trt.models.precision import HalfPrecision

BATCH = "batch"
"""Name of the one symbolic dimension: the first of every graph input and output."""

LATENTS, TIMESTEP, CLASS_LABELS, NOISE_PREDICTION = "latents", "timestep", "class_labels", "noise_prediction"
"""Names of tensors at the edges of both graphs; labels are an input of class-conditional models."""

PROMPT, PROMPT_MASK = "encoder_hidden_states", "encoder_attention_mask"
"""Names of the text inputs, as diffusers calls them: embeddings (B, L, D), and (B, L) with 1 where a token is."""

FULL, REUSE, CONDITIONING, FULL_CONDITIONING = "full", "reuse", "conditioning", "full_conditioning"
"""Names of the graphs, of their engines and of their files. A bundle without optimization has the first two; the others
compute what timestep and class decide before the loop, the last of them what only full steps read."""

FEATURE = "feature."
"""A feature is named by this and the module path of its site, in both graphs."""

HOISTED, FOLDED = "conditioning.", "folded."
"""What the conditioning graph puts out for the others, and what the full graph puts out instead of features."""

WINDOW = "window"
"""Name of the symbolic dimension in front of `batch` in tensors that hold something for each reuse step of a window."""

Optimization = Literal["none", "conditioning", "fold"]
OPTIMIZATIONS: tuple[Optimization, ...] = get_args(Optimization)
"""What is taken out of the graphs of a step, each with what is before it: nothing; what depends on timestep and class
alone; the sum of the features."""


def of_window(name: str) -> str:
    """Name of the tensor that holds `name` for each reuse step of a window, (window, batch, ...)."""
    return f"{WINDOW}.{name}"


PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""Precision of a graph -> dtype of its weights, of what its cache sites compute, and of their features."""


@dataclass(frozen=True)
class TensorSpec:
    """A named tensor of a graph; dtype as torch spells it, a shape that begins with the symbolic batch."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def sized(self, batch: int, window: int = 0) -> tuple[int, ...]:
        """The shape for a batch size, and for so many reuse steps in a window."""
        symbols = {BATCH: batch, WINDOW: window}
        return tuple(symbols[size] if isinstance(size, str) else size for size in self.shape)


def in_window(tensor: TensorSpec) -> TensorSpec:
    """The tensor that holds another for each reuse step of a window."""
    return TensorSpec(of_window(tensor.name), tensor.dtype, (WINDOW, *tensor.shape))


def out_of_window(tensor: TensorSpec) -> TensorSpec:
    """What such a tensor holds for one step."""
    return TensorSpec(tensor.name.removeprefix(of_window("")), tensor.dtype, tensor.shape[1:])


@dataclass(frozen=True)
class CacheSite:
    """A module whose output is cached, and its features: what it puts out before its gate is applied.

    Nearly always that is one tensor; a module that returns a tuple has a feature for each tensor in it.
    """

    module: str
    kind: str
    features: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class LatentSpec:
    """The space that the network denoises in: the shape (C, H, W) of one sample, the batch left out.

    A VAE decodes latents / `scale` + `shift`; pixels have no VAE. With `learned_sigma` a prediction has 2C channels.
    """

    shape: tuple[int, ...]
    scale: float = 1.0
    shift: float = 0.0
    pixels: bool = False
    learned_sigma: bool = False

    @property
    def channels(self) -> int:
        """C."""
        return self.shape[0]


@dataclass(frozen=True)
class GuidanceSpec:
    """Classes, and classifier-free guidance by a learned null class; without one there is no guidance.

    Only the first `channels` of a prediction are guided, all of them without it.
    """

    num_classes: int
    null_class: int | None
    channels: int | None = None


@dataclass(frozen=True)
class TextSpec:
    """Conditioning on text: how many tokens the graphs take, and the diffusers pipeline that encodes a prompt.

    `encoder` is the folder or hub id with the tokenizer and the text encoder; None where there is none at hand.
    """

    length: int
    pipeline: str
    encoder: str | None


@dataclass(frozen=True)
class InputSpec:
    """What may be put in an input of the graphs other than latents.

    `values` bounds it, the upper bound excluded for whole numbers; None means normal noise. `default` holds the
    numbers of one sample, row by row, for an input that a caller may leave out. Of `timestep` the upper bound is the
    module's own: 1 for one whose time runs from 0 to 1, to which the timesteps of schedulers are then scaled.
    """

    values: tuple[float, float] | None = None
    default: tuple[float, ...] | None = None


def call_by_position(module: torch.nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Call a module with its inputs in order; of several outputs the first is the prediction."""
    output: Any = module(*inputs.values())
    if hasattr(output, "sample"):  # the output classes of diffusers
        output = output.sample
    prediction: torch.Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return prediction


@dataclass(frozen=True)
class ModelSpec:
    """An architecture as the exporter sees it. For a module of one's own `inputs` is all that must be given.

    `inputs` begins with `latents` (B, ...) and `timestep` (B,), in the order in which `call` passes them on. `call`
    runs the module on tensors by input name and returns its prediction; without one the module is called by position.
    `cache_sites` maps the kind of a site to patterns over module paths, in which `*` stands for one path component.
    `conditioning` says what may be put in the other inputs. `fp32_in_bf16` are patterns of modules that stay in fp32
    in a bf16 bundle, whose 8 bits are too few for a timestep embedder; fp16 has 11, and old GPUs no fp32 products.
    `scheduler` is a diffusers configuration; DDIM with a linear schedule without one.
    """

    inputs: tuple[TensorSpec, ...]
    call: Callable[[torch.nn.Module, Mapping[str, torch.Tensor]], torch.Tensor] = call_by_position
    architecture: str = ""
    cache_sites: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    output: TensorSpec | None = None
    latents: LatentSpec | None = None
    conditioning: Mapping[str, InputSpec] = field(default_factory=dict)
    guidance: GuidanceSpec | None = None
    text: TextSpec | None = None
    fp32_in_bf16: tuple[str, ...] = ()
    scheduler: Mapping[str, Any] | None = None


@dataclass
class Model:
    """A module ready to be split: in evaluation mode, on the CPU, cast to its precision for its cache sites.

    `sites` lists module path and kind of every cache site, in the order of the module tree. `image_size` is height and
    width in pixels; None where nobody knows what the latents stand for.
    """

    options: SourceOptions
    name: str
    module: torch.nn.Module
    spec: ModelSpec
    sites: list[tuple[str, str]]
    config: dict[str, Any]
    precision: str
    half: HalfPrecision | None
    scheduler: dict[str, Any]
    vae: str | None = None
    image_size: tuple[int, int] | None = None

    @property
    def latents(self) -> LatentSpec:
        """The latents; what loads a model fills them in."""
        assert self.spec.latents is not None
        return self.spec.latents

    @property
    def output(self) -> TensorSpec:
        """The prediction; what loads a model fills it in."""
        assert self.spec.output is not None
        return self.spec.output
