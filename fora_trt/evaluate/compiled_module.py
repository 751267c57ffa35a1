"""The reference `PyTorch compiled`: the original module under `torch.compile`, not the graphs of the bundle.

For FORA the module is split at its cache sites into a full and a reuse step; each is traced and compiled as a whole.
Nothing is hoisted or folded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from fora_trt.bundle import Bundle
from fora_trt.contract import FULL, REUSE, TensorSpec
from fora_trt.engines.base import Engine, Launch
from fora_trt.engines.cuda_graphs import Replay
from fora_trt.engines.torch.engine import Step, compiled, run_compiled
from fora_trt.evaluate.source_module import model_from_bundle, with_unread_inputs
from fora_trt.export.split import Split, steps_of_module
from fora_trt.export.traced import TRACED_BATCH, program_from_step
from fora_trt.models.examples import example_inputs


class CompiledStep(Engine):
    """One step of a split module, compiled at the first call for each batch size."""

    def __init__(
        self, step: Split, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], device: torch.device
    ) -> None:
        super().__init__(inputs, outputs, device)
        self._names, self._spec = step.names, step.spec  # all inputs of the module, including unread ones
        of_model = {tensor.name for tensor in step.spec.inputs}
        given = example_inputs(step.spec.inputs, step.spec.conditioning, TRACED_BATCH)
        given |= example_inputs((one for one in inputs if one.name not in of_model), {}, TRACED_BATCH)
        self._traced = program_from_step(step, {name: given[name].to(device) for name in self._names}).module()
        self._compiled: dict[object, Step] = {}

    def bind(self, tensors: Mapping[str, Tensor]) -> Launch:
        given = with_unread_inputs(tensors, self._spec)
        sources, targets = [given[name] for name in self._names], [tensors[name] for name in self.outputs]
        key = tuple(tuple(one.shape) for one in sources)
        if key not in self._compiled:
            self._compiled[key] = compiled(_into_targets(self._traced))
        return Replay(partial(run_compiled, self._compiled[key], (sources, targets), self.device), self.device)

    def is_capturable(self) -> bool:
        return True


def _into_targets(step: Callable[..., Sequence[Tensor]]) -> Step:
    """A step that copies its results to output tensors, so that the copies are compiled with it.

    Each step gets its own code object, because `torch.compile` limits the number of recompilations per code object.
    """

    def run(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        for target, result in zip(targets, step(*sources), strict=True):
            target.copy_(result)

    run.__code__ = run.__code__.replace()
    return run


def compiled_engines(bundle: Bundle, device: torch.device) -> dict[str, Engine]:
    """The compiled full and reuse step of the module that a bundle was exported from; they share its weights.

    Raises `BackendError`.
    """
    model, manifest = model_from_bundle(bundle), bundle.manifest
    features, prediction = manifest.features(), manifest.graphs[FULL].outputs[:1]
    sites, names = [site.module for site in manifest.cache_sites], [feature.name for feature in features]
    full, reuse = steps_of_module(model.module.to(device), model.spec, sites, names)
    return {
        FULL: CompiledStep(full, manifest.inputs, (*prediction, *features), device),
        REUSE: CompiledStep(reuse, (*manifest.inputs, *features), prediction, device),
    }
