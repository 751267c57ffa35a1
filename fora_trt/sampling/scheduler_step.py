"""The scheduler step between two calls of the denoiser: a diffusers scheduler as a table of coefficients.

Nearly every scheduler's step is a weighted sum of current and recent latents, current and recent predictions, and new
noise. The weights depend on the step alone, so they are computed once, by running the scheduler on unit vectors. After
that, a step needs no host code: it can be captured in a CUDA graph together with the engine before it.

Shapes: S model calls (NFE); K calls that a step remembers, the current one included; B images; C, H, W are channels,
height and width of the latents.
"""

from __future__ import annotations

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fora_trt.errors import InputError, first_line
from fora_trt.plan import MOST_STEPS
from fora_trt.runtime.inputs import integer_of
from fora_trt.runtime.sums import add_rows
from fora_trt.sampling.schedulers import scheduler_from_config

CHECKED_STEPS = 4  # also distilled models, such as LCM, take so many
LONGEST_MEMORY = 6  # calls; the longest memory among diffusers schedulers is PNDM's, five calls
AGREEMENT = 1e-4  # relative; if coefficients differ more (the scheduler may clip), the scheduler itself is called


class SchedulerStep(ABC):
    """Updates the latents of a trajectory from the denoiser's predictions."""

    latents: Tensor
    """(B, C, H, W) in fp32, after the last completed step."""

    def __init__(self, timesteps: Tensor, takes_variance: bool, on_device: bool) -> None:
        self.timesteps = timesteps  # (S,), the values that `timestep` will return
        self.nfe = len(timesteps)
        self.takes_variance = takes_variance
        self.on_device = on_device

    adds_noise: bool = False
    """Whether the scheduler adds noise at each step; False where that is unknown, because the scheduler is called."""

    @abstractmethod
    def begin(self, shape: tuple[int, ...], seeds: Sequence[int], device: torch.device) -> object:
        """Draw the noise of a trajectory, image k from `seeds[k]` alone; `shape` is the shape of one sample.

        Tensors of an earlier trajectory of the same shape are reused at their addresses. The returned object identifies
        the allocation: it changes when the addresses do.
        """

    @abstractmethod
    def model_input(self) -> Tensor:
        """The denoiser's next latents, scaled for the model, (B, C, H, W)."""

    @abstractmethod
    def timestep(self) -> Tensor:
        """The denoiser's next timestep, (1,)."""

    @abstractmethod
    def advance(self, prediction: Tensor) -> None:
        """Update the latents with the prediction (B, C, H, W), or (B, 2C, H, W) with a learned variance."""


def scheduler_step_from(scheduler: SchedulerMixin, steps: int) -> SchedulerStep:
    """The scheduler's coefficients at this number of steps if they reproduce it, else the scheduler itself."""
    timesteps_of(scheduler, steps)
    try:
        coefficients = coefficients_from_scheduler(scheduler, steps)
    except Exception as error:  # a setting or a package that the scheduler needs only when it steps
        raise InputError(
            f"{type(scheduler).__name__} cannot step with the settings of this model's scheduler: "
            f"{first_line(error) or type(error).__name__}; correct scheduler_config.json of the source and export it "
            "again, or give --scheduler"
        ) from error
    return TabulatedStep(coefficients) if coefficients is not None else CalledScheduler(scheduler, steps)


def check_scheduler(config: Mapping[str, Any], learned_sigma: bool) -> None:
    """Raise `InputError` unless the scheduler of a configuration can make a short trajectory with finite numbers."""
    scheduler = scheduler_from_config(config, None, learned_sigma)
    levels = getattr(scheduler, "alphas_cumprod", None)
    if isinstance(levels, Tensor) and not (levels.isfinite() & (levels >= 0) & (levels <= 1)).all():
        raise InputError(
            f"the noise levels of {type(scheduler).__name__} are not all between 0 and 1 with the settings of this "
            "model; correct scheduler_config.json of the source"
        )
    scheduler_step = scheduler_step_from(scheduler, CHECKED_STEPS)
    scheduler_step.begin((2, 2, 2), [0], torch.device("cpu"))
    for _ in range(scheduler_step.nfe):
        predicted = scheduler_step.model_input()
        scheduler_step.timestep()
        scheduler_step.advance(torch.cat([predicted] * (2 if scheduler_step.takes_variance else 1), 1))
    if not scheduler_step.latents.isfinite().all():
        raise InputError(
            f"{type(scheduler).__name__} gives latents that are not finite with the settings of this model; correct "
            "scheduler_config.json of the source"
        )


