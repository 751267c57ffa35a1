"""Weights of forecasts by least squares, from what reuse steps should have read along trajectories without caching.

Each step of such a trajectory is full. It folds sums for itself and for the steps after it, with their gates: what
reuse steps would read of it, and what it would have computed itself. Where a bundle has no folded sums, the features
take their place. Of each sample a few values are kept: a step has few weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy
import torch
from torch import Tensor

from fora_trt.bundle import Manifest
from fora_trt.contract import FULL, of_window
from fora_trt.pipeline import Sampling
from fora_trt.plan import Plan, Step, lagrange_weights
from fora_trt.runtime.denoiser import Denoiser, EngineRun
from fora_trt.runtime.layout import Layout
from fora_trt.runtime.window import folded_of
from fora_trt.sampling.conditioning import Conditioning
from fora_trt.sampling.guidance import Guidance
from fora_trt.sampling.loop import Sampler

VALUES = 512
"""Number of values that are kept of each sample."""

DIGITS = 6
"""Digits after the point of fitted weights; there is no more in them."""


@dataclass
class Observer:
    """A `Predictor` that runs trajectories of full steps and keeps what they computed for later steps.

    A step folds sums for `ahead` steps after it.
    """

    denoiser: Denoiser
    ahead: int
    runs: list[list[Tensor]] = field(default_factory=list)

    @property
    def manifest(self) -> Manifest:
        return self.denoiser.manifest

    @property
    def device(self) -> torch.device:
        return self.denoiser.device

    def begin(
        self,
        plan: Plan,
        timesteps: Tensor,
        conditioning: Mapping[str, Tensor],
        batches: Sequence[int],
        first: int = 0,
    ) -> EngineRun:
        """Announce a trajectory without caching."""
        layout = Layout.ahead(len(plan), self.ahead)
        self.runs.append([])
        self._samples = min(batches)  # those that every step has
        return self.denoiser.start(layout, layout, plan, timesteps, conditioning, batches)

    def first_not_finite(self) -> str | None:
        return self.denoiser.first_not_finite()

    def keep(self, latents: Tensor) -> None:
        """Keep values (rows, samples, `VALUES`) of the step that has run, one row for each step that reads it."""
        window = self.denoiser.window
        assert window is not None
        read = [window.tensors[of_window(name)] for name in folded_of(window.full, window.reuse)]
        if not read:
            read = [window.tensors[name][None] for name in window.reuse.inputs if name in window.full.outputs]
        each = -(-VALUES // len(read))
        kept = []
        for tensor in read:
            values = tensor[:, : self._samples].flatten(2)
            kept.append(values[..., :: max(1, values.shape[-1] // each)].float().cpu())
        self.runs[-1].append(torch.cat(kept, dim=-1))


@dataclass(frozen=True)
class Observed:
    """Values (rows, V) of each step of trajectories without caching: row k is for the k-th step after it.

    There is one row if all steps after it read the same.
    """

    steps: Sequence[Tensor]

    @classmethod
    def of(
        cls,
        denoiser: Denoiser,
        plain: Sampling,
        given: Conditioning,
        seeds: Sequence[int],
        guidance: Guidance,
        batch_size: int,
        ahead: int,
    ) -> Observed:
        """Run trajectories without caching; `ahead` is the largest distance from a step to one that reads it.

        It is less if the engines support fewer rows in window tensors.
        """
        most = denoiser.engines[FULL].longest_window if denoiser.folds else None
        observer = Observer(denoiser, ahead if most is None else min(ahead, most - 1))
        sampler = Sampler(observer, plain.scheduler_step, plain.schedule)
        sampler.in_batches(given, seeds, guidance, batch_size, observe=observer.keep)
        return cls([torch.cat([one.flatten(1) for one in step], dim=1) for step in zip(*observer.runs, strict=True)])

    def read(self, full: int, step: int) -> Tensor | None:
        """The values (V,) that full step `full` computed for `step`; None if it is too far."""
        rows = self.steps[full]
        row = 0 if len(rows) == 1 else step - full
        return rows[row] if row < len(rows) else None

    def fitted(self, plan: Plan, damping: float) -> tuple[Step, ...]:
        """The plan with weights that minimize the error of what its reuse steps read, in the place of its own.

        `damping` is what a weight's difference to Lagrange's adds to the error, relative to the squares of the values.
        Steps that read too far keep their weights.
        """
        full_steps: list[int] = []
        steps = []
        for number, step in enumerate(plan):
            if step.is_full:
                full_steps.append(number)
            steps.append(
                step if step.is_full else self._fitted(step, full_steps[-len(step.weights) :], number, damping)
            )
        return tuple(steps)

    def _fitted(self, step: Step, full_steps: Sequence[int], number: int, damping: float) -> Step:
        near = [one for full in reversed(full_steps) if (one := self.read(full, number)) is not None]
        wanted = self.read(number, number)
        assert wanted is not None
        if len(near) < len(full_steps):
            return step
        values = numpy.stack([one.double().numpy() for one in near], axis=1)
        start = numpy.array(lagrange_weights(full_steps, number))
        products = values.T @ values
        products += damping * numpy.trace(products) / len(products) * numpy.eye(len(products))
        missing = values.T @ (wanted.double().numpy() - values @ start)
        weights = start + numpy.linalg.lstsq(products, missing)[0]  # also where all values are 0
        return replace(step, weights=tuple(round(float(one), DIGITS) for one in weights))
