"""PixArt-alpha (arXiv 2310.00426) and PixArt-Sigma (2403.04692) as diffusers' `PixArtTransformer2DModel`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn

from fora_trt.contract import (
    BATCH,
    LATENTS,
    NOISE_PREDICTION,
    PROMPT,
    PROMPT_MASK,
    TIMESTEP,
    InputSpec,
    LatentSpec,
    TensorSpec,
    TextSpec,
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
from fora_trt.models.options import SourceOptions
from fora_trt.models.pixart_checkpoint import ALPHA, KINDS, PIXART, SIGMA, TEXT_LENGTH, kind_of
from fora_trt.models.spec import TEXT_GUIDANCE_SCALE, ModelSpec
from fora_trt.models.text import MASKED_PROMPTS

VAE_SCALE = {ALPHA: 0.18215, SIGMA: 0.13025}  # scaling factors of the VAEs in their repositories
IMAGE_SIZE, PATCH = 512, 2  # default image size and patch size of the published models
RESOLUTION, ASPECT_RATIO = "resolution", "aspect_ratio"

PUBLISHED = {"PixArt-XL/2": ALPHA, "PixArt-Sigma-XL/2": SIGMA}

SCHEDULER = {
    "_class_name": "DPMSolverMultistepScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
}


def config_from_name(name: str, options: SourceOptions) -> dict[str, Any]:
    """The configuration of a published model. Raises `ModelError` for an image size not divisible into patches."""
    side = IMAGE_SIZE // VAE_FACTOR
    sample_size = max(options.latent_size((side, side), VAE_FACTOR, PATCH))
    return {
        "num_attention_heads": 16,
        "attention_head_dim": 72,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 28,
        "cross_attention_dim": 1152,
        "caption_channels": 4096,
        "sample_size": sample_size,
        "patch_size": PATCH,
        "use_additional_conditions": PUBLISHED[name] == ALPHA and sample_size == 128,
    }


def call(module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """The network's prediction (B, out_channels, H, W) for the inputs that the spec names."""
    sizes = {name: inputs.get(name) for name in (RESOLUTION, ASPECT_RATIO)}
    prediction: Tensor = module(
        inputs[LATENTS],
        encoder_hidden_states=inputs[PROMPT],
        encoder_attention_mask=inputs[PROMPT_MASK],
        timestep=inputs[TIMESTEP],
        added_cond_kwargs=sizes,
        return_dict=False,
    )[0]
    return prediction


def spec_from_config(config: Config, options: SourceOptions, parts: PipelineParts) -> ModelSpec:
    """Describe a PixArt of this configuration; `_pipeline` says how an unknown pipeline is treated.

    Models for 1024 pixels also take the image's height and width in pixels and their ratio; the defaults are those of
    the exported size. Raises `ModelError` for an image size that is not divisible into patches.
    """
    pipeline = _pipeline(options, parts)
    text = TextSpec(options.text_length or TEXT_LENGTH[pipeline], pipeline, parts.encoder)
    own_size = (config["sample_size"], config["sample_size"])
    channels, patch = config["in_channels"], config.get("patch_size", 2)
    outputs = config.get("out_channels") or channels
    size = options.latent_size(own_size, parts.vae_factor, patch)
    if min(size) < 1 or any(side % patch for side in size):
        raise ModelError(
            f"latents of {size[0]} x {size[1]} are not divisible into patches of {patch}; "
            "give --image-size another value"
        )
    height, width = (float(side * parts.vae_factor) for side in size)
    additional = config.get("use_additional_conditions")
    if additional is None:
        additional = config.get("sample_size") == 128  # the default of diffusers
    sizes: dict[str, tuple[float, ...]] = {RESOLUTION: (height, width), ASPECT_RATIO: (height / width,)}
    if not additional:
        sizes = {}
    return ModelSpec(
        inputs=(
            TensorSpec(LATENTS, "float32", (BATCH, channels, *size)),
            TensorSpec(TIMESTEP, "float32", (BATCH,)),
            TensorSpec(PROMPT, "float32", (BATCH, text.length, config["caption_channels"])),
            TensorSpec(PROMPT_MASK, "int64", (BATCH, text.length)),
            *(TensorSpec(name, "float32", (BATCH, len(default))) for name, default in sizes.items()),
        ),
        output=TensorSpec(NOISE_PREDICTION, "float32", (BATCH, outputs, *size)),
        call=call,
        cache_sites={
            "attention": ("transformer_blocks.*.attn1",),
            "cross-attention": ("transformer_blocks.*.attn2",),
            "feed-forward": ("transformer_blocks.*.ff",),
        },
        latents=LatentSpec(
            (channels, *size),
            *factors_of(parts.autoencoder, VAE_SCALE[pipeline]),
            learned_sigma=outputs == 2 * channels,
        ),
        conditioning={PROMPT_MASK: InputSpec(values=(0, 2))}
        | {name: InputSpec(default=default) for name, default in sizes.items()},
        text=text,
        fp32_in_bf16=("adaln_single.emb",),
        scheduler=SCHEDULER,
    )


def _pipeline(options: SourceOptions, parts: PipelineParts) -> str:
    """The class of the pipeline: that of the option `architecture`, or of the source.

    If neither is known, a VAE with the scale of PixArt-Sigma's tells, else it is taken for PixArt-alpha.
    """
    if (named := kind_of(options)) is not None:
        return named
    if parts.pipeline in TEXT_LENGTH:
        return parts.pipeline
    return SIGMA if (parts.autoencoder or {}).get("scaling_factor") == VAE_SCALE[SIGMA] else ALPHA


def guesses(spec: ModelSpec, options: SourceOptions, parts: PipelineParts) -> list[str]:
    """What is assumed about a transformer without its pipeline or without a VAE."""
    assert spec.text is not None
    assert spec.latents is not None
    found, kind = [], next(name for name, pipeline in KINDS.items() if pipeline == spec.text.pipeline)
    if parts.pipeline not in TEXT_LENGTH and options.architecture is None:
        found.append(
            f"taken for a {kind} with prompts of {spec.text.length} tokens; --architecture says whether it is a "
            "PixArt-alpha or a PixArt-Sigma, --text-length how many tokens"
        )
    if parts.vae is None:
        scale = f"{spec.latents.scale:g}"
        found.append(f"latents are scaled by {scale}, as in {kind}; --vae FOLDER brings the scale of your VAE")
    return found


ARCHITECTURES.register(
    Architecture(
        name="PixArt",
        class_names=("PixArtTransformer2DModel", "Transformer2DModel"),
        recognises=partial(of_class, "ada_norm_single"),
        guesses=guesses,
        ignores=("caption_projection.y_embedding",),
        state_dicts=(PIXART,),
        make=lambda config: PixArtTransformer2DModel.from_config(dict(config)),
        spec=spec_from_config,
        takes=("image_size", "text_length", "architecture"),
        published={name: Published(partial(config_from_name, name), pipeline) for name, pipeline in PUBLISHED.items()},
        guidance_scale=TEXT_GUIDANCE_SCALE,
        prompts=MASKED_PROMPTS,
    )
)
