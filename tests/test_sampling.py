import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from fora_trt import Denoiser, Schedule, load
from fora_trt.bundle import Bundle
from fora_trt.engines.base import Launch
from fora_trt.errors import BackendError, InputError
from fora_trt.evaluate.eager_fora import EagerFora
from fora_trt.images.decode import Decoder
from fora_trt.images.grid import grid, square_grid
from fora_trt.models.spec import DEFAULT_SCHEDULER
from fora_trt.pipeline import Pipeline
from fora_trt.plan import FULL_STEP
from fora_trt.sampling.conditioning import Conditioning, conditioning_of_classes
from fora_trt.sampling.guidance import mix_guidance
from fora_trt.sampling.loop import Trajectory
from fora_trt.sampling.scheduler_step import check_scheduler, scheduler_step_from, takes_variance
from fora_trt.sampling.schedulers import SHORT_NAMES, scheduler_choice, scheduler_from_config


@pytest.fixture(scope="module")
def denoiser(exported: Bundle) -> Denoiser:
    return load(exported, schedule="none", backend="onnxruntime", device="cpu")


def run(
    denoiser: Denoiser,
    bundle: Bundle,
    labels: list[int],
    *,
    scheduler: str | None = None,
    steps: int = 6,
    interval: int = 2,
    seed: int = 0,
    guidance: float = 1.5,
    batch_size: int = 64,
) -> Trajectory:
    pipeline = Pipeline(
        bundle, predictor=denoiser, cache_interval=interval, scheduler=scheduler, steps=steps, guidance_scale=guidance,
        batch_size=batch_size,
    )  # fmt: skip
    return pipeline(class_labels=labels, seed=seed).trajectory


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "dpm-solver++", "euler-ancestral"])
def test_an_image_is_the_same_in_any_batch(denoiser: Denoiser, exported: Bundle, scheduler: str) -> None:
    labels = [3, 7, 7, 500, 0]
    together = run(denoiser, exported, labels, scheduler=scheduler).latents
    in_pairs = run(denoiser, exported, labels, scheduler=scheduler, batch_size=2).latents
    last_alone = run(denoiser, exported, labels[4:], scheduler=scheduler, seed=4).latents
    scale = together.abs().max().item()
    torch.testing.assert_close(in_pairs, together, atol=1e-5 * scale, rtol=0)
    torch.testing.assert_close(last_alone[0], together[4], atol=1e-5 * scale, rtol=0)
    assert (together[1] - together[2]).abs().max() > 0.01 * scale, "same class, other seed"


@pytest.mark.parametrize("scheduler", SHORT_NAMES)
def test_every_scheduler_runs_and_caching_matters(denoiser: Denoiser, exported: Bundle, scheduler: str) -> None:
    cached = run(denoiser, exported, [1, 2], scheduler=scheduler, interval=3)
    plain = run(denoiser, exported, [1, 2], scheduler=scheduler, interval=1)
    assert cached.latents.isfinite().all()
    assert not torch.equal(cached.latents, plain.latents)
    assert len(plain.reuse_seconds) == 0 < len(cached.reuse_seconds)
    calls = len(plain.full_seconds)
    assert len(cached.full_seconds) == Schedule.fora(calls, 3).full_steps
    assert calls >= 6  # Heun and PNDM call the model more often than there are steps


def test_diffusers_class_names_are_taken_and_others_refused(exported: Bundle) -> None:
    config = exported.scheduler_config
    assert isinstance(scheduler_from_config(config, "DEISMultistepScheduler", True), diffusers.DEISMultistepScheduler)
    assert isinstance(scheduler_from_config(config, None, True), diffusers.DDIMScheduler)
    for wrong in ("ddim2", "AutoencoderKL", "KarrasVeScheduler", "RePaintScheduler", ""):
        with pytest.raises(InputError, match=r"there is no scheduler .* give one of ddim, ddpm"):
            scheduler_from_config(config, wrong, True)


def test_timesteps_can_be_spaced_as_the_dit_authors_space_them() -> None:
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    scheduler = scheduler_from_config(DEFAULT_SCHEDULER, "ddpm", True, "linspace")
    scheduler.set_timesteps(20)
    assert scheduler.timesteps.tolist() == [round(k * 999 / 19) for k in reversed(range(20))]
    with pytest.raises(ValueError, match="has no timestep spacing 'linspace'; leave it out"):
        scheduler_from_config(flow, None, False, "linspace")


