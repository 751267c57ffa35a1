"""Split a module at its cache sites: one forward either outputs the features of all sites or consumes them.

For the full step, each site's `forward` is wrapped so that its output is also recorded. For the reuse step, it is
replaced by a function that returns the recorded output. A site is given by its module path, so this works for any
architecture. The ONNX reuse graph is not traced from the reuse step; `export.traced` cuts it out of the full graph.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from fora_trt.contract import DTYPES, FEATURE
from fora_trt.errors import ExportError
from fora_trt.models.spec import ModelSpec

CONSTANTS = (bool, int, float, str, type(None))
"""Types that a site may output besides tensors; such values must be equal at every step."""


@dataclass(frozen=True)
class Sample:
    """Shape and dtype of one sample of a feature.

    With `joined`, the site outputs (k * B, ...), such as k frames or windows of each sample, and the feature is
    (B, k, ...).
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    joined: bool


@dataclass(frozen=True)
class Output:
    """The structure of a site's output: its pytree and its leaves, each the name of a feature or a constant."""

    tree: TreeSpec
    leaves: tuple[Any, ...]
    samples: Mapping[str, Sample]

    @property
    def features(self) -> list[str]:
        """Names of the features in the output."""
        return [*self.samples]

    def of(self, tensors: Mapping[str, Tensor], like: Tensor) -> Any:
        """The output, rebuilt from features by name.

        The graph has no feature that nothing reads. The module may still compute with it, so zeros take its place, with
        the batch and on the device of `like`.
        """
        return tree_unflatten([self._leaf(leaf, tensors, like) for leaf in self.leaves], self.tree)

    def _leaf(self, leaf: Any, tensors: Mapping[str, Tensor], like: Tensor) -> Any:
        sample = self.samples.get(leaf) if isinstance(leaf, str) else None
        if sample is None:
            return leaf
        tensor = tensors.get(leaf)
        if tensor is None:
            tensor = torch.zeros(like.shape[0], *sample.shape, dtype=sample.dtype, device=like.device)
        return tensor.flatten(0, 1) if sample.joined else tensor


NEVER_CALLED = Output(tree_flatten(None)[1], (None,), {})
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

    @contextmanager
    def replaying(self, paths: Iterable[str], features: Sequence[str], tensors: Sequence[Tensor]) -> Iterator[None]:
        """Within the block, the sites at `paths` output `features`, which follow the inputs in `tensors`."""
        given = dict(zip(features, tensors[len(self.spec.inputs) :], strict=True))

        def replay(path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *args, **kwargs: self.outputs[path].of(given, tensors[0])

        with _forwards_replaced(self.module, paths, replay):
            yield


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
                        f"give --exclude {path}"
                    )
                seen.add(path)
                self.outputs[path], tensors = _taken_apart(path, result, inputs[0].shape[0])
                if self.cut_later:
                    tensors = {name: one.clone() for name, one in tensors.items()}
                    result = self.outputs[path].of(tensors, inputs[0])
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
    """(inputs, the features named in `features`) -> prediction, which must not depend on any other feature."""

    features: list[str]

    @property
    def names(self) -> list[str]:
        return [*super().names, *self.features]

    def forward(self, *tensors: Tensor) -> tuple[Tensor]:
        with self.replaying(self.sites, self.features, tensors):
            return (self.predict(tensors[: len(self.spec.inputs)]),)


class PartialStep(Split):
    """(inputs, the features of the sites that it does not compute) -> (prediction, the features of the others).

    The full step must run first. `given` names the features that it takes, `full.features` those that it outputs.
    """

    def __init__(self, step: Split, computed: Collection[str]) -> None:
        super().__init__(step.module, step.spec, step.sites, step.outputs)
        self.full = FullStep(step.module, step.spec, [path for path in step.sites if path in computed], step.outputs)
        self.given = [name for path in step.sites if path not in computed for name in step.outputs[path].features]

    @property
    def names(self) -> list[str]:
        return [*super().names, *self.given]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        cached = [path for path in self.sites if path not in self.full.sites]
        with self.replaying(cached, self.given, tensors):
            return self.full.forward(*tensors[: len(self.spec.inputs)])


def steps_of_module(
    module: nn.Module, spec: ModelSpec, sites: Iterable[str], features: Sequence[str] | None = None
) -> tuple[FullStep, ReuseStep]:
    """The full and the reuse step of a module; the full step must run first. `features` limits the features passed."""
    paths, outputs = tuple(sites), Outputs()
    full, reuse = FullStep(module, spec, paths, outputs), ReuseStep(module, spec, paths, outputs)
    full.kept, reuse.features = (None, []) if features is None else (list(features), list(features))
    return full, reuse


def _taken_apart(path: str, result: Any, batch: int) -> tuple[Output, dict[str, Tensor]]:
    """The structure of an output and its features by name: `feature.PATH`, or `feature.PATH.K` for several tensors."""
    leaves, tree = tree_flatten(result)
    if odd := [leaf for leaf in leaves if not isinstance(leaf, (Tensor, *CONSTANTS))]:
        raise ExportError(
            f"the cache site {path} outputs an object of type {type(odd[0]).__name__}; only tensors, alone or in "
            "tuples, lists and dictionaries, can be cached; give --exclude "
            f"{path}"
        )
    for leaf in leaves:
        if isinstance(leaf, Tensor) and (dtype := str(leaf.dtype).removeprefix("torch.")) not in DTYPES:
            raise ExportError(
                f"the cache site {path} outputs a tensor of dtype {dtype}, and graphs pass only {', '.join(DTYPES)}; "
                f"give --exclude {path}"
            )
    count = sum(isinstance(leaf, Tensor) for leaf in leaves)
    if count == 0:
        raise ExportError(f"the cache site {path} outputs no tensor that could be cached; give --exclude {path}")
    names = iter([f"{FEATURE}{path}"] if count == 1 else [f"{FEATURE}{path}.{k}" for k in range(count)])
    named = tuple(next(names) if isinstance(leaf, Tensor) else leaf for leaf in leaves)
    tensors: dict[str, Tensor] = {}
    samples: dict[str, Sample] = {}
    for name, leaf in zip(named, leaves, strict=True):
        if isinstance(leaf, Tensor):
            tensors[name] = _by_sample(leaf, batch)
            samples[name] = Sample(tuple(tensors[name].shape[1:]), leaf.dtype, tensors[name].dim() > leaf.dim())
    return Output(tree, named, samples), tensors


def _by_sample(tensor: Tensor, batch: int) -> Tensor:
    """A tensor (B, ...) itself; (B, k, ...) for a tensor (k * B, ...). `batch` may be symbolic."""
    many = tensor.shape[0] if tensor.dim() else 0
    if not statically_known_true(many > batch) or not statically_known_true(many % batch == 0):
        return tensor
    return tensor.reshape(batch, many // batch, *tensor.shape[1:])


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
