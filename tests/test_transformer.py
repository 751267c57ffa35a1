import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, DPMSolverMultistepScheduler, HeunDiscreteScheduler
from torch import Tensor

from fora_trt import Schedule, load
from fora_trt.bundle import Bundle
from fora_trt.errors import InputError, ScheduleError
from fora_trt.runtime.denoiser import EngineStep
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


def full_steps(run: Callable[[], object]) -> list[bool]:
    """Which of the steps that `run` takes compute every layer."""
    calls: list[bool] = []
    predict = EngineStep.predict

    def noted(self: EngineStep, offset: int, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(offset == 0)
        return predict(self, offset, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(EngineStep, "predict", noted)
        run()
    return calls


@pytest.mark.parametrize("given", ["pipeline", "scheduler"])
def test_a_replaced_scheduler_is_followed(given: str, pipe: DiTPipeline, optimized: dict[str, Bundle]) -> None:
    denoiser = load(optimized["fold"], cache_interval=3, device="cpu")
    pipe.transformer = denoiser.as_transformer(pipe if given == "pipeline" else pipe.scheduler)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the pipeline does not run|running a full step instead")
        calls = full_steps(lambda: images(pipe, steps=8))
    assert calls == [*Schedule.fora(8, 3).full]
    expected = images(pipe, steps=8)
    pipe.transformer = load(optimized["fold"], schedule=Schedule.fora(8, 3), device="cpu").as_transformer()
    np.testing.assert_array_equal(images(pipe, steps=8), expected)


@pytest.mark.parametrize("before", [None, 7])
def test_a_scheduler_that_is_not_in_use_is_said_aloud(before: int | None, exported: Bundle) -> None:
    """The pipeline passes copies of its timesteps, as on a GPU."""
    stale, used = DDIMScheduler(), DDIMScheduler(timestep_spacing="trailing")
    if before is not None:
        stale.set_timesteps(before)
    used.set_timesteps(9)
    transformer = load(exported, cache_interval=3, device="cpu").as_transformer(stale)
    latents, labels = torch.randn(1, 4, 8, 8), torch.tensor([3])

    def run() -> None:
        for timestep in used.timesteps.tolist():
            transformer(latents, torch.tensor(timestep), class_labels=labels)

    with pytest.warns(UserWarning, match="not run the timesteps of the DDIMScheduler .* give as_transformer") as told:
        calls = full_steps(run)
    assert len(told) == 1, "once"
    assert calls == [step % 3 == 0 for step in range(9)], "counted from the first step"
    stale.set_timesteps(4)
    used = stale
    assert full_steps(run) == [*Schedule.fora(4, 3).full], "it is looked up again"


LATENTS, LABELS = torch.zeros(2, 4, 8, 8), torch.tensor([1, 2])

MISUSED: dict[str, tuple[Any, Any, Any, str]] = {
    "no latents": (LATENTS[:0], 5, LABELS[:0], "the batch is 0; at least one latent is needed"),
    "a list": (LATENTS.tolist(), 5, LABELS, "'latents' is an object of type list; give a tensor"),
    "numpy latents": (LATENTS.numpy(), 5, LABELS, "'latents' is an object of type numpy.ndarray; give a tensor"),
    "complex latents": (LATENTS.to(torch.complex64), 5, LABELS, "latents have the dtype complex64; floating-point"),
    "integer latents": (LATENTS.int(), 5, LABELS, "latents have the dtype int32; floating-point numbers are needed"),
    "channels": (LATENTS[:, :3], 5, LABELS, r"latents have shape \[2, 3, 8, 8\]; tiny takes \[2, 4, 8, 8\]"),
    "another device": (LATENTS.to("meta"), 5, LABELS, "latents are on meta, but the engines of tiny on cpu; move"),
    "timesteps": (
        LATENTS,
        torch.zeros(3),
        LABELS,
        r"timestep has shape \[3\]; give one number, or one for each of the 2",
    ),
    "text": (LATENTS, "now", LABELS, "timestep is an object of type str; give a number"),
    "no timestep": (LATENTS, None, LABELS, "timestep is an object of type NoneType; give a number"),
    "a bool timestep": (LATENTS, True, LABELS, "timestep has the dtype bool; real numbers are needed"),
    "a complex timestep": (LATENTS, 1j, LABELS, "timestep has the dtype complex64; real numbers are needed"),
    "a list of labels": (LATENTS, 5, [1, 2], "'class_labels' is an object of type list; give a tensor"),
    "numpy labels": (LATENTS, 5, LABELS.numpy(), "'class_labels' is an object of type numpy.ndarray; give a tensor"),
    "bool labels": (LATENTS, 5, LABELS > 1, "'class_labels' has the dtype bool; give a tensor of int64"),
    "complex labels": (LATENTS, 5, LABELS * 1j, "'class_labels' has the dtype complex64; give a tensor of int64"),
    "half a label": (LATENTS, 5, LABELS / 2, "'class_labels' contains 0.5; valid values are integers from 0 to 1000"),
    "a label too many": (LATENTS, 5, torch.tensor([1, 1001]), "'class_labels' contains 1001; valid values"),
    "labels of another batch": (
        LATENTS,
        5,
        torch.tensor([1, 2, 3]),
        r"'class_labels' has shape \[3\]; tiny takes \[2\]",
    ),
}


@pytest.mark.parametrize("case", MISUSED)
def test_misuse_gives_a_sentence(case: str, exported: Bundle) -> None:
    latents, timestep, labels, message = MISUSED[case]
    denoiser = load(exported, schedule=Schedule.none(2), backend="torch", device="cpu")
    for called in (denoiser, denoiser.as_transformer()):
        denoiser.reset()
        with pytest.raises(InputError, match=message):
            called(latents, timestep, class_labels=labels)
    assert denoiser(LATENTS, torch.tensor([5, 5]), class_labels=LABELS.int()).shape == (2, 8, 8, 8), "goes on"


def test_labels_out_of_range_are_found_at_any_step(exported: Bundle) -> None:
    denoiser = load(exported, schedule=Schedule.none(2), backend="torch", device="cpu")
    denoiser(LATENTS, 5, class_labels=LABELS)
    with pytest.raises(InputError, match="'class_labels' contains -1"):
        denoiser(LATENTS, 4, class_labels=LABELS - 2)


def test_only_a_pipeline_or_a_scheduler_has_timesteps(exported: Bundle) -> None:
    denoiser = load(exported, schedule=Schedule.none(2), backend="torch", device="cpu")
    with pytest.raises(InputError, match="was given an object of type str; give the diffusers pipeline, its scheduler"):
        denoiser.as_transformer("ddim")
