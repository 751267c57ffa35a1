"""Check in eager PyTorch that the output of each cache site can be stored at one step and read at another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fora_trt.contract import FEATURE
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

    def wrong(name: str, problem: str) -> ExportError:
        site = name.removeprefix(FEATURE)
        return ExportError(f"the output of the cache site {site} {problem}; leave the site out of --cache")

    def varies(name: str) -> str:
        """Why a feature of a sample is another one when the other sample of the batch changes."""
        _, again = run(inputs)
        if again[name].shape == features[name].shape and _equal(again[name], features[name]):
            return (
                "does not have the values of each sample in one block along its first dimension, so it cannot be cached"
            )
        return (
            "differs between calls with the same inputs (the module keeps state or draws random numbers), so it cannot "
            "be cached"
        )

    full, _ = steps_of_module(module, spec, sites)
    inputs = example(batch=2, seed=1)
    prediction, features = run(inputs)
    outputs = dict(full.outputs)
    for name, feature in features.items():
        if feature.shape[:1] != (2,):
            shape = list(feature.shape)
            raise wrong(
                name, f"has shape {shape} for a batch of 2; the first dimension of a cached output must be the batch"
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
                    name,
                    f"has shape {list(feature.shape)}, but {list(again[name].shape)} for {case}; only the first "
                    "dimension, the batch, may change",
                )
            if case == "other inputs" and not _equal(again[name][1:], feature[1:]):  # the second sample is the same
                raise wrong(name, varies(name))

    def replays(paths: Sequence[str]) -> bool:
        _, reuse = steps_of_module(module, spec, paths)
        reuse.outputs.update(outputs)
        reuse.features = [name for path in paths for name in outputs[path].features]
        (replayed,) = reuse(*inputs, *(features[name] for name in reuse.features))
        return _equal(replayed, prediction)

    if replays(sites):
        return
    for path in sites:  # one of them; each costs a full step
        if not replays([path]):
            raise ExportError(
                f"the cache site {path} has side effects (it changes its input in place, stores a value that another "
                "module reads, or its output is changed in place), so it cannot be cached; leave the site out of "
                "--cache"
            )


def _equal(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-4, atol=1e-6, equal_nan=True)
