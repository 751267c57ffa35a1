"""Pipelines of diffusers around the transformers of `tests/tiny_transformers.py`, without text encoders and VAE.

`PIPELINES` maps a name to a factory of the pipeline and of the arguments of a call with one prompt.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

import diffusers
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from tests.tiny_transformers import TRANSFORMERS

TinyPipeline: TypeAlias = tuple[Any, dict[str, Any]]


def piped(kind: str, transformer: str, scheduler: Any = None, **parts: Any) -> Any:
    """A pipeline of this class around a tiny transformer; parts that are not given are None."""
    made = getattr(diffusers, kind)
    module, _ = TRANSFORMERS[transformer]()
    given = {"transformer": module, "scheduler": scheduler or FlowMatchEulerDiscreteScheduler(), **parts}
    parameters = inspect.signature(made.__init__).parameters
    missing = [name for name, one in parameters.items() if name != "self" and one.default is inspect.Parameter.empty]
    pipe = made(**{**dict.fromkeys(missing), **given})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.int64)


def prompts(length: int = 6, width: int = 16, mask: bool = False, negative: bool = True, **more: Any) -> dict[str, Any]:
    """Prompt embeddings (1, L, D) and their masks; the negative ones differ."""
    given: dict[str, Any] = {"prompt_embeds": drawn(1, length, width, seed=1)}
    if mask:
        given["prompt_attention_mask"] = ones(1, length)
    if negative:
        given |= {
            f"negative_{name}": one.flip(1) * 0.5 if one.is_floating_point() else one for name, one in given.items()
        }
    return given | more


SQUARE = {"height": 64, "width": 64}


def sd3(kind: str = "sd3") -> TinyPipeline:
    pooled: dict[str, Any] = {
        "pooled_prompt_embeds": drawn(1, 64, seed=2),
        "negative_pooled_prompt_embeds": drawn(1, 64, seed=3),
    }
    return piped("StableDiffusion3Pipeline", kind), {**prompts(5, 32, **pooled), **SQUARE}


def sd35() -> TinyPipeline:
    return sd3("sd35")


def flux() -> TinyPipeline:
    """Embedded guidance; `use_dynamic_shifting` as the published configuration has it."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    text = {"text_encoder": None, "text_encoder_2": None}
    given = prompts(6, 32, negative=False, pooled_prompt_embeds=drawn(1, 32, seed=2))
    return piped("FluxPipeline", "flux", scheduler, **text), {**given, **SQUARE}


def flux_cfg() -> TinyPipeline:
    """True classifier-free guidance: two calls a step."""
    pipe, given = flux()
    negative = {
        "negative_pooled_prompt_embeds": drawn(1, 32, seed=3),
        "negative_prompt_embeds": drawn(1, 6, 32, seed=4),
    }
    return pipe, {**given, **negative, "true_cfg_scale": 3.0}


def flux2() -> TinyPipeline:
    return piped("Flux2Pipeline", "flux2"), {**prompts(6, 32, negative=False), **SQUARE}


def wan() -> TinyPipeline:
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return piped("WanPipeline", "wan", scheduler), {**prompts(), **SQUARE, "num_frames": 5}


def wan22() -> TinyPipeline:
    """Two transformers, each with its part of the steps."""
    pipe, given = wan()
    second, _ = TRANSFORMERS["wan"]()
    for one in second.parameters():
        one.data = one.data * 0.9
    both = {"transformer": pipe.transformer, "transformer_2": second, "boundary_ratio": 0.8}
    return type(pipe)(tokenizer=None, text_encoder=None, vae=None, scheduler=pipe.scheduler, **both), given


def ltx() -> TinyPipeline:
    given = {**prompts(mask=True), "height": 128, "width": 128, "num_frames": 9}
    return piped("LTXPipeline", "ltx"), given


def cogvideox(kind: str = "cogvideox") -> TinyPipeline:
    scheduler = diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    return piped("CogVideoXPipeline", kind, scheduler), {**prompts(), **SQUARE, "num_frames": 5}


def cogvideox_5b() -> TinyPipeline:
    return cogvideox("cogvideox_5b")


def sana() -> TinyPipeline:
    given = {**prompts(mask=True), "height": 256, "width": 256, "use_resolution_binning": False}
    return piped("SanaPipeline", "sana"), {**given, "negative_prompt": None}


def auraflow() -> TinyPipeline:
    return piped("AuraFlowPipeline", "auraflow"), {**prompts(mask=True), **SQUARE}


def lumina2() -> TinyPipeline:
    return piped("Lumina2Pipeline", "lumina2"), {**prompts(mask=True), **SQUARE}


