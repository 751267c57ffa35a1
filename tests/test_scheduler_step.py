import diffusers
import pytest
import torch
from diffusers import SchedulerMixin
from torch import Tensor

from fora_trt.errors import InputError
from fora_trt.sampling.scheduler_step import (
    CalledScheduler,
    SchedulerStep,
    TabulatedStep,
    coefficients_from_scheduler,
    scheduler_step_from,
)
from fora_trt.sampling.schedulers import scheduler_from_config

SHAPE = (4, 3, 3)
CPU = torch.device("cpu")

TABULATED: dict[str, SchedulerMixin] = {
    "ddim": diffusers.DDIMScheduler(clip_sample=False),
    "ddpm": diffusers.DDPMScheduler(clip_sample=False),
    "ddpm, learned variance": diffusers.DDPMScheduler(clip_sample=False, variance_type="learned_range"),
    "dpm-solver++": diffusers.DPMSolverMultistepScheduler(),
    "dpm-solver++ of order 3": diffusers.DPMSolverMultistepScheduler(solver_order=3),
    "sde-dpm-solver++": diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
    "euler": diffusers.EulerDiscreteScheduler(),
    "euler-ancestral": diffusers.EulerAncestralDiscreteScheduler(),
    "heun": diffusers.HeunDiscreteScheduler(),
    "lms": diffusers.LMSDiscreteScheduler(),
}
CALLED: dict[str, SchedulerMixin] = {
    "ddim that clips": diffusers.DDIMScheduler(clip_sample=True),
    "ddpm with dynamic thresholds": diffusers.DDPMScheduler(thresholding=True, clip_sample=False),
    "unipc": diffusers.UniPCMultistepScheduler(),
    "pndm": diffusers.PNDMScheduler(),
}


def network(latents: Tensor, timestep: Tensor, channels: int) -> Tensor:
    """Something smooth that depends on both and is no multiple of the latents."""
    noise = torch.tanh(latents.roll(1, -1)) + 0.1 * torch.cos(timestep / 100) * latents
    return torch.cat([noise, torch.sin(latents)], 1) if channels == 8 else noise


def trajectory(scheduler_step: SchedulerStep, seeds: list[int]) -> list[Tensor]:
    scheduler_step.begin(SHAPE, seeds, CPU)
    states = []
    for _ in range(scheduler_step.nfe):
        latents = scheduler_step.model_input()
        scheduler_step.advance(network(latents, scheduler_step.timestep(), 8 if scheduler_step.takes_variance else 4))
        states.append(scheduler_step.latents.clone())
    return states


@pytest.mark.parametrize("order", [1, 2])
def test_flow_matching_takes_steps_of_one_length_from_1_to_0(order: int) -> None:
    name = {1: "FlowMatchEulerDiscreteScheduler", 2: "FlowMatchHeunDiscreteScheduler"}[order]
    steps = 5
    scheduler_step = scheduler_step_from(getattr(diffusers, name)(), steps)
    assert scheduler_step.nfe == order * steps - (order - 1), "the last step is one of Euler's"
    (*_, found) = trajectory(scheduler_step, [3])
    latents = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(3))
    for k in range(steps):
        time = torch.tensor([1000 * (1 - k / steps)])
        velocity = network(latents, time, 4)
        if order == 2 and k < steps - 1:
            velocity = (velocity + network(latents - velocity / steps, time - 1000 / steps, 4)) / 2
        latents = latents - velocity / steps
    torch.testing.assert_close(found, latents)


@pytest.mark.parametrize("name", TABULATED)
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_coefficients_give_what_the_scheduler_gives_at_every_step(name: str, steps: int) -> None:
    scheduler = TABULATED[name]
    scheduler_step = scheduler_step_from(scheduler, steps)
    assert isinstance(scheduler_step, TabulatedStep)
    assert scheduler_step.on_device
    seeds = [3, 4]
    expected = trajectory(CalledScheduler(scheduler, steps), seeds)
    for repeat in range(2):  # the second trajectory begins where the first left its tensors
        for step, (got, want) in enumerate(zip(trajectory(scheduler_step, seeds), expected, strict=True)):
            assert (got - want).abs().max() <= 2e-4 * want.abs().max(), f"step {step} of trajectory {repeat}"


@pytest.mark.parametrize("name", CALLED)
def test_a_scheduler_whose_step_is_no_weighted_sum_is_called(name: str) -> None:
    scheduler_step = scheduler_step_from(CALLED[name], 20)
    assert isinstance(scheduler_step, CalledScheduler)
    assert not scheduler_step.on_device
    assert all(state.isfinite().all() for state in trajectory(scheduler_step, [0]))


def test_settings_that_the_scheduler_does_not_take_are_named() -> None:
    with pytest.raises(InputError, match=r"DDIMScheduler does not support the settings .* zz is not implemented"):
        scheduler_from_config({"_class_name": "DDIMScheduler", "beta_schedule": "zz"}, None, learned_sigma=False)
    wrong = scheduler_from_config({"_class_name": "DDIMScheduler", "prediction_type": "x"}, None, learned_sigma=False)
    with pytest.raises(InputError, match=r"DDIMScheduler cannot step .*prediction_type given as x must be"):
        scheduler_step_from(wrong, 4)


def test_coefficients_remember_no_more_than_the_scheduler_does() -> None:
    found = {name: coefficients_from_scheduler(scheduler, 20) for name, scheduler in TABULATED.items()}
    memory = {name: one.memory for name, one in found.items() if one is not None}
    assert memory["ddim"] == memory["ddpm"] == memory["euler"] == 1
    assert memory["dpm-solver++"] == memory["heun"] == 2
    assert memory["dpm-solver++ of order 3"] == 3
    assert memory["lms"] == 4


def test_ddim_is_the_formula_of_the_paper() -> None:
    """ArXiv 2010.02502, equation 12 with sigma 0: an independent computation of the weights."""
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(10)
    coefficients = coefficients_from_scheduler(scheduler, 10)
    assert coefficients is not None
    for call, t in enumerate(scheduler.timesteps.tolist()):
        now = scheduler.alphas_cumprod[t].double()
        following = scheduler.alphas_cumprod[t - 100].double() if t >= 100 else scheduler.final_alpha_cumprod.double()
        of_latents = (following / now).sqrt()
        of_noise = (1 - following).sqrt() - of_latents * (1 - now).sqrt()
        assert coefficients.weights[call, 0].tolist() == pytest.approx([of_latents.item(), of_noise.item()], rel=1e-4)


def test_tensors_stay_in_place_from_trajectory_to_trajectory() -> None:
    scheduler_step = scheduler_step_from(TABULATED["ddpm"], 5)
    trajectory(scheduler_step, [1, 2])
    address = scheduler_step.latents.data_ptr()
    trajectory(scheduler_step, [3, 4])
    assert scheduler_step.latents.data_ptr() == address
    trajectory(scheduler_step, [3, 4, 5])
    assert len(scheduler_step.latents) == 3


def test_noise_is_drawn_from_each_seed_alone() -> None:
    scheduler_step = scheduler_step_from(TABULATED["euler-ancestral"], 6)
    together = trajectory(scheduler_step, [5, 6, 7])[-1]
    alone = trajectory(scheduler_step, [6])[-1]
    torch.testing.assert_close(together[1], alone[0])
    assert (together[0] - together[1]).abs().max() > 0.1
