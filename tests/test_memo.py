"""What is remembered about tensors, and when it is computed again."""

import gc
import weakref

import torch
from torch import Tensor

from fora_trt.memo import Memo


def counted() -> tuple[Memo[float], list[float]]:
    computed: list[float] = []

    def total(value: Tensor) -> float:
        computed.append(float(value.sum()))
        return computed[-1]

    return Memo(total), computed


def test_a_tensor_is_computed_once_until_it_changes() -> None:
    memo, computed = counted()
    value = torch.ones(3)
    assert [memo(value), memo(value)] == [3, 3]
    value += 1
    assert [memo(value), memo(value), memo(value.clone())] == [6, 6, 6]
    assert computed == [3, 6, 6]


def test_a_change_through_a_view_counts() -> None:
    memo, computed = counted()
    value = torch.ones(3)
    memo(value)
    value[:1].zero_()
    assert memo(value) == 2
    assert computed == [3, 2]


def test_tensors_without_a_count_of_changes_are_computed_each_time() -> None:
    memo, computed = counted()
    with torch.inference_mode():
        value = torch.ones(3)
        memo(value)
        value.zero_()
        assert memo(value) == 0
    assert computed == [3, 0]


def test_the_tensor_is_not_kept_alive() -> None:
    memo, _ = counted()
    value = torch.ones(3)
    memo(value)
    gone = weakref.ref(value)
    del value
    gc.collect()
    assert gone() is None
