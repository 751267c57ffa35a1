"""Small checkpoints in the formats of the authors and of diffusers, with seeded weights and gates that are not tiny."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 # as everybody calls it
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)
from torch import Tensor

DEPTH, WIDTH, HEADS, PATCH, SIDE, CHANNELS, CLASSES = 3, 48, 4, 2, 8, 4, 10


def authors_state(depth: int = DEPTH, width: int = WIDTH, seed: int = 0) -> dict[str, Tensor]:
    """A state dict with the names and shapes of the DiT authors; SiT's are the same."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {
        "x_embedder.proj.weight": (width, CHANNELS, PATCH, PATCH),
        "t_embedder.mlp.0.weight": (width, 256),
        "t_embedder.mlp.2.weight": (width, width),
        "y_embedder.embedding_table.weight": (CLASSES + 1, width),
        "final_layer.linear.weight": (PATCH * PATCH * 2 * CHANNELS, width),
        "final_layer.adaLN_modulation.1.weight": (2 * width, width),
    }
    for i in range(depth):
        shapes |= {
            f"blocks.{i}.attn.qkv.weight": (3 * width, width),
            f"blocks.{i}.attn.proj.weight": (width, width),
            f"blocks.{i}.mlp.fc1.weight": (4 * width, width),
            f"blocks.{i}.mlp.fc2.weight": (width, 4 * width),
            f"blocks.{i}.adaLN_modulation.1.weight": (6 * width, width),
        }
    state = {"pos_embed": positions(width)}
    for name, shape in shapes.items():
        state[name] = torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))
        if "embedding_table" not in name:
            state[name.replace(".weight", ".bias")] = torch.randn(shape[0], generator=generator) * 0.2
    return state


def positions(width: int) -> Tensor:
    """(1, N, width): for the column and then the row of each patch, sines and then cosines."""
    rates = 10000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    side = torch.arange(SIDE // PATCH, dtype=torch.float64)
    rows, columns = torch.meshgrid(side, side, indexing="ij")
    angles = [axis.reshape(-1, 1) * rates for axis in (columns, rows)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1).float()[None]


def authors_dit(state: dict[str, Tensor], x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """The DiT paper's network, evaluated from a state dict: (B, C, H, W) -> (B, 2C, H, W)."""

    def linear(name: str, value: Tensor) -> Tensor:
        return F.linear(value, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(value: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return F.layer_norm(value, value.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    angles = t[:, None].float() * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    times = torch.cat([angles.cos(), angles.sin()], dim=1)
    c = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", times)))
    c = F.silu(c + state["y_embedder.embedding_table.weight"][y])
    h = F.conv2d(x, state["x_embedder.proj.weight"], state["x_embedder.proj.bias"], stride=PATCH)
    h = h.flatten(2).transpose(1, 2) + state["pos_embed"]  # (B, N, D)
    count, tokens, width = h.shape
    for i in range(sum(name.endswith("qkv.weight") for name in state)):
        modulation = linear(f"blocks.{i}.adaLN_modulation.1", c).chunk(6, dim=1)
        qkv = linear(f"blocks.{i}.attn.qkv", norm(h, *modulation[:2]))
        q, k, v = qkv.view(count, tokens, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4)
        attention = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(count, tokens, width)
        h = h + modulation[2][:, None] * linear(f"blocks.{i}.attn.proj", attention)
        hidden = F.gelu(linear(f"blocks.{i}.mlp.fc1", norm(h, *modulation[3:5])), approximate="tanh")
        h = h + modulation[5][:, None] * linear(f"blocks.{i}.mlp.fc2", hidden)
    h = linear("final_layer.linear", norm(h, *linear("final_layer.adaLN_modulation.1", c).chunk(2, dim=1)))
    side = SIDE // PATCH
    pixels = h.view(count, side, side, PATCH, PATCH, -1).permute(0, 5, 1, 3, 2, 4)
    return pixels.reshape(count, -1, SIDE, SIDE)


def pixart_pipeline(folder: Path, kind: str) -> Path:
    """A PixArt pipeline with a T5 encoder, its tokenizer (of single letters) and a VAE that halves.

    The alpha one has the conditions of the published model for 1024 pixels: it takes the image's size too.
    """
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    torch.manual_seed(0)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *((one, -3.0) for one in letters)]
    tokenizer = T5Tokenizer(vocab=vocabulary, extra_ids=0)
    size, patch = {"alpha": (128, 16), "sigma": (8, 2)}[kind]  # alpha's conditions come with 128
    transformer = PixArtTransformer2DModel(
        num_attention_heads=3, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=size,
        patch_size=patch, cross_attention_dim=24, caption_channels=12,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, mid_block_add_attention=size < 128,  # slow on 128 x 128
    )  # fmt: skip
    pipeline = {"alpha": PixArtAlphaPipeline, "sigma": PixArtSigmaPipeline}[kind](
        tokenizer=tokenizer,
        text_encoder=T5EncoderModel(
            T5Config(vocab_size=len(vocabulary) + 8, d_model=12, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
        ),
        vae=vae,
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(),
    )
    pipeline.save_pretrained(folder)
    return folder
