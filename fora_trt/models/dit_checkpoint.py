"""State dicts of the DiT authors and of the SiT authors (arXiv 2401.08740), whose network is the same.

The files contain only weights. Depth, width, patch size, classes and image size follow from the shapes. The number of
heads does not; for the published models it follows from the width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fora_trt.contract import CLASS_LABELS, TIMESTEP, InputSpec, Part
from fora_trt.errors import ModelError
from fora_trt.models.architectures import VAE_FACTOR, Config, PipelineParts, StateDictFormat
from fora_trt.models.checkpoint import Tensors, depth_of
from fora_trt.models.options import SourceOptions
from fora_trt.models.spec import ModelSpec

SIZES = {  # depth, width, heads: table 1 of the DiT paper
    "DiT-S": (12, 384, 6),
    "DiT-B": (12, 768, 12),
    "DiT-L": (24, 1024, 16),
    "DiT-XL": (28, 1152, 16),
}
HEADS = {width: heads for _, width, heads in SIZES.values()}
VAE = "stabilityai/sd-vae-ft-ema"  # the VAE that the authors use

POSITIONS = "pos_embed"
NORM_EPSILON = 1e-6  # of the authors' LayerNorms

NAMES = {  # the authors' name -> the diffusers name, without .weight or .bias; {} is the block number
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "transformer_blocks.{}.norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "transformer_blocks.{}.norm1.emb.timestep_embedder.linear_2",
    "y_embedder.embedding_table": "transformer_blocks.{}.norm1.emb.class_embedder.embedding_table",
    "blocks.{}.adaLN_modulation.1": "transformer_blocks.{}.norm1.linear",
    "blocks.{}.attn.proj": "transformer_blocks.{}.attn1.to_out.0",
    "blocks.{}.mlp.fc1": "transformer_blocks.{}.ff.net.0.proj",
    "blocks.{}.mlp.fc2": "transformer_blocks.{}.ff.net.2",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
JOINT = {"blocks.{}.attn.qkv": ("transformer_blocks.{}.attn1.to_", "qkv")}
"""Joint projections: the beginning of the names of their parts, and a letter for each."""

LABELS, HIDDEN = "y_embedder.embedding_table.weight", "blocks.0.mlp.fc1.weight"

DIMENSIONS = {"x_embedder.proj.weight": 4, "final_layer.linear.weight": 2, LABELS: 2, HIDDEN: 2, POSITIONS: 3}
"""Number of dimensions of the tensors from which a configuration is derived; positions may be missing."""

REQUIRED = ("x_embedder.proj.weight", "blocks.0.attn.qkv.weight", "final_layer.linear.weight")
"""Tensors that identify a state dict as one of the authors; all others are checked later by name and shape."""

SHARED_MODULATION = "t_block.1.weight"
"""Tensor of the PixArt authors, whose other names are those of a DiT."""

GUIDED_CHANNELS = 3
"""The authors apply guidance to three of the four latent channels, also for their published results."""

SIT_SCHEDULER: dict[str, Any] = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 1.0,
}


def is_dit_checkpoint(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the tensors have the authors' names."""
    return all(name in tensors for name in REQUIRED) and SHARED_MODULATION not in tensors


def config_from_checkpoint(tensors: Mapping[str, Tensor], options: SourceOptions, what: str) -> dict[str, Any]:
    """The diffusers configuration that fits the shapes. Raises `ModelError` for shapes that are not those of a DiT."""
    for key, dimensions in DIMENSIONS.items():
        shape = list(tensors[key].shape) if key in tensors else None
        if (shape is None and key != POSITIONS) or (shape is not None and (len(shape) != dimensions or 0 in shape)):
            shown = f"{key} is {shape}" if shape is not None else f"there is no {key}"
            raise ModelError(
                f"{what} has the tensor names of a DiT but not its shapes: {shown}; {dimensions} nonzero dimensions "
                "are needed; for a network of your own see docs/python.md"
            )
    patches, output = tensors["x_embedder.proj.weight"], tensors["final_layer.linear.weight"]
    table, hidden = tensors[LABELS], tensors[HIDDEN]
    width, channels, patch = patches.shape[0], patches.shape[1], patches.shape[2]
    heads = options.num_heads or HEADS.get(width)
    if heads is None or width % heads:
        raise ModelError(
            f"{what} has a width of {width}, "
            f"{f'not divisible by {heads} heads' if heads else 'for which the number of attention heads is unknown'}; "
            f"give --num-heads, a divisor of {width}"
        )
    if hidden.shape[0] != 4 * width:
        raise ModelError(
            f"the feed-forward layers of {what} are {hidden.shape[0] / width:g} times as wide as the network; "
            "diffusers supports only a factor of 4; export the module itself with 'package.module:factory'"
        )
    size = max(options.image_size or (256,))
    side = round(tensors[POSITIONS].shape[1] ** 0.5) if POSITIONS in tensors else size // VAE_FACTOR // patch
    return {
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "in_channels": channels,
        "out_channels": output.shape[0] // patch**2,
        "num_layers": depth_of(tensors),
        "sample_size": side * patch,
        "patch_size": patch,
        "num_embeds_ada_norm": table.shape[0] - 1,  # diffusers adds a row for the null class
        "norm_eps": NORM_EPSILON,
    }


