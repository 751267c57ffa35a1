"""Variants: other networks for ranges of timesteps, each with engines of its own, in one trajectory.

Some systems switch networks along the trajectory: fewer mediator tokens for noisy latents, narrower layers for some
timesteps. A step runs the network whose range has its timestep. Features do not pass from one network to the next, so
the first step of a range is full, and a forecast begins anew there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from fora_trt.bundle import Manifest
from fora_trt.errors import InputError
from fora_trt.plan import Plan, adapted
from fora_trt.runtime.interface import Predictor, ReadyStep, Run

Range = tuple[float, float]
"""Timesteps from the first number up to, but without, the second."""


class Variants:
    """A `Predictor` that runs a trajectory with several predictors, one for each range of timesteps.

    `usual` runs the steps whose timestep is in no range. All take latents of one shape.
    """

    def __init__(self, usual: Predictor, others: Sequence[tuple[Range, Predictor]]) -> None:
        self.predictors = [usual, *(one for _, one in others)]
        self._ranges = [one for one, _ in others]
        self._latest: Predictor = usual

    @property
    def manifest(self) -> Manifest:
        """The manifest of the bundle, which is that of the usual network."""
        return self.predictors[0].manifest

    @property
    def device(self) -> torch.device:
        """The device that computes the steps."""
        return self.predictors[0].device

    def begin(
        self,
        plan: Plan,
        timesteps: Tensor,
        conditioning: Mapping[str, Tensor],
        batches: Sequence[int],
        first: int = 0,
    ) -> VariantRun:
        """Announce a trajectory to each network that runs a part of it; see `Predictor.begin`.

        Raises `InputError` if the samples of a step are in different ranges, and if a network would run twice, because
        the timesteps return to its range.
        """
        numbers = [self._number_of(one) for one in timesteps.reshape(len(timesteps), -1).tolist()]
        parts = [(number, [*steps]) for number, steps in groupby(range(len(numbers)), key=numbers.__getitem__)]
        if len({number for number, _ in parts}) < len(parts):
            raise InputError(
                f"the timesteps of this scheduler leave a range of {self.manifest.name} and return to it; give another "
                "scheduler"
            )
        starts = [first + steps[0] for _, steps in parts[1:]]
        whole = adapted(plan, full=starts, forgotten=starts) if starts else plan
        begun = []
        for number, steps in parts:
            given = timesteps[steps[0] : steps[-1] + 1]
            own = whole[first + steps[0] : first + steps[-1] + 1]
            begun.append(Part(number, steps[0], self.predictors[number].begin(own, given, conditioning, batches)))
        return VariantRun(self, begun)

    def first_not_finite(self) -> str | None:
        """Name of the first tensor of the last step that is not finite; None if all are."""
        return self._latest.first_not_finite()

    def _number_of(self, timesteps: Sequence[float]) -> int:
        """The number of the network that runs a step, whose samples have these timesteps."""
        found = {
            next((k for k, (low, high) in enumerate(self._ranges, 1) if low <= one < high), 0) for one in timesteps
        }
        if len(found) > 1:
            raise InputError(f"{self.manifest.name} needs one timestep for all samples of a step: it has variants")
        return found.pop()


@dataclass(frozen=True)
class Part:
    """The part of a trajectory that one network runs, from step `first` on."""

    number: int
    first: int
    run: Run


@dataclass(frozen=True)
class VariantRun:
    """A run of several networks, one after the other."""

    variants: Variants
    parts: Sequence[Part]

    @property
    def offsets(self) -> Sequence[int]:
        """The offset of each step in its window; the first step of a part begins one."""
        return [offset for part in self.parts for offset in part.run.offsets]

    @property
    def graphs(self) -> Sequence[str]:
        """The graph of each step."""
        return [graph for part in self.parts for graph in part.run.graphs]

    @property
    def generation(self) -> object:
        """Changes when captured steps become invalid."""
        return tuple((part.number, part.run.generation) for part in self.parts)

    def at(self, step: int, batch: int) -> VariantStep:
        """Prepare a step and the rest of its window."""
        part = next(one for one in reversed(self.parts) if one.first <= step)
        self.variants._latest = self.variants.predictors[part.number]
        return VariantStep(part.number, part.run.at(step - part.first, batch))


@dataclass(frozen=True)
class VariantStep:
    """A prepared step of one of the networks."""

    number: int
    step: ReadyStep

    @property
    def variant(self) -> tuple[int, object]:
        """Differs between networks, and as the step's own does."""
        return self.number, self.step.variant

    def predict(self, offset: int, latents: Tensor, timestep: Tensor | float, **conditioning: Tensor) -> Tensor:
        """Run the step at an offset in the window; see `ReadyStep.predict`."""
        return self.step.predict(offset, latents, timestep, **conditioning)

    def is_capturable(self) -> bool:
        """Whether the steps from this one to the end of its window can be captured in a CUDA graph."""
        return self.step.is_capturable()


def variants_of(manifest: Manifest, predictors: Sequence[Predictor]) -> Predictor:
    """One predictor for a bundle, given those of its networks: the usual one first, then those of the variants."""
    usual, *others = predictors
    ranges = [record.timesteps for record in manifest.variants]
    return Variants(usual, [*zip(ranges, others, strict=True)]) if others else usual


def networks_of(predictor: Predictor) -> Sequence[Predictor]:
    """The predictors of all networks: the usual one first, then those of the variants."""
    return predictor.predictors if isinstance(predictor, Variants) else [predictor]
