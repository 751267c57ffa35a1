"""The `torch` backend: the module itself, split at its cache sites and run eagerly. It is the reference.

What is done to the graphs of a bundle is not done here: both steps read all inputs, and features pass between them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from fora_trt.bundle import Bundle
from fora_trt.engines.base import Engine, Launch
from fora_trt.errors import BackendError, ExportError, ModelError
from fora_trt.export.split import Split, steps_of_module
from fora_trt.export.write import weights_digest
from fora_trt.models.sources import model_from_source
from fora_trt.models.spec import FULL, REUSE, Model


class TorchEngine(Engine):
    """One step of a split module; its results are copied to the bound outputs."""

    def __init__(self, step: Split, bundle: Bundle, graph: str, device: torch.device) -> None:
        manifest, features = bundle.manifest, bundle.manifest.features()
        prediction = manifest.graphs[FULL].outputs[:1]
        if graph == FULL:
            super().__init__(manifest.inputs, (*prediction, *features), device)
        else:
            super().__init__((*manifest.inputs, *features), prediction, device)
        self._step = step

    def bind(self, tensors: Mapping[str, Tensor]) -> Launch:
        sources = [tensors[name] for name in self._step.names]  # a module takes all inputs, also those it ignores
        return partial(self._run, sources, [tensors[name] for name in self.outputs])

    @torch.inference_mode()
    def _run(self, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        for target, result in zip(targets, self._step(*sources), strict=True):
            target.copy_(result)


def engines_from_bundle(bundle: Bundle, device: torch.device, *_: object) -> dict[str, Engine]:
    """Both engines, over one copy of the module."""
    return {name: TorchEngine(step, bundle, name, device) for name, step in steps_from_bundle(bundle, device).items()}


def steps_from_bundle(bundle: Bundle, device: torch.device) -> dict[str, Split]:
    """The full and the reuse step of the module that a bundle was exported from. Raises `BackendError`."""
    model = model_from_bundle(bundle)
    sites, features = bundle.manifest.cache_sites, [feature.name for feature in bundle.manifest.features()]
    full, reuse = steps_of_module(model.module.to(device), model.spec, [site.module for site in sites], features)
    return {FULL: full, REUSE: reuse}


def model_from_bundle(bundle: Bundle, precision: str | None = None) -> Model:
    """Load the module that a bundle was exported from, and make sure that it is the same.

    In another `precision` than the bundle's the weights are others too, and are not compared. Raises `BackendError` if
    the source is no longer there or has other weights.
    """
    record, sites = bundle.manifest.model, [site.module for site in bundle.manifest.cache_sites]
    source = record.options.source
    try:
        model = model_from_source(record.options, precision or bundle.manifest.precision, sites)
    except (ModelError, ExportError) as error:
        raise BackendError(
            f"PyTorch needs the checkpoint that {bundle.folder} was exported from, "
            f"and {source!r} cannot be loaded: {error}"
        ) from error
    if model.precision == bundle.manifest.precision and weights_digest(model.module) != record.weights_sha256:
        raise BackendError(
            f"{source!r} has other weights than those {bundle.folder} was exported from; "
            f"export it again: fora-trt export {source} --name {bundle.manifest.name} --force"
        )
    return model
