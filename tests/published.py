"""Checkpoints in the forms in which they were published, which today's libraries no longer write.

docs/models.md lists the published files. The inputs are small and have random weights.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 # as everybody calls it
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.checkpoints import positions

OLD_KEYS: dict[str, Any] = {
    "_class_name": "Transformer2DModel",
    "_diffusers_version": "0.12.0.dev0",
    "cross_attention_dim": None,
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "use_linear_projection": False,
}
"""Keys of the configurations of facebook/DiT-XL-2-256 and of the PixArt repositories, which the class has no more."""

WEIGHTS = "diffusion_pytorch_model.safetensors"
DEPTH, WIDTH, HEADS, CHANNELS, PATCH, SIDE, TOKENS, CAPTION = 2, 144, 2, 4, 2, 8, 12, 24


def aged(folder: Path, norm_type: str, **more: Any) -> Path:
    """Give a pipeline folder the configuration it was published with, before the class had a name of its own."""
    path, index = folder / "transformer/config.json", folder / "model_index.json"
    config = json.loads(path.read_text())
    for key in ("use_additional_conditions", "interpolation_scale"):
        config.pop(key, None)
    path.write_text(json.dumps({**config, **OLD_KEYS, "norm_type": norm_type, **more}))
    index.write_text(json.dumps({**json.loads(index.read_text()), "transformer": ["diffusers", "Transformer2DModel"]}))
    return folder


def with_tensors(folder: Path, **tensors: Tensor) -> None:
    """Add tensors to the weight file of a model folder."""
    save_file({**load_file(folder / WEIGHTS), **tensors}, folder / WEIGHTS, metadata={"format": "pt"})


def as_pickle(folder: Path) -> None:
    """Store the weights as the .bin file that repositories had before .safetensors."""
    torch.save(load_file(folder / WEIGHTS), folder / "diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def pixart_state(tokens: int = TOKENS, with_sizes: bool = False, with_positions: bool = True) -> dict[str, Tensor]:
    """A state dict with the names and shapes of the PixArt authors."""
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "x_embedder.proj.weight": (WIDTH, CHANNELS, PATCH, PATCH),
        "t_embedder.mlp.0.weight": (WIDTH, 256),
        "t_embedder.mlp.2.weight": (WIDTH, WIDTH),
        "t_block.1.weight": (6 * WIDTH, WIDTH),
        "y_embedder.y_proj.fc1.weight": (WIDTH, CAPTION),
        "y_embedder.y_proj.fc2.weight": (WIDTH, WIDTH),
        "final_layer.linear.weight": (PATCH * PATCH * 2 * CHANNELS, WIDTH),
    }
    for k in range(DEPTH):
        shapes |= {
            f"blocks.{k}.attn.qkv.weight": (3 * WIDTH, WIDTH),
            f"blocks.{k}.attn.proj.weight": (WIDTH, WIDTH),
            f"blocks.{k}.cross_attn.q_linear.weight": (WIDTH, WIDTH),
            f"blocks.{k}.cross_attn.kv_linear.weight": (2 * WIDTH, WIDTH),
            f"blocks.{k}.cross_attn.proj.weight": (WIDTH, WIDTH),
            f"blocks.{k}.mlp.fc1.weight": (4 * WIDTH, WIDTH),
            f"blocks.{k}.mlp.fc2.weight": (WIDTH, 4 * WIDTH),
        }
    for name in ("csize_embedder", "ar_embedder") if with_sizes else ():
        width = WIDTH // 3
        shapes |= {f"{name}.mlp.0.weight": (width, 256), f"{name}.mlp.2.weight": (width, width)}
    state = {"pos_embed": positions(WIDTH)} if with_positions else {}
    for name, shape in shapes.items():
        state[name] = torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))
        state[name.replace(".weight", ".bias")] = torch.randn(shape[0], generator=generator) * 0.2
    tables = {"final_layer": 2} | {f"blocks.{k}": 6 for k in range(DEPTH)}
    for name, rows in tables.items():
        state[f"{name}.scale_shift_table"] = torch.randn(rows, WIDTH, generator=generator)
    return state | {"y_embedder.y_embedding": torch.randn(tokens, CAPTION, generator=generator)}


def authors_pixart(state: dict[str, Tensor], x: Tensor, t: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """The network of the PixArt-alpha paper, evaluated from a state dict.

    Latents (B, C, H, W), timesteps (B,), prompt embeddings (B, L, D) and mask (B, L) -> (B, 2C, H, W).
    """

    def linear(name: str, value: Tensor) -> Tensor:
        return F.linear(value, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(value: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return F.layer_norm(value, value.shape[-1:], eps=1e-6) * (1 + scale) + shift

    def attention(q: Tensor, k: Tensor, v: Tensor, kept: Tensor | None = None) -> Tensor:
        q, k, v = (one.view(*one.shape[:2], HEADS, -1).transpose(1, 2) for one in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=kept).transpose(1, 2).flatten(2)

    angles = t[:, None].float() * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    times = torch.cat([angles.cos(), angles.sin()], dim=1)
    c = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", times)))  # (B, D)
    modulation = linear("t_block.1", F.silu(c)).view(-1, 6, WIDTH)  # (B, 6, D)
    hidden = F.gelu(linear("y_embedder.y_proj.fc1", y), approximate="tanh")
    y, kept = linear("y_embedder.y_proj.fc2", hidden), mask.bool()[:, None, None]
    h = F.conv2d(x, state["x_embedder.proj.weight"], state["x_embedder.proj.bias"], stride=PATCH)
    h = h.flatten(2).transpose(1, 2) + state["pos_embed"]  # (B, N, D)
    for k in range(DEPTH):
        table = state[f"blocks.{k}.scale_shift_table"] + modulation
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = table.chunk(6, dim=1)
        qkv = linear(f"blocks.{k}.attn.qkv", norm(h, shift, scale)).chunk(3, dim=-1)
        h = h + gate * linear(f"blocks.{k}.attn.proj", attention(qkv[0], qkv[1], qkv[2]))
        q, kv = linear(f"blocks.{k}.cross_attn.q_linear", h), linear(f"blocks.{k}.cross_attn.kv_linear", y)
        h = h + linear(f"blocks.{k}.cross_attn.proj", attention(q, kv[..., :WIDTH], kv[..., WIDTH:], kept))
        inner = F.gelu(linear(f"blocks.{k}.mlp.fc1", norm(h, shift_mlp, scale_mlp)), approximate="tanh")
        h = h + gate_mlp * linear(f"blocks.{k}.mlp.fc2", inner)
    shift, scale = (state["final_layer.scale_shift_table"] + c[:, None]).chunk(2, dim=1)
    h = linear("final_layer.linear", norm(h, shift, scale))
    side = SIDE // PATCH
    return h.view(len(h), side, side, PATCH, PATCH, -1).permute(0, 5, 1, 3, 2, 4).reshape(len(h), -1, SIDE, SIDE)
