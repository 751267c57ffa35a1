"""Bundle and settings in, images out: each setting reaches its part, and images are those of other implementations."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline

import fora_trt
from fora_trt import Pipeline, PipelineConfig, Schedule, load
from fora_trt.bundle import Bundle
from fora_trt.engines.backends import BACKENDS
from fora_trt.engines.base import Engine
from fora_trt.engines.options import EngineOptions
from fora_trt.errors import BackendError, BundleError, InputError, ScheduleError
from fora_trt.evaluate.eager_fora import EagerFora
from fora_trt.images.decode import Decoder
from fora_trt.pipeline import Sampling
from fora_trt.runtime.denoiser import Denoiser
from fora_trt.sampling.conditioning import Conditioning, conditioning_of_classes
from fora_trt.sampling.guidance import Guidance

CPU = torch.device("cpu")
SETTINGS: dict[str, Any] = {"steps": 8, "backend": "torch", "device": "cpu"}


def test_images_are_those_of_the_diffusers_pipeline(pipeline_folder: Path, exported: Bundle) -> None:
    """The same noise, without caching: the pipeline of diffusers is another implementation of all of it."""
    pipe = DiTPipeline.from_pretrained(pipeline_folder)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    expected = pipe([7], num_inference_steps=8, guidance_scale=1.5, output_type="np", generator=generator)
    made = Pipeline(exported, schedule="none", **SETTINGS)(class_labels=[7], seed=5)
    assert made.guidance == Guidance(1.5), "the usual scale of a model of classes"
    difference = np.asarray(made.images[0]) / 255 - expected.images[0]
    assert np.abs(difference).max() < 1.5 / 255


def test_an_output_has_latents_images_and_times(exported: Bundle) -> None:
    made = Pipeline(exported, cache_interval=3, batch_size=2, **SETTINGS)(class_labels=[1, 2, 3], seed=9)
    assert made.latents.shape == (3, 4, 8, 8)
    assert [image.size for image in made.images] == [(16, 16)] * 3
    assert made.images is made.images, "decoded once"
    assert made.sampling.schedule == Schedule.fora(8, 3)
    assert (made.full_steps, made.batch_size) == (4, 2)
    assert len(made.trajectory.full_seconds) == 2 * 4
    assert len(made.trajectory.reuse_seconds) == 2 * 4
    assert made.trajectory.seconds > sum(made.trajectory.full_seconds)
    alone = Pipeline(exported, cache_interval=3, **SETTINGS)(class_labels=[2], seed=10)
    torch.testing.assert_close(alone.latents[0], made.latents[1], atol=1e-5, rtol=1e-4)


def test_a_pipeline_is_the_denoiser_called_step_by_step(exported: Bundle) -> None:
    made = Pipeline(exported, cache_interval=2, guidance_scale=1.0, **SETTINGS)(class_labels=[4], seed=3)
    denoiser = load(exported, schedule=Schedule.fora(8, 2), backend="torch", device="cpu")
    scheduler = DDIMScheduler.from_config(exported.scheduler_config)
    scheduler.set_timesteps(8)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    for t in scheduler.timesteps:
        noise = denoiser(latents, t, class_labels=torch.tensor([4]))[:, :4]
        latents = scheduler.step(noise, t, latents).prev_sample
    torch.testing.assert_close(made.latents, latents, atol=1e-5, rtol=1e-4)


def test_settings_reach_their_parts(exported: Bundle) -> None:
    pipeline = Pipeline(
        exported, schedule="fora:2", scheduler="heun", timestep_spacing="trailing", guidance_scale=3.0,
        guidance_interval=(2, 5), backend="torch", device="cpu", steps=6,
    )  # fmt: skip
    sampling = pipeline.sampling()
    assert type(sampling.scheduler).__name__ == "HeunDiscreteScheduler"
    assert sampling.scheduler.config["timestep_spacing"] == "trailing"
    assert (sampling.steps, sampling.nfe, sampling.schedule.text) == (6, 11, "fora:2")
    assert pipeline.sampling(4, "none").schedule == Schedule.none(7)
    given = conditioning_of_classes(exported.manifest, [1])
    assert pipeline.guidance(given, sampling) == Guidance(3.0, 2, 5)
    assert (pipeline.backend.name, pipeline.device) == ("torch", CPU)
    assert isinstance(pipeline.denoiser, Denoiser)
    assert pipeline.denoiser is pipeline.denoiser, "started once"
    made = pipeline(class_labels=[1], steps=3)
    assert (made.sampling.steps, made.sampling.nfe) == (3, 5), "of the call"


def test_other_steps_and_schedules_share_the_engines(exported: Bundle) -> None:
    pipeline = Pipeline(exported, cache_interval=2, **SETTINGS)
    first = pipeline(class_labels=[1]).latents
    denoiser = pipeline.denoiser
    sampling = pipeline.sampling(schedule="none")
    assert sampling.with_schedule("fora:4").scheduler_step is sampling.scheduler_step
    plain = pipeline.sampler(sampling)(conditioning_of_classes(exported.manifest, [1]), [0], 1.5).latents
    assert not torch.equal(plain, first)
    assert torch.equal(pipeline(class_labels=[1]).latents, first)
    assert pipeline.denoiser is denoiser


def test_another_predictor_takes_the_steps(exported: Bundle) -> None:
    pipeline = Pipeline(exported, cache_interval=3, **SETTINGS)
    eager = pipeline.over(EagerFora(exported, CPU))
    assert eager.config == pipeline.config
    torch.testing.assert_close(
        eager(class_labels=[1, 2]).latents, pipeline(class_labels=[1, 2]).latents, atol=1e-4, rtol=1e-3
    )


def test_a_configuration_is_plain_and_pickles(exported: Bundle) -> None:
    config = PipelineConfig(exported.folder, cache_interval=3, steps=8, backend="torch", device="cpu")
    assert config.schedule == "fora:3"
    assert pickle.loads(pickle.dumps(config)) == config  # of this very line
    assert PipelineConfig(exported.folder, forecast=2).schedule == "dense:every=3,forecast=2"
    assert PipelineConfig(exported.folder, forecast=0).schedule == "fora:3"
    assert PipelineConfig(exported.folder, cache_interval=3, forecast=2).schedule == "fora:3,forecast=2"
    flags = [True, False, True, False]
    forecast = PipelineConfig(exported.folder, schedule=Schedule.from_flags(flags), forecast=1, steps=4)
    assert isinstance(forecast.schedule, Schedule)
    assert forecast.schedule.plan[3].weights == (1.5, -0.5)
    own = PipelineConfig(exported.folder, schedule=Schedule.from_flags([True, False]), steps=2)
    assert pickle.loads(pickle.dumps(own)).schedule.full == (True, False)  # of this very line
    one = Pipeline(config)(class_labels=[1]).latents
    assert torch.equal(one, Pipeline(exported, cache_interval=3, **SETTINGS)(class_labels=[1]).latents)
    assert Pipeline(config, steps=2).config.steps == 2


def test_a_vae_of_ones_own_decodes(pipeline_folder: Path, exported: Bundle) -> None:
    record = exported.manifest.model.model_copy(update={"vae": None})
    bare = Bundle(exported.folder, exported.manifest.model_copy(update={"model": record}))
    made = Pipeline(bare, **SETTINGS)(class_labels=[1])
    with pytest.raises(InputError, match=r"has none; name one with --vae FOLDER$"):
        made.images  # noqa: B018 # decoded when asked for
    named = Pipeline(bare, vae=str(pipeline_folder), **SETTINGS)(class_labels=[1])
    expected = Decoder(exported.manifest).images(made.latents, CPU)[0]
    assert named.images[0].tobytes() == expected.tobytes()


def test_engines_that_are_built_for_a_batch_are_built_again_for_a_larger_one(
    exported: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only TensorRT builds; here PyTorch says that it does."""
    monkeypatch.setattr(BACKENDS["torch"], "builds", True)
    asked: list[int] = []
    original = BACKENDS["torch"].engines_of

    def engines_of(bundle: Bundle, device: torch.device, options: EngineOptions) -> dict[str, Engine]:
        asked.append(options.batch)
        return original(bundle, device, options)

    monkeypatch.setattr(BACKENDS["torch"], "engines_of", engines_of)
    pipeline = Pipeline(exported, cache_interval=2, **SETTINGS)
    for labels in ([1], [1, 2, 3], [4, 5]):
        pipeline(class_labels=labels)
    assert asked == [2, 6], "twice the images, for guidance"


