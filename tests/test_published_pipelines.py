"""Pipelines at the widths of published models and reduced depth: exported in fp16, and built by TensorRT-RTX."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import Tensor, nn

import fora_trt
from fora_trt.engines.tensorrt.library import TENSORRT_RTX, library_from_name
from fora_trt.engines.tensorrt.plan_builder import PlanOptions, Profile
from fora_trt.engines.tensorrt.plan_store import build_plans, target_of
from fora_trt.export.statistics import graph_statistics
from tests.tiny_pipelines import TinyPipeline, drawn
from tests.tiny_transformers import alive

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'fora-trt[rtx]'")

NO_TEXT = {"vae": None, "tokenizer": None, "text_encoder": None}

REUSE_BYTES = 2**21
"""Most bytes of a reuse graph and of its plan: patch embedding, positions and last projection."""

ATTENTIONS = {
    "sd3_medium": ["transformer_blocks.0.attn", "transformer_blocks.1.attn"],
    "flux": ["transformer_blocks.0.attn", "single_transformer_blocks.0.attn"],
    "wan": ["blocks.0.attn1", "blocks.0.attn2"],
}


def half(module: nn.Module) -> nn.Module:
    return alive(module).to(torch.float16)


def embeds(*shape: int, seed: int) -> Tensor:
    return drawn(*shape, seed=seed).half()


def sd3_medium() -> TinyPipeline:
    """2 of 24 blocks; the last block of the model has no text stream after its attention."""
    transformer = SD3Transformer2DModel(
        sample_size=128, patch_size=2, in_channels=16, num_layers=2, attention_head_dim=64, num_attention_heads=24,
        joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048, out_channels=16,
        pos_embed_max_size=192,
    )  # fmt: skip
    pipe = StableDiffusion3Pipeline(
        transformer=half(transformer), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), tokenizer_2=None,
        text_encoder_2=None, tokenizer_3=None, text_encoder_3=None, **NO_TEXT,
    )  # fmt: skip
    return pipe, {
        "prompt_embeds": embeds(1, 77, 4096, seed=1),
        "pooled_prompt_embeds": embeds(1, 2048, seed=2),
        "negative_prompt_embeds": embeds(1, 77, 4096, seed=3),
        "negative_pooled_prompt_embeds": embeds(1, 2048, seed=4),
        "height": 256,
        "width": 256,
    }


def flux() -> TinyPipeline:
    """FLUX.1-dev with 1 of 19 double and 1 of 38 single blocks."""
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=128,
        num_attention_heads=24, joint_attention_dim=4096, pooled_projection_dim=768, guidance_embeds=True,
        axes_dims_rope=(16, 56, 56),
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    pipe = FluxPipeline(
        transformer=half(transformer), scheduler=scheduler, tokenizer_2=None, text_encoder_2=None, **NO_TEXT
    )
    text = {"prompt_embeds": embeds(1, 64, 4096, seed=1), "pooled_prompt_embeds": embeds(1, 768, seed=2)}
    return pipe, {**text, "height": 128, "width": 128}


def wan() -> TinyPipeline:
    """Wan 2.1 with 1.3 billion parameters; 1 of 30 blocks."""
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=12, attention_head_dim=128, in_channels=16, out_channels=16,
        text_dim=4096, freq_dim=256, ffn_dim=8960, num_layers=1, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", eps=1e-6, rope_max_seq_len=1024,
    )  # fmt: skip
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe = WanPipeline(transformer=half(transformer), scheduler=scheduler, **NO_TEXT)
    text = {"prompt_embeds": embeds(1, 512, 4096, seed=1), "negative_prompt_embeds": embeds(1, 512, 4096, seed=2)}
    return pipe, {**text, "height": 128, "width": 128, "num_frames": 5}


MADE = {made.__name__: made for made in (sd3_medium, flux, wan)}


@pytest.mark.slow
@pytest.mark.parametrize("name", MADE)
def test_both_plans_are_built_and_all_attentions_are_fused(name: str, tmp_path: Path) -> None:
    pipe, given = MADE[name]()
    bundle = fora_trt.export(pipe, tmp_path / name, precision="fp16", **given)
    manifest = bundle.manifest
    assert manifest.optimization == "fold"
    assert manifest.measured_error is not None
    assert max(error.relative for error in manifest.measured_error.values()) < 1e-3, manifest.measured_on
    target = target_of(library_from_name(TENSORRT_RTX), None, ("8.9",))
    options = PlanOptions(profiles=(Profile(minimum=1, optimum=2, maximum=4),))
    built = build_plans(bundle, target, options, tmp_path / "engines")[0].manifest
    full, reuse = built.plans["full"], built.plans["reuse"]
    assert {one.name: one.fused for one in full.attentions} == dict.fromkeys(ATTENTIONS[name], True)
    assert reuse.attentions == ()
    weights = graph_statistics(bundle.graph_path("full")).weight_bytes
    assert weights < built.files[full.file].size < 1.2 * weights
    assert graph_statistics(bundle.graph_path("reuse")).weight_bytes < REUSE_BYTES
    assert built.files[reuse.file].size < 2 * REUSE_BYTES
