"""A window: one full step and the reuse steps after it, as launches of the two engines on shared buffers.

A step is identified by its offset in the window: 0 is the full step, k the k-th reuse step after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

from torch import Tensor

from fora_trt.contract import LATENTS, of_window
from fora_trt.engines.base import Engine, Launch
from fora_trt.errors import InputError
from fora_trt.runtime.buffers import Buffers

_GENERATIONS = count(1)
"""One counter for all windows, so that no two windows ever have the same generation."""


class Window:
    """Engines bound for windows of up to `length` reuse steps, at one batch size at a time.

    The reuse engine reads the memory that the full engine writes: a tensor has the same name in both graphs. The full
    engine writes the folded sums of all reuse steps of the window into one tensor, and each reuse step reads its own
    slice of it. So the reuse engine has one binding per offset.
    """

    def __init__(self, full: Engine, reuse: Engine, length: int) -> None:
        self.full, self.reuse, self.length = full, reuse, length
        self.batch = 0
        self.generation = next(_GENERATIONS)
        self._folded = folded_of(full, reuse)
        edges = (full.inputs, full.outputs, reuse.inputs, reuse.outputs)
        specs = {name: one for tensors in edges for name, one in tensors.items() if name not in self._folded}
        self.buffers = Buffers(specs.values(), length, full.device, self._scratch_bytes)
        self._launches: dict[int, Launch] = {}
        self._sums: dict[str, Tensor] = {}
        self._summed_batch = 0
        self._scratch: tuple[int, int] | None = None

    def prepare(self, batch: int) -> None:
        """Bind the engines to tensors of this batch size; `generation` changes if captured steps become invalid.

        Memory only grows. If the batch shrinks within a window, features stay at their address and the smaller batch
        reads their first rows.
        """
        if batch < 1:
            raise InputError(f"the batch is {batch}; at least one latent is needed")
        if batch != self.batch:
            self.batch = 0
            if not self.buffers.have_room(batch):  # drop the bindings to memory that `resize` frees
                self._launches, self._sums, self._summed_batch = {}, {}, 0
            self.buffers.resize(batch)
            self._launches = {0: self.full.bind(self.buffers.tensors)}
            self._renew()
            if batch > self._summed_batch:
                self._sum_at(batch)
            self._launch(1)
            self.batch = batch
        if (scratch := (self.full.scratch_address(), self.reuse.scratch_address())) != self._scratch:
            self._scratch = scratch
            self._renew()

    def run(self, offset: int) -> None:
        """Launch the engine of the step at this offset on the current buffers."""
        if offset == 0 and self.batch != self._summed_batch:
            self._sum_at(self.batch)
        self._launch(offset)()

    def free(self) -> None:
        """Give back all memory, also to holders of this window; it must be prepared again before it is used."""
        self._launches, self._sums, self._summed_batch, self.batch = {}, {}, 0, 0
        self.buffers.free()
        self._renew()

    def launches(self) -> dict[bool, Launch]:
        """The current launches: of the full engine under True, of the reuse engine under False."""
        return {True: self._launches[0], False: self._launch(1)}

    def can_capture(self, offsets: Sequence[int]) -> bool:
        """Whether the steps at these offsets have run once and can be captured in a CUDA graph."""
        launches = {binding: self._launches.get(binding) for binding in map(self._binding, offsets)}
        return bool(launches) and all(
            launch is not None and (self.reuse if binding else self.full).can_capture(launch)
            for binding, launch in launches.items()
        )

    def _binding(self, offset: int) -> int:
        """Number of the binding that an offset uses; without folded sums all reuse steps share binding 1."""
        return min(offset, self.length if self._folded else 1)

    def _launch(self, offset: int) -> Launch:
        binding = self._binding(offset)
        if binding not in self._launches:
            tensors = self.buffers.tensors
            sums = {name: one[binding - 1, : len(tensors[LATENTS])] for name, one in self._sums.items()}
            self._launches[binding] = self.reuse.bind({**tensors, **sums})
        return self._launches[binding]

    def _sum_at(self, batch: int) -> None:
        """Point reuse steps to the sums that the full engine writes at this batch; smaller batches read first rows."""
        self._sums = {name: self.buffers.tensors[of_window(name)] for name in self._folded}
        self._summed_batch = batch
        self._launches = {0: self._launches[0]}
        self._renew()

    def _renew(self) -> None:
        self.generation = next(_GENERATIONS)

    def _scratch_bytes(self, batch: int) -> int:
        return max(engine.scratch_bytes(batch, self.length) for engine in (self.full, self.reuse))


def folded_of(full: Engine, reuse: Engine) -> list[str]:
    """Names of the folded sums that the full engine computes for the reuse steps of its window; empty if none."""
    return [name for name in reuse.inputs if of_window(name) in full.outputs]
