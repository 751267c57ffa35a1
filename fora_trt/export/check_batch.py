"""Check in seconds, before the trace, that a module takes a symbolic batch dimension: call it without data."""

from __future__ import annotations

import re
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import SymInt, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from fora_trt.contract import LATENTS
from fora_trt.errors import ExportError
from fora_trt.models.examples import example_inputs
from fora_trt.models.sharing import sharing_copy
from fora_trt.models.spec import ModelSpec
from fora_trt.quiet import quiet

HINT = 5
"""Size of the symbolic batch: not 0 or 1, which are special, and hardly another size of the module."""

_PLACE = re.compile(r"([\w./-]+\.py):(\d+)")
_TORCH = str(Path(torch.__file__).parent)


class _ConstantError(Exception):
    """The batch became a constant."""


class _Shapes(ShapeEnv):
    """Stops at the line of code that makes the batch a constant."""

    batch: Any = None
    place = ""

    def _set_replacement(self, a: Any, tgt: Any, msg: str) -> None:
        super()._set_replacement(a, tgt, msg)
        if a == self.batch and tgt.is_number:
            outer = (_TORCH, str(Path(__file__).parent))
            frames = [one for one in traceback.extract_stack() if not one.filename.startswith(outer)]
            self.place = f" at {_short(frames[-1].filename)}:{frames[-1].lineno}" if frames else ""
            raise _ConstantError


@torch.no_grad()
def check_symbolic_batch(module: nn.Module, spec: ModelSpec) -> None:
    """Raise `ExportError` with a line of code if the module makes the batch a constant, or reads values of its inputs.

    A module that fails for another reason is not refused: that is left to the trace.
    """
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
    if isinstance(batch, SymInt) and batch.node.maybe_as_int() is not None:
        raise ExportError(
            f"{spec.architecture} makes the size of the batch a constant{shapes.place}; compute on the batch as a "
            "whole: no loop over samples, no list of samples, no len() or int() of the batch"
        )
    reads = "data-dependent" in str(failure) or "DataDependent" in type(failure).__name__
    if reads or any(isinstance(size, SymInt) for size in shape[1:]):
        place = _PLACE.search(str(failure))
        at = f" at {place[1]}:{place[2]}" if place else ""
        raise ExportError(
            f"{spec.architecture} reads values of a tensor{at}, so its shapes or its path depend on its inputs; give "
            "what is equal for all inputs, such as a full mask, as numbers in `call`"
        )


def _short(path: str) -> str:
    """The last parts of a path."""
    return "/".join(Path(path).parts[-3:])
