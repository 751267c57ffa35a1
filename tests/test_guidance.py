"""Guidance on a part of the steps, and as many channels as the model says."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from fora_trt import Denoiser, Schedule, load
from fora_trt.bundle import Bundle
from fora_trt.cli import main
from fora_trt.engines.base import Launch
from fora_trt.errors import InputError
from fora_trt.pipeline import Pipeline
from fora_trt.plan import FULL_STEP, REUSE_STEP
from fora_trt.runtime.denoiser import EngineStep
from fora_trt.sampling.conditioning import conditioning_of_classes
from fora_trt.sampling.guidance import Guidance, mix_guidance
from fora_trt.sampling.loop import Sampler

STEPS = 12
LABELS = [5, 7]


@pytest.fixture(params=["onnxruntime", "torch"])
def pipeline(exported: Bundle, request: pytest.FixtureRequest) -> Pipeline:
    return Pipeline(exported, steps=STEPS, backend=request.param, device="cpu")


@pytest.fixture
def denoiser(pipeline: Pipeline) -> Denoiser:
    assert isinstance(pipeline.denoiser, Denoiser)
    return pipeline.denoiser


def sampler_of(pipeline: Pipeline, interval: int = 1) -> Sampler:
    return pipeline.sampler(pipeline.sampling(schedule=Schedule.fora(STEPS, interval)))


def latents(sampler: Sampler, guidance: Guidance | float) -> Tensor:
    given = conditioning_of_classes(sampler.denoiser.manifest, LABELS)
    return sampler(given, [0, 1], guidance).latents


def by_hand(pipeline: Pipeline, guidance: Guidance, full_steps: set[int]) -> Tensor:
    """The same trajectory with every half computed by itself, and features kept for each half."""
    scheduler_step = pipeline.sampling(schedule="none").scheduler_step
    scheduler_step.begin(pipeline.manifest.latents.shape, [0, 1], torch.device("cpu"))
    plan = [FULL_STEP if step in full_steps else REUSE_STEP for step in range(STEPS)]
    labels = {null: {"class_labels": torch.tensor([1000, 1000] if null else LABELS)} for null in (False, True)}
    halves = {
        null: load(pipeline.bundle, schedule="none", backend=pipeline.backend.name, device="cpu") for null in labels
    }
    runs = {null: halves[null].begin(plan, scheduler_step.timesteps, labels[null], [2]) for null in labels}
    for step in range(STEPS):
        now, time = scheduler_step.model_input(), scheduler_step.timestep()
        noise = {}
        for null in (False, True):
            if null and not guidance.guides(step):
                continue
            ready = runs[null].at(step, 2)
            noise[null] = ready.predict(int(step not in full_steps), now, time, **labels[null])[:, :4].clone()
        guided = noise[False]
        if True in noise:
            guided = noise[True] + guidance.scale * (noise[False] - noise[True])
        scheduler_step.advance(guided)
    return scheduler_step.latents.clone()


@pytest.mark.parametrize(
    ("guidance", "interval", "full"),
    [
        (Guidance(2.0), 3, {0, 2, 5, 8, 11}),
        (Guidance(2.0, 0, 6), 3, {0, 2, 5, 8, 11}),
        (Guidance(2.0, 4, 9), 3, {0, 2, 4, 5, 8, 11}),  # 4: the unconditional half has no features before
        (Guidance(2.0, 2, None), 12, {0, 2, 11}),
        (Guidance(2.0, 20, None), 3, {0, 2, 5, 8, 11}),
    ],
)
def test_guidance_of_some_steps_is_what_each_half_alone_gives(
    guidance: Guidance, interval: int, full: set[int], pipeline: Pipeline
) -> None:
    sampler, expected = sampler_of(pipeline, interval), by_hand(pipeline, guidance, full)
    assert (latents(sampler, guidance) - expected).abs().max() < 1e-4
    assert (latents(sampler, guidance) - expected).abs().max() < 1e-4, "again, on the same memory"


def test_steps_without_guidance_run_the_conditional_half_alone(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = []
    predict = EngineStep.predict

    def counted(step: EngineStep, offset: int, latents: Tensor, timestep: Tensor | float, **given: Tensor) -> Tensor:
        batches.append(len(latents))
        return predict(step, offset, latents, timestep, **given)

    monkeypatch.setattr(EngineStep, "predict", counted)
    sampler = sampler_of(pipeline)
    latents(sampler, Guidance(2.0, 4, 9))
    assert batches == [2] * 4 + [4] * 5 + [2] * 3
    batches.clear()
    latents(sampler, 1.0)
    assert batches == [2] * STEPS


@pytest.mark.parametrize(
    ("guidance", "batches"),
    [(Guidance(2.0), [4]), (Guidance(1.0), [2]), (Guidance(2.0, 0, 6), [4, 2, 4, 2])],
)
def test_engines_are_bound_to_no_batch_that_no_step_has(
    guidance: Guidance, batches: list[int], pipeline: Pipeline, denoiser: Denoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plans may admit no smaller batch, and a batch that is bound again is captured again."""
    bound = []
    bind = denoiser.engines["full"].bind

    def noted(tensors: Mapping[str, Tensor]) -> Launch:
        bound.append(len(tensors["latents"]))
        return bind(tensors)

    monkeypatch.setattr(denoiser.engines["full"], "bind", noted)
    sampler = sampler_of(pipeline)
    latents(sampler, guidance)
    assert bound == batches
    latents(sampler, guidance)
    assert bound == (batches if len(batches) == 1 else [*batches, 4, 2, 4, 2])


def test_a_smaller_batch_uses_the_first_rows_of_the_same_memory(denoiser: Denoiser) -> None:
    def generation(batch: int) -> object:
        return denoiser.begin([FULL_STEP], torch.zeros(1), {}, [batch]).generation

    def addresses() -> dict[str, int]:
        assert denoiser.window is not None
        return {name: tensor.data_ptr() for name, tensor in denoiser.window.buffers.tensors.items()}

    of_four = generation(4)
    assert generation(4) == of_four
    before = addresses()
    assert generation(2) != of_four, "its launches are others, and what was captured of the first is invalid"
    assert addresses() == before
    assert generation(5) != of_four


def test_only_the_first_channels_are_guided() -> None:
    prediction = torch.arange(2 * 6.0).view(2, 6, 1, 1)  # conditional 0 to 5, unconditional 6 to 11
    mixed = mix_guidance(prediction[:1], prediction[1:], torch.tensor(2.0), 3)
    assert mixed.flatten().tolist() == [-6, -5, -4, 3, 4, 5]


def test_the_command_takes_a_range_of_steps(exported: Bundle, tmp_path: Path) -> None:
    command = ["run", str(exported.folder), "--class-labels", "1", "--steps", "12", "--device", "cpu", "--json"]
    made = CliRunner().invoke(main, [*command, "--guidance-interval", "4:9", "-o", str(tmp_path / "a.png")])
    assert made.exit_code == 0, made.output
    assert '"full_steps": 6' in made.stdout
    pipeline = Pipeline(exported, steps=2, backend="onnxruntime", device="cpu")
    bare = replace(conditioning_of_classes(exported.manifest, [1]), unconditional=None)
    with pytest.raises(InputError, match="guidance needs unconditional inputs; none were given for tiny"):
        pipeline.sampler(pipeline.sampling(schedule="none"))(bare, [0], 2.0)
