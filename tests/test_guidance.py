"""Guidance on a part of the steps, and as many channels as the model says."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from fora_trt import Schedule, load
from fora_trt.bundle import Bundle
from fora_trt.cli import main
from fora_trt.engines.base import Launch
from fora_trt.errors import InputError
from fora_trt.runtime.conditioning import conditioning_of_classes
from fora_trt.runtime.denoiser import Denoiser
from fora_trt.runtime.sampling import Guidance, Sampler, mix_guidance
from fora_trt.runtime.schedulers import scheduler_from_config
from fora_trt.runtime.updates import update_from_scheduler

STEPS = 12
LABELS = [5, 7]


@pytest.fixture(params=["onnxruntime", "torch"])
def sampler(exported: Bundle, request: pytest.FixtureRequest) -> Sampler:
    denoiser = load(exported, schedule=Schedule.static(STEPS, 1), backend=request.param, device="cpu")
    scheduler = scheduler_from_config(exported.scheduler_config, None, learned_sigma=True)
    return Sampler(denoiser, update_from_scheduler(scheduler, STEPS))


def latents(sampler: Sampler, guidance: Guidance | float, interval: int = 1) -> torch.Tensor:
    given = conditioning_of_classes(sampler.denoiser.manifest, LABELS)
    return sampler(Schedule.static(STEPS, interval), given, [0, 1], guidance).latents


def by_hand(bundle: Bundle, sampler: Sampler, guidance: Guidance, full_steps: set[int]) -> torch.Tensor:
    """The same trajectory with every half computed by itself, and features kept for each half."""
    denoiser = sampler.denoiser
    assert isinstance(denoiser, Denoiser)
    halves = {
        null: load(bundle, schedule=denoiser.schedule, backend=denoiser.backend, device="cpu") for null in (False, True)
    }
    update = sampler.update
    update.begin(denoiser.manifest.latents.shape, [0, 1], torch.device("cpu"))
    for step in range(STEPS):
        now, time = update.model_input(), update.timestep()
        noise = {}
        for null in (False, True):
            labels = torch.tensor([1000, 1000] if null else LABELS)
            if null and not guidance.guides(step):
                continue
            halves[null].prepare(2)
            noise[null] = (
                halves[null].predict(int(step not in full_steps), now, time, class_labels=labels)[:, :4].clone()
            )
        guided = noise[False]
        if True in noise:
            guided = noise[True] + guidance.scale * (noise[False] - noise[True])
        update.advance(guided)
    return update.latents.clone()


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
    guidance: Guidance, interval: int, full: set[int], sampler: Sampler, exported: Bundle
) -> None:
    expected = by_hand(exported, sampler, guidance, full)
    assert (latents(sampler, guidance, interval) - expected).abs().max() < 1e-4
    assert (latents(sampler, guidance, interval) - expected).abs().max() < 1e-4, "again, on the same memory"


def test_steps_without_guidance_run_the_conditional_half_alone(sampler: Sampler) -> None:
    batches = []
    predict = sampler.denoiser.predict

    def counted(place: int, given: torch.Tensor, *args: object, **more: torch.Tensor) -> torch.Tensor:
        batches.append(len(given))
        return predict(place, given, *args, **more)  # type: ignore[arg-type]

    sampler.denoiser.predict = counted  # type: ignore[assignment, method-assign]
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
    guidance: Guidance, batches: list[int], sampler: Sampler
) -> None:
    """Plans may admit no smaller batch, and a batch that is bound again is captured again."""
    assert isinstance(sampler.denoiser, Denoiser)
    bound = []
    bind = sampler.denoiser.full.bind

    def noted(tensors: Mapping[str, torch.Tensor]) -> Launch:
        bound.append(len(tensors["latents"]))
        return bind(tensors)

    sampler.denoiser.full.bind = noted  # type: ignore[method-assign]
    latents(sampler, guidance)
    assert bound == batches
    latents(sampler, guidance)
    assert bound == (batches if len(batches) == 1 else [*batches, 4, 2, 4, 2])


def test_a_smaller_batch_uses_the_first_rows_of_the_same_memory(sampler: Sampler) -> None:
    denoiser = sampler.denoiser
    assert isinstance(denoiser, Denoiser)
    token = denoiser.prepare(4)
    assert denoiser.prepare(4) is token
    addresses = {name: tensor.data_ptr() for name, tensor in denoiser.buffers.items()}
    assert denoiser.prepare(2) is not token, "its launches are others, and what was captured of the first is void"
    assert {name: tensor.data_ptr() for name, tensor in denoiser.buffers.items()} == addresses
    assert denoiser.prepare(5) is not token


def test_only_the_first_channels_are_guided() -> None:
    prediction = torch.arange(2 * 6.0).view(2, 6, 1, 1)  # conditional 0 to 5, unconditional 6 to 11
    mixed = mix_guidance(prediction, torch.tensor(2.0), 3)
    assert mixed.flatten().tolist() == [-6, -5, -4, 3, 4, 5]


def test_the_command_takes_a_range_of_steps(exported: Bundle, tmp_path: Path) -> None:
    command = ["run", str(exported.folder), "--class-labels", "1", "--steps", "12", "--device", "cpu", "--json"]
    made = CliRunner().invoke(main, [*command, "--guidance-interval", "4:9", "-o", str(tmp_path / "a.png")])
    assert made.exit_code == 0, made.output
    assert '"full_steps": 6' in made.stdout
    with pytest.raises(InputError, match="guidance needs an unconditional half"):
        given = conditioning_of_classes(exported.manifest, [1])
        denoiser = load(exported, schedule=Schedule.static(2, 1), backend="onnxruntime", device="cpu")
        scheduler = scheduler_from_config(exported.scheduler_config, None, learned_sigma=True)
        bare = type(given)(1, given.conditional, None)
        Sampler(denoiser, update_from_scheduler(scheduler, 2))(Schedule.static(2, 1), bare, [0], 2.0)
