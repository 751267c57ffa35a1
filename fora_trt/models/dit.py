"""The DiT family (arXiv 2212.09748) as diffusers' `DiTTransformer2DModel`: sites, inputs, guidance, published sizes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

from fora_trt.contract import (
    BATCH,
    CLASS_LABELS,
    LATENTS,
    NOISE_PREDICTION,
    TIMESTEP,
    GuidanceSpec,
    InputSpec,
    LatentSpec,
    TensorSpec,
)
from fora_trt.errors import ModelError
from fora_trt.models.architectures import (
    ARCHITECTURES,
    VAE_FACTOR,
    Architecture,
    Config,
    PipelineParts,
    Published,
    factors_of,
    of_class,
)
from fora_trt.models.dit_checkpoint import DIT, SIT, SIZES
from fora_trt.models.options import SourceOptions
from fora_trt.models.spec import CLASS_GUIDANCE_SCALE, ModelSpec

PATCH_SIZES = (2, 4, 8)
NUM_CLASSES = 1000
IMAGE_SIZE = 256  # default image size of the published sizes
VAE_SCALE = 0.18215  # of the autoencoder that the DiT paper uses


def config_from_name(name: str, options: SourceOptions) -> dict[str, Any]:
    """The configuration of a published size such as `DiT-XL/2`.

    Raises `ModelError` for an image size that is not square or not divisible into patches.
    """
    size, _, patch = name.partition("/")
    depth, width, heads = SIZES[size]
    image_size = _square(options, *(options.image_size or (IMAGE_SIZE, IMAGE_SIZE)))
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


def _square(options: SourceOptions, height: int, width: int) -> int:
    """The side of a square image. Raises `ModelError` if it is not square."""
    if height != width:
        raise ModelError(f"{options.source!r} is a DiT, whose images are square; give --image-size one number")
    return height


def share_embedders(module: nn.Module, tensors: Mapping[str, Tensor] | None) -> None:
    """Let all blocks share one timestep and class embedder; the diffusers layout stores a copy per block.

    Only copies that are bitwise equal to the first one in `tensors` are shared, so the results do not change. If
    `tensors` is None, all are shared.
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


def spec_from_config(config: Config, options: SourceOptions, parts: PipelineParts) -> ModelSpec:
    """Describe a DiT of this configuration; latents with one or three channels and no VAE are pixels.

    The timestep is a float to support schedulers with fractional timesteps. Raises `ModelError` for an image size that
    is not square or not divisible into patches.
    """
    channels, classes = config["in_channels"], config["num_embeds_ada_norm"]
    outputs = config.get("out_channels") or channels
    pixels = parts.vae is None and channels in (1, 3)
    factor, own_size = 1 if pixels else parts.vae_factor, (config["sample_size"], config["sample_size"])
    scale, shift = (1.0, 0.0) if pixels else factors_of(parts.autoencoder, VAE_SCALE)
    sample_size = _square(options, *options.latent_size(own_size, factor, config["patch_size"]))
    if sample_size < 1 or sample_size % config["patch_size"]:
        raise ModelError(
            f"latents of {sample_size} x {sample_size} are not divisible into patches of {config['patch_size']}; "
            "give --image-size another value"
        )
    size = (sample_size, sample_size)
    return ModelSpec(
        inputs=(
            TensorSpec(LATENTS, "float32", (BATCH, channels, *size)),
            TensorSpec(TIMESTEP, "float32", (BATCH,)),
            TensorSpec(CLASS_LABELS, "int64", (BATCH,)),
        ),
        output=TensorSpec(NOISE_PREDICTION, "float32", (BATCH, outputs, *size)),
        call=call,
        cache_sites={"attention": ("transformer_blocks.*.attn1",), "feed-forward": ("transformer_blocks.*.ff",)},
        latents=LatentSpec((channels, *size), scale, shift, pixels, learned_sigma=outputs == 2 * channels),
        conditioning={CLASS_LABELS: InputSpec(values=(0, classes + 1))},
        guidance=GuidanceSpec(num_classes=classes, null_class=classes),
        fp32_in_bf16=("transformer_blocks.*.norm1.emb.timestep_embedder",),
    )


def guesses(spec: ModelSpec, options: SourceOptions, parts: PipelineParts) -> list[str]:
    """What is assumed about the latents of a transformer without a VAE."""
    assert spec.latents is not None
    if parts.vae is not None or spec.latents.pixels:
        return []
    scale = f"{spec.latents.scale:g}"
    return [f"no VAE is known: latents are scaled by {scale}, as in the DiT paper; --vae FOLDER brings its own scale"]


ARCHITECTURES.register(
    Architecture(
        name="DiT",
        class_names=("DiTTransformer2DModel", "Transformer2DModel"),
        recognises=partial(of_class, "ada_norm_zero"),
        guesses=guesses,
        make=lambda config: DiTTransformer2DModel.from_config(dict(config)),
        spec=spec_from_config,
        takes=("image_size",),
        published={
            name: Published(partial(config_from_name, name))
            for name in (f"{size}/{patch}" for size in SIZES for patch in PATCH_SIZES)
        },
        prepare=share_embedders,
        state_dicts=(DIT, SIT),
        guidance_scale=CLASS_GUIDANCE_SCALE,
        example="facebook/DiT-XL-2-256",
    )
)
