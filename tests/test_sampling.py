from collections.abc import Mapping

import diffusers
import pytest
import torch
from PIL import Image
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
from fora_trt.sampling.scheduler_step import scheduler_step_from, takes_variance
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
    for wrong in ("ddim2", "AutoencoderKL", "CogVideoXDDIMScheduler", ""):
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
    mixed = mix_guidance(torch.cat([conditional, unconditional]), torch.tensor(2.5), channels=2)
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
    vae = diffusers.AutoencoderKL.from_pretrained(exported.manifest.model.vae, subfolder="vae")
    with torch.no_grad():
        pixels = vae.decode(latents[:1] / vae.config.scaling_factor).sample[0, :, 0, 0]
    assert images[0].getpixel((0, 0)) == tuple(((pixels / 2 + 0.5).clamp(0, 1) * 255).round().int().tolist())


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
