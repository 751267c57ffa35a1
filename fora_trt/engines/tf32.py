"""Full fp32 precision on a GPU: by default, PyTorch's convolutions round to TF32, which has 10 mantissa bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def without_tf32(device: torch.device) -> Iterator[None]:
    """Compute matrix products and convolutions in full fp32 within the block; then restore the previous settings."""
    if device.type != "cuda":
        yield
        return
    backends: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [one.allow_tf32 for one in backends]
    try:
        for one in backends:
            one.allow_tf32 = False
        yield
    finally:
        for one, allowed in zip(backends, before, strict=True):
            one.allow_tf32 = allowed
