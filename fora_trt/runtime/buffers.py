"""Input and output tensors of the step graphs: allocated once, bound by name, shared by the engines.

Shapes: B is the batch of one call, W the largest number of reuse steps in a window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from fora_trt.contract import TensorSpec
from fora_trt.engines.memory import bytes_of, check_room


class Buffers:
    """Tensors by name for one batch size at a time. Memory only grows; a smaller batch uses its first elements.

    `scratch_bytes(batch)` is the memory that the engines allocate in addition.
    """

    def __init__(
        self, specs: Iterable[TensorSpec], window: int, device: torch.device, scratch_bytes: Callable[[int], int]
    ) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._specs = list(specs)
        self._window, self._device, self._scratch_bytes = window, device, scratch_bytes
        self._memory: dict[str, Tensor] = {}

    def have_room(self, batch: int) -> bool:
        """Whether the allocated memory suffices for a batch."""
        return all(len(self._memory.get(one.name, ())) >= self._size(one, batch) for one in self._specs)

    def resize(self, batch: int) -> None:
        """Give `tensors` the shapes of a batch. Raises `InputError` if the batch does not fit the device's memory."""
        if not self.have_room(batch):
            self._allocate(batch)
        shapes = {one.name: one.sized(batch, self._window) for one in self._specs}
        self.tensors = {name: self._memory[name][: math.prod(shape)].view(shape) for name, shape in shapes.items()}

    def free(self) -> None:
        """Give back the memory."""
        self.tensors, self._memory = {}, {}

    def _allocate(self, batch: int) -> None:
        self.free()  # freed first, so that old and new memory need not fit together
        check_room(batch, self._device, self.bytes_of)
        with torch.inference_mode(False):  # inference tensors cannot be written outside inference mode
            for one in self._specs:
                size = max(1, self._size(one, batch))  # an empty tensor has no address to bind
                self._memory[one.name] = torch.zeros(size, dtype=getattr(torch, one.dtype), device=self._device)

    def _size(self, tensor: TensorSpec, batch: int) -> int:
        return math.prod(tensor.sized(batch, self._window))

    def bytes_of(self, batch: int) -> int:
        """Bytes that a batch needs, with the memory of the engines."""
        return bytes_of(self._specs, batch, self._window) + self._scratch_bytes(batch)
