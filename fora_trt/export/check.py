"""Measure exported graphs against the PyTorch module that they were traced from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from fora_trt.bundle import GraphError
from fora_trt.errors import ExportError
from fora_trt.export.split import steps_of_module
from fora_trt.models.examples import example_inputs
from fora_trt.models.spec import CONDITIONING, FULL, FULL_CONDITIONING, REUSE, CacheSite, Model, of_window

GRAPH_TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1}
"""Largest admitted error of a graph relative to PyTorch's largest value, by precision; PyTorch computes in fp32."""

MEASURED_BATCH = 1
"""Another than the graphs were traced with, so that a batch that became a constant shows."""


@torch.no_grad()
def measure_errors(model: Model, sites: Sequence[CacheSite], paths: Mapping[str, Path]) -> dict[str, GraphError] | None:
    """Error of the full graph (worst over its outputs) and of the reuse graph, on seeded inputs.

    What optimized graphs take from each other is computed by them: the errors are those of all that came before.
    The reference is the module computing in fp32 with the weights of its precision. ONNX Runtime runs the graphs on
    the CPU; the result is None where it is not installed, or where it has no kernels (bfloat16).
    """
    if model.precision == "bf16" or find_spec("onnxruntime") is None:
        return None
    spec, kept = model.spec, [feature for site in sites for feature in site.features]
    full, reuse = steps_of_module(model.module, spec, [site.module for site in sites])
    first, second = (example_inputs(spec.inputs, spec.conditioning, MEASURED_BATCH, seed) for seed in (1, 2))
    with _computing_in_fp32(model):
        prediction, *features = full(*first.values())
        expected = {model.output.name: prediction} | dict(zip(full.features, features, strict=True))
        reuse.features = [feature.name for feature in kept]
        (reused,) = reuse(*second.values(), *(expected[name] for name in reuse.features))

    conditioned, ahead, stale = {}, {}, {}
    if CONDITIONING in paths:
        both = {name: torch.cat([value, second[name]]) for name, value in first.items()}
        for name in (CONDITIONING, FULL_CONDITIONING):
            both |= _outputs(paths[name], both) if name in paths else {}
        rows = {name: value.chunk(2) for name, value in both.items() if name not in first}
        conditioned = {name: before for name, (before, _) in rows.items()}
        second |= {name: after for name, (_, after) in rows.items()}
        ahead = {of_window(name): after[None] for name, (_, after) in rows.items()}
    got = _outputs(paths[FULL], first | conditioned | ahead)
    for name, value in got.items():
        in_front = of_window("")
        stale[name.removeprefix(in_front)] = value[0] if name.startswith(in_front) else value
    stale |= {one.name: expected[one.name].to(getattr(torch, one.dtype)) for one in kept}
    worst = [GraphError.between(value, expected[name]) for name, value in got.items() if name in expected]
    again = _outputs(paths[REUSE], stale | second)
    return {
        FULL: GraphError(max(error.maximum for error in worst), max(error.relative for error in worst)),
        REUSE: GraphError.between(again[model.output.name], reused),
    }


def is_rounding(errors: Mapping[str, GraphError], precision: str) -> bool:
    """Whether errors are no larger than the order in which sums are taken and the precision explain."""
    return all(error.relative <= GRAPH_TOLERANCE[precision] for error in errors.values())


@contextmanager
def _computing_in_fp32(model: Model) -> Iterator[None]:
    """Widen each layer's own parameters for the time of its call only, so that they are not in memory twice."""
    if model.half is None:
        yield
        return
    dtypes = {parameter: parameter.dtype for parameter in model.module.parameters()}

    def widen(layer: nn.Module, _: object) -> None:
        for parameter in layer.parameters(recurse=False):
            parameter.data = parameter.data.float()

    def narrow(layer: nn.Module, *_: object) -> None:
        for parameter in layer.parameters(recurse=False):
            parameter.data = parameter.data.to(dtypes[parameter])

    layers = [layer for layer in model.module.modules() if any(True for _ in layer.parameters(recurse=False))]
    hooks = [layer.register_forward_pre_hook(widen) for layer in layers]
    hooks += [layer.register_forward_hook(narrow) for layer in layers]
    try:
        with model.half.off():
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _outputs(path: Path, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # The graph as it was written: optimising would keep the weights three times, widened and packed. In the other
    # order every weight is widened before the first layer runs.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        feeds = {one.name: inputs[one.name].numpy() for one in session.get_inputs()}
        names = [one.name for one in session.get_outputs()]
        outputs = session.run(names, feeds)
    except Exception as error:  # onnxruntime raises many kinds, all with one sentence
        raise ExportError(f"ONNX Runtime does not take the {path.stem} graph as it was traced: {error}") from error
    return {name: torch.from_numpy(output) for name, output in zip(names, outputs, strict=True)}
