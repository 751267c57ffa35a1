"""What happens to the latents between two calls of the denoiser: a diffusers scheduler as a table on the device.

Nearly every scheduler's step is a weighted sum of latents and noise predictions, current and recent ones, and fresh
noise. The weights depend on the step alone, so they are read off the scheduler once, by running it on unit vectors.
Then a step needs no host: it can be captured in a CUDA graph with the engine that it follows.

Shapes: S calls, K recent calls that a step remembers, B images, C, H, W latents.
"""

from __future__ import annotations

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fora_trt.errors import InputError, first_line

LONGEST_MEMORY = 6  # calls; the longest among the schedulers of diffusers is PNDM's, five
AGREEMENT = 1e-4  # relative; a scheduler that differs more from its table (it clips, say) is called instead


class Update(ABC):
    """The latents of a trajectory, and how they follow from what the denoiser predicts."""

    latents: Tensor
    """(B, C, H, W) in fp32, after the steps that are done."""

    def __init__(self, timesteps: Tensor, takes_variance: bool, on_device: bool) -> None:
        self.timesteps = timesteps  # (S,), what `timestep` is going to be
        self.calls = len(timesteps)
        self.takes_variance = takes_variance
        self.on_device = on_device

    @abstractmethod
    def begin(self, shape: tuple[int, ...], seeds: Sequence[int], device: torch.device) -> object:
        """Draw the noise of a trajectory, image k from `seeds[k]` alone; `shape` is that of one sample.

        Tensors of a trajectory of this shape before it are used again, at their addresses; what is returned is
        another object where they are not.
        """

    @abstractmethod
    def model_input(self) -> Tensor:
        """What the denoiser is called with next, (B, C, H, W)."""

    @abstractmethod
    def timestep(self) -> Tensor:
        """At which timestep, (1,)."""

    @abstractmethod
    def advance(self, prediction: Tensor) -> None:
        """Take the prediction (B, C, H, W), or (B, 2C, H, W) with a learned variance, and go to the next step."""


def update_from_scheduler(scheduler: SchedulerMixin, steps: int) -> Update:
    """A table of the scheduler at so many steps where it agrees with the scheduler, else the scheduler itself."""
    timesteps_of(scheduler, steps)
    try:
        table = table_from_scheduler(scheduler, steps)
    except ValueError as error:  # a setting that is looked at only now
        raise InputError(
            f"{type(scheduler).__name__} takes no step with the settings of this model's scheduler: "
            f"{first_line(error)}; mend scheduler_config.json of the source and export it again"
        ) from error
    return TabulatedUpdate(table) if table is not None else SchedulerUpdate(scheduler, steps)


def timesteps_of(scheduler: SchedulerMixin, steps: int) -> int:
    """Set the scheduler to `steps`; return how often it will call the model, which can be more (Heun, PNDM)."""
    if steps < 1:
        raise InputError(f"the number of steps is {steps}; at least 1 is needed")
    try:
        set_steps(scheduler, steps)
    except ValueError as error:
        raise InputError(f"{type(scheduler).__name__} does not admit {steps} steps: {error}") from error
    return len(scheduler.timesteps)


def set_steps(scheduler: SchedulerMixin, steps: int) -> None:
    """Set the scheduler to so many steps; those of flow matching to steps of one length, from 1 to 0.

    Left to themselves those end with a step that is as short as the first noise level.
    """
    if not is_flow_matching(scheduler):
        scheduler.set_timesteps(steps)
    elif "sigmas" in inspect.signature(scheduler.set_timesteps).parameters:
        scheduler.set_timesteps(sigmas=[1 - k / steps for k in range(steps)])
    else:  # Heun's, which spaces them evenly from its largest to its least
        scheduler.sigma_min = 1 / steps
        scheduler.set_timesteps(steps)


def is_flow_matching(scheduler: SchedulerMixin) -> bool:
    """Whether it integrates a velocity; such a one has no scale of its first noise, which is 1."""
    return not hasattr(scheduler, "init_noise_sigma")


def takes_variance(scheduler: SchedulerMixin) -> bool:
    """Whether the scheduler's step expects the model's variance behind its noise prediction."""
    return scheduler.config.get("variance_type") in ("learned", "learned_range")


@dataclass(frozen=True)
class SchedulerTable:
    """A scheduler at a number of steps, as numbers.

    The latents after call i are the sum over the last K calls, i - k for k from 0 on, of `weights[i, k, 0]` times the
    latents then and `weights[i, k, 1]` times the prediction, plus `noise_scale[i] * exp(noise_growth[i] * v)` times
    fresh noise, where v is the learned variance.
    """

    timesteps: Tensor  # (S,)
    input_scale: Tensor  # (S,)
    weights: Tensor  # (S, K, 2)
    noise_scale: Tensor  # (S,)
    noise_growth: Tensor  # (S,)
    draws: Tensor  # (S,), whether the call draws noise
    first_scale: float
    takes_variance: bool

    @property
    def memory(self) -> int:
        """K."""
        return self.weights.shape[1]