def z_image() -> TinyPipeline:
    embeds = {"prompt_embeds": [drawn(32, 16, seed=1)], "negative_prompt_embeds": [drawn(32, 16, seed=2)]}
    return piped("ZImagePipeline", "z_image"), {**embeds, **SQUARE}


def qwen_image() -> TinyPipeline:
    masks: dict[str, Any] = {"prompt_embeds_mask": ones(1, 6), "negative_prompt_embeds_mask": ones(1, 6)}
    return piped("QwenImagePipeline", "qwen_image"), {
        **prompts(**masks),
        **SQUARE,
        "true_cfg_scale": 4.0,
        "max_sequence_length": 8,
    }


def hunyuan_dit() -> TinyPipeline:
    scheduler = DDIMScheduler(prediction_type="v_prediction", clip_sample=False)
    second: dict[str, Any] = {
        "prompt_embeds_2": drawn(1, 6, 16, seed=5),
        "negative_prompt_embeds_2": drawn(1, 6, 16, seed=6),
        "prompt_attention_mask_2": ones(1, 6),
        "negative_prompt_attention_mask_2": ones(1, 6),
    }
    given = {**prompts(5, mask=True, **second), **SQUARE, "use_resolution_binning": False}
    return piped("HunyuanDiTPipeline", "hunyuan_dit", scheduler, requires_safety_checker=False), given


def hunyuan_video() -> TinyPipeline:
    pooled: dict[str, Any] = {"pooled_prompt_embeds": drawn(1, 8, seed=2)}
    return piped("HunyuanVideoPipeline", "hunyuan_video"), {
        **prompts(mask=True, negative=False, **pooled),
        **SQUARE,
        "num_frames": 5,
    }


def kandinsky5() -> TinyPipeline:
    given = {
        "prompt_embeds_qwen": drawn(1, 6, 16, seed=1),
        "prompt_embeds_clip": drawn(1, 8, seed=2),
        "prompt_cu_seqlens": torch.tensor([0, 6], dtype=torch.int32),
        "negative_prompt_embeds_qwen": drawn(1, 6, 16, seed=3),
        "negative_prompt_embeds_clip": drawn(1, 8, seed=4),
        "negative_prompt_cu_seqlens": torch.tensor([0, 6], dtype=torch.int32),
    }
    return piped("Kandinsky5T2VPipeline", "kandinsky5"), {**given, **SQUARE, "num_frames": 5}


def mochi() -> TinyPipeline:
    return piped("MochiPipeline", "mochi"), {**prompts(mask=True), **SQUARE, "num_frames": 7}


def allegro() -> TinyPipeline:
    return piped("AllegroPipeline", "allegro", DDIMScheduler(clip_sample=False)), {
        **prompts(mask=True),
        "negative_prompt": None,
        **SQUARE,
        "num_frames": 8,
    }


def latte() -> TinyPipeline:
    given = {**prompts(), **SQUARE, "video_length": 3, "negative_prompt": None}
    return piped("LattePipeline", "latte", DDIMScheduler(clip_sample=False)), given


def stable_audio() -> TinyPipeline:
    """Audio; positions and the timestep (1,) are the same for all samples."""
    from diffusers.pipelines.stable_audio import StableAudioProjectionModel

    vae = diffusers.AutoencoderOobleck(
        encoder_hidden_size=6, downsampling_ratios=[1, 2], decoder_channels=3, decoder_input_channels=8,
        audio_channels=2, channel_multiples=[2, 4], sampling_rate=4,
    )  # fmt: skip
    projection = StableAudioProjectionModel(text_encoder_dim=16, conditioning_dim=12, min_value=0, max_value=32)
    parts = {"vae": vae, "projection_model": projection.eval()}
    given = {**prompts(3), "audio_end_in_s": 4.0, "guidance_scale": 7.0}
    masks = {"attention_mask": ones(1, 3), "negative_attention_mask": ones(1, 3)}
    return piped("StableAudioPipeline", "stable_audio", DPMSolverMultistepScheduler(), **parts), {**given, **masks}


PIPELINES: dict[str, Callable[[], TinyPipeline]] = {
    made.__name__: made
    for made in (
        sd3, sd35, flux, flux_cfg, flux2, qwen_image, z_image, wan, wan22, ltx, cogvideox, cogvideox_5b, sana, lumina2,
        auraflow, hunyuan_dit, hunyuan_video, kandinsky5, mochi, allegro, latte, stable_audio,
    )
}  # fmt: skip
