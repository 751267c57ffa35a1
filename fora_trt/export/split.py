"""Split a module at its cache sites: one forward either outputs the features of all sites or consumes them.

For the full step, each site's `forward` is wrapped so that its output is also recorded. For the reuse step, it is
replaced by a function that returns the recorded output. A site is given by its module path, so this works for any
architecture. The ONNX reuse graph is not traced from the reuse step; `export.traced` cuts it out of the full graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from fora_trt.contract import DTYPES, FEATURE
from fora_trt.errors import ExportError, first_line
from fora_trt.models.examples import example_inputs
from fora_trt.models.spec import ModelSpec

CONSTANTS = (bool, int, float, str, type(None))
"""Types that a site may output besides tensors; such values must be equal at every step."""


@dataclass(frozen=True)
class Output:
    """The structure of a site's output: its pytree and its leaves, each the name of a feature or a constant."""

    tree: TreeSpec
    leaves: tuple[Any, ...]
    is_feature: tuple[bool, ...]

    @property
    def features(self) -> list[str]:
        """Names of the features in the output."""
        return [leaf for leaf, is_feature in zip(self.leaves, self.is_feature, strict=True) if is_feature]

    def of(self, tensors: Mapping[str, Tensor]) -> Any:
        """The output, rebuilt from features by name; None in place of a missing feature."""
        both = zip(self.leaves, self.is_feature, strict=True)
        return tree_unflatten([tensors.get(leaf) if is_feature else leaf for leaf, is_feature in both], self.tree)


NEVER_CALLED = Output(tree_flatten(None)[1], (None,), (False,))
"""The output of a site that matches a pattern but that the network does not call."""


class Outputs(dict[str, Output]):
    """Outputs of the sites by module path. A subclass, because `torch.export` restores plain dicts after tracing."""


class Split(nn.Module):
    """Base of `FullStep` and `ReuseStep`: one step of a split model, on the tensors named in `names`, in order."""

    def __init__(self, module: nn.Module, spec: ModelSpec, sites: Iterable[str], outputs: Outputs) -> None:
        super().__init__()
        self.module = module
        self.spec = spec
        self.sites = tuple(sites)
        self.outputs = outputs  # shared by both steps; the full step fills it

    @property
    def names(self) -> list[str]:
        """Names of the tensors that `forward` takes, in order."""
        return [tensor.name for tensor in self.spec.inputs]

    def predict(self, inputs: Sequence[Tensor]) -> Tensor:
        named = {tensor.name: value for tensor, value in zip(self.spec.inputs, inputs, strict=True)}
        return self.spec.call(self.module, named)


