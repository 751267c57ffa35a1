"""How much device memory there is, and how to say so."""

from __future__ import annotations

import torch


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on a CUDA device: free ones, and those that torch keeps for later."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


def gibibytes(count: float) -> str:
    """A number of bytes in GiB, to be read."""
    return f"{count / 2**30:.2f} GiB"
