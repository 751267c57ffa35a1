"""The exporter's view of a network: `ModelSpec` describes an architecture, `Model` is a module ready to be split."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fora_trt.call import PipelineSpec
from fora_trt.contract import GuidanceSpec, InputSpec, LatentSpec, Part, TensorSpec, TextSpec
from fora_trt.models.options import SourceOptions
from fora_trt.models.precision import HalfPrecision

if TYPE_CHECKING:
    import torch

DEFAULT_SCHEDULER: Mapping[str, Any] = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "clip_sample": False,
}
"""DDIM with the linear beta schedule of DDPM (arXiv 2006.11239), for a model without a scheduler configuration."""

CLASS_GUIDANCE_SCALE, TEXT_GUIDANCE_SCALE = 1.5, 4.5
"""Default scales of classifier-free guidance: for classes from the DiT paper, for text from diffusers' PixArt."""


def call_by_position(module: torch.nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Call a module with its inputs by position and return the prediction, the first of its outputs."""
    output: Any = module(*inputs.values())
    if hasattr(output, "sample"):  # the output classes of diffusers
        output = output.sample
    prediction: torch.Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return prediction


@dataclass(frozen=True)
class ModelSpec:
    """The exporter's description of an architecture. For a custom network, only `inputs` is required.

    - `inputs`: the inputs in the order in which `call` passes them, with `latents` (B, ...) and `timestep` (B,).
    - `call`: runs the module on tensors by input name and returns the prediction; default: call by position.
    - `cache_sites`: patterns over module paths for each kind of site; `*` matches one path component.
    - `conditioning`: valid values of the other inputs.
    - `fp32_in_bf16`: patterns of modules that stay in fp32 in a bf16 bundle. The 8 significant bits of bf16 are too few
      for a timestep embedder. In fp16, 11 bits suffice, and old GPUs have no fast fp32 matrix products.
    - `scheduler`: a diffusers configuration; default: `DEFAULT_SCHEDULER`.
    - `pipeline`, `constants`: of the transformer of a diffusers pipeline that was watched: how the pipeline calls it,
      and the tensors that are the same in every call.
    - `guidance_scale`: the scale of classifier-free guidance if the user gives none; default: that of the architecture,
      or for a custom network 1.5 with classes and 4.5 with text.
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
    guidance_scale: float | None = None
    pipeline: PipelineSpec | None = None
    constants: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass
class Model:
    """A module ready to be split: in evaluation mode, on the CPU, with cache sites cast to the precision.

    `sites` lists module path and kind of every cache site, in the order of the module tree. `image_size` is height and
    width in pixels; None if it is unknown how latents relate to images. `notes` are sentences for the user about what
    was chosen or guessed.
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
    vae: Part | None = None
    image_size: tuple[int, int] | None = None
    notes: tuple[str, ...] = ()

    def in_fp32(self) -> AbstractContextManager[None]:
        """Within the block the module computes in fp32, with the weights of its precision."""
        return nullcontext() if self.half is None else self.half.off()

    @property
    def latents(self) -> LatentSpec:
        """The spec of the latents, which is always set in a loaded model."""
        assert self.spec.latents is not None
        return self.spec.latents

    @property
    def guidance_scale(self) -> float:
        """The default scale of classifier-free guidance; 1 means no guidance."""
        return 1.0 if self.spec.guidance_scale is None else self.spec.guidance_scale

    @property
    def output(self) -> TensorSpec:
        """The spec of the prediction, which is always set in a loaded model."""
        assert self.spec.output is not None
        return self.spec.output
