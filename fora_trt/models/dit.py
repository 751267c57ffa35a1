"""The DiT family (arXiv 2212.09748) as diffusers' `DiTTransformer2DModel`: sites, inputs, guidance, published sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fora_trt.errors import ModelError
from fora_trt.models.spec import (
    BATCH,
    CLASS_LABELS,
    LATENTS,
    NOISE_PREDICTION,
    TIMESTEP,
    GuidanceSpec,
    InputSpec,
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
VAE = "stabilityai/sd-vae-ft-ema"  # that autoencoder, where a checkpoint does not bring one

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


def published_names() -> list[str]:
    """The sizes that `config_from_name` knows."""
    return [f"{size}/{patch}" for size in SIZES for patch in PATCH_SIZES]


def share_embedders(module: nn.Module, tensors: Mapping[str, Tensor] | None) -> None:
    """Let all blocks use one timestep and class embedder, of which the diffusers layout stores a copy per block.

    Only copies that equal the first bit for bit in `tensors` are shared, so nothing changes numerically; all where
    there are no tensors to compare.
    """
    blocks: Any = module.transformer_blocks
    first = blocks[0].norm1.emb
    for i, block in enumerate(blocks):
        names = [(f"transformer_blocks.{k}.norm1.emb.{name}" for k in (0, i)) for name in first.state_dict()]
        if tensors is None or all(_equal(tensors, *pair) for pair in names):
            block.norm1.emb = first


def _equal(tensors: Mapping[str, Tensor], one: str, other: str) -> bool:
    return one in tensors and other in tensors and torch.equal(tensors[one], tensors[other])


def call(module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """The network's prediction (B, out_channels, H, W) for the inputs that the spec names."""
    prediction: Tensor = module(
        hidden_states=inputs[LATENTS],
        timestep=inputs[TIMESTEP],
        class_labels=inputs[CLASS_LABELS],
        return_dict=False,
    )[0]
    return prediction


def spec_from_config(config: Mapping[str, Any], *, sample_size: int, scale: float, pixels: bool) -> ModelSpec:
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
    size = (sample_size, sample_size)
    return ModelSpec(
        architecture=ARCHITECTURE,
        inputs=(
            TensorSpec(LATENTS, "float32", (BATCH, channels, *size)),
            TensorSpec(TIMESTEP, "float32", (BATCH,)),
            TensorSpec(CLASS_LABELS, "int64", (BATCH,)),
        ),
        output=TensorSpec(NOISE_PREDICTION, "float32", (BATCH, outputs, *size)),
        call=call,
        cache_sites={"attention": ("transformer_blocks.*.attn1",), "feed-forward": ("transformer_blocks.*.ff",)},
        latents=LatentSpec((channels, *size), scale=scale, pixels=pixels, learned_sigma=outputs == 2 * channels),
        conditioning={CLASS_LABELS: InputSpec(values=(0, classes + 1))},
        guidance=GuidanceSpec(num_classes=classes, null_class=classes),
        fp32_in_bf16=("transformer_blocks.*.norm1.emb.timestep_embedder",),
    )
