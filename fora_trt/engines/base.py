"""The `Engine` interface, which every backend implements; the runtime knows nothing else of a backend."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from fora_trt.models.spec import TensorSpec

Launch = Callable[[], None]
"""Runs a graph on tensors that were bound, on the current stream; may return before it is done.

A launch may have a method `is_capturable` of its own, which then takes precedence over that of its engine.
"""


class Engine(ABC):
    """Runs one graph on tensors that the caller owns.

    `inputs` and `outputs` map a tensor's name to its dtype and symbolic shape.
    """

    longest_window: int | None = None
    """The most reuse steps that tensors of a window can be bound for; None for any number."""

    shortest_window: int = 0
    """The fewest reuse steps that tensors of a window must have room for; 1 where a runtime takes no empty tensors."""

    most_rows: int | None = None
    """The largest batch of a conditioning engine; None for any."""

    def __init__(self, inputs: Iterable[TensorSpec], outputs: Iterable[TensorSpec], device: torch.device) -> None:
        self.inputs: Mapping[str, TensorSpec] = {tensor.name: tensor for tensor in inputs}
        self.outputs: Mapping[str, TensorSpec] = {tensor.name: tensor for tensor in outputs}
        self.device = device

    @abstractmethod
    def bind(self, tensors: Mapping[str, Tensor]) -> Launch:
        """Take the addresses of `tensors` by name, once for many steps; names of other engines are passed over.

        What is returned runs the graph on them, and the caller keeps them in place as long as it does. An engine can
        be bound to several sets of tensors, and run on them in turn.
        """

    def is_capturable(self) -> bool:
        """Whether a launch on the current stream, once it has been done, can become a part of a CUDA graph."""
        return False

    def can_capture(self, launch: Launch) -> bool:
        """Whether this launch of the engine, on the current stream, can become a part of a CUDA graph now."""
        return bool(getattr(launch, "is_capturable", self.is_capturable)())

    def scratch_address(self) -> int:
        """Where the memory is that it uses beside bound tensors; a graph that was captured at another is void."""
        return 0

    def scratch_bytes(self, batch: int, window: int = 0) -> int:
        """Device memory that binding this batch allocates beside the bound tensors, as far as it is known.

        `window` is the number of reuse steps in tensors of a window.
        Raises `InputError` for a batch that the engine does not admit.
        """
        return 0