def timesteps_of(scheduler: SchedulerMixin, steps: int) -> int:
    """Set the scheduler to `steps` steps; return the NFE, which is larger for some schedulers (Heun, PNDM)."""
    steps = integer_of("the number of steps", steps, 1)
    if steps > MOST_STEPS:
        raise InputError(f"the number of steps is {steps}; the limit is {MOST_STEPS}")
    try:
        set_steps(scheduler, steps)
    except Exception as error:  # a setting that diffusers does not check can raise anything
        if scheduler.config.get("use_dynamic_shifting"):
            raise InputError(
                f"{type(scheduler).__name__} has use_dynamic_shifting, so its timesteps depend on the number of "
                "tokens, which only a pipeline gives it; set use_dynamic_shifting to false and shift to exp(mu) in the "
                "scheduler's configuration, and export again"
            ) from error
        reason = first_line(error) or type(error).__name__
        raise InputError(f"{type(scheduler).__name__} does not support {steps} steps: {reason}") from error
    if len(scheduler.timesteps) > 2 * MOST_STEPS or not torch.as_tensor(scheduler.timesteps).isfinite().all():
        raise InputError(
            f"{type(scheduler).__name__} takes timesteps for {steps} steps that are not finite, or more than "
            f"{2 * MOST_STEPS}; correct scheduler_config.json of the source and export it again"
        )
    return len(scheduler.timesteps)


def set_steps(scheduler: SchedulerMixin, steps: int) -> None:
    """Set the scheduler to a number of steps; a flow-matching scheduler to equal steps from noise level 1 to 0.

    By default flow-matching schedulers make the last step much shorter: as short as their smallest noise level.
    """
    if not is_flow_matching(scheduler):
        scheduler.set_timesteps(steps)
    elif "sigmas" in inspect.signature(scheduler.set_timesteps).parameters:
        scheduler.set_timesteps(sigmas=[1 - k / steps for k in range(steps)])
    else:  # Heun takes no sigmas; it spaces them evenly from the largest to `sigma_min`
        scheduler.sigma_min = 1 / steps
        scheduler.set_timesteps(steps)


def is_flow_matching(scheduler: SchedulerMixin) -> bool:
    """Whether it is a flow-matching scheduler, which has no `init_noise_sigma` in diffusers: the initial scale is 1."""
    return not hasattr(scheduler, "init_noise_sigma")


def takes_variance(scheduler: SchedulerMixin) -> bool:
    """Whether the scheduler's step expects the model's variance in the channels after the noise prediction."""
    return scheduler.config.get("variance_type") in ("learned", "learned_range")


