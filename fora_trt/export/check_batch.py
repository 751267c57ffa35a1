"""Check in seconds, before the trace, that a module takes a symbolic batch dimension: call it without data.

The same call finds the line to blame if the trace fails later.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import SymInt, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from fora_trt.contract import LATENTS
from fora_trt.errors import ExportError, first_line
from fora_trt.models.examples import example_inputs
from fora_trt.models.sharing import sharing_copy
from fora_trt.models.spec import ModelSpec
from fora_trt.quiet import quiet

HINT = 5
"""Size of the symbolic batch: not 0 or 1, which are special, and hardly another size of the module."""

OTHERS = (2, 3, 4, 7, 8, 64)
"""Other sizes of the batch; code is blamed if what it found for `HINT` does not hold for one of them."""

_PLACE = re.compile(r"([\w./-]+\.py):(\d+)")
_TORCH, _PACKAGE = str(Path(torch.__file__).parent), str(Path(__file__).parents[1])
_OPERATORS = str(Path(_TORCH, "_subclasses"))

CONSTRAINT = "Constraints violated"
"""What torch.export says if code holds for some sizes of the batch only."""

AS_A_WHOLE = (
    "compute on the batch as a whole: no loop over samples, no list of samples, no len() or int() of the batch, and "
    "// instead of /"
)


class _ConstantError(Exception):
    """The batch became a constant."""


class _Shapes(ShapeEnv):
    """Stops at the line that makes the batch a constant, and keeps the first line that holds for some sizes only."""

    batch: Any = None
    place = ""
    compared = ""

    def _set_replacement(self, a: Any, tgt: Any, msg: str) -> None:
        super()._set_replacement(a, tgt, msg)
        if a == self.batch and tgt.is_number:
            self.place = _line_of(traceback.extract_stack())
            raise _ConstantError

    def _log_guard(self, prefix: str, g: Any, forcing_spec: bool) -> None:
        super()._log_guard(prefix, g, forcing_spec)
        if not self.compared and any(g.subs(self.batch, size) == False for size in OTHERS):  # noqa: E712 # of sympy
            frames = traceback.extract_stack()
            by_operator = any(one.filename.startswith(_OPERATORS) for one in frames)  # such as a choice of a kernel
            self.compared = "" if by_operator else _line_of(frames)


@dataclass(frozen=True)
class _Called:
    """What happened in a call without data: the symbolic batch, the shape of the prediction, or the failure."""

    shapes: _Shapes
    batch: Any
    shape: tuple[Any, ...]
    failure: Exception | None


@torch.no_grad()
def _called(module: nn.Module, spec: ModelSpec) -> _Called:
    """Call a module with tensors without data, whose first dimension is a symbol."""
    shapes = _Shapes()
    mode = FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True)
    example = example_inputs(spec.inputs, spec.conditioning, HINT)
    first = example[LATENTS]
    sizes = [DimDynamic.DYNAMIC, *[DimDynamic.STATIC] * (first.dim() - 1)]
    copied = sharing_copy(module)  # some modules keep what they have computed: tensors without data
    failure: Exception | None = None
    shape: tuple[int, ...] = ()
    with quiet("torch"), enable_python_dispatcher(), mode:
        latents = mode.from_tensor(first, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))
        batch = latents.shape[0]
        shapes.batch = batch.node.expr if isinstance(batch, SymInt) else None
        inputs = {name: torch.empty((batch, *one.shape[1:]), dtype=one.dtype) for name, one in example.items()}
        try:
            shape = spec.call(copied, inputs).shape
        except Exception as error:  # the module's own code can raise anything
            failure = error
    return _Called(shapes, batch, shape, failure)


def check_symbolic_batch(module: nn.Module, spec: ModelSpec) -> None:
    """Raise `ExportError` with a line of code if the module makes the batch a constant, or reads values of its inputs.

    A module that fails for another reason is not refused: that is left to the trace.
    """
    called = _called(module, spec)
    failure = called.failure
    if isinstance(called.batch, SymInt) and called.batch.node.maybe_as_int() is not None:
        raise ExportError(
            f"{spec.architecture} makes the size of the batch a constant{called.shapes.place}; {AS_A_WHOLE}"
        )
    reads = "data-dependent" in str(failure) or "DataDependent" in type(failure).__name__
    if reads or any(isinstance(size, SymInt) for size in called.shape[1:]):
        place = _PLACE.search(str(failure))
        at = f" at {place[1]}:{place[2]}" if place else ""
        raise ExportError(
            f"{spec.architecture} reads values of a tensor{at}, so its shapes or its path depend on its inputs; give "
            "what is equal for all inputs, such as a full mask, as numbers in `call`"
        )


def reason_in_words(error: Exception, module: nn.Module, spec: ModelSpec) -> str:
    """Why a module could not be traced with a symbolic batch, as the end of a sentence, with the line if known."""
    if CONSTRAINT not in str(error):
        return f"cannot be traced with a symbolic batch dimension{_line_of_error(error)}: {first_line(error)}"
    shapes = _called(module, spec).shapes
    return (
        f"computes with the size of the batch in Python{shapes.place or shapes.compared}, which fits some sizes only, "
        f"such as int() of a quotient or a comparison; {AS_A_WHOLE}"
    )


def _line_of_error(error: Exception) -> str:
    return _line_of(traceback.extract_tb(error.__traceback__))


def _line_of(frames: Iterable[traceback.FrameSummary]) -> str:
    """The innermost line outside PyTorch and this package, as the end of a phrase; empty if there is none."""
    outside = [one for one in frames if not one.filename.startswith((_TORCH, _PACKAGE))]
    found = [one for one in outside if Path(one.filename).is_file()]
    return f" at {_short(found[-1].filename)}:{found[-1].lineno}" if found else ""


def _short(path: str) -> str:
    """The last parts of a path."""
    return "/".join(Path(path).parts[-3:])
