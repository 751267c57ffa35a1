"""The transformers of diffusers at a tiny size: two blocks of each kind, random weights, gates that are not zero.

`TRANSFORMERS` maps a model's name to a factory of the module and its `ModelSpec`. Positions, shapes and other values
that a pipeline computes from the size of the image are constants, made in `call`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import diffusers
import torch
from diffusers.models.embeddings import (
    get_1d_rotary_pos_embed,
    get_2d_rotary_pos_embed,
    get_3d_rotary_pos_embed,
    get_3d_rotary_pos_embed_allegro,
)
from torch import Tensor, nn

from fora_trt import InputSpec, ModelSpec, TensorSpec
from fora_trt.models.block_sites import sites_of_blocks

Tiny: TypeAlias = tuple[nn.Module, ModelSpec]
Inputs: TypeAlias = Mapping[str, Tensor]
Shapes: TypeAlias = Mapping[str, tuple[int, ...]]

TEXT = "encoder_hidden_states"
NAMES = {"latents": "hidden_states"}


def alive(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module with all parameters drawn from a normal distribution; diffusers sets some gates to zero."""
    generator = torch.Generator().manual_seed(seed)
    for one in module.parameters():
        spread = 0.3 / max(1, one.shape[-1]) ** 0.5 if one.dim() > 1 else 0.1
        one.data = torch.randn(one.shape, generator=generator) * spread
    return module.eval()


def by_name(module: nn.Module, inputs: Inputs, **constants: Any) -> Tensor:
    """The prediction of a transformer that is called with its inputs by name."""
    given = {NAMES.get(name, name): value for name, value in inputs.items()}
    prediction: Tensor = module(**given, **constants).sample
    return prediction


def in_units(inputs: Inputs) -> Inputs:
    """The inputs with a timestep from 0 to 1."""
    return {**inputs, "timestep": inputs["timestep"] / 1000}


def tiny(
    kind: str,
    latents: tuple[int, ...],
    shapes: Shapes,
    *,
    call: Callable[..., Tensor] = by_name,
    conditioning: Mapping[str, InputSpec] | None = None,
    integers: tuple[str, ...] = (),
    **config: Any,
) -> Tiny:
    """A transformer of this class, with float inputs of these shapes of a sample beside latents and timestep."""
    torch.manual_seed(0)  # some classes draw buffers
    module = alive(getattr(diffusers, kind)(**config))
    given = {"latents": latents, "timestep": (), **shapes}
    inputs = tuple(
        TensorSpec(name, "int64" if name in integers else "float32", ("batch", *shape)) for name, shape in given.items()
    )
    spec = ModelSpec(inputs=inputs, call=call, conditioning=conditioning or {}, cache_sites=sites_of_blocks(module))
    return module, spec


def sd3(dual: tuple[int, ...] = (), **more: Any) -> Tiny:
    return tiny(
        "SD3Transformer2DModel", (4, 8, 8), {TEXT: (5, 32), "pooled_projections": (64,)},
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=64, out_channels=4,
        pos_embed_max_size=8, dual_attention_layers=dual, **more,
    )  # fmt: skip


def sd35() -> Tiny:
    return sd3(dual=(0,), qk_norm="rms_norm")


def flux(channels: int = 4, guidance: bool = True) -> Tiny:
    ids = {
        "img_ids": torch.stack(torch.meshgrid(torch.zeros(1), torch.arange(4.0), torch.arange(4.0), indexing="ij"), -1)
    }
    constants = {"img_ids": ids["img_ids"].reshape(16, 3), "txt_ids": torch.zeros(6, 3)}
    shapes: dict[str, tuple[int, ...]] = {TEXT: (6, 32), "pooled_projections": (32,)} | (
        {"guidance": ()} if guidance else {}
    )
    return tiny(
        "FluxTransformer2DModel", (16, channels), shapes,
        call=lambda module, inputs: by_name(module, in_units(inputs), **constants),
        conditioning={"guidance": InputSpec(values=(1, 5))} if guidance else None,
        patch_size=1, in_channels=channels, out_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
        guidance_embeds=guidance,
    )  # fmt: skip


