"""Names and types that export, engines and denoiser share: graph names, tensor names, roles, cache sites, latents.

This module depends on no model, engine or file format.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

BATCH = "batch"
"""Name of the symbolic batch dimension of every graph input and output."""

LATENTS, TIMESTEP, CLASS_LABELS, NOISE_PREDICTION = "latents", "timestep", "class_labels", "noise_prediction"
"""Names of graph inputs and outputs; class-conditional models have the labels."""

PROMPT, PROMPT_MASK = "encoder_hidden_states", "encoder_attention_mask"
"""Names of the text inputs in diffusers: prompt embeddings (B, L, D), and a mask (B, L) with 1 for a token."""

FULL, REUSE, CONDITIONING, FULL_CONDITIONING = "full", "reuse", "conditioning", "full_conditioning"
"""Names of the graphs, of their engines and of their files. A bundle with `optimization` none has the first two. The
two conditioning graphs run once before the loop; only full steps read the outputs of the last one."""

CONDITIONING_GRAPHS = (CONDITIONING, FULL_CONDITIONING)
"""The graphs that run before the loop; all others are graphs of a step."""

PARTIAL = "partial-"
"""Prefix of the name of a partial graph, before a digest of the cache sites that it computes."""


def partial_name(computed: Iterable[str]) -> str:
    """Name of the graph that computes the cache sites with these module paths and reads the features of all others."""
    paths = "\n".join(sorted(computed))
    return f"{PARTIAL}{hashlib.sha256(paths.encode()).hexdigest()[:10]}"


FEATURE = "feature."
"""Prefix of a feature's name, before the module path of its cache site; both graphs use the same name.

Code that needs to know what a tensor is for reads its role, not its name."""

HOISTED, FOLDED = "conditioning.", "folded."
"""Prefixes of the names of hoisted tensors (outputs of the conditioning graphs) and of folded sums."""

WINDOW = "window"
"""Name of the symbolic dimension before `batch` in tensors that hold one entry per reuse step of a window."""

Optimization = Literal["none", "conditioning", "fold"]
OPTIMIZATIONS: tuple[Optimization, ...] = get_args(Optimization)
"""Levels of optimization; each includes the one before. `conditioning` hoists the conditioning path out of the loop,
`fold` also moves the gated sum of the features from the reuse graph into the full graph."""


def of_window(name: str) -> str:
    """Name of the tensor (window, batch, ...) that stacks `name` over the reuse steps of a window."""
    return f"{WINDOW}.{name}"


DTYPES = {
    "float32": "FLOAT",
    "float16": "FLOAT16",
    "bfloat16": "BFLOAT16",
    "float64": "DOUBLE",
    "int64": "INT64",
    "int32": "INT32",
    "int16": "INT16",
    "int8": "INT8",
    "uint8": "UINT8",
    "bool": "BOOL",
}
"""The dtypes that graph inputs and outputs can have: name in torch -> name in ONNX."""

PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""Precision of a graph -> dtype of its weights, its cache sites' arithmetic and its features."""


Role = Literal["latents", "timestep", "noise", "conditioning", "hoisted", "feature", "sum", "function", "prediction"]
"""Role of a graph input or output. The model's inputs are latents, timestep, noise (normal, drawn anew at every step,
as the latent of a GAN) and conditioning (all others, which stay the same during a trajectory); its output is the
prediction. Between graphs pass hoisted tensors (outputs of the conditioning graphs), features (outputs of cache
sites), sums (folded sums of all gated features) and functions (folded values that are not linear in the features)."""

ROLES_OF_NAMES: dict[str, Role] = {LATENTS: "latents", TIMESTEP: "timestep", NOISE_PREDICTION: "prediction"}
"""Roles of the tensors that have the same name in every model."""