def table_from_scheduler(scheduler: SchedulerMixin, steps: int) -> SchedulerTable | None:
    """Read the weights off a scheduler; None for one whose steps are no such sum, or remember too much."""
    memory, variance = LONGEST_MEMORY, takes_variance(scheduler)
    probe = _Run(scheduler, steps)
    calls, slots = len(probe.timesteps), 2 * memory + 2  # a unit for each tensor remembered, zeros, zeros with v = 1
    results, scales, draws = [], [], []
    for call in range(calls):
        sample, prediction, learned = (torch.zeros(slots, dtype=torch.float64) for _ in range(3))
        sample[2 * (call % memory)] = prediction[2 * (call % memory) + 1] = learned[-1] = 1
        scales.append(probe.input_scale(call))
        result, noise = probe.step(call, sample, prediction, learned if variance else None)
        draws.append(noise is not None)
        results.append(result if noise is None else _parted(result, noise))
    found = torch.stack(results)  # (S, 2K + 2)
    zero, one = found[:, -2], found[:, -1]  # scale of the noise at v = 0 and at v = 1
    noisy = torch.tensor(draws) & (zero != 0)
    table = SchedulerTable(
        timesteps=probe.timesteps.float(),
        input_scale=torch.tensor(scales),
        weights=_by_age(found[:, :-2].view(calls, memory, 2)),
        noise_scale=torch.where(noisy, zero, 0.0),
        noise_growth=torch.where(noisy, (one / zero).log(), 0.0) if variance else torch.zeros(calls),
        draws=torch.tensor(draws),
        first_scale=_first_scale(scheduler),
        takes_variance=variance,
    )
    return table if _agrees(table, scheduler, steps) else None


def _parted(result: Tensor, noise: Tensor) -> Tensor:
    """(N,), of which the last two are nothing but scaled noise -> the weights without it, and those two scales."""
    scales = result[-2:] / noise[-2:]
    weights = result[:-2] - scales[0] * noise[:-2]
    return torch.cat([torch.where(weights.abs() > 1e-6 * weights.abs().max(), weights, 0.0), scales])


def _by_age(weights: Tensor) -> Tensor:
    """(S, M, 2), call i at place i % M -> (S, K, 2), the last call first, and only as many as are ever in use."""
    calls, longest = weights.shape[:2]
    by_age = torch.stack([weights[i, [(i - age) % longest for age in range(longest)]] for i in range(calls)])
    return by_age[:, : int((by_age != 0).any(0).any(-1).nonzero().max()) + 1]


def _agrees(table: SchedulerTable, scheduler: SchedulerMixin, steps: int) -> bool:
    """Whether the table gives what the scheduler gives, for random latents and predictions at every call."""
    run, generator = _Run(scheduler, steps), torch.Generator().manual_seed(1)
    remembered = torch.zeros(table.memory, 2, 8, dtype=torch.float64)
    for call in range(len(table.timesteps)):
        sample, prediction, learned = torch.randn(3, 8, dtype=torch.float64, generator=generator)
        run.input_scale(call)
        expected, noise = run.step(call, sample, prediction, learned if table.takes_variance else None)
        remembered = torch.cat([torch.stack([sample, prediction])[None], remembered[:-1]])
        terms = table.weights[call][..., None] * remembered
        fresh = (
            table.noise_scale[call] * torch.exp(table.noise_growth[call] * learned) * (0 if noise is None else noise)
        )
        if not torch.allclose(terms.sum((0, 1)) + fresh, expected, rtol=0, atol=AGREEMENT * float(terms.abs().max())):
            return False
    return True


