"""Split a module at its cache sites: the same forward either emits every site's feature or consumes it.

For the full step each site's `forward` is wrapped so that its output is also recorded; for the reuse step it is
replaced by one that returns the recorded feature. Nothing here knows an architecture: a site is a module path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from fora_trt.errors import ExportError
from fora_trt.models.spec import GuidanceSpec, ModelSpec, TensorSpec


def find_sites(module: nn.Module, spec: ModelSpec, cache: Sequence[str]) -> list[tuple[str, str]]:
    """Module path and kind of every site that `cache` asks for, in the order of the module tree.

    Each entry of `cache` is a kind of the architecture (`attention`) or a pattern over module paths
    (`transformer_blocks.*.attn1`). Raises `ExportError` for one that matches nothing.
    """
    paths = [path for path, _ in module.named_modules() if path]
    kinds: dict[str, str] = {}
    for wanted in cache:
        patterns = spec.cache_sites.get(wanted, (wanted,))
        matched = [path for path in paths if any(_matches(path, pattern) for pattern in patterns)]
        if not matched:
            raise ExportError(
                f"the cache pattern {wanted!r} matches no module of {spec.architecture}; give one of "
                f"{', '.join(spec.cache_sites)} or a pattern such as {next(iter(spec.cache_sites.values()))[0]}"
            )
        kinds.update({path: kind_of(path, spec) for path in matched})
    if not kinds:
        raise ExportError(f"nothing to cache was named; give one of {', '.join(spec.cache_sites)}")
    return [(path, kinds[path]) for path in paths if path in kinds]


def kind_of(path: str, spec: ModelSpec) -> str:
    """The kind that the architecture gives to a module path; `module` where it names none."""
    for kind, patterns in spec.cache_sites.items():
        if any(_matches(path, pattern) for pattern in patterns):
            return kind
    return "module"


def _matches(path: str, pattern: str) -> bool:
    parts, wanted = path.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


class Split(nn.Module):
    """One step of a split model on positional tensors; `FullStep` and `ReuseStep` say which."""

    def __init__(self, module: nn.Module, spec: ModelSpec, sites: Iterable[str]) -> None:
        super().__init__()
        self.module = module
        self.spec = spec
        self.sites = tuple(sites)

    def predict(self, inputs: Sequence[Tensor]) -> Tensor:
        named = {tensor.name: value for tensor, value in zip(self.spec.inputs, inputs, strict=True)}
        return self.spec.call(self.module, named)


class FullStep(Split):
    """Inputs -> (prediction, feature of every site)."""

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        features: dict[str, Tensor] = {}

        def capture(path: str, forward: Callable[..., Any]) -> Callable[..., Tensor]:
            def captured(*args: Any, **kwargs: Any) -> Tensor:
                output = forward(*args, **kwargs)
                _check_feature(path, output, seen=path in features)
                features[path] = output
                return features[path]

            return captured

        with _forwards_replaced(self.module, self.sites, capture):
            prediction = self.predict(inputs)
        silent = [path for path in self.sites if path not in features]
        if silent:
            raise ExportError(f"the cache site {silent[0]} is never called by the model; leave it out of --cache")
        return (prediction, *(features[path] for path in self.sites))


class ReuseStep(Split):
    """(inputs, feature of every site) -> prediction."""

    def forward(self, *tensors: Tensor) -> tuple[Tensor]:
        count = len(self.spec.inputs)
        features = dict(zip(self.sites, tensors[count:], strict=True))

        def replay(path: str, forward: Callable[..., Any]) -> Callable[..., Tensor]:
            return lambda *args, **kwargs: features[path]

        with _forwards_replaced(self.module, self.sites, replay):
            return (self.predict(tensors[:count]),)


@contextmanager
def _forwards_replaced(
    module: nn.Module, sites: Iterable[str], replace: Callable[[str, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Give each site another `forward` for a while; paths, parameters and attributes stay as they are."""
    replaced = [(path, module.get_submodule(path)) for path in sites]
    for path, site in replaced:
        site.forward = replace(path, site.forward)
    try:
        yield
    finally:
        for _, site in replaced:
            del site.forward  # the instance attribute: the class's own shows again


def _check_feature(path: str, output: object, seen: bool) -> None:
    if not isinstance(output, Tensor):
        raise ExportError(f"the cache site {path} puts out {type(output).__name__}; only a single tensor can be cached")
    if seen:
        raise ExportError(f"the cache site {path} is called more than once in one step, so it cannot be cached")


def example_inputs(
    tensors: Iterable[TensorSpec], guidance: GuidanceSpec, batch: int, seed: int = 0
) -> dict[str, Tensor]:
    """Seeded values that a model admits: normal noise, timesteps and classes (the null class too) over their range."""
    generator = torch.Generator().manual_seed(seed)
    values: dict[str, Tensor] = {}
    for tensor in tensors:
        shape, dtype = tensor.sized(batch), getattr(torch, tensor.dtype)
        if not dtype.is_floating_point:
            values[tensor.name] = torch.randint(guidance.null_class + 1, shape, generator=generator)
        elif len(shape) == 1:
            values[tensor.name] = torch.randint(1000, shape, generator=generator).to(dtype)
        else:
            values[tensor.name] = torch.randn(shape, generator=generator).to(dtype)
    return values
