"""Copies of modules that share their weights."""

from __future__ import annotations

import copy

from torch import nn


def sharing_copy(module: nn.Module) -> nn.Module:
    """A copy of a module that shares its parameters and buffers."""
    memo = {id(one): one for one in (*module.parameters(), *module.buffers())}
    copied = copy.deepcopy(module, memo)
    for owner in copied.modules():  # a buffer that is cast must not be that of the pipeline
        for name, buffer in list(owner.named_buffers(recurse=False)):
            owner._buffers[name] = buffer.clone()
    return copied
