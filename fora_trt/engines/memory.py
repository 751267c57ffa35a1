"""How much memory a device has left, and how to say so."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable

import psutil
import torch
from torch import Tensor

from fora_trt.errors import InputError
from fora_trt.models.spec import TensorSpec


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated: free ones, and on a CUDA device those that torch keeps for later."""
    if device.type == "cpu":
        return int(psutil.virtual_memory().available)
    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


def gibibytes(count: float) -> str:
    """A number of bytes in GiB, to be read."""
    return f"{count / 2**30:.2f} GiB"


def bytes_of(tensors: Iterable[TensorSpec], batch: int, window: int = 0) -> int:
    """What tensors take at a batch, and at so many reuse steps in a window."""
    return sum(math.prod(one.sized(batch, window)) * getattr(torch, one.dtype).itemsize for one in tensors)


def address_of(tensor: Tensor) -> int:
    """Where a tensor is; an empty one has the address of its memory, which is not null."""
    return tensor.data_ptr() or tensor.untyped_storage().data_ptr()


def content_of(tensor: Tensor) -> bytes:
    """The numbers of a tensor, of any dtype, in their order."""
    row = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.flatten())  # a single number may have a stride
    return row.view(torch.uint8).numpy().tobytes()


def check_room(batch: int, device: torch.device, need_of: Callable[[int], int]) -> None:
    """Raise `InputError` if what is needed at a batch, in bytes, does not fit the device; name a batch that would."""
    need = need_of(batch)
    if need <= (free := free_bytes(device)):
        return

    def too_large(fewer: int) -> bool:
        try:
            return need_of(fewer) > free
        except InputError:  # a batch that the engines do not admit
            return True

    fitting = bisect_left(range(1, batch), True, key=too_large)
    remedy = f"a batch of {fitting} would fit" if fitting else "not even a batch of 1 would fit"
    raise InputError(
        f"a batch of {batch} (twice the images under guidance) needs {gibibytes(need)} on {device}, "
        f"where {gibibytes(free)} are free; {remedy}, see --batch-size"
    )