class FullStep(Split):
    """Inputs -> (prediction, features in the order of their sites): all features, or only those in `kept`.

    With `cut_later`, the layers after a site read a copy of its output, and the copy is the feature. Some sites return
    a tensor that other nodes also read, such as their input; without the copy, cutting the graph at the feature would
    also cut those other reads.
    """

    kept: list[str] | None = None
    cut_later: bool = False

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        features: dict[str, Tensor] = {}
        seen: set[str] = set()

        def capture(path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
            def captured(*args: Any, **kwargs: Any) -> Any:
                result = forward(*args, **kwargs)
                if path in seen:
                    raise ExportError(
                        f"the cache site {path} is called more than once in one step and cannot be cached; "
                        "leave it out of --cache"
                    )
                seen.add(path)
                self.outputs[path], tensors = _taken_apart(path, result)
                if self.cut_later:
                    tensors = {name: one.clone() for name, one in tensors.items()}
                    result = self.outputs[path].of(tensors)
                features.update(tensors)
                return result

            return captured

        with _forwards_replaced(self.module, self.sites, capture):
            prediction = self.predict(inputs)
        for path in self.sites:
            if path not in seen:
                self.outputs[path] = NEVER_CALLED
        return (prediction, *(features[name] for name in self.features))

    @property
    def features(self) -> list[str]:
        """Names of the outputs after the prediction; known after the step has run."""
        found = [name for path in self.sites for name in self.outputs[path].features]
        return found if self.kept is None else [name for name in found if name in self.kept]


class ReuseStep(Split):
    """(inputs, the features named in `features`) -> prediction. The module must not read any other feature."""

    features: list[str]

    @property
    def names(self) -> list[str]:
        return [*super().names, *self.features]

    def forward(self, *tensors: Tensor) -> tuple[Tensor]:
        count = len(self.spec.inputs)
        given = dict(zip(self.features, tensors[count:], strict=True))

        def replay(path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *args, **kwargs: self.outputs[path].of(given)

        with _forwards_replaced(self.module, self.sites, replay):
            return (self.predict(tensors[:count]),)


def steps_of_module(
    module: nn.Module, spec: ModelSpec, sites: Iterable[str], features: Sequence[str] | None = None
) -> tuple[FullStep, ReuseStep]:
    """The full and the reuse step of a module; the full step must run first. `features` limits the features passed."""
    paths, outputs = tuple(sites), Outputs()
    full, reuse = FullStep(module, spec, paths, outputs), ReuseStep(module, spec, paths, outputs)
    full.kept, reuse.features = (None, []) if features is None else (list(features), list(features))
    return full, reuse


def _taken_apart(path: str, result: Any) -> tuple[Output, dict[str, Tensor]]:
    """The structure of an output and its tensors by name: `feature.PATH`, or `feature.PATH.K` for several tensors."""
    leaves, tree = tree_flatten(result)
    if odd := [leaf for leaf in leaves if not isinstance(leaf, (Tensor, *CONSTANTS))]:
        raise ExportError(
            f"the cache site {path} outputs an object of type {type(odd[0]).__name__}; only tensors, alone or in "
            "tuples, lists and dictionaries, can be cached; leave it out of --cache"
        )
    for leaf in leaves:
        if isinstance(leaf, Tensor) and (dtype := str(leaf.dtype).removeprefix("torch.")) not in DTYPES:
            raise ExportError(
                f"the cache site {path} outputs a tensor of dtype {dtype}, and graphs pass only {', '.join(DTYPES)}; "
                "leave it out of --cache"
            )
    count = sum(isinstance(leaf, Tensor) for leaf in leaves)
    if count == 0:
        raise ExportError(f"the cache site {path} outputs no tensor that could be cached; leave it out of --cache")
    names = iter([f"{FEATURE}{path}"] if count == 1 else [f"{FEATURE}{path}.{k}" for k in range(count)])
    is_feature = tuple(isinstance(leaf, Tensor) for leaf in leaves)
    named = tuple(next(names) if is_tensor else leaf for leaf, is_tensor in zip(leaves, is_feature, strict=True))
    tensors = {name: leaf for name, leaf, is_tensor in zip(named, leaves, is_feature, strict=True) if is_tensor}
    return Output(tree, named, is_feature), tensors


@contextmanager
def _forwards_replaced(
    module: nn.Module, sites: Iterable[str], replace: Callable[[str, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Replace the `forward` of each site within the block; paths, parameters and attributes do not change."""
    replaced = [(path, module.get_submodule(path)) for path in sites]
    own = [vars(site).get("forward") for _, site in replaced]  # set where `forward` was already replaced before
    for path, site in replaced:
        site.forward = replace(path, site.forward)
    try:
        yield
    finally:
        for (_, site), before in zip(replaced, own, strict=True):
            del site.forward  # deletes the instance attribute, so that the method of the class is visible again
            if before is not None:
                site.forward = before


@torch.no_grad()
def check_sites(module: nn.Module, spec: ModelSpec, sites: Sequence[str]) -> None:
    """Raise `ExportError` that names the first site whose output cannot be cached.

    The output must be deterministic, must have the batch as first dimension and other sizes that do not depend on the
    inputs, and must be the only effect of the site on the network. Sites that the architecture does not declare need
    this check.
    """

    def run(batch: int, seed: int) -> tuple[list[Tensor], Tensor, dict[str, Tensor]]:
        inputs = list(example_inputs(spec.inputs, spec.conditioning, batch, seed).values())
        try:
            prediction, *features = full(*inputs)
        except ExportError:
            raise
        except Exception as error:  # the user's module can raise anything
            raise ExportError(
                f"{spec.architecture} fails on a batch of {batch} ({type(error).__name__}: {first_line(error)}); "
                "a bundle needs a model that takes any batch size"
            ) from error
        return inputs, prediction, {name: one.clone() for name, one in zip(full.features, features, strict=True)}

    full, _ = steps_of_module(module, spec, sites)
    inputs, prediction, features = run(batch=2, seed=1)
    outputs = dict(full.outputs)
    for name, feature in features.items():
        if feature.shape[:1] != (2,):
            raise ExportError(
                f"the output of the cache site {name.removeprefix(FEATURE)} has shape {list(feature.shape)} for a "
                "batch of 2; the first dimension of a cached output must be the batch; leave the site out of --cache"
            )
    for case, batch, seed in (("same inputs", 2, 1), ("other inputs", 2, 2), ("another batch", 3, 3)):
        *_, again = run(batch, seed)
        for path in sites:
            if full.outputs[path].leaves != outputs[path].leaves:
                raise ExportError(
                    f"the output of the cache site {path} has another structure for {case}, so it cannot be cached; "
                    "leave the site out of --cache"
                )
        for name, feature in features.items():
            site = name.removeprefix(FEATURE)
            if again[name].shape != (batch, *feature.shape[1:]):
                raise ExportError(
                    f"the output of the cache site {site} has shape {list(feature.shape)}, "
                    f"but {list(again[name].shape)} for {case}; only the first dimension, the batch, may change; "
                    "leave the site out of --cache"
                )
            if case == "same inputs" and not _equal(again[name], feature):
                raise ExportError(
                    f"the output of the cache site {site} differs between calls with the same inputs (the module keeps "
                    "state or draws random numbers), so it cannot be cached; leave the site out of --cache"
                )
    for path in sites:
        _, reuse = steps_of_module(module, spec, [path])
        reuse.outputs.update(outputs)
        reuse.features = outputs[path].features
        (replayed,) = reuse(*inputs, *(features[name] for name in reuse.features))
        if not _equal(replayed, prediction):
            raise ExportError(
                f"the cache site {path} has side effects (it changes its input in place, stores a value that another "
                "module reads, or its output is changed in place), so it cannot be cached; leave the site out of "
                "--cache"
            )


def _equal(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-4, atol=1e-6, equal_nan=True)
