"""Find the modules of a network that a trace did not call: a switch in Python chose others, and the choice is fixed."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

SWITCHES = (
    "the trace fixes the branch of every condition in Python, such as an `if` on an attribute or an argument; if "
    "another branch is wanted, set the switch in the factory"
)
"""What a user should know about modules that were never called."""


@contextmanager
def calls_watched(module: nn.Module) -> Iterator[set[nn.Module]]:
    """Collects the modules within `module` that are called in the block."""
    own, called = {*module.modules()}, set[nn.Module]()

    def before(one: nn.Module, args: object) -> None:
        if one in own:
            called.add(one)

    handle = register_module_forward_pre_hook(before)
    try:
        yield called
    finally:
        handle.remove()


def never_called(module: nn.Module, called: Collection[nn.Module], program: torch.export.ExportedProgram) -> list[str]:
    """Paths of the outermost modules with weights of which neither a call nor a weight is part of the trace.

    A module whose weights are read without a call, as attention of PyTorch does, is not one of them.
    """
    weights = program.graph_signature.inputs_to_parameters
    nodes = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in weights]
    parameters = dict(program.named_parameters())
    read = {parameters[weights[node.name]] for node in nodes if node.users}
    found: list[str] = []
    for path, one in module.named_modules():
        inside = [*one.parameters()]
        if not inside or any(path.startswith(f"{outer}.") for outer in found):
            continue
        if not any(part in called for part in one.modules()) and not any(weight in read for weight in inside):
            found.append(path)
    return found
