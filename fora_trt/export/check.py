"""Measure exported graphs against the PyTorch module that they were traced from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from fora_trt.bundle import GraphError
from fora_trt.export.split import FullStep, ReuseStep, example_inputs
from fora_trt.models.spec import FULL, REUSE, CacheSite, Model


@torch.no_grad()
def measure_errors(model: Model, sites: Sequence[CacheSite], paths: Mapping[str, Path]) -> dict[str, GraphError] | None:
    """Error of the full graph (worst over its outputs) and of the reuse graph, on seeded inputs.

    The reference is the module computing in fp32 with the weights of its precision. ONNX Runtime runs the graphs on
    the CPU; the result is None where it is not installed, or where it has no kernels (bfloat16).
    """
    if model.precision == "bf16" or find_spec("onnxruntime") is None:
        return None
    module, spec, names = model.module, model.spec, [site.module for site in sites]
    first, second = (example_inputs(spec.inputs, spec.guidance, batch=2, seed=seed) for seed in (1, 2))
    with _computing_in_fp32(module):
        expected = FullStep(module, spec, names)(*_widened(first))
        features = expected[1:]
        (reused,) = ReuseStep(module, spec, names)(*_widened(second), *features)

    full = _outputs(paths[FULL], first)
    stale = {
        site.feature.name: feature.to(getattr(torch, site.feature.dtype))
        for site, feature in zip(sites, features, strict=True)
    }
    (reuse,) = _outputs(paths[REUSE], second | stale)
    worst = [GraphError.between(got, want) for got, want in zip(full, expected, strict=True)]
    return {
        FULL: GraphError(max(error.maximum for error in worst), max(error.relative for error in worst)),
        REUSE: GraphError.between(reuse, reused),
    }


@contextmanager
def _computing_in_fp32(module: nn.Module) -> Iterator[None]:
    """Widen each layer's own parameters for the time of its call only, so that they are not in memory twice."""
    dtypes = {parameter: parameter.dtype for parameter in module.parameters()}

    def widen(layer: nn.Module, _: object) -> None:
        for parameter in layer.parameters(recurse=False):
            parameter.data = parameter.data.float()

    def narrow(layer: nn.Module, *_: object) -> None:
        for parameter in layer.parameters(recurse=False):
            parameter.data = parameter.data.to(dtypes[parameter])

    layers = [layer for layer in module.modules() if any(True for _ in layer.parameters(recurse=False))]
    hooks = [layer.register_forward_pre_hook(widen) for layer in layers]
    hooks += [layer.register_forward_hook(narrow) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _widened(inputs: Mapping[str, Tensor]) -> list[Tensor]:
    return [value.float() if value.is_floating_point() else value for value in inputs.values()]


def _outputs(path: Path, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # The graph as it was written: optimising would keep the weights three times, widened and packed. In the other
    # order every weight is widened before the first layer runs.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(output) for output in session.run(None, {k: v.numpy() for k, v in inputs.items()})]