def test_only_ddpm_takes_the_learned_variance(exported: Bundle) -> None:
    config = exported.scheduler_config
    assert takes_variance(scheduler_from_config(config, "ddpm", learned_sigma=True))
    assert not takes_variance(scheduler_from_config(config, "ddpm", learned_sigma=False))
    assert not takes_variance(scheduler_from_config({**config, "variance_type": "learned_range"}, "dpm-solver++", True))


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDPMParallelScheduler"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range"])
def test_the_variance_of_the_configuration_is_kept(name: str, variance: str) -> None:
    config = {**DEFAULT_SCHEDULER, "_class_name": name, "variance_type": variance}
    assert scheduler_from_config(config, None, learned_sigma=True).config["variance_type"] == variance
    if variance.startswith("learned"):
        with pytest.raises(InputError, match=f"variance_type '{variance}', but the network predicts no variance"):
            scheduler_from_config(config, None, learned_sigma=False)
    else:
        assert scheduler_from_config(config, None, learned_sigma=False).config["variance_type"] == variance


def test_every_setting_of_a_configuration_reaches_the_scheduler() -> None:
    """Each setting in a value that is not the default: none is dropped or replaced."""
    settings: dict[str, dict[str, Any]] = {
        "DDIMScheduler": {"set_alpha_to_one": False, "steps_offset": 1, "clip_sample": True, "thresholding": True,
                          "prediction_type": "v_prediction", "timestep_spacing": "trailing",
                          "rescale_betas_zero_snr": True},
        "DPMSolverMultistepScheduler": {"algorithm_type": "sde-dpmsolver++", "solver_order": 3,
                                        "final_sigmas_type": "sigma_min", "use_karras_sigmas": True},
        "LCMScheduler": {"original_inference_steps": 20, "timestep_scaling": 5.0, "prediction_type": "sample"},
        "FlowMatchEulerDiscreteScheduler": {"shift": 3.0, "num_train_timesteps": 500, "use_karras_sigmas": True},
    }  # fmt: skip
    for name, given in settings.items():
        scheduler = scheduler_from_config({**DEFAULT_SCHEDULER, **given, "_class_name": name}, None, True)
        assert {key: scheduler.config[key] for key in given} == given


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "VQDiffusionScheduler"}, "VQDiffusionScheduler does not support the settings"),
        ({"_class_name": "KarrasVeScheduler"}, "there is no scheduler 'KarrasVeScheduler' for this model"),
        (
            {"_class_name": "DPMSolverSDEScheduler"},
            "DPMSolverSDEScheduler requires the torchsde library but it was not found",
        ),
        ({"rescale_betas_zero_snr": True}, "has rescale_betas_zero_snr, so its first step is pure noise"),
        ({"beta_start": float("nan")}, "the scheduler's beta_start is nan; a number between 0 and 1 is needed"),
        ({"beta_end": "0.02"}, "the scheduler's beta_end is '0.02'"),
        ({"num_train_timesteps": 10**9}, "num_train_timesteps is 1000000000; an integer from 1 to 100000"),
        ({"num_train_timesteps": 2}, "DDIMScheduler does not support 4 steps"),
        ({"beta_schedule": "cubic"}, "does not support the settings of this model's scheduler"),
        (
            {"trained_betas": [0.0] * 999 + [float("nan")]},
            "the noise levels of DDIMScheduler are not all between 0 and 1",
        ),
        ({"_class_name": ["DDIMScheduler"]}, "there is no scheduler"),
    ],
)
def test_a_scheduler_that_cannot_run_is_refused_before_the_export(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_scheduler({**DEFAULT_SCHEDULER, **changes}, learned_sigma=True)


@pytest.mark.parametrize("name", ["LCMScheduler", "TCDScheduler", "SASolverScheduler", *SHORT_NAMES.values()])
def test_schedulers_that_step_from_a_prediction_alone_are_taken(name: str) -> None:
    check_scheduler({**DEFAULT_SCHEDULER, "_class_name": name}, learned_sigma=True)


def test_the_loop_equals_diffusers_own_for_ddpm_with_learned_variance(denoiser: Denoiser, exported: Bundle) -> None:
    """The pipeline's loop for one image, written out; same generator for the noise and for every step."""
    reference = EagerFora(exported, torch.device("cpu"))
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range", clip_sample=False)
    scheduler.set_timesteps(10)
    generator = torch.Generator().manual_seed(11)
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    for t in scheduler.timesteps:
        with torch.no_grad():
            output = reference.compute(FULL_STEP, torch.cat([latents] * 2), t, class_labels=torch.tensor([5, 1000]))
        cond, null = output.chunk(2)
        noise = null[:, :4] + 3.0 * (cond[:, :4] - null[:, :4])
        latents = scheduler.step(torch.cat([noise, cond[:, 4:]], 1), t, latents, generator=generator).prev_sample
    got = run(denoiser, exported, [5], scheduler="ddpm", steps=10, interval=1, seed=11, guidance=3.0).latents
    torch.testing.assert_close(got, latents, atol=1e-4 * latents.abs().max().item(), rtol=0)


def test_guidance_up_to_one_runs_the_conditional_half_alone(denoiser: Denoiser, exported: Bundle) -> None:
    pipeline = Pipeline(exported, predictor=denoiser, steps=4)
    sampler = pipeline.sampler(pipeline.sampling(schedule="fora:2"))
    wanted = conditioning_of_classes(exported.manifest, [1, 2, 3])
    for guidance, batch in ((1.0, 3), (1.1, 6)):
        sampler(wanted, [0, 1, 2], guidance)
        assert denoiser.window is not None
        assert len(denoiser.window.buffers.tensors["latents"]) == batch


def test_guidance_without_an_unconditional_half_is_refused(denoiser: Denoiser, exported: Bundle) -> None:
    pipeline = Pipeline(exported, predictor=denoiser, steps=2)
    sampler = pipeline.sampler(pipeline.sampling(schedule="none"))
    given = conditioning_of_classes(exported.manifest, [1])
    alone = Conditioning(given.images, given.conditional, None)
    message = (
        "classifier-free guidance needs unconditional inputs; none were given for tiny; "
        "add them, or turn guidance off with --guidance-scale 1"
    )
    with pytest.raises(InputError, match=message):
        sampler(alone, [0], guidance=1.5)
    assert sampler(alone, [0], guidance=1.0).latents.isfinite().all()


def test_guidance_mixes_the_noise_and_keeps_the_variance() -> None:
    conditional, unconditional = torch.full((1, 4, 2, 2), 3.0), torch.full((1, 4, 2, 2), 1.0)
    mixed = mix_guidance(conditional, unconditional, torch.tensor(2.5), channels=2)
    assert mixed.shape == (1, 4, 2, 2)
    assert (mixed[:, :2] == 6.0).all()
    assert (mixed[:, 2:] == 3.0).all()


@pytest.mark.parametrize("label", [-1, 1000, 12345])
def test_a_class_out_of_range_is_refused(denoiser: Denoiser, exported: Bundle, label: int) -> None:
    with pytest.raises(InputError, match=f"there is no class {label}; tiny has the classes 0 to 999"):
        run(denoiser, exported, [0, label])


def test_latents_become_pictures_through_the_vae(denoiser: Denoiser, exported: Bundle) -> None:
    latents = run(denoiser, exported, [1, 2, 3]).latents
    images = Decoder(exported.manifest).images(latents, torch.device("cpu"))
    assert [image.size for image in images] == [(16, 16)] * 3
    assert {image.mode for image in images} == {"RGB"}
    assert exported.manifest.model.vae is not None
    vae = diffusers.AutoencoderKL.from_pretrained(exported.manifest.model.vae.where, subfolder="vae")
    with torch.no_grad():
        pixels = vae.decode(latents[:1] / vae.config.scaling_factor).sample[0, :, 0, 0]
    assert images[0].getpixel((0, 0)) == tuple(((pixels / 2 + 0.5).clamp(0, 1) * 255).round().int().tolist())


def test_a_given_vae_decodes_with_its_own_factors(exported: Bundle, tmp_path: Path) -> None:
    assert exported.manifest.model.vae is not None
    folder = Path(shutil.copytree(Path(exported.manifest.model.vae.where) / "vae", tmp_path / "vae"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "scaling_factor": 0.5, "shift_factor": 0.25}))
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    vae = diffusers.AutoencoderKL.from_pretrained(folder)
    with torch.no_grad():
        expected = (vae.decode(latents / 0.5 + 0.25).sample / 2 + 0.5).clamp(0, 1) * 255
    pictures = Decoder(exported.manifest, str(folder)).pictures(latents, torch.device("cpu"))
    assert torch.equal(pictures, expected.permute(0, 2, 3, 1))


