"""State dicts of the PixArt authors, for PixArt-alpha (arXiv 2310.00426) and PixArt-Sigma (arXiv 2403.04692).

Depth, width, patch size, prompt length and the conditions on the image size follow from the tensors. The image size
follows from the position embeddings where the file has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from fora_trt.contract import Part
from fora_trt.errors import ModelError
from fora_trt.models.architectures import VAE_FACTOR, PipelineParts, StateDictFormat
from fora_trt.models.checkpoint import depth_of
from fora_trt.models.dit_checkpoint import POSITIONS, SHARED_MODULATION, as_diffusers
from fora_trt.models.options import SourceOptions
from fora_trt.models.spec import ModelSpec

ALPHA, SIGMA = "PixArtAlphaPipeline", "PixArtSigmaPipeline"
TEXT_LENGTH = {ALPHA: 120, SIGMA: 300}  # tokens that the models were trained with
KINDS = {"PixArt-alpha": ALPHA, "PixArt-Sigma": SIGMA}  # values of the option `architecture`
VAES = {ALPHA: "stabilityai/sd-vae-ft-ema", SIGMA: "PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers"}

HEAD_WIDTH = 72  # of the published models
TRAINED_WITHOUT_INTERPOLATION = 512  # pixels; positions of other image sizes are interpolated

NULL_PROMPT = "y_embedder.y_embedding"  # (tokens, channels); the diffusers pipelines encode an empty prompt instead
REQUIRED = (
    *("x_embedder.proj.weight", SHARED_MODULATION),
    *("blocks.0.cross_attn.q_linear.weight", "final_layer.linear.weight"),
)
"""Tensors that identify a state dict as one of the authors; all others are checked later by name and shape."""

DIMENSIONS = {"x_embedder.proj.weight": 4, "final_layer.linear.weight": 2, "y_embedder.y_proj.fc1.weight": 2}
SIZE_CONDITIONS = "csize_embedder.mlp.0.weight"  # PixArt-alpha for 1024 pixels has it

UNSUPPORTED = {
    ".attn.sr.": "compresses keys and values",
    ".attn.q_norm.": "normalizes queries and keys",
}
"""Parts of tensor names of variants that diffusers does not have."""

NAMES = {  # the authors' name -> the diffusers name, without .weight or .bias; {} is the block number
    "x_embedder.proj": "pos_embed.proj",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
    "csize_embedder.mlp.0": "adaln_single.emb.resolution_embedder.linear_1",
    "csize_embedder.mlp.2": "adaln_single.emb.resolution_embedder.linear_2",
    "ar_embedder.mlp.0": "adaln_single.emb.aspect_ratio_embedder.linear_1",
    "ar_embedder.mlp.2": "adaln_single.emb.aspect_ratio_embedder.linear_2",
    "t_block.1": "adaln_single.linear",
    "blocks.{}.attn.proj": "transformer_blocks.{}.attn1.to_out.0",
    "blocks.{}.cross_attn.q_linear": "transformer_blocks.{}.attn2.to_q",
    "blocks.{}.cross_attn.proj": "transformer_blocks.{}.attn2.to_out.0",
    "blocks.{}.mlp.fc1": "transformer_blocks.{}.ff.net.0.proj",
    "blocks.{}.mlp.fc2": "transformer_blocks.{}.ff.net.2",
    "final_layer.linear": "proj_out",
    "blocks.{}.scale_shift_table": "transformer_blocks.{}.scale_shift_table",
    "final_layer.scale_shift_table": "scale_shift_table",
}
JOINT = {
    "blocks.{}.attn.qkv": ("transformer_blocks.{}.attn1.to_", "qkv"),
    "blocks.{}.cross_attn.kv_linear": ("transformer_blocks.{}.attn2.to_", "kv"),
}
"""Joint projections, as in `dit_checkpoint`."""


def recognises(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the tensors have the authors' names."""
    return all(name in tensors for name in REQUIRED)


