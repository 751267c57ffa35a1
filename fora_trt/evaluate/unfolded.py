"""FORA on the full graph of a bundle: the reference if the module that it was exported from is not available.

Nothing is precomputed or folded, and only the full graph is used: a reuse step runs it with the features of the last
full step, or a forecast from the last ones, as inputs in place of its own, and a partial step with some of these.
Everything is computed in fp32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fora_trt.bundle import Bundle
from fora_trt.contract import CONDITIONING, FULL, FULL_CONDITIONING, LATENTS, NOISE_PREDICTION, TIMESTEP
from fora_trt.engines.tf32 import without_tf32
from fora_trt.engines.torch.graph import TorchGraph
from fora_trt.errors import BackendError, SourceError
from fora_trt.evaluate.eager_fora import EagerFora, PlainPredictor, forecast_of
from fora_trt.plan import Step
from fora_trt.runtime.interface import Predictor
from fora_trt.runtime.variants import variants_of


def reference_from_bundle(bundle: Bundle, device: torch.device) -> tuple[Predictor, str]:
    """The fp32 reference of a bundle, and its name for messages: the module with hooks, or else the unfolded graph.

    Raises `BackendError` if the source exists but its weights differ from the bundle's.
    """
    bundles = [bundle, *(one for _, one in bundle.variants)]
    found: list[Predictor]
    try:
        found, name = [EagerFora(one, device) for one in bundles], "PyTorch"
    except SourceError:
        found = [UnfoldedFora(one, device) for one in bundles]
        name = "the unfolded full graph (the checkpoint is not available)"
    return variants_of(bundle.manifest, found), name


class UnfoldedFora(PlainPredictor):
    """Runs the conditioning and full graphs in PyTorch."""

    def __init__(self, bundle: Bundle, device: torch.device) -> None:
        self.manifest, self.device = bundle.manifest, device
        before = [name for name in (CONDITIONING, FULL_CONDITIONING) if name in bundle.manifest.graphs]
        self._before = {name: TorchGraph(bundle.graph_path(name), device, widened=True) for name in before}
        self._graph = TorchGraph(bundle.graph_path(FULL), device, widened=True)
        self._features = [feature.name for feature in bundle.manifest.features()]
        if missing := [name for name in self._features if name not in self._graph.values]:
            raise BackendError(
                f"the full graph of {bundle.folder} has no tensor {missing[0]!r}, a feature of its manifest; "
                "export it again"
            )
        self._kept: list[dict[str, Tensor]] = []

    @torch.no_grad()
    def compute(self, step: Step, latents: Tensor, timestep: Tensor | float, **conditioning: Tensor) -> Tensor:
        batch = len(latents)
        given: dict[str, Tensor] = {LATENTS: latents, TIMESTEP: torch.as_tensor(timestep, device=self.device)}
        given = {name: one.expand(batch, *one.shape[1:]) for name, one in {**given, **conditioning}.items()}
        with without_tf32(self.device):
            for name, graph in self._before.items():
                outputs = [one.name for one in self.manifest.graphs[name].outputs]
                given |= zip(outputs, _computed(graph, given, outputs, self._inputs_of(name)), strict=True)
            read = [one for one in self._inputs_of(FULL) if one in given]  # without inputs of the folded sums
            if not step.computes:
                kept = {name: [one[name] for one in self._kept] for name in self._features}
                given |= {name: forecast_of(of_site, step.weights, batch) for name, of_site in kept.items()}
                (prediction,) = _computed(self._graph, given, [NOISE_PREDICTION], [*read, *self._features])
                return prediction
            own = self._features_of(step.graph)
            others = {} if step.is_full else {name: one for name, one in self._kept[0].items() if name not in own}
            given |= {name: one[:batch] for name, one in others.items()}
            prediction, *features = _computed(self._graph, given, [NOISE_PREDICTION, *own], [*read, *others])
            latest = {**others, **dict(zip(own, features, strict=True))}
        self._kept = [{name: latest[name] for name in self._features}, *self._kept[: self.depth - 1]]
        return prediction

    def first_not_finite(self) -> str | None:
        """Name of the first kept feature that is not finite."""
        latest = self._kept[0] if self._kept else {}
        return next((name for name, one in latest.items() if not one.isfinite().all()), None)

    def _features_of(self, graph: str) -> list[str]:
        """Names of the features that a full or partial step computes."""
        computed = self.manifest.partial_graphs.get(graph)
        sites = self.manifest.cache_sites
        return [one.name for site in sites if computed is None or site.module in computed for one in site.features]

    def _inputs_of(self, graph: str) -> list[str]:
        return [one.name for one in self.manifest.graphs[graph].inputs]


def _computed(
    graph: TorchGraph, given: Mapping[str, Tensor], outputs: Sequence[str], inputs: Sequence[str]
) -> Sequence[Tensor]:
    """Compute `outputs` of a graph; `inputs` names the tensors of `given` to start from, which may be inner values."""
    tensors = [given[name].to(graph.dtype_of(graph.values[name])) for name in inputs]
    shapes = {name: tuple(one.shape) for name, one in zip(inputs, tensors, strict=True)}
    results: Sequence[Tensor] = graph.module(shapes, outputs)(*tensors)
    return results