def test_another_vae_at_the_same_place_is_not_used(exported: Bundle, tmp_path: Path) -> None:
    part = exported.manifest.model.vae
    assert part is not None
    folder = Path(shutil.copytree(Path(part.where) / "vae", tmp_path / "vae"))
    moved = dataclasses.replace(part, where=str(tmp_path))
    manifest = exported.manifest.model_copy(update={"model": exported.manifest.model.model_copy(update={"vae": moved})})
    Decoder(manifest)
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    weights["decoder.conv_out.bias"] += 1
    save_file(weights, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        InputError, match=r"the VAE at .* is another one than at export; put the old one there, or give"
    ):
        Decoder(manifest)
    Decoder(manifest, str(folder))  # asked for


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("no weights", r"has no weights: diffusion_pytorch_model\.safetensors was expected"),
        ("a pointer", r"diffusion_pytorch_model\.safetensors is a Git LFS pointer"),
        ("no folder", "is not a local folder and cannot be downloaded|no VAE was found at"),
        ("another class", "has no valid AutoencoderKL configuration: its class is 'AutoencoderTiny'"),
        ("16 channels", "has 16 latent channels, tiny has 4"),
    ],
)
def test_a_vae_that_cannot_decode_is_named_before_the_first_step(
    damage: str, message: str, exported: Bundle, tmp_path: Path
) -> None:
    assert exported.manifest.model.vae is not None
    folder = Path(shutil.copytree(Path(exported.manifest.model.vae.where) / "vae", tmp_path / "vae"))
    weights, config = folder / "diffusion_pytorch_model.safetensors", json.loads((folder / "config.json").read_text())
    if damage == "no weights":
        weights.unlink()
    elif damage == "a pointer":
        weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 334643238\n")
    elif damage == "no folder":
        shutil.rmtree(folder)
    elif damage == "another class":
        (folder / "config.json").write_text(json.dumps({**config, "_class_name": "AutoencoderTiny"}))
    else:
        (folder / "config.json").write_text(json.dumps({**config, "latent_channels": 16}))
    with pytest.raises(InputError, match=message):
        Decoder(exported.manifest, str(folder))