def kind_of(options: SourceOptions) -> str | None:
    """The pipeline class that the option `architecture` names; None without it. Raises `ModelError`."""
    if options.architecture is None or options.architecture.lower() == "pixart":
        return None
    for name, pipeline in KINDS.items():
        if name.lower() == options.architecture.lower():
            return pipeline
    raise ModelError(f"the architecture is {options.architecture!r}; choose {' or '.join(KINDS)}")


def parts_of(tensors: Mapping[str, Tensor], options: SourceOptions) -> PipelineParts:
    """The pipeline class, by the option `architecture` or by the number of tokens of the null prompt."""
    tokens = tensors[NULL_PROMPT].shape[0] if NULL_PROMPT in tensors else None
    by_length = {length: pipeline for pipeline, length in TEXT_LENGTH.items()}
    pipeline = kind_of(options) or by_length.get(tokens or 0) or (ALPHA if SIZE_CONDITIONS in tensors else None)
    return PipelineParts(pipeline, vae=Part(VAES[pipeline or ALPHA]))


def config_from_checkpoint(tensors: Mapping[str, Tensor], options: SourceOptions, what: str) -> dict[str, Any]:
    """The diffusers configuration that fits the shapes. Raises `ModelError` for shapes of another network."""
    for part, kind in UNSUPPORTED.items():
        if any(part in name for name in tensors):
            raise ModelError(
                f"{what} is a PixArt that {kind}, which diffusers cannot; export the module itself with "
                "'package.module:factory'"
            )
    for key, dimensions in DIMENSIONS.items():
        shape = list(tensors[key].shape) if key in tensors else None
        if shape is None or len(shape) != dimensions or 0 in shape:
            raise ModelError(
                f"{what} has the tensor names of a PixArt but not its shapes: {key} is {shape}; {dimensions} nonzero "
                "dimensions are needed"
            )
    patches, output = tensors["x_embedder.proj.weight"], tensors["final_layer.linear.weight"]
    width, channels, patch = patches.shape[:3]
    heads = options.num_heads or (width // HEAD_WIDTH if width % HEAD_WIDTH == 0 else None)
    if heads is None or width % heads:
        raise ModelError(
            f"{what} has a width of {width}, for which {heads or 'the number of'} attention heads do not fit; give "
            f"--num-heads, a divisor of {width}"
        )
    side = _image_size(tensors, options, patch)
    return {
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "in_channels": channels,
        "out_channels": output.shape[0] // patch**2,
        "num_layers": depth_of(tensors),
        "cross_attention_dim": width,
        "caption_channels": tensors["y_embedder.y_proj.fc1.weight"].shape[1],
        "sample_size": side // VAE_FACTOR,
        "patch_size": patch,
        "interpolation_scale": side / TRAINED_WITHOUT_INTERPOLATION,
        "use_additional_conditions": SIZE_CONDITIONS in tensors,
    }


def _image_size(tensors: Mapping[str, Tensor], options: SourceOptions, patch: int) -> int:
    """The side of the training images in pixels. Raises `ModelError` if nothing tells it."""
    if POSITIONS in tensors and tensors[POSITIONS].dim() == 3:
        return int(tensors[POSITIONS].shape[1] ** 0.5) * patch * VAE_FACTOR
    if SIZE_CONDITIONS in tensors:
        return 1024
    if options.image_size is None:
        raise ModelError(
            f"{options.source!r} has no position embeddings, so its image size is unknown; give --image-size, such as "
            "512 or 1024"
        )
    return max(options.image_size)


def set_up(module: nn.Module, tensors: Mapping[str, Tensor], spec: ModelSpec, what: str) -> None:
    """Use the position embeddings of the file; for another image size, diffusers computes them."""
    table: Any = module.pos_embed
    positions = tensors.get(POSITIONS)
    if positions is not None and positions.shape == table.pos_embed.shape:
        table.pos_embed = positions.float().clone()


PIXART = StateDictFormat(
    name="PixArt",
    kinds=tuple(KINDS),
    recognises=recognises,
    config=config_from_checkpoint,
    renamed=partial(as_diffusers, names=NAMES, joint=JOINT, unused=(POSITIONS, NULL_PROMPT)),
    set_up=set_up,
    parts=parts_of,
    takes=("image_size", "architecture", "num_heads", "text_length"),
)
