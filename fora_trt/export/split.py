"""Split a module at its cache sites: the same forward either emits every site's features or consumes them.

For the full step each site's `forward` is wrapped so that its output is also recorded; for the reuse step it is
replaced by one that returns what was recorded. Nothing here knows an architecture: a site is a module path.
A reuse step as an ONNX graph is not traced again, but cut out of the full one: `export.graphs`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from fora_trt.errors import ExportError, first_line
from fora_trt.models.examples import example_inputs
from fora_trt.models.spec import FEATURE, ModelSpec

CONSTANTS = (bool, int, float, str, type(None))
"""What a site may put out beside tensors: it is the same at every step."""


@dataclass(frozen=True)
class Output:
    """How a site's output is made up: its tree, and each leaf: a feature's name, or a constant."""

    tree: TreeSpec
    leaves: tuple[Any, ...]
    is_feature: tuple[bool, ...]

    @property
    def features(self) -> list[str]:
        """Names of the tensors in it."""
        return [leaf for leaf, is_feature in zip(self.leaves, self.is_feature, strict=True) if is_feature]

    def of(self, tensors: Mapping[str, Tensor]) -> Any:
        """The output made up of these features by name; None for those that are not there."""
        both = zip(self.leaves, self.is_feature, strict=True)
        return tree_unflatten([tensors.get(leaf) if is_feature else leaf for leaf, is_feature in both], self.tree)


NEVER_CALLED = Output(tree_flatten(None)[1], (None,), (False,))
"""Of a site that a pattern matches and the network does not use."""


class Outputs(dict[str, Output]):
    """Outputs of the sites by module path. Not a plain dict: `torch.export` puts those back as they were."""


class Split(nn.Module):
    """One step of a split model on positional tensors, named in `names`; `FullStep` and `ReuseStep` say which."""

    def __init__(self, module: nn.Module, spec: ModelSpec, sites: Iterable[str], outputs: Outputs) -> None:
        super().__init__()
        self.module = module
        self.spec = spec
        self.sites = tuple(sites)
        self.outputs = outputs  # of the sites, shared by the two steps: a full step finds out

    @property
    def names(self) -> list[str]:
        """Of the tensors that `forward` takes, in order."""
        return [tensor.name for tensor in self.spec.inputs]

    def predict(self, inputs: Sequence[Tensor]) -> Tensor:
        named = {tensor.name: value for tensor, value in zip(self.spec.inputs, inputs, strict=True)}
        return self.spec.call(self.module, named)


class FullStep(Split):
    """Inputs -> (prediction, features in the order of their sites): all of them, or those in `kept`.

    Where it is `cut_later`, what follows a site reads a copy that is this site's feature and nothing else: some sites
    put out what others read too, such as their input, and a graph of it must not be cut there.
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
                        f"the cache site {path} is called more than once in one step, so it cannot be cached"
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
        """Names of what follows the prediction; known once the step has run."""
        found = [name for path in self.sites for name in self.outputs[path].features]
        return found if self.kept is None else [name for name in found if name in self.kept]


class ReuseStep(Split):
    """(inputs, features by the names in `features`) -> prediction. A feature that is left out must not be read."""

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
    """Both steps of a module; the full one must run once before the reuse one. `features` pass between them."""
    paths, outputs = tuple(sites), Outputs()
    full, reuse = FullStep(module, spec, paths, outputs), ReuseStep(module, spec, paths, outputs)
    full.kept, reuse.features = (None, []) if features is None else (list(features), list(features))
    return full, reuse