def flux_fill() -> Tiny:
    """FLUX Fill: latents, masked latents and the mask are one input of more channels than the prediction has."""
    return flux(channels=12, guidance=False)


def flux2() -> Tiny:
    image = torch.stack(torch.meshgrid(*(torch.arange(float(n)) for n in (1, 4, 4, 1)), indexing="ij"), -1).reshape(
        16, 4
    )
    text = torch.stack(torch.meshgrid(*(torch.arange(float(n)) for n in (1, 1, 1, 6)), indexing="ij"), -1).reshape(6, 4)
    return tiny(
        "Flux2Transformer2DModel", (16, 4), {TEXT: (6, 32), "guidance": ()},
        call=lambda module, inputs: by_name(module, in_units(inputs), img_ids=image, txt_ids=text),
        conditioning={"guidance": InputSpec(values=(1, 5))},
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, timestep_guidance_channels=256, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip


def qwen_image() -> Tiny:
    def call(module: nn.Module, inputs: Inputs) -> Tensor:
        return by_name(module, in_units(inputs), img_shapes=[[(1, 4, 4)]])

    return tiny(
        "QwenImageTransformer2DModel", (16, 16), {TEXT: (6, 16)}, call=call,
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip


def z_image() -> Tiny:
    """It takes lists of samples, so `call` splits the batch."""

    def call(module: nn.Module, inputs: Inputs) -> Tensor:
        latents, text = [*inputs["latents"].unbind(0)], [*inputs[TEXT].unbind(0)]
        return torch.stack(module(latents, inputs["timestep"] / 1000, text, return_dict=False)[0])

    return tiny(
        "ZImageTransformer2DModel", (4, 1, 8, 8), {TEXT: (32, 16)}, call=call,
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[8, 4, 4], axes_lens=[64, 32, 32],
    )  # fmt: skip


def wan(channels: int = 4) -> Tiny:
    return tiny(
        "WanTransformer3DModel", (channels, 2, 8, 8), {TEXT: (6, 16)},
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=channels, out_channels=4,
        text_dim=16,        freq_dim=256, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip


def wan_image() -> Tiny:
    """Wan 2.1 image to video: more channels in than out, and tokens of an image in the cross-attention.

    It takes 512 tokens of text, a constant in diffusers.
    """
    return tiny(
        "WanTransformer3DModel", (12, 2, 8, 8), {TEXT: (512, 16), "encoder_hidden_states_image": (4, 16)},
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=12, out_channels=4, text_dim=16,
        freq_dim=256, ffn_dim=32, num_layers=2, rope_max_seq_len=32, image_dim=16, added_kv_proj_dim=24,
    )  # fmt: skip


def wan22() -> Tiny:
    """Wan 2.2 A14B image to video: Wan 2.1 with more channels in and no tokens of an image."""
    return wan(channels=12)


def ltx() -> Tiny:
    return tiny(
        "LTXVideoTransformer3DModel", (32, 8), {TEXT: (6, 16), "encoder_attention_mask": (6,)},
        call=lambda module, inputs: by_name(module, inputs, num_frames=2, height=4, width=4),
        conditioning={"encoder_attention_mask": InputSpec(values=(0, 2))}, integers=("encoder_attention_mask",),
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=12, cross_attention_dim=24,
        num_layers=2, caption_channels=16,
    )  # fmt: skip


def cogvideox(rotary: bool = False, channels: int = 4) -> Tiny:
    embedding = get_3d_rotary_pos_embed(16, ((0, 0), (4, 4)), (4, 4), 2) if rotary else None
    return tiny(
        "CogVideoXTransformer3DModel", (2, channels, 8, 8), {TEXT: (6, 16)},
        call=lambda module, inputs: by_name(module, inputs, image_rotary_emb=embedding),
        num_attention_heads=2, attention_head_dim=16, in_channels=channels, out_channels=4, time_embed_dim=8,
        text_embed_dim=16,        num_layers=2, sample_width=8, sample_height=8, sample_frames=5, patch_size=2,
        temporal_compression_ratio=4,        max_text_seq_length=6, use_rotary_positional_embeddings=rotary,
    )  # fmt: skip


def cogvideox_5b() -> Tiny:
    return cogvideox(rotary=True)


def sana() -> Tiny:
    return tiny(
        "SanaTransformer2DModel", (4, 8, 8), {TEXT: (6, 16), "encoder_attention_mask": (6,)},
        conditioning={"encoder_attention_mask": InputSpec(values=(0, 2))}, integers=("encoder_attention_mask",),
        patch_size=1, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        num_cross_attention_heads=4, cross_attention_head_dim=8, cross_attention_dim=32, caption_channels=16,
        sample_size=8,
    )  # fmt: skip


def lumina2() -> Tiny:
    """The prompt mask is full: the lengths of the prompts become constants."""

    def call(module: nn.Module, inputs: Inputs) -> Tensor:
        mask = torch.ones(inputs[TEXT].shape[:2], dtype=torch.bool)
        return by_name(module, in_units(inputs), encoder_attention_mask=mask)

    return tiny(
        "Lumina2Transformer2DModel", (4, 8, 8), {TEXT: (6, 16)}, call=call,
        sample_size=8, patch_size=2, in_channels=4, hidden_size=24, num_layers=2, num_refiner_layers=1,
        num_attention_heads=3, num_kv_heads=1, multiple_of=2, axes_dim_rope=(4, 2, 2), axes_lens=(32, 32, 32),
        cap_feat_dim=16,
    )  # fmt: skip


def auraflow() -> Tiny:
    return tiny(
        "AuraFlowTransformer2DModel", (4, 8, 8), {TEXT: (6, 16)},
        call=lambda module, inputs: by_name(module, in_units(inputs)),
        sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=2, num_single_dit_layers=2, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=16, caption_projection_dim=32, out_channels=4, pos_embed_max_size=16,
    )  # fmt: skip


def hunyuan_dit() -> Tiny:
    embedding = get_2d_rotary_pos_embed(8, ((0, 0), (4, 4)), (4, 4), output_type="pt")
    ids = torch.tensor([[8, 8, 8, 8, 0, 0]])
    masks = ("text_embedding_mask", "text_embedding_mask_t5")

    def call(module: nn.Module, inputs: Inputs) -> Tensor:
        batch = inputs["latents"].shape[0]  # `len` would make it a constant
        return by_name(
            module, inputs, image_meta_size=ids.repeat(batch, 1), image_rotary_emb=embedding,
            style=torch.zeros(batch, dtype=torch.int64),
        )  # fmt: skip

    return tiny(
        "HunyuanDiT2DModel", (4, 8, 8),
        {TEXT: (5, 16), masks[0]: (5,), "encoder_hidden_states_t5": (6, 16), masks[1]: (6,)}, call=call,
        conditioning=dict.fromkeys(masks, InputSpec(values=(0, 2))), integers=masks,
        sample_size=8, patch_size=2, in_channels=4, num_layers=4, attention_head_dim=8, num_attention_heads=2,
        cross_attention_dim=16, cross_attention_dim_t5=16, pooled_projection_dim=4, hidden_size=16, text_len=5,
        text_len_t5=6, activation_fn="gelu-approximate",
    )  # fmt: skip


def hunyuan_video() -> Tiny:
    return tiny(
        "HunyuanVideoTransformer3DModel", (4, 2, 8, 8),
        {TEXT: (6, 16), "encoder_attention_mask": (6,), "pooled_projections": (8,), "guidance": ()},
        conditioning={"encoder_attention_mask": InputSpec(values=(0, 2)), "guidance": InputSpec(values=(1, 6000))},
        integers=("encoder_attention_mask",),
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=2, num_single_layers=2,
        num_refiner_layers=1, patch_size=2, patch_size_t=1, guidance_embeds=True, text_embed_dim=16,
        pooled_projection_dim=8, rope_axes_dim=(2, 4, 4),
    )  # fmt: skip


def kandinsky5() -> Tiny:
    positions = [torch.arange(2), torch.arange(4), torch.arange(4)]
    return tiny(
        "Kandinsky5Transformer3DModel", (2, 8, 8, 4), {TEXT: (6, 16), "pooled_projections": (8,)},
        call=lambda module, inputs: by_name(module, inputs, visual_rope_pos=positions, text_rope_pos=torch.arange(6)),
        in_visual_dim=4, in_text_dim=16, in_text_dim2=8, time_dim=16, out_visual_dim=4, patch_size=(1, 2, 2),
        model_dim=32, ff_dim=64, num_text_blocks=2, num_visual_blocks=2, axes_dims=(4, 6, 6),
    )  # fmt: skip


def mochi() -> Tiny:
    """The prompt mask is full: padding would make the number of tokens depend on it."""

    def call(module: nn.Module, inputs: Inputs) -> Tensor:
        mask = torch.ones(inputs[TEXT].shape[:2], dtype=torch.bool)
        return by_name(module, inputs, encoder_attention_mask=mask)

    return tiny(
        "MochiTransformer3DModel", (4, 2, 8, 8), {TEXT: (6, 16)}, call=call,
        patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16,
        in_channels=4, qk_norm="rms_norm", text_embed_dim=16, time_embed_dim=4, activation_fn="swiglu",
        max_sequence_length=6,
    )  # fmt: skip


def allegro() -> Tiny:
    made = get_3d_rotary_pos_embed_allegro(24, ((0, 0), (4, 4)), (4, 4), 2)
    places = torch.cartesian_prod(*(grid.long() for grid in made[3:]))
    rotary = made[:3], tuple(places.T.reshape(3, 1, -1).contiguous())
    return tiny(
        "AllegroTransformer3DModel", (4, 2, 8, 8), {TEXT: (6, 16), "encoder_attention_mask": (6,)},
        call=lambda module, inputs: by_name(module, inputs, image_rotary_emb=rotary),
        conditioning={"encoder_attention_mask": InputSpec(values=(0, 2))}, integers=("encoder_attention_mask",),
        num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, num_layers=2,
        cross_attention_dim=48, sample_width=8, sample_height=8, sample_frames=8, caption_channels=16,
    )  # fmt: skip


def latte() -> Tiny:
    return tiny(
        "LatteTransformer3DModel", (4, 3, 8, 8), {TEXT: (6, 16)},
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3, caption_channels=16,
        in_channels=4, cross_attention_dim=24, out_channels=8, attention_bias=True, activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6,
        video_length=3,
    )  # fmt: skip


def stable_audio() -> Tiny:
    rotary = get_1d_rotary_pos_embed(8, 17, use_real=True, repeat_interleave_real=False)
    return tiny(
        "StableAudioDiTModel", (8, 16), {TEXT: (5, 12), "global_hidden_states": (1, 24)},
        call=lambda module, inputs: by_name(module, inputs, rotary_embedding=rotary),
        sample_size=16, in_channels=8, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        num_key_value_attention_heads=1, out_channels=8, cross_attention_dim=16, time_proj_dim=32,
        global_states_input_dim=24, cross_attention_input_dim=12,
    )  # fmt: skip


TRANSFORMERS: dict[str, Callable[[], Tiny]] = {
    made.__name__: made
    for made in (
        sd3, sd35, flux, flux_fill, flux2, qwen_image, z_image, wan, wan_image, wan22, ltx, cogvideox, cogvideox_5b,
        sana, lumina2, auraflow, hunyuan_dit, hunyuan_video, kandinsky5, mochi, allegro, latte, stable_audio,
    )
}  # fmt: skip
