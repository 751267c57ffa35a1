"""Input and output tensors of the step graphs: allocated once, bound by name, shared by the engines.

Shapes: B is the batch of one call, W the largest number of reuse steps in a window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from fora_trt.contract import BATCH, TensorSpec
from fora_trt.engines.memory import check_room


class Memory:
    """Memory by name that the windows of a denoiser share: only one of them is in use at a time.

    It only grows, for all names at once. `before_move` is called before that; holders must then drop their tensors.
    """

    def __init__(self, device: torch.device, before_move: Callable[[], object] = lambda: None) -> None:
        self.device = device
        self._before_move = before_move
        self._sizes: dict[str, tuple[int, torch.dtype]] = {}
        self._tensors: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        """The memory of a name, as one row of elements."""
        return self._tensors[name]

    def has(self, sizes: Sizes) -> bool:
        """Whether there is memory for so many elements of each name."""
        return all(len(self._tensors.get(name, ())) >= count for name, (count, _) in sizes.items())

    def reserve(self, sizes: Sizes, check: Callable[[], object]) -> None:
        """Grow to these sizes; `check` is called when the old memory is free and may raise `RoomError`."""
        if self.has(sizes):
            return
        self._before_move()
        self._tensors = {}  # freed first, so that old and new memory need not fit together
        check()
        self._sizes = self._joined(sizes)
        with torch.inference_mode(False):  # inference tensors cannot be written outside inference mode
            for name, (count, dtype) in self._sizes.items():  # an empty tensor has no address to bind
                self._tensors[name] = torch.zeros(max(1, count), dtype=dtype, device=self.device)

    def bytes_with(self, sizes: Sizes) -> int:
        """Bytes after growing to these sizes."""
        return sum(count * dtype.itemsize for count, dtype in self._joined(sizes).values())

    def free(self) -> None:
        """Give back all memory."""
        self._before_move()
        self._tensors, self._sizes = {}, {}

    def _joined(self, sizes: Sizes) -> dict[str, tuple[int, torch.dtype]]:
        larger = {name: (max(one[0], self._sizes.get(name, one)[0]), one[1]) for name, one in sizes.items()}
        return {**self._sizes, **larger}


Sizes = Mapping[str, tuple[int, torch.dtype]]
"""Number of elements and dtype by name."""


class Buffers:
    """Tensors by name for one batch size at a time, in a memory; a smaller batch uses its first elements.

    `scratch_bytes(batch)` is the memory that the engines allocate in addition. `prefix` keeps names apart from those of
    other buffers in the same memory; memory for `beside` is allocated together with that of these.
    """

    def __init__(
        self,
        specs: Iterable[TensorSpec],
        window: int,
        memory: Memory,
        scratch_bytes: Callable[[int], int],
        prefix: str = "",
        beside: Buffers | None = None,
    ) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._specs = list(specs)
        self._window, self._memory, self._scratch_bytes = window, memory, scratch_bytes
        self._prefix, self._beside = prefix, beside

    def have_room(self, batch: int) -> bool:
        """Whether the allocated memory suffices for a batch."""
        return self._memory.has(self._sizes(batch))

    def resize(self, batch: int) -> None:
        """Give `tensors` the shapes of a batch. Raises `RoomError` if the batch does not fit the device's memory."""
        memory = self._memory
        memory.reserve(self._sizes(batch), lambda: check_room(batch, memory.device, self._needed))
        shapes = {one.name: one.sized(batch, self._window) for one in self._specs}
        self.tensors = {
            name: self._memory[self._prefix + name][: math.prod(shape)].view(shape) for name, shape in shapes.items()
        }

    def resize_keeping(self, batch: int) -> None:
        """The same; for a smaller batch than before, the content of the first samples moves along."""
        axes = {one.name: one.shape.index(BATCH) for one in self._specs}
        kept = {
            name: tensor.narrow(axes[name], 0, batch).clone()
            for name, tensor in self.tensors.items()
            if batch < tensor.shape[axes[name]]
        }
        self.resize(batch)
        for name, tensor in kept.items():
            self.tensors[name].copy_(tensor)

    def drop(self) -> None:
        """Drop the tensors; the memory is that of others too."""
        self.tensors = {}

    def _sizes(self, batch: int) -> dict[str, tuple[int, torch.dtype]]:
        own = {
            self._prefix + one.name: (math.prod(one.sized(batch, self._window)), getattr(torch, one.dtype))
            for one in self._specs
        }
        return own if self._beside is None else {**own, **self._beside._sizes(batch)}

    def _needed(self, batch: int) -> int:
        return self._memory.bytes_with(self._sizes(batch)) + self._scratch_bytes(batch)
