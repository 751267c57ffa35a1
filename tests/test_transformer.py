from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiTPipeline, HeunDiscreteScheduler

from fora_trt import Schedule, load
from fora_trt.bundle import Bundle
from fora_trt.errors import ScheduleError
from tests.test_denoiser import SITES


@pytest.fixture
def pipe(pipeline_folder: Path) -> DiTPipeline:
    loaded = DiTPipeline.from_pretrained(pipeline_folder)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def images(pipe: DiTPipeline, steps: int = 10) -> np.ndarray:
    made = pipe(class_labels=[1, 2], num_inference_steps=steps, generator=torch.manual_seed(3), output_type="np")
    return np.asarray(made.images)


def test_a_pipeline_makes_the_same_pictures_at_interval_one(pipe: DiTPipeline, exported: Bundle) -> None:
    before = images(pipe)
    denoiser = load(exported, schedule=Schedule.fora(10, 1), device="cpu")
    pipe.transformer = denoiser.as_transformer()
    assert np.abs(images(pipe) - before).max() < 1 / 255
    assert np.abs(images(pipe) - before).max() < 1 / 255, "a second call starts anew"


def test_a_pipeline_caches_as_eager_fora_does(pipe: DiTPipeline, exported: Bundle) -> None:
    full = (0, 2, 5, 8)
    kept: dict[str, torch.Tensor] = {}
    calls = [0]
    module, original = pipe.transformer, {path: pipe.transformer.get_submodule(path).forward for path in SITES}
    for path in SITES:

        def cached(*args: object, path: str = path, **kwargs: object) -> torch.Tensor:
            if calls[0] in full:
                kept[path] = original[path](*args, **kwargs)
            return kept[path]

        module.get_submodule(path).forward = cached
    schedule = Schedule.from_flags(tuple(step in full for step in range(10)))
    module.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    expected = images(pipe)
    pipe.transformer = load(exported, schedule=schedule, device="cpu").as_transformer()
    assert np.abs(images(pipe) - expected).max() < 1 / 255


def test_an_interrupted_trajectory_does_not_shift_the_next(pipe: DiTPipeline, exported: Bundle) -> None:
    transformer = load(exported, schedule=Schedule.fora(10, 3), device="cpu").as_transformer()
    pipe.transformer = transformer
    first = images(pipe)
    transformer(torch.randn(4, 4, 8, 8), torch.full((4,), 900), class_labels=torch.tensor([1, 2, 3, 4]))
    transformer(torch.randn(4, 4, 8, 8), torch.full((4,), 800), class_labels=torch.tensor([1, 2, 3, 4]))
    np.testing.assert_array_equal(images(pipe), first)


def test_a_scheduler_that_repeats_timesteps_keeps_its_place(pipe: DiTPipeline, exported: Bundle) -> None:
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    before = images(pipe, steps=5)
    pipe.transformer = load(exported, schedule=Schedule.fora(9, 1), device="cpu").as_transformer()
    assert np.abs(images(pipe, steps=5) - before).max() < 1 / 255


def test_a_pipeline_may_take_any_number_of_steps(pipe: DiTPipeline, exported: Bundle) -> None:
    transformer = load(exported, cache_interval=3, device="cpu").as_transformer()
    expected = {}
    for steps in (10, 7, 2):
        pipe.transformer = load(exported, schedule=Schedule.fora(steps, min(steps, 3)), device="cpu").as_transformer()
        expected[steps] = images(pipe, steps)
    pipe.transformer = transformer
    for steps in (10, 7, 2, 10):
        np.testing.assert_array_equal(images(pipe, steps), expected[steps])
        assert transformer.denoiser.schedule == Schedule.fora(steps, min(steps, 3))
        assert transformer.denoiser.finished


def test_a_schedule_of_ones_own_is_for_its_number_of_steps(pipe: DiTPipeline, exported: Bundle) -> None:
    schedule = Schedule.from_flags((True, False, True, False))
    pipe.transformer = load(exported, schedule=schedule, device="cpu").as_transformer()
    images(pipe, steps=4)
    message = r"the pipeline takes 5 steps, but the schedule has 4; .* cache_interval=N"
    with pytest.raises(ScheduleError, match=message):
        images(pipe, steps=5)


def test_an_argument_that_is_none_does_not_hide_a_nested_one(exported: Bundle) -> None:
    transformer = load(exported, schedule=Schedule.none(1), backend="torch", device="cpu").as_transformer()
    latents, labels = torch.randn(1, 4, 8, 8), torch.tensor([3])
    nested = transformer(latents, 500.0, class_labels=None, added_cond_kwargs={"class_labels": labels}).sample.clone()
    assert torch.equal(transformer(latents, 500.0, class_labels=labels).sample, nested)
