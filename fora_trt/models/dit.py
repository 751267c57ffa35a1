"""The DiT family (arXiv 2212.09748) as diffusers' `DiTTransformer2DModel`: sites, inputs, guidance, random weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

from fora_trt.errors import ModelError
from fora_trt.models.spec import (
    BATCH,
    CLASS_LABELS,
    LATENTS,
    NOISE_PREDICTION,
    PRECISIONS,
    TIMESTEP,
    GuidanceSpec,
    LatentSpec,
    ModelSpec,
    TensorSpec,
)

ARCHITECTURE = "DiTTransformer2DModel"

SIZES = {  # depth, width, heads: table 1 of the DiT paper
    "DiT-S": (12, 384, 6),
    "DiT-B": (12, 768, 12),
    "DiT-L": (24, 1024, 16),
    "DiT-XL": (28, 1152, 16),
}
PATCH_SIZES = (2, 4, 8)
NUM_CLASSES = 1000
VAE_FACTOR, VAE_SCALE = 8, 0.18215  # of the autoencoder that the DiT paper uses

SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "clip_sample": False,
}


def config_from_name(name: str, image_size: int) -> dict[str, Any]:
    """The configuration of a published size such as `DiT-XL/2` for square images of `image_size` pixels."""
    size, _, patch = name.partition("/")
    if size not in SIZES or patch not in map(str, PATCH_SIZES):
        known = ", ".join(f"{known}/{patch}" for known in SIZES for patch in PATCH_SIZES)
        raise ModelError(f"there is no model 'random:{name}'; known are {known}")
    depth, width, heads = SIZES[size]
    if image_size % (VAE_FACTOR * int(patch)):
        raise ModelError(
            f"an image size of {image_size} does not fit DiT/{patch}: give a multiple of {VAE_FACTOR * int(patch)}"
        )
    return {
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": depth,
        "sample_size": image_size // VAE_FACTOR,
        "patch_size": int(patch),
        "num_embeds_ada_norm": NUM_CLASSES,
    }


def random_module(config: dict[str, Any], dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """A DiT with seeded random weights of unit gain and gates that are not zero, for timing.

    Every tensor is drawn in `dtype` at once, so the weights are in memory only once.
    """
    with init_empty_weights(include_buffers=False):
        module: nn.Module = DiTTransformer2DModel(**config)
    share_embedders(module, compare=False)
    generator = torch.Generator().manual_seed(seed)
    drawn: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if id(parameter) not in drawn:
                fan_in = parameter[0].numel() if parameter.dim() > 1 else 0
                std = fan_in**-0.5 if fan_in else 0.02
                value = torch.empty(parameter.shape, dtype=dtype).normal_(std=std, generator=generator)
                drawn[id(parameter)] = nn.Parameter(value, requires_grad=False)
            setattr(owner, name, drawn[id(parameter)])
    return module.eval()


def share_embedders(module: nn.Module, compare: bool = True) -> None:
    """Let all blocks use one timestep and class embedder, of which the diffusers layout stores a copy per block.

    With `compare`, only copies that equal the first bit for bit are shared, so nothing changes numerically.
    """
    first, *others = (block.norm1 for block in module.transformer_blocks)  # type: ignore[union-attr]
    weights = first.emb.state_dict()
    for norm in others:
        copies = norm.emb.state_dict()
        if not compare or all(torch.equal(value, copies[name]) for name, value in weights.items()):
            norm.emb = first.emb


def call(module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """The network's prediction (B, out_channels, H, W) for the inputs that `spec` names."""
    prediction: Tensor = module(
        hidden_states=inputs[LATENTS],
        timestep=inputs[TIMESTEP],
        class_labels=inputs[CLASS_LABELS],
        return_dict=False,
    )[0]
    return prediction


def spec_from_config(
    config: Mapping[str, Any], precision: str, *, sample_size: int, scale: float, pixels: bool
) -> ModelSpec:
    """Describe a DiT of this configuration at `sample_size` latent pixels a side.

    The timestep is a float, so that schedulers with fractional timesteps are served too.
    """
    channels, classes = config["in_channels"], config["num_embeds_ada_norm"]
    outputs = config.get("out_channels") or channels
    if sample_size < 1 or sample_size % config["patch_size"]:
        raise ModelError(
            f"latents of {sample_size} x {sample_size} cannot be cut into patches of {config['patch_size']}; "
            "give --image-size another value"
        )
    size, dtype = (sample_size, sample_size), PRECISIONS[precision]
    return ModelSpec(
        architecture=ARCHITECTURE,
        inputs=(
            TensorSpec(LATENTS, dtype, (BATCH, channels, *size)),
            TensorSpec(TIMESTEP, "float32", (BATCH,)),
            TensorSpec(CLASS_LABELS, "int64", (BATCH,)),
        ),
        output=TensorSpec(NOISE_PREDICTION, dtype, (BATCH, outputs, *size)),
        call=call,
        cache_sites={"attention": ("transformer_blocks.*.attn1",), "feed-forward": ("transformer_blocks.*.ff",)},
        latents=LatentSpec(channels, *size, scale=scale, pixels=pixels, learned_sigma=outputs == 2 * channels),
        guidance=GuidanceSpec(num_classes=classes, null_class=classes),
    )
