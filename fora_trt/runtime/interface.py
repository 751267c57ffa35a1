"""The interface between the sampling loop and a denoiser; the PyTorch references implement it too.

Types enforce the order of calls: `begin` returns a run, a run returns a step, and a step returns a prediction.
Shapes: B is the batch of one call (twice the images under guidance); C, H, W are channels, height and width of the
latents; S is the number of steps.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fora_trt.bundle import Manifest
from fora_trt.plan import Plan


class ReadyStep(Protocol):
    """A prepared step, and the steps after it in its window: they need only the arguments of `predict`."""

    def predict(self, offset: int, latents: Tensor, timestep: Tensor | float, **conditioning: Tensor) -> Tensor:
        """Run the step at an `offset` in the window on the current stream; 0 is the full or partial step.

        `latents` is (B, C, H, W), `timestep` a scalar or (B,), `conditioning` the other inputs by name. The prediction
        (B, out_channels, H, W) is valid until the next call.
        """

    @property
    def variant(self) -> Hashable:
        """Differs if the window begins with another graph or uses other addresses: then captures cannot replace it."""

    def is_capturable(self) -> bool:
        """Whether the steps from this one to the end of its window can be captured in a CUDA graph."""


class Run(Protocol):
    """An announced trajectory; its steps must run in order."""

    @property
    def offsets(self) -> Sequence[int]:
        """The offset of each step in its window. More steps may be full than the plan has."""

    @property
    def graphs(self) -> Sequence[str]:
        """The graph of each step: those at offset 0 are full or partial, the others reuse steps."""

    @property
    def generation(self) -> object:
        """Changes when captured steps become invalid, because memory moved or engines were bound again."""

    def at(self, step: int, batch: int) -> ReadyStep:
        """Prepare a step and the rest of its window, for calls with this batch size."""


class Predictor(Protocol):
    """Predicts the noise at every step of an announced trajectory."""

    @property
    def manifest(self) -> Manifest:
        """The manifest of the bundle."""

    @property
    def device(self) -> torch.device:
        """The device that computes the steps."""

    def begin(
        self,
        plan: Plan,
        timesteps: Tensor,
        conditioning: Mapping[str, Tensor],
        batches: Sequence[int],
        first: int = 0,
    ) -> Run:
        """Announce a trajectory: its plan, the timesteps (S,) or (S, B), and the conditioning inputs.

        The run consists of the S steps of the plan from number `first` on; those before have run already.
        `batches` are the batch sizes that the steps will be called with. `conditioning` has as many rows as the largest
        of them, or one row for all samples.
        """

    def first_not_finite(self) -> str | None:
        """Name of the first tensor of the last step, in network order, that is not finite; None if all are."""


def overflow_remedy(precision: str) -> str:
    """What to do about a model whose outputs are not finite in this precision."""
    finer = {"fp16": "bf16 or fp32", "bf16": "fp32"}
    return (
        f"export it with --precision {finer[precision]}"
        if precision in finer
        else "its weights or its inputs are too large even for fp32; check the checkpoint and the guidance scale"
    )
