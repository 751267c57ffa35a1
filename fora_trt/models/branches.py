"""Find a network whose branches could be merged: parallel layers for training that one layer computes at inference."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fora_trt.models.examples import example_inputs
from fora_trt.models.spec import ModelSpec

MERGING = ("switch_to_deploy", "reparameterize", "reparam", "merge_branches", "merge_kernel", "fuse")
"""Names of the methods that merge the branches of a module, as published networks spell them."""


@torch.no_grad()
def unmerged_branches(module: nn.Module, spec: ModelSpec) -> str | None:
    """A sentence about branches that are not merged, with the arithmetic they cost; None if merging saves nothing.

    The branches are merged in a copy. A copy that fails or computes something else is no reason for a sentence.
    """
    found = [(type(one).__name__, name) for one in module.modules() for name, _ in _methods(one)]
    if not found:
        return None
    inputs = example_inputs(spec.inputs, spec.conditioning, batch=2)
    try:
        merged = _merged(copy.deepcopy(module)).eval()
        before, left = _arithmetic(module, spec, inputs)
        after, right = _arithmetic(merged, spec, inputs)
    except Exception:  # methods of the user's module can raise anything
        return None
    if left.shape != right.shape or not torch.allclose(left, right, rtol=1e-3, atol=1e-3 * float(left.abs().max())):
        return None
    fewer = sum(one.numel() for one in merged.parameters()) < sum(one.numel() for one in module.parameters())
    if before <= after and not fewer:
        return None
    kind, name = found[0]
    times = before / max(after, 1)
    more = f", which takes {times:.1f} times the arithmetic of the merged network" if times > 1.05 else ""
    return (
        f"{len(found)} modules are exported with branches for training, such as {kind}{more}; call {name}() of each in "
        "the factory, after the weights are loaded and eval() was called"
    )


def _methods(module: nn.Module) -> Iterator[tuple[str, Callable[[], object]]]:
    """The method that merges the branches of a module, if it has one that needs no arguments."""
    for name in MERGING:
        method = getattr(module, name, None)
        if inspect.ismethod(method) and all(
            one.default is not one.empty or one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
            for one in inspect.signature(method).parameters.values()
        ):
            yield name, method
            return


def _merged(module: nn.Module) -> nn.Module:
    """The module with all branches merged in place; some methods return the module that takes the place."""
    for name, child in list(module.named_children()):
        setattr(module, name, _merged(child))
    for _, method in _methods(module):
        made = method()
        return made if isinstance(made, nn.Module) else module
    return module


def _arithmetic(module: nn.Module, spec: ModelSpec, inputs: Mapping[str, Tensor]) -> tuple[int, Tensor]:
    """Operations of a call, and its result."""
    with FlopCounterMode(display=False) as counter:
        result = spec.call(module, inputs)
    return counter.get_total_flops(), result
