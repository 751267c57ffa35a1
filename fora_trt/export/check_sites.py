"""Check in eager PyTorch that the output of each cache site can be stored at one step and read at another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fora_trt.errors import ExportError, first_line
from fora_trt.export.split import steps_of_module
from fora_trt.models.examples import example_inputs
from fora_trt.models.spec import ModelSpec


@torch.no_grad()
def check_sites(module: nn.Module, spec: ModelSpec, sites: Sequence[str]) -> None:
    """Raise `ExportError` that names the first site whose output cannot be cached.

    The output must be deterministic, must have the batch, or a multiple of it in the order of the samples, as first
    dimension and other sizes that do not depend on the inputs, and must be the only effect of the site on the network.
    Sites that the architecture does not declare need this check. It evaluates the network on 5 samples in full steps
    and on 2 in a reuse step, and more only to name the problem.
    """

    def example(batch: int, seed: int) -> list[Tensor]:
        return list(example_inputs(spec.inputs, spec.conditioning, batch, seed).values())

    def run(inputs: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        try:
            prediction, *found = full(*inputs)
            return prediction, {name: found.pop(0).clone() for name in full.features}  # one at a time: they are large
        except ExportError:
            raise
        except Exception as error:  # the user's module can raise anything
            raise ExportError(
                f"{spec.architecture} fails on a batch of {len(inputs[0])} ({type(error).__name__}: "
                f"{first_line(error)}); a bundle needs a model that takes any batch size"
            ) from error

    def wrong(path: str, problem: str) -> ExportError:
        return ExportError(f"the output of the cache site {path} {problem}; give --exclude {path}")

    def state(path: str = "") -> str:
        """What the modules at a path, or else any, have stored since before the first call, in words."""
        changed = [name for name, mark in _stored(module).items() if before.get(name, ...) != mark]
        own = [name for name in changed if name.startswith(f"{path}.")] or changed
        return f" (it sets {', '.join(own[:3])}{', ...' if len(own) > 3 else ''})" if own else ""

    def unsteady(path: str = "") -> str:
        """Why results for the same inputs differ, in words."""
        if kept := state(path):
            return f"keeps state between calls{kept}"
        results: list[Tensor] = []
        for _ in range(2):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                results.append(run(inputs)[0])
        return "draws random numbers" if _equal(*results) else "keeps state between calls"

    def varies(name: str) -> str:
        """Why a feature of a sample is another one when the other sample of the batch changes."""
        _, again = run(inputs)
        if again[name].shape == features[name].shape and _equal(again[name], features[name]):
            return (
                "does not have the values of each sample in one block along its first dimension, so it cannot be cached"
            )
        return (
            f"differs between calls with the same inputs, because the module {unsteady(owners[name])}, so it cannot be "
            "cached"
        )

    before = _stored(module)
    full, _ = steps_of_module(module, spec, sites)
    inputs = example(batch=2, seed=1)
    prediction, features = run(inputs)
    outputs = dict(full.outputs)
    owners = {name: path for path, output in outputs.items() for name in output.features}
    after = _stored(module)
    for name, feature in features.items():
        if feature.shape[:1] != (2,):
            shape = list(feature.shape)
            raise wrong(
                owners[name],
                f"has shape {shape} for a batch of 2; the first dimension of a cached output must be the batch",
            )
    other = [torch.cat([changed[:1], one[1:]]) for one, changed in zip(inputs, example(2, seed=2), strict=True)]
    for case, given in (("other inputs", other), ("another batch", example(batch=1, seed=3))):
        _, again = run(given)
        for path in sites:
            if full.outputs[path].leaves != outputs[path].leaves:
                raise wrong(path, f"has another structure for {case}, so it cannot be cached")
        for name, feature in features.items():
            if again[name].shape != (len(given[0]), *feature.shape[1:]):
                raise wrong(
                    owners[name],
                    f"has shape {list(feature.shape)}, but {list(again[name].shape)} for {case}; only the first "
                    "dimension, the batch, may change",
                )
            if case == "other inputs" and not _equal(again[name][1:], feature[1:]):  # the second sample is the same
                raise wrong(owners[name], varies(name))

    def replays(paths: Sequence[str]) -> bool:
        _, reuse = steps_of_module(module, spec, paths)
        reuse.outputs.update(outputs)
        reuse.features = [name for path in paths for name in outputs[path].features]
        (replayed,) = reuse(*inputs, *(features[name] for name in reuse.features))
        return _equal(replayed, prediction)

    replayed = replays(sites)
    if replayed and _stored(module) == after:
        return
    if not all(_equal(run(inputs)[0], prediction) for _ in range(2)):  # twice: some networks alternate
        raise ExportError(
            f"{spec.architecture} {unsteady()}, so its prediction differs between calls with the same inputs; a bundle "
            "needs a network that depends on its inputs alone: turn off what it keeps or draws, or make it an input"
        )
    if replayed:
        return
    run(other)  # so that state is of other inputs, as at a reuse step
    for path in sites:  # one of them; each costs a full step
        if not replays([path]):
            raise ExportError(
                f"the cache site {path} has side effects{state(path)}: it changes its input in place, keeps state that "
                "another module reads, or its output is changed in place, so it cannot be cached; give --exclude "
                f"{path}"
            )


def _stored(module: nn.Module) -> dict[str, object]:
    """What each module of a network stores beside its weights, by path; values are equal if nothing was stored."""
    internals = vars(nn.Module()).keys()
    return {
        f"{path}.{name}".lstrip("."): _mark(value)
        for path, one in module.named_modules()
        for name, value in {**vars(one), **one._buffers}.items()
        if name not in internals
    }


def _mark(value: object) -> object:
    """A value that changes if another value is stored, or if a tensor is written."""
    if isinstance(value, Tensor):
        return id(value), 0 if value.is_inference() else value._version
    if isinstance(value, (list, tuple)):
        return tuple(map(_mark, value))
    if isinstance(value, dict):
        return tuple((str(key), _mark(one)) for key, one in value.items())
    return value if isinstance(value, (bool, int, float, str, type(None))) else id(value)


def _equal(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-4, atol=1e-6, equal_nan=True)