@dataclass(frozen=True)
class Coefficients:
    """A scheduler at a fixed number of steps, as numbers.

    The latents after call i are a sum over the last K calls, i - k for k = 0 to K - 1: `weights[i, k, 0]` times the
    latents before call i - k, plus `weights[i, k, 1]` times its prediction. To that is added new noise times
    `noise_scale[i] * exp(noise_growth[i] * v)`, where v is the learned variance.
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

    def rows(self) -> Tensor:
        """All numbers of each call, (S, 4 + 2K): timestep, input scale, noise scale and growth, and the weights."""
        numbers = (
            self.timesteps,
            self.input_scale,
            self.noise_scale,
            self.noise_growth,
            *self.weights.flatten(1).T,
        )
        return torch.stack([one.float() for one in numbers], 1)


def coefficients_from_scheduler(scheduler: SchedulerMixin, steps: int) -> Coefficients | None:
    """Compute the coefficients of a scheduler; None if its step is no such sum, or depends on too many calls."""
    memory, variance = LONGEST_MEMORY, takes_variance(scheduler)
    probe = _Run(scheduler, steps)
    # slots: a unit vector for each remembered tensor, then two for zero inputs: with v = 0 and with v = 1
    calls, slots = len(probe.timesteps), 2 * memory + 2
    results, scales, draws = [], [], []
    for call in range(calls):
        sample, prediction, learned = (torch.zeros(slots, dtype=torch.float64) for _ in range(3))
        sample[2 * (call % memory)] = prediction[2 * (call % memory) + 1] = learned[-1] = 1
        scales.append(probe.input_scale(call))
        result, noise = probe.step(call, sample, prediction, learned if variance else None)
        draws.append(noise is not None)
        results.append(result if noise is None else _parted(result, noise))
    responses = torch.stack(results)  # (S, 2K + 2)
    zero, one = responses[:, -2], responses[:, -1]  # scale of the noise at v = 0 and at v = 1
    noisy = torch.tensor(draws) & (zero != 0)
    coefficients = Coefficients(
        timesteps=probe.timesteps.float(),
        input_scale=torch.tensor(scales),
        weights=_by_age(responses[:, :-2].view(calls, memory, 2)),
        noise_scale=torch.where(noisy, zero, 0.0),
        noise_growth=torch.where(noisy, (one / zero).log(), 0.0) if variance else torch.zeros(calls),
        draws=torch.tensor(draws),
        first_scale=_first_scale(scheduler),
        takes_variance=variance,
    )
    return coefficients if _agrees(coefficients, scheduler, steps) else None


def _parted(result: Tensor, noise: Tensor) -> Tensor:
    """Separate the noise from a result (N,): returns the weights without noise, then the two noise scales.

    The last two elements of `result` are scaled noise alone.
    """
    scales = result[-2:] / noise[-2:]
    weights = result[:-2] - scales[0] * noise[:-2]
    return torch.cat([torch.where(weights.abs() > 1e-6 * weights.abs().max(), weights, 0.0), scales])


def _by_age(weights: Tensor) -> Tensor:
    """(S, M, 2) with call i in slot i % M -> (S, K, 2), latest call first, without slots that are always zero."""
    calls, longest = weights.shape[:2]
    by_age = torch.stack([weights[i, [(i - age) % longest for age in range(longest)]] for i in range(calls)])
    return by_age[:, : int((by_age != 0).any(0).any(-1).nonzero().max()) + 1]


def _agrees(coefficients: Coefficients, scheduler: SchedulerMixin, steps: int) -> bool:
    """Whether the coefficients reproduce the scheduler on random latents and predictions, at every call."""
    run, generator = _Run(scheduler, steps), torch.Generator().manual_seed(1)
    remembered = torch.zeros(coefficients.memory, 2, 8, dtype=torch.float64)
    for call in range(len(coefficients.timesteps)):
        sample, prediction, learned = torch.randn(3, 8, dtype=torch.float64, generator=generator)
        run.input_scale(call)
        expected, noise = run.step(call, sample, prediction, learned if coefficients.takes_variance else None)
        remembered = torch.cat([torch.stack([sample, prediction])[None], remembered[:-1]])
        terms = coefficients.weights[call][..., None] * remembered
        fresh = (
            coefficients.noise_scale[call]
            * torch.exp(coefficients.noise_growth[call] * learned)
            * (0 if noise is None else noise)
        )
        if not torch.allclose(terms.sum((0, 1)) + fresh, expected, rtol=0, atol=AGREEMENT * float(terms.abs().max())):
            return False
    return True


class _Run:
    """A copy of a scheduler that is called on vectors; it returns the noise that the scheduler drew, too.

    Vectors have fewer than 16 elements: torch draws so few random numbers alike in every precision.
    """

    def __init__(self, scheduler: SchedulerMixin, steps: int) -> None:
        self._scheduler = copy.deepcopy(scheduler)
        set_steps(self._scheduler, steps)
        self.timesteps: Tensor = self._scheduler.timesteps
        self._takes_generator = _takes_generator(scheduler)

    def input_scale(self, call: int) -> float:
        """The factor that scales the latents for the model; some schedulers require this call before each step."""
        one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        return float(_scaled(self._scheduler, one, self.timesteps[call]))

    def step(
        self, call: int, sample: Tensor, prediction: Tensor, learned: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """(N,) -> the next latents (N,), and the noise (N,) if the scheduler drew any."""
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
    """The latents scaled for the model."""
    scaled: Tensor = latents if is_flow_matching(scheduler) else scheduler.scale_model_input(latents, timestep)
    return scaled


def _takes_generator(scheduler: SchedulerMixin) -> bool:
    return "generator" in inspect.signature(scheduler.step).parameters


def drawn(shape: tuple[int, ...], generators: Sequence[torch.Generator]) -> Tensor:
    """Noise (B, ...) of samples of this shape, each from its own generator."""
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


class TabulatedStep(SchedulerStep):
    """Applies the coefficients, on tensors at fixed addresses; `advance` never waits for the host."""

    def __init__(self, coefficients: Coefficients) -> None:
        super().__init__(coefficients.timesteps, coefficients.takes_variance, on_device=True)
        self.coefficients, self._scales = coefficients, bool((coefficients.input_scale != 1).any())
        self.adds_noise = bool((coefficients.noise_scale != 0).any())
        self._key: tuple[object, ...] = ()

    def begin(self, shape: tuple[int, ...], seeds: Sequence[int], device: torch.device) -> object:
        if self._key != (key := (shape, len(seeds), device)):
            self._allocate(shape, len(seeds), device)
            self._key = key
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.latents.copy_(drawn(shape, generators) * self.coefficients.first_scale)
        for k in range(len(self._noise)):
            self._noise[k].copy_(drawn((1, *shape), generators)[:, 0])
        self._remembered.zero_()
        self._call.zero_()
        return self._allocation

    def _allocate(self, shape: tuple[int, ...], images: int, device: torch.device) -> None:
        coefficients, self._allocation = self.coefficients, object()
        draws = coefficients.draws.long()
        self.latents = torch.empty(images, *shape, device=device)
        self._remembered = torch.empty(coefficients.memory, 2, images, *shape, device=device)
        self._last_latents, self._last_prediction = self._remembered[0]
        self._terms, self._result = self._remembered.flatten(0, 1).flatten(1), self.latents.view(1, -1)
        self._order = torch.arange(len(self._terms))[None].to(device)
        self._noise = torch.empty(int(draws.sum()), images, *shape, device=device)
        self._call = torch.zeros(1, dtype=torch.int64, device=device)
        self._draw = (draws.cumsum(0) - 1).clamp_(min=0).to(device)
        self._numbers = coefficients.rows().to(device)

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
        if self.latents.device.type == "cpu":  # there mm adds in an order that depends on the batch
            add_rows(self._terms, self._order, self._row[:, 4:], self._result)
        else:
            torch.mm(self._row[:, 4:], self._terms, out=self._result)  # (1, 2K) by (2K, B * ...)
        if len(self._noise):
            noise = self._noise.index_select(0, self._draw.index_select(0, self._call))[0]
            growth = torch.exp(self._row[:, 3] * prediction[:, channels:]) if self.takes_variance else 1.0
            self.latents.addcmul_(self._row[:, 2] * growth, noise)
        self._call.add_(1)


class CalledScheduler(SchedulerStep):
    """Calls the scheduler at each step, on the host."""

    def __init__(self, scheduler: SchedulerMixin, steps: int) -> None:
        timesteps_of(scheduler, steps)
        super().__init__(scheduler.timesteps.clone(), takes_variance(scheduler), on_device=False)
        self._scheduler, self._steps = scheduler, steps

    def begin(self, shape: tuple[int, ...], seeds: Sequence[int], device: torch.device) -> object:
        set_steps(self._scheduler, self._steps)  # clears its memory of the previous trajectory
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.latents = drawn(shape, generators).to(device) * _first_scale(self._scheduler)
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
