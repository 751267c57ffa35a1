import diffusers
import pytest
import torch
from diffusers import SchedulerMixin
from torch import Tensor

from fora_trt.errors import InputError
from fora_trt.runtime.schedulers import scheduler_from_config
from fora_trt.runtime.updates import (
    SchedulerUpdate,
    TabulatedUpdate,
    Update,
    table_from_scheduler,
    update_from_scheduler,
)

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


def trajectory(update: Update, seeds: list[int]) -> list[Tensor]:
    update.begin(SHAPE, seeds, CPU)
    states = []
    for _ in range(update.calls):
        latents = update.model_input()
        update.advance(network(latents, update.timestep(), 8 if update.takes_variance else 4))
        states.append(update.latents.clone())
    return states


@pytest.mark.parametrize("order", [1, 2])
def test_flow_matching_takes_steps_of_one_length_from_1_to_0(order: int) -> None:
    name = {1: "FlowMatchEulerDiscreteScheduler", 2: "FlowMatchHeunDiscreteScheduler"}[order]
    steps = 5
    update = update_from_scheduler(getattr(diffusers, name)(), steps)
    assert update.calls == order * steps - (order - 1), "the last step is one of Euler's"
    (*_, found) = trajectory(update, [3])
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
def test_a_table_gives_what_the_scheduler_gives_at_every_step(name: str, steps: int) -> None:
    scheduler = TABULATED[name]
    update = update_from_scheduler(scheduler, steps)
    assert isinstance(update, TabulatedUpdate)
    assert update.on_device
    seeds = [3, 4]
    expected = trajectory(SchedulerUpdate(scheduler, steps), seeds)
    for repeat in range(2):  # the second trajectory begins where the first left its tensors
        for step, (got, want) in enumerate(zip(trajectory(update, seeds), expected, strict=True)):
            assert (got - want).abs().max() <= 2e-4 * want.abs().max(), f"step {step} of trajectory {repeat}"


@pytest.mark.parametrize("name", CALLED)
def test_what_is_no_weighted_sum_is_called(name: str) -> None:
    update = update_from_scheduler(CALLED[name], 20)
    assert isinstance(update, SchedulerUpdate)
    assert not update.on_device
    assert all(state.isfinite().all() for state in trajectory(update, [0]))


def test_settings_that_no_scheduler_has_are_named() -> None:
    with pytest.raises(InputError, match=r"DDIMScheduler does not take the settings .* zz is not implemented"):
        scheduler_from_config({"_class_name": "DDIMScheduler", "beta_schedule": "zz"}, None, learned_sigma=False)
    wrong = scheduler_from_config({"_class_name": "DDIMScheduler", "prediction_type": "x"}, None, learned_sigma=False)
    with pytest.raises(InputError, match=r"DDIMScheduler takes no step .*prediction_type given as x must be"):
        update_from_scheduler(wrong, 4)


def test_tables_remember_no_more_than_the_scheduler_does() -> None:
    memory = {name: table.memory for name, one in TABULATED.items() if (table := table_from_scheduler(one, 20))}
    assert memory["ddim"] == memory["ddpm"] == memory["euler"] == 1
    assert memory["dpm-solver++"] == memory["heun"] == 2
    assert memory["dpm-solver++ of order 3"] == 3
    assert memory["lms"] == 4


def test_ddim_is_the_formula_of_the_paper() -> None:
    """ArXiv 2010.02502, equation 12 with sigma 0: an independent computation of the weights."""
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(10)
    table = table_from_scheduler(scheduler, 10)
    assert table is not None
    for call, t in enumerate(scheduler.timesteps.tolist()):
        now = scheduler.alphas_cumprod[t].double()
        following = scheduler.alphas_cumprod[t - 100].double() if t >= 100 else scheduler.final_alpha_cumprod.double()
        of_latents = (following / now).sqrt()
        of_noise = (1 - following).sqrt() - of_latents * (1 - now).sqrt()
        assert table.weights[call, 0].tolist() == pytest.approx([of_latents.item(), of_noise.item()], rel=1e-4)


def test_tensors_stay_in_place_from_trajectory_to_trajectory() -> None:
    update = update_from_scheduler(TABULATED["ddpm"], 5)
    trajectory(update, [1, 2])
    address = update.latents.data_ptr()
    trajectory(update, [3, 4])
    assert update.latents.data_ptr() == address
    trajectory(update, [3, 4, 5])
    assert len(update.latents) == 3


def test_noise_is_drawn_from_each_seed_alone() -> None:
    update = update_from_scheduler(TABULATED["euler-ancestral"], 6)
    together = trajectory(update, [5, 6, 7])[-1]
    alone = trajectory(update, [6])[-1]
    torch.testing.assert_close(together[1], alone[0])
    assert (together[0] - together[1]).abs().max() > 0.1
