"""Find the cache sites of a diffusion transformer by the structure of its blocks; no model is named.

A block is an entry of a `ModuleList` that contains attention. Its sites are its attention and feed-forward layers: they
output tensors before the gate is applied. A parallel block, which joins attention and MLP in one projection, has this
projection as its only site.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from fora_trt.models.sites import matches

ATTENTION, FEED_FORWARD, PARALLEL = "attention", "feed-forward", "parallel"
"""Kinds of the sites."""

_FEED_FORWARD_NAME = re.compile(r"(.*_)?(ff|ffn|mlp|moe|feed_?forward)(_.*|\d*)")
_FEED_FORWARD_CLASS = re.compile(r"FeedForward|MLP|Mlp|FFN|MoE")


def sites_of_blocks(module: nn.Module) -> dict[str, tuple[str, ...]]:
    """Patterns over module paths for each kind of site, in the order of the module tree; empty without blocks."""
    found = dict(_sites(module))
    paths = [path for path, _ in module.named_modules(remove_duplicate=False)]
    patterns: dict[str, dict[str, None]] = {}
    for path, kind in found.items():
        pattern = _pattern(path, kind, found, paths)
        patterns.setdefault(kind, {})[pattern] = None
    return {kind: tuple(named) for kind, named in patterns.items()}


def paths_in_half(module: nn.Module, sites: Sequence[str]) -> list[str]:
    """Paths of what computes in half precision: the sites, and attentions that feed a site of a parallel block."""
    found = [*sites]
    for path in sites:
        parent, _, name = path.rpartition(".")
        block = module.get_submodule(parent)
        if _joint_projection(block) == name:
            found += [f"{parent}.{child}" for child, one in block.named_children() if _is_attention(one)]
    return found


def _pattern(path: str, kind: str, found: Mapping[str, str], paths: list[str]) -> str:
    """The path with stars for numbers; the path itself if the stars would match anything but sites of its kind."""
    pattern = ".".join("*" if part.isdecimal() else part for part in path.split("."))
    return pattern if all(found.get(one) == kind for one in paths if matches(one, pattern)) else path


def _sites(module: nn.Module) -> Iterator[tuple[str, str]]:
    for path, one in module.named_modules():
        if isinstance(one, nn.ModuleList):
            for name, block in one.named_children():
                if _is_block(block):
                    yield from _sites_in_block(block, f"{path}.{name}" if path else name)


def _sites_in_block(block: nn.Module, path: str) -> Iterator[tuple[str, str]]:
    if (joint := _joint_projection(block)) is not None:
        yield f"{path}.{joint}", PARALLEL
        return
    for name, child in block.named_children():
        if _is_attention(child):
            yield f"{path}.{name}", ATTENTION
        elif _is_feed_forward(name, child):
            yield f"{path}.{name}", FEED_FORWARD


def _is_block(module: nn.Module) -> bool:
    """Whether diffusers registers the class as a transformer block, or attention is among the module's children."""
    from diffusers.hooks._helpers import TransformerBlockRegistry

    try:
        TransformerBlockRegistry.get(type(module))
    except ValueError:  # not registered
        return any(map(_is_attention, module.children()))
    return True


def _is_attention(module: nn.Module) -> bool:
    from diffusers.models.attention import AttentionModuleMixin

    return isinstance(module, AttentionModuleMixin | nn.MultiheadAttention) or (
        bool(re.search(r"Attention|Attn", type(module).__name__)) and _matrices(module) > 1
    )


def _is_feed_forward(name: str, module: nn.Module) -> bool:
    named = _FEED_FORWARD_NAME.fullmatch(name) or _FEED_FORWARD_CLASS.search(type(module).__name__)
    return bool(named) and _matrices(module) > 1


def _joint_projection(block: nn.Module) -> str | None:
    """The linear child that reads attention and MLP of a parallel block; None if the block has a feed-forward layer."""
    children = dict(block.named_children())
    if any(_is_feed_forward(name, child) for name, child in children.items()):
        return None
    linear = {name: child for name, child in children.items() if isinstance(child, nn.Linear)}
    wide = max((child.out_features for child in linear.values()), default=0)
    joint = [name for name, child in linear.items() if child.in_features > max(wide, child.out_features)]
    return joint[0] if joint else None


def _matrices(module: nn.Module) -> int:
    return sum(parameter.dim() > 1 for parameter in module.parameters())