def test_grids_have_a_cell_for_each_picture_and_enlarge_small_ones() -> None:
    small = [Image.new("L", (8, 8), 255 * (k % 2)) for k in range(5)]
    assert square_grid(small).size == (3 * (64 + 4) + 4, 2 * (64 + 4) + 4)
    large = [Image.new("RGB", (100, 100), "red")] * 2
    assert grid([large]).size == (2 * 104 + 4, 104 + 4)
    labelled = grid([small, small], ["one", "a longer label"])
    assert labelled.width > 5 * 68 + 4
    assert labelled.getpixel((labelled.width - 10, 10)) == 0


def test_latents_that_are_not_finite_are_an_error_and_no_black_picture(
    denoiser: Denoiser, exported: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bind(tensors: Mapping[str, Tensor]) -> Launch:
        def launch() -> None:
            tensors["noise_prediction"].fill_(torch.inf)

        return launch

    denoiser.begin([FULL_STEP], torch.zeros(1), {}, [9])  # another batch, so that engines are bound again
    monkeypatch.setattr(denoiser.engines["full"], "bind", bind)
    message = (
        "latents of tiny are not finite in fp32; the first tensor with such values is noise_prediction, at step 0 of 2"
    )
    with pytest.raises(BackendError, match=message):
        run(denoiser, exported, [1], steps=2, interval=1)
    monkeypatch.undo()
    denoiser.begin([FULL_STEP], torch.zeros(1), {}, [9])


def test_a_scheduler_takes_its_order_and_spacing_in_a_text(exported: Bundle) -> None:
    config = exported.scheduler_config
    for text, expected in (
        ("dpm-solver++:order=3", {"solver_order": 3}),
        ("dpm-solver++:order=1,spacing=lu", {"solver_order": 1, "use_lu_lambdas": True, "use_karras_sigmas": False}),
        ("unipc:spacing=karras", {"use_karras_sigmas": True}),
        ("ddim:spacing=trailing", {"timestep_spacing": "trailing"}),
    ):
        made = scheduler_from_config(config, text, False).config
        assert {name: made[name] for name in expected} == expected
        assert scheduler_choice(config, text).label == text
        assert scheduler_choice(config, scheduler_choice(config, text).text) == scheduler_choice(config, text)


@pytest.mark.parametrize(
    ("text", "spacing", "message"),
    [
        ("ddim:order=2", None, "DDIMScheduler has a fixed order; leave order=2 out"),
        ("ddim:spacing=lu", None, "DDIMScheduler has no timestep spacing 'lu'; leave it out"),
        ("dpm-solver++:order=x", None, "'order=x' in the scheduler 'dpm-solver[+][+]:order=x' is not an order; give 1"),
        ("dpm-solver++:spacing=wide", None, "'spacing=wide' in the scheduler .* is not known; give one of leading"),
        ("unipc:steps=3", None, "'steps=3' in the scheduler 'unipc:steps=3' is not understood; the form is NAME"),
        ("unipc:order=2,order=3", None, "'order=3' in the scheduler .* is not understood"),
        ("unipc:", None, None),
        ("unipc:spacing=trailing", "leading", "has a spacing already; give it there or with --timestep-spacing"),
        ("dpm-solver++:order=9", None, "'order=9' in the scheduler .* is not an order; give 1, 2 or 3"),
    ],
)
def test_a_wrong_setting_of_a_scheduler_is_a_sentence(
    exported: Bundle, text: str, spacing: str | None, message: str | None
) -> None:
    if message is None:
        assert scheduler_choice(exported.scheduler_config, text).label == "unipc"
        return
    with pytest.raises(InputError, match=message):
        scheduler_step_from(scheduler_from_config(exported.scheduler_config, text, False, spacing), 8)
