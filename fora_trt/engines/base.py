"""The `Engine` interface, which every backend implements and through which the runtime uses it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from fora_trt.contract import TensorSpec

Launch = Callable[[], None]
"""Runs a graph on its bound tensors, on the current stream; may return before the work is finished.

A launch may define a method `is_capturable`, which takes precedence over that of its engine.
"""


BASE, WEIGHTS = "base.", "weights."
"""Prefixes of the further tensors that an engine which accumulates takes for an output; see `Engine.accumulates`."""


class Engine(ABC):
    """Runs one graph on tensors that the caller owns.

    `inputs` and `outputs` map the name of a tensor to its spec.
    """

    longest_window: int | None = None
    """Largest number of rows (reuse steps) of window tensors that can be bound; None for no limit."""

    shortest_window: int = 0
    """Smallest number of rows of window tensors; 1 for a runtime that does not support empty tensors."""

    any_window: bool = False
    """Whether another number of rows in window tensors costs next to nothing, so that a step can bind just its own."""

    accumulates: bool = False
    """Whether window outputs can be added to what is in memory: `bind` then takes for an output X also `base.X`, the
    initial values of its first rows, and `weights.X` (rows), which its sums are multiplied by before that."""

    has_threads: bool = False
    """Whether it computes on a CPU with threads of its own. Those of torch, which spin after their work, would then
    compete with them: small tensors around the launches are better computed in one thread."""

    most_rows: int | None = None
    """Largest batch of a conditioning engine; None for no limit."""

    def __init__(self, inputs: Iterable[TensorSpec], outputs: Iterable[TensorSpec], device: torch.device) -> None:
        self.inputs: Mapping[str, TensorSpec] = {tensor.name: tensor for tensor in inputs}
        self.outputs: Mapping[str, TensorSpec] = {tensor.name: tensor for tensor in outputs}
        self.device = device

    @abstractmethod
    def bind(self, tensors: Mapping[str, Tensor]) -> Launch:
        """Bind the graph's inputs and outputs to `tensors` by name, once for many steps; unknown names are ignored.

        The returned launch runs the graph on these tensors; the caller must not free or move them while it uses the
        launch. An engine can be bound to several sets of tensors and run on them alternately.
        """

    def is_capturable(self) -> bool:
        """Whether launches of this engine can be captured in a CUDA graph after a first run outside a capture."""
        return False

    def can_capture(self, launch: Launch) -> bool:
        """Whether this launch can be captured in a CUDA graph on the current stream now."""
        return bool(getattr(launch, "is_capturable", self.is_capturable)())

    def scratch_address(self) -> int:
        """Address of the scratch memory; a CUDA graph that was captured at another address is invalid."""
        return 0

    def scratch_bytes(self, batch: int, window: int = 0) -> int:
        """Device memory in bytes that binding this batch allocates in addition to the bound tensors, as far as known.

        `window` is the number of reuse steps in window tensors. Raises `InputError` for a batch that the engine does
        not support.
        """
        return 0
