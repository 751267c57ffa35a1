"""State dicts of the DiT authors, and of SiT's (arXiv 2401.08740), which is the same network: names, sizes, positions.

Their files hold the weights alone. Depth, width, patches, classes and image size are read off the shapes; the number
of heads is not in the weights and follows from the width for the published ones.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fora_trt.errors import ModelError
from fora_trt.models import dit
from fora_trt.models.checkpoint import Tensors
from fora_trt.models.spec import TIMESTEP, ModelSpec

DIT, SIT = "DiT", "SiT"

HEADS = {width: heads for _, width, heads in dit.SIZES.values()}

POSITIONS = "pos_embed"
NORM_EPSILON = 1e-6  # of the authors' LayerNorms

NAMES = {  # theirs -> of diffusers, without .weight or .bias; {} is the number of the block
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
QKV = ("blocks.{}.attn.qkv", "transformer_blocks.{}.attn1.to_")

LABELS, HIDDEN = "y_embedder.embedding_table.weight", "blocks.0.mlp.fc1.weight"

DIMENSIONS = {"x_embedder.proj.weight": 4, "final_layer.linear.weight": 2, LABELS: 2, HIDDEN: 2, POSITIONS: 3}
"""How many sizes the tensors have from which a configuration is read; positions may be left out."""

REQUIRED = ("x_embedder.proj.weight", "blocks.0.attn.qkv.weight", "final_layer.linear.weight")
"""By these a state dict is known as one of theirs; what else is needed is checked by name and shape."""

GUIDED_CHANNELS = 3
"""The authors guide three of the four latent channels, and publish their figures so."""

SIT_SCHEDULER: dict[str, Any] = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 1.0,
}


def is_dit_checkpoint(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are the authors' names."""
    return all(name in tensors for name in REQUIRED)


def config_from_checkpoint(tensors: Mapping[str, Tensor], num_heads: int | None, what: str) -> dict[str, Any]:
    """The diffusers configuration that fits the shapes. Raises `ModelError` for shapes that no DiT has."""
    for key, dimensions in DIMENSIONS.items():
        shape = list(tensors[key].shape) if key in tensors else None
        if (shape is None and key != POSITIONS) or (shape is not None and (len(shape) != dimensions or 0 in shape)):
            shown = f"{key} is {shape}" if shape is not None else f"there is no {key}"
            raise ModelError(
                f"{what} has the names of a DiT and other shapes: {shown}, where {dimensions} sizes were expected; "
                "for a network of your own see 'package.module:factory' in the README"
            )
    patches, output = tensors["x_embedder.proj.weight"], tensors["final_layer.linear.weight"]
    table, hidden = tensors[LABELS], tensors[HIDDEN]
    width, channels, patch = patches.shape[0], patches.shape[1], patches.shape[2]
    blocks = {int(found[1]) for name in tensors if (found := re.match(r"blocks\.(\d+)\.", name))}
    heads = num_heads or HEADS.get(width)
    if heads is None or width % heads:
        raise ModelError(
            f"{what} has a width of {width}, for which the number of attention heads is not known"
            f"{f' to be {heads}' if heads else ''}; give it with --num-heads, a divisor of {width}"
        )
    if hidden.shape[0] != 4 * width:
        raise ModelError(
            f"the feed-forward layers of {what} are {hidden.shape[0] / width:g} times as wide as the network; "
            "diffusers builds DiTs with 4 times; export the module itself with 'package.module:factory'"
        )
    side = round(tensors[POSITIONS].shape[1] ** 0.5) if POSITIONS in tensors else 256 // dit.VAE_FACTOR // patch
    return {
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "in_channels": channels,
        "out_channels": output.shape[0] // patch**2,
        "num_layers": max(blocks) + 1,
        "sample_size": side * patch,
        "patch_size": patch,
        "num_embeds_ada_norm": table.shape[0] - 1,  # the last row is the null class
        "norm_eps": NORM_EPSILON,
    }


def as_diffusers(tensors: Mapping[str, Tensor], depth: int) -> Tensors:
    """The same tensors under the names of diffusers; the joint projection to query, key and value in three parts.

    What has no name there keeps its own, so that it is found to be one too many.
    """
    read: dict[str, Callable[[], Tensor]] = {}
    left = {name for name in tensors if name != POSITIONS}

    def take(theirs: str, ours: str, part: int | None = None) -> None:
        if theirs in tensors:
            left.discard(theirs)
            read[ours] = lambda: tensors[theirs] if part is None else _third(tensors[theirs], part)

    for end in (".weight", ".bias"):
        for block in range(depth):
            for theirs, ours in NAMES.items():
                take(theirs.format(block) + end, ours.format(block) + end)
            for part, letter in enumerate("qkv"):
                take(QKV[0].format(block) + end, QKV[1].format(block) + letter + end, part)
    return Tensors(read | {name: lambda name=name: tensors[name] for name in left})


def _third(joint: Tensor, part: int) -> Tensor:
    """Query, key or value of a joint projection; of another shape where that does not divide by three."""
    return joint.tensor_split(3)[part] if joint.dim() else joint


def set_up_as_authors(module: nn.Module, positions: Tensor | None, what: str) -> None:
    """Give a diffusers DiT what its configuration cannot say: the authors' frequencies of time, and their positions.

    Raises `ModelError` where the checkpoint has positions of its own and the module was made for another image size.
    """
    part: Any
    for part in module.modules():
        if hasattr(part, "downscale_freq_shift"):
            part.downscale_freq_shift = 0  # diffusers spaces them by one place less
    table: Any = module.pos_embed
    if positions is None or positions.shape == table.pos_embed.shape:
        if positions is not None and not torch.allclose(positions.float(), table.pos_embed, atol=1e-4):
            table.pos_embed = positions.float().clone()  # learned ones
        return
    raise ModelError(
        f"{what} has positions for {positions.shape[1]} patches and not for {table.pos_embed.shape[1]} "
        f"({list(positions.shape)} and not {list(table.pos_embed.shape)}): leave --image-size out, or give the size "
        "that it was trained at"
    )


def guided_as_authors(spec: ModelSpec) -> ModelSpec:
    """The same model, its guidance on as many channels as in the authors' sampling loops."""
    assert spec.guidance is not None
    return dataclasses.replace(spec, guidance=dataclasses.replace(spec.guidance, channels=GUIDED_CHANNELS))


def sit_spec(spec: ModelSpec) -> ModelSpec:
    """The same network trained by flow matching: its time runs from 0 (noise) to 1, and it predicts a velocity.

    The graphs speak the language of diffusers' flow-matching schedulers: timesteps fall from 1000, and what is
    predicted is noise minus image. Only the velocity is put out, not the unused second half of the channels.
    """
    assert spec.latents is not None
    assert spec.output is not None
    channels = spec.latents.channels

    def call(module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        flow = {**inputs, TIMESTEP: 1 - inputs[TIMESTEP] / SIT_SCHEDULER["num_train_timesteps"]}
        return -dit.call(module, flow)[:, :channels]

    batch, _, *size = spec.output.shape
    return dataclasses.replace(
        spec,
        call=call,
        output=dataclasses.replace(spec.output, shape=(batch, channels, *size)),
        latents=dataclasses.replace(spec.latents, learned_sigma=False),
        scheduler=SIT_SCHEDULER,
    )