def _taken_apart(path: str, result: Any) -> tuple[Output, dict[str, Tensor]]:
    """How an output is made up, and its tensors by name: `feature.PATH`, with a number where there are several."""
    leaves, tree = tree_flatten(result)
    if odd := [leaf for leaf in leaves if not isinstance(leaf, (Tensor, *CONSTANTS))]:
        raise ExportError(
            f"the cache site {path} puts out {type(odd[0]).__name__}; only tensors, alone or in tuples, lists and "
            "dictionaries, can be cached"
        )
    count = sum(isinstance(leaf, Tensor) for leaf in leaves)
    if count == 0:
        raise ExportError(f"the cache site {path} puts out no tensor, so there is nothing to cache")
    names = iter([f"{FEATURE}{path}"] if count == 1 else [f"{FEATURE}{path}.{k}" for k in range(count)])
    is_feature = tuple(isinstance(leaf, Tensor) for leaf in leaves)
    named = tuple(next(names) if is_tensor else leaf for leaf, is_tensor in zip(leaves, is_feature, strict=True))
    tensors = {name: leaf for name, leaf, is_tensor in zip(named, leaves, is_feature, strict=True) if is_tensor}
    return Output(tree, named, is_feature), tensors


@contextmanager
def _forwards_replaced(
    module: nn.Module, sites: Iterable[str], replace: Callable[[str, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Give each site another `forward` for a while; paths, parameters and attributes stay as they are."""
    replaced = [(path, module.get_submodule(path)) for path in sites]
    own = [vars(site).get("forward") for _, site in replaced]  # where someone else has replaced it already
    for path, site in replaced:
        site.forward = replace(path, site.forward)
    try:
        yield
    finally:
        for (_, site), before in zip(replaced, own, strict=True):
            del site.forward  # the instance attribute: the class's own shows again
            if before is not None:
                site.forward = before


@torch.no_grad()
def check_sites(module: nn.Module, spec: ModelSpec, sites: Sequence[str]) -> None:
    """Raise `ExportError` that names the first site whose output cannot stand in for the site at a later step.

    It must be the same for the same inputs, have one shape whatever the inputs, one sample in each row, and be all
    that the rest of the network sees of the site. Needed for sites that nobody has cached before.
    """

    def run(batch: int, seed: int) -> tuple[list[Tensor], Tensor, dict[str, Tensor]]:
        inputs = list(example_inputs(spec.inputs, spec.conditioning, batch, seed).values())
        try:
            prediction, *features = full(*inputs)
        except ExportError:
            raise
        except Exception as error:  # of the module itself, which is not ours
            raise ExportError(
                f"{spec.architecture} does not run on a batch of {batch}, and a bundle must take any: "
                f"{type(error).__name__}: {first_line(error)}"
            ) from error
        return inputs, prediction, {name: one.clone() for name, one in zip(full.features, features, strict=True)}

    full, _ = steps_of_module(module, spec, sites)
    inputs, prediction, features = run(batch=2, seed=1)
    outputs = dict(full.outputs)
    for name, feature in features.items():
        if feature.shape[:1] != (2,):
            raise ExportError(
                f"the output of the cache site {name.removeprefix(FEATURE)} has shape {list(feature.shape)} for a "
                "batch of 2; its first size must be the batch, so it cannot be cached"
            )
    for case, batch, seed in (("same inputs", 2, 1), ("other inputs", 2, 2), ("another batch", 3, 3)):
        *_, again = run(batch, seed)
        for path in sites:
            if full.outputs[path].leaves != outputs[path].leaves:
                raise ExportError(f"the cache site {path} puts out other things for {case}, so it cannot be cached")
        for name, feature in features.items():
            site = name.removeprefix(FEATURE)
            if again[name].shape != (batch, *feature.shape[1:]):
                raise ExportError(
                    f"the output of the cache site {site} has shape {list(feature.shape)}, and for {case} "
                    f"{list(again[name].shape)}; only the first size, the batch, may change; it cannot be cached"
                )
            if case == "same inputs" and not _equal(again[name], feature):
                raise ExportError(
                    f"the cache site {site} puts out something else at every call: it keeps state or draws random "
                    "numbers, so it cannot be cached"
                )
    for path in sites:
        _, reuse = steps_of_module(module, spec, [path])
        reuse.outputs.update(outputs)
        reuse.features = outputs[path].features
        (replayed,) = reuse(*inputs, *(features[name] for name in reuse.features))
        if not _equal(replayed, prediction):
            raise ExportError(
                f"the cache site {path} does more than its output shows (it changes its input in place, or leaves "
                "something behind that is read elsewhere), so it cannot be cached"
            )


def _equal(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-4, atol=1e-6, equal_nan=True)
