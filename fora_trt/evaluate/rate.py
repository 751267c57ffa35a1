"""The rate at which a device multiplies matrices, to estimate how long a comparison takes."""

from __future__ import annotations

import time

import torch


def flops_per_second(device: torch.device) -> float:
    """FLOPs per second of a large matrix product in fp32."""
    size = 1024
    matrix, seconds = torch.ones(size, size, device=device), []
    for _ in range(4):  # the first warms up
        began = time.perf_counter()
        (matrix @ matrix).sum().item()  # waits for the device
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds[1:])
