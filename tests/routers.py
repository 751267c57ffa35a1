"""Routers of Learning-to-Cache with random numbers, in the form in which the authors publish theirs."""

import random
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor

DDIM20 = {0: 56, 2: 55, 4: 55, 6: 55, 8: 53, 10: 26, 12: 8, 14: 4, 16: 0, 18: 0}
"""Layers that the authors' router for 20 steps computes at each step that consults it, counted from the last step."""


def ddim20_routers(layers: int, seed: int = 0) -> list[Tensor]:
    """Random routers that leave out as many of this number of layers as the authors'; equal counts are equal masks."""
    generator = random.Random(seed)
    chosen = {count: {*generator.sample(range(layers), layers * count // 56)} for count in {*DDIM20.values()}}
    return [scores_of(chosen[DDIM20[step]] if step in DDIM20 else (), layers) for step in range(20)]


def router_file(path: Path, scores: Sequence[Tensor]) -> Path:
    """A file as the authors' training writes it: routers by number, and the arguments of the training."""
    routers = OrderedDict((f"{number}.prob", one) for number, one in enumerate(scores))
    torch.save({"routers": routers, "opt": {}, "args": Namespace(model="DiT-XL/2", num_sampling_steps=20)}, path)
    return path


def scores_of(active: Collection[int], layers: int = 6) -> Tensor:
    """Numbers whose sigmoids are above 0.1 for the active layers alone."""
    return torch.tensor([1.0 if layer in active else -4.0 for layer in range(layers)])
