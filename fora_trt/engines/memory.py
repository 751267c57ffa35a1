"""Free memory of a device, sizes of tensors, and the check that a batch fits."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable
from string import ascii_letters
from typing import TYPE_CHECKING

from fora_trt.contract import TensorSpec
from fora_trt.errors import InputError, RoomError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def free_bytes(device: torch.device) -> int:
    """Bytes that can be allocated: free memory, and on a CUDA device also torch's cached memory."""
    import psutil
    import torch

    if device.type == "cpu":
        return int(psutil.virtual_memory().available)
    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


def gibibytes(count: float) -> str:
    """Format a number of bytes in GiB."""
    return f"{count / 2**30:.2f} GiB"


def bytes_of(tensors: Iterable[TensorSpec], batch: int, window: int = 0) -> int:
    """Bytes of tensors for a batch size and a number of reuse steps in the window."""
    return sum(math.prod(one.sized(batch, window)) * _width(one.dtype) for one in tensors)


def _width(dtype: str) -> int:
    """Bytes of an element of a dtype as torch spells it; without torch, which takes seconds to import."""
    return int(dtype.lstrip(ascii_letters)) // 8 if dtype != "bool" else 1


def address_of(tensor: Tensor) -> int:
    """Address of a tensor; for an empty tensor the address of its storage, which is not null."""
    return tensor.data_ptr() or tensor.untyped_storage().data_ptr()


def content_of(tensor: Tensor) -> bytes:
    """The bytes of a tensor of any dtype, in row-major order."""
    import torch

    row = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.flatten())  # a single element may have a stride
    return row.view(torch.uint8).numpy().tobytes()


def check_room(batch: int, device: torch.device, need_of: Callable[[int], int]) -> None:
    """Raise `RoomError` if the bytes that a batch needs exceed the free memory; name the largest batch that fits."""
    need = need_of(batch)
    if need <= (free := free_bytes(device)):
        return

    def too_large(fewer: int) -> bool:
        try:
            return need_of(fewer) > free
        except InputError:  # a batch that the engines do not support
            return True

    fitting = bisect_left(range(1, batch), True, key=too_large)
    remedy = f"a batch of {fitting} fits" if fitting else "not even a batch of 1 fits"
    raise RoomError(
        f"a batch of {batch} (with guidance twice the number of images) needs {gibibytes(need)} on {device}, but only "
        f"{gibibytes(free)} are free; {remedy}, see --batch-size",
        batch,
        fitting,
    )