class _Run:
    """A copy of a scheduler, called on vectors; tells apart the noise that it draws.

    Vectors are shorter than 16: so few random numbers are the same in every precision that a scheduler may draw in.
    """

    def __init__(self, scheduler: SchedulerMixin, steps: int) -> None:
        self._scheduler = copy.deepcopy(scheduler)
        set_steps(self._scheduler, steps)
        self.timesteps: Tensor = self._scheduler.timesteps
        self._takes_generator = _takes_generator(scheduler)

    def input_scale(self, call: int) -> float:
        """What the latents are multiplied with for the model; some schedulers must be asked before each step."""
        one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        return float(_scaled(self._scheduler, one, self.timesteps[call]))

    def step(
        self, call: int, sample: Tensor, prediction: Tensor, learned: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """(N,) -> the next latents (N,), and the noise (N,) if any was drawn."""
        shape = (len(sample), 1, 1, 1)
        output = prediction.view(shape) if learned is None else torch.stack([prediction, learned], 1)[..., None, None]
        generator = torch.Generator().manual_seed(call)
        before = generator.get_state()
        extra = {"generator": generator} if self._takes_generator else {}
        result = self._scheduler.step(output, self.timesteps[call], sample.view(shape), **extra).prev_sample
        drawn = not torch.equal(generator.get_state(), before)
        noise = randn_tensor(shape, generator=generator.manual_seed(call), dtype=output.dtype) if drawn else None
        return result.flatten().double(), None if noise is None else noise.flatten()


def _first_scale(scheduler: SchedulerMixin) -> float:
    return 1.0 if is_flow_matching(scheduler) else float(scheduler.init_noise_sigma)


def _scaled(scheduler: SchedulerMixin, latents: Tensor, timestep: Tensor) -> Tensor:
    """What the model is called with."""
    scaled: Tensor = latents if is_flow_matching(scheduler) else scheduler.scale_model_input(latents, timestep)
    return scaled


def _takes_generator(scheduler: SchedulerMixin) -> bool:
    return "generator" in inspect.signature(scheduler.step).parameters


def _drawn(shape: tuple[int, ...], generators: Sequence[torch.Generator]) -> Tensor:
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


class TabulatedUpdate(Update):
    """Follows a table with tensors that stay in place; nothing in `advance` needs the host."""

    def __init__(self, table: SchedulerTable) -> None:
        super().__init__(table.timesteps, table.takes_variance, on_device=True)
        self._table, self._scales = table, bool((table.input_scale != 1).any())
        self._key: tuple[object, ...] = ()

    def begin(self, shape: tuple[int, ...], seeds: Sequence[int], device: torch.device) -> object:
        if self._key != (key := (shape, len(seeds), device)):
            self._allocate(shape, len(seeds), device)
            self._key = key
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.latents.copy_(_drawn(shape, generators) * self._table.first_scale)
        for k in range(len(self._noise)):
            self._noise[k].copy_(_drawn((1, *shape), generators)[:, 0])
        self._remembered.zero_()
        self._call.zero_()
        return self._allocation

    def _allocate(self, shape: tuple[int, ...], images: int, device: torch.device) -> None:
        table, self._allocation = self._table, object()
        draws = table.draws.long()
        self.latents = torch.empty(images, *shape, device=device)
        self._remembered = torch.empty(table.memory, 2, images, *shape, device=device)
        self._last_latents, self._last_prediction = self._remembered[0]
        self._terms, self._result = self._remembered.flatten(0, 1).flatten(1), self.latents.view(1, -1)
        self._noise = torch.empty(int(draws.sum()), images, *shape, device=device)
        self._call = torch.zeros(1, dtype=torch.int64, device=device)
        self._draw = (draws.cumsum(0) - 1).clamp_(min=0).to(device)
        numbers = (
            table.timesteps,
            table.input_scale,
            table.noise_scale,
            table.noise_growth,
            *table.weights.flatten(1).T,
        )
        self._numbers = torch.stack([one.float() for one in numbers], 1).to(device)  # (S, 4 + 2K)

    def model_input(self) -> Tensor:
        self._row = self._numbers.index_select(0, self._call)  # (1, 4 + 2K)
        return self.latents * self._row[:, 1] if self._scales else self.latents

    def timestep(self) -> Tensor:
        return self._row[0, :1]

    def advance(self, prediction: Tensor) -> None:
        channels, remembered = self.latents.shape[1], self._remembered
        if len(remembered) > 1:
            remembered[1:].copy_(remembered[:-1].clone())
        self._last_latents.copy_(self.latents)
        self._last_prediction.copy_(prediction[:, :channels] if self.takes_variance else prediction)
        torch.mm(self._row[:, 4:], self._terms, out=self._result)  # (1, 2K) by (2K, B * ...)
        if len(self._noise):
            noise = self._noise.index_select(0, self._draw.index_select(0, self._call))[0]
            growth = torch.exp(self._row[:, 3] * prediction[:, channels:]) if self.takes_variance else 1.0
            self.latents.addcmul_(self._row[:, 2] * growth, noise)
        self._call.add_(1)


class SchedulerUpdate(Update):
    """Calls the scheduler at each step, on the host."""

    def __init__(self, scheduler: SchedulerMixin, steps: int) -> None:
        timesteps_of(scheduler, steps)
        super().__init__(scheduler.timesteps.clone(), takes_variance(scheduler), on_device=False)
        self._scheduler, self._steps = scheduler, steps

    def begin(self, shape: tuple[int, ...], seeds: Sequence[int], device: torch.device) -> object:
        set_steps(self._scheduler, self._steps)  # clears what it remembers of the trajectory before
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.latents = _drawn(shape, generators).to(device) * _first_scale(self._scheduler)
        self._extra: dict[str, Any] = {"generator": generators} if _takes_generator(self._scheduler) else {}
        self._remaining = list(self._scheduler.timesteps)[::-1]
        return None

    def model_input(self) -> Tensor:
        return _scaled(self._scheduler, self.latents, self._remaining[-1])

    def timestep(self) -> Tensor:
        timestep: Tensor = self._remaining[-1]
        return timestep.reshape(1)

    def advance(self, prediction: Tensor) -> None:
        following = self._scheduler.step(prediction, self._remaining.pop(), self.latents, **self._extra)
        self.latents = following.prev_sample
