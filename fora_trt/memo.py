"""Remembers what was computed: from a tensor that is given at every step, or for the latest of several keys."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

Result = TypeVar("Result")
Key = TypeVar("Key", bound=Hashable)


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


class Kept(Generic[Key, Result]):
    """What was made for the latest `most` different keys."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._made: dict[Key, Result] = {}

    def get(self, key: Key, make: Callable[[], Result]) -> Result:
        """What was made for a key; it is made now if it is not kept."""
        made = self._made.pop(key) if key in self._made else make()
        self._made[key] = made  # the latest comes last
        if len(self._made) > self._most:
            self._made.pop(next(iter(self._made)))
        return made