MISTAKES: dict[str, tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = {
    "no batch": ({"batch_size": 0}, {}, InputError, "the batch size is 0; at least 1 is needed"),
    "two schedules": (
        {"schedule": "fora:5", "cache_interval": 2},
        {},
        InputError,
        "schedule='fora:5' and cache_interval=2 say the same",
    ),
    "two orders": (
        {"schedule": "fora:2,forecast=1", "forecast": 2},
        {},
        ScheduleError,
        "the schedule 'fora:2,forecast=1' has a forecast order already; give one order, here or there",
    ),
    "an order for a file": (
        {"schedule": "own.json", "forecast": 2},
        {},
        ScheduleError,
        "the schedule own.json has weights of its own; give the file without a forecast order",
    ),
    "an order without caching": ({"cache_interval": 1, "forecast": 2}, {}, ScheduleError, "no step can forecast"),
    "no such order": ({"forecast": 4}, {}, ScheduleError, "the forecast order is 4; give 0"),
    "no interval": ({"cache_interval": 0}, {}, ScheduleError, "the cache interval is 0"),
    "unknown schedule": ({"schedule": "often"}, {}, ScheduleError, "there is no schedule 'often'; give none, fora:N"),
    "schedule of others": (
        {"schedule": Schedule.none(4)},
        {},
        ScheduleError,
        "is for 4 model evaluations, .* has 8",
    ),
    "unknown scheduler": ({"scheduler": "x"}, {}, InputError, "there is no scheduler 'x'"),
    "unknown backend": ({"backend": "x"}, {}, BackendError, "unknown backend 'x'"),
    "unknown device": ({"device": "x"}, {}, BackendError, "unknown device 'x'"),
    "no guided step": (
        {"guidance_interval": (8, 9)},
        {},
        InputError,
        "no step is guided: the guidance interval is 8:9",
    ),
    "negative guidance": ({"guidance_scale": -1.0}, {}, InputError, "the guidance scale is -1.0"),
    "nothing said": ({}, {"class_labels": None}, InputError, "tiny needs conditioning inputs; give --class-labels"),
    "no such class": ({}, {"class_labels": [1000]}, InputError, "there is no class 1000"),
    "labels of others": (
        {},
        {"conditioning": Conditioning(1, {}, None)},
        InputError,
        "leave the other inputs out",
    ),
    "two ways": ({}, {"prompt": "a cat"}, InputError, "exclude each other; give one of them"),
    "half a step": ({}, {"steps": 2.5}, InputError, "the number of steps is 2.5; an integer is needed"),
    "a negative seed": ({}, {"seed": -1}, InputError, "the seed is -1; at least 0 is needed"),
    "half a seed": ({}, {"seed": 0.5}, InputError, "the seed is 0.5; an integer is needed"),
    "half a batch": ({"batch_size": 1.5}, {}, InputError, "the batch size is 1.5; an integer is needed"),
    "no number": ({"guidance_scale": "2"}, {}, InputError, "guidance_scale is '2'; a number is needed"),
    "not a number": ({"guidance_scale": float("nan")}, {}, InputError, "the guidance scale is nan"),
    "half an interval": (
        {"guidance_interval": (5,)},
        {},
        InputError,
        r"guidance_interval is \(5,\); give the first step",
    ),
    "one label": (
        {},
        {"class_labels": 3},
        InputError,
        "class_labels is 3; give integers in a list, one for each image",
    ),
    "no labels": ({}, {"class_labels": []}, InputError, r"class_labels is \[\]; give integers in a list"),
    "labels in text": ({}, {"class_labels": "1,2"}, InputError, "class_labels is '1,2'; give integers in a list"),
    "lists of labels": ({}, {"class_labels": [[1, 2]]}, InputError, r"a class label is \[1, 2\]; an integer is needed"),
    "bool labels": ({}, {"class_labels": [True]}, InputError, "a class label is True; an integer is needed"),
    "half a label": ({}, {"class_labels": [1.5]}, InputError, "a class label is 1.5; an integer is needed"),
    "no steps": ({}, {"steps": 0}, InputError, "the number of steps is 0"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_a_sentence(exported: Bundle, mistake: str) -> None:
    settings, call, error, message = MISTAKES[mistake]
    with pytest.raises(error, match=message):
        Pipeline(exported, **{**SETTINGS, **settings})(**{"class_labels": [1], **call})


def test_a_folder_without_a_bundle_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a bundle: it contains no manifest"):
        Pipeline(tmp_path)


def test_a_way_to_sample_is_checked_against_the_scheduler(exported: Bundle) -> None:
    scheduler = DDIMScheduler.from_config(exported.scheduler_config)
    with pytest.raises(ScheduleError, match="larger than the number of steps 2"):
        Sampling.of(scheduler, 2, "fora:3")
    with pytest.raises(InputError, match="does not support 1001 steps"):
        Sampling.of(scheduler, 1001)


def test_the_public_names_are_those_that_are_listed() -> None:
    assert dir(fora_trt) == sorted(fora_trt.__all__)
    for name in fora_trt.__all__:
        assert getattr(fora_trt, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'pipline'"):
        fora_trt.pipline  # noqa: B018 # the mistake
