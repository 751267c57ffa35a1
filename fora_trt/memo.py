"""Remembers what was computed from tensors, for callers who give the same tensors at every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

Result = TypeVar("Result")


class Memo(Generic[Result]):
    """A function of a tensor that is computed once as long as the tensor lives and is not changed in place.

    Tensors of `torch.inference_mode` do not count changes, so nothing is remembered about them.
    """

    def __init__(self, compute: Callable[[Tensor], Result]) -> None:
        from torch.utils.weak import WeakTensorKeyDictionary  # `call` is read without torch

        self._compute = compute
        self._known: Any = WeakTensorKeyDictionary()

    def __call__(self, value: Tensor) -> Result:
        if value.is_inference():
            return self._compute(value)
        version, found = self._known.get(value, (None, None))
        if version != value._version:
            found = self._compute(value)
            self._known[value] = value._version, found
        return found  # type: ignore[no-any-return]