@dataclass(frozen=True)
class TensorSpec:
    """A graph input or output: name, dtype as torch spells it, shape with the symbolic batch dimension, role.

    For `latents`, `timestep` and `noise_prediction` the role follows from the name and may be left out.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    role: Role = "conditioning"

    def __post_init__(self) -> None:
        if self.role == "conditioning":
            object.__setattr__(self, "role", ROLES_OF_NAMES.get(self.name, self.role))

    @property
    def is_floating(self) -> bool:
        """Whether the values are floating-point numbers."""
        return "float" in self.dtype

    @property
    def is_integer(self) -> bool:
        """Whether the values are integers; bool is none."""
        return "int" in self.dtype

    @property
    def is_of_window(self) -> bool:
        """Whether the tensor has one entry per reuse step of a window: (window, batch, ...)."""
        return self.shape[:1] == (WINDOW,)

    @property
    def in_onnx(self) -> tuple[str, str, tuple[int | str, ...]]:
        """The part that an ONNX file records: name, dtype and shape."""
        return self.name, self.dtype, self.shape

    def sized(self, batch: int, window: int = 0) -> tuple[int, ...]:
        """The shape for a batch size and a number of reuse steps in the window."""
        symbols = {BATCH: batch, WINDOW: window}
        return tuple(symbols[size] if isinstance(size, str) else size for size in self.shape)


def in_window(tensor: TensorSpec) -> TensorSpec:
    """The tensor (window, batch, ...) that stacks `tensor` over the reuse steps of a window."""
    return replace(tensor, name=of_window(tensor.name), shape=(WINDOW, *tensor.shape))


def out_of_window(tensor: TensorSpec) -> TensorSpec:
    """The inverse of `in_window`: the tensor of one step."""
    return replace(tensor, name=tensor.name.removeprefix(of_window("")), shape=tensor.shape[1:])


@dataclass(frozen=True)
class CacheSite:
    """A module whose output is cached, and its features: the tensors that it outputs, before the gate is applied.

    Most modules output one tensor; a module that returns a tuple has one feature per tensor.
    """

    module: str
    kind: str
    features: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class LatentSpec:
    """The space in which the network denoises: the shape (C, H, W) of one sample, without the batch.

    A VAE decodes latents / `scale` + `shift`. With `pixels`, latents are the image itself and there is no VAE. With
    `learned_sigma`, the prediction has 2C channels.
    """

    shape: tuple[int, ...]
    scale: float = 1.0
    shift: float = 0.0
    pixels: bool = False
    learned_sigma: bool = False

    @property
    def channels(self) -> int:
        """Number of latent channels C."""
        return self.shape[0]


def has_fewer_channels(prediction: Sequence[int | str], latents: Sequence[int | str]) -> bool:
    """Whether a prediction has the shape of the latents except for fewer channels, whichever dimension they are.

    Then a part of the latents is no noise but a condition, such as an image to animate or a mask of what to paint.
    """
    if len(prediction) != len(latents):
        return False
    sizes = [(few, many) for few, many in zip(prediction, latents, strict=True) if few != many]
    return len(sizes) == 1 and all(isinstance(size, int) for size in sizes[0]) and int(sizes[0][0]) < int(sizes[0][1])


@dataclass(frozen=True)
class GuidanceSpec:
    """The classes, and the null class that classifier-free guidance needs; None means that guidance is unavailable.

    Guidance applies to the first `channels` channels of the prediction; None means all channels.
    """

    num_classes: int
    null_class: int | None
    channels: int | None = None


@dataclass(frozen=True)
class Part:
    """Where a part of a pipeline is: an absolute folder, or a hub id with its revision (commit).

    `sha256` covers what the part contained at export; None if it was not looked at.
    """

    where: str
    revision: str | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class TextSpec:
    """Text conditioning: the number of tokens that the graphs take, and the diffusers pipeline that encodes prompts.

    `encoder` holds the tokenizer and the text encoder; None if the source has neither.
    """

    length: int
    pipeline: str
    encoder: Part | None


@dataclass(frozen=True)
class InputSpec:
    """Valid values of a graph input other than latents.

    `values` holds the lower and upper bound; for integers the upper bound is exclusive. None means normal noise.
    `default` holds the values of one sample in row-major order, for an input that a caller may omit. For `timestep`
    the upper bound is that of the module: 1 if its time runs from 0 to 1; scheduler timesteps are scaled to it.
    """

    values: tuple[float, float] | None = None
    default: tuple[float, ...] | None = None