def as_diffusers(
    tensors: Mapping[str, Tensor],
    config: Config,
    names: Mapping[str, str] = NAMES,
    joint: Mapping[str, tuple[str, str]] = JOINT,
    unused: Collection[str] = (POSITIONS,),
) -> Tensors:
    """The tensors under their diffusers names; joint projections are split.

    Unknown tensors keep their names, so that placing the weights reports them as unexpected.
    """
    read: dict[str, Callable[[], Tensor]] = {}
    left = {name for name in tensors if name not in unused}

    def take(theirs: str, ours: str, part: int = 0, parts: int = 1) -> None:
        if theirs in tensors:
            left.discard(theirs)
            read[ours] = lambda: _part_of(tensors[theirs], part, parts)

    for end in ("", ".weight", ".bias"):
        for block in range(config["num_layers"]):
            for theirs, ours in names.items():
                take(theirs.format(block) + end, ours.format(block) + end)
            for theirs, (ours, letters) in joint.items():
                for part, letter in enumerate(letters):
                    take(theirs.format(block) + end, ours.format(block) + letter + end, part, len(letters))
    return Tensors(read | {name: lambda name=name: tensors[name] for name in left})


def _part_of(joint: Tensor, part: int, parts: int) -> Tensor:
    """Query, key or value of a joint projection; of a wrong shape if the size is not divisible by `parts`."""
    return joint.tensor_split(parts)[part] if joint.dim() and parts > 1 else joint


def set_up_as_authors(module: nn.Module, tensors: Mapping[str, Tensor], spec: ModelSpec, what: str) -> None:
    """Set attributes of a diffusers DiT that its configuration cannot express: timestep frequencies and positions.

    Raises `ModelError` if the checkpoint has learned position embeddings for another image size than that of the spec;
    sines and cosines are interpolated, as in diffusers.
    """
    part: Any
    for part in module.modules():
        if hasattr(part, "downscale_freq_shift"):
            part.downscale_freq_shift = 0  # diffusers uses 1, which gives slightly different frequencies
    table: Any = module.pos_embed
    positions = tensors.get(POSITIONS)
    if positions is not None and positions.shape != table.pos_embed.shape:
        raise ModelError(
            f"the position embeddings of {what} are {list(positions.shape)} instead of {list(table.pos_embed.shape)}, "
            "so the file is damaged; download or copy it again"
        )
    if positions is None or torch.allclose(positions.float(), table.pos_embed, atol=1e-4):
        return
    table.pos_embed = positions.float().clone()  # learned positions
    assert spec.latents is not None
    needed = spec.latents.shape[1] * spec.latents.shape[2] // table.patch_size**2
    if needed != positions.shape[1]:
        raise ModelError(
            f"{what} has learned position embeddings for {positions.shape[1]} patches, but the image size needs "
            f"{needed}; leave --image-size out, or give the image size of the training"
        )


def guided_as_authors(spec: ModelSpec, options: SourceOptions) -> ModelSpec:
    """The spec with guidance limited to the first channels, as in the authors' sampling loops.

    With the option `null_class` set to False every row of the embedding table is a class, and there is no guidance.
    """
    assert spec.guidance is not None
    guidance = dataclasses.replace(spec.guidance, channels=GUIDED_CHANNELS)
    if options.null_class is not False:
        return dataclasses.replace(spec, guidance=guidance)
    classes = guidance.num_classes + 1
    return dataclasses.replace(
        spec,
        guidance=dataclasses.replace(guidance, num_classes=classes, null_class=None),
        conditioning={**spec.conditioning, CLASS_LABELS: InputSpec(values=(0, classes))},
    )


def guesses(spec: ModelSpec, options: SourceOptions) -> list[str]:
    """What is assumed about the last row of an embedding table whose size is a round number."""
    assert spec.guidance is not None
    rows = spec.guidance.num_classes + 1
    if options.null_class is not None or rows % 10:
        return []
    return [
        f"the last of {rows} rows of the class embeddings is taken for the null class of guidance; give "
        "--no-null-class if all rows are classes"
    ]


def sit_spec(spec: ModelSpec, options: SourceOptions) -> ModelSpec:
    """The spec of SiT, a DiT trained by flow matching: time runs from 0 (noise) to 1, and the output is a velocity.

    The graphs follow the convention of diffusers' flow-matching schedulers: timesteps decrease from 1000, and the
    prediction is noise minus image. Only the velocity is output, without the unused second half of the channels.
    """
    spec = guided_as_authors(spec, options)
    assert spec.latents is not None
    assert spec.output is not None
    channels, predicted = spec.latents.channels, spec.call

    def call(module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        flow = {**inputs, TIMESTEP: 1 - inputs[TIMESTEP] / SIT_SCHEDULER["num_train_timesteps"]}
        return -predicted(module, flow)[:, :channels]

    batch, _, *size = spec.output.shape
    return dataclasses.replace(
        spec,
        call=call,
        output=dataclasses.replace(spec.output, shape=(batch, channels, *size)),
        latents=dataclasses.replace(spec.latents, learned_sigma=False),
        scheduler=SIT_SCHEDULER,
    )


DIT = StateDictFormat(
    name="DiT",
    recognises=is_dit_checkpoint,
    config=config_from_checkpoint,
    renamed=as_diffusers,
    set_up=set_up_as_authors,
    adapted=guided_as_authors,
    guesses=guesses,
    parts=lambda tensors, options: PipelineParts(vae=Part(VAE)),
    takes=("image_size", "architecture", "num_heads", "null_class"),
)
SIT = dataclasses.replace(DIT, name="SiT", adapted=sit_spec)
