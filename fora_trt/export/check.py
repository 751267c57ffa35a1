"""Measure the error of exported graphs against the PyTorch module from which they were traced."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from fora_trt.bundle import GraphError, GraphRecord
from fora_trt.contract import CONDITIONING, FULL, FULL_CONDITIONING, REUSE, CacheSite, of_window, out_of_window
from fora_trt.errors import ExportError
from fora_trt.export.split import steps_of_module
from fora_trt.models.examples import example_inputs
from fora_trt.models.spec import Model

GRAPH_TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1}
"""Tolerance by precision: the largest error of a graph relative to PyTorch's largest value. PyTorch runs in fp32."""

MEASURED_BATCH = 1
"""Differs from the batch size of the trace, so that a batch dimension traced as a constant is detected."""


@torch.no_grad()
def measure_errors(
    model: Model, sites: Sequence[CacheSite], folder: Path, graphs: Mapping[str, GraphRecord]
) -> dict[str, GraphError] | None:
    """Error of the full graph (maximum over its outputs) and of the reuse graph in `folder`, on seeded inputs.

    Each optimized graph reads the tensors that the earlier graphs computed, so errors accumulate as in a real run.
    The reference is the module in fp32 arithmetic with the weights of its precision. ONNX Runtime runs the graphs on
    the CPU; the result is None if it is not installed or has no kernels for the precision (bfloat16).
    """
    if model.precision == "bf16" or find_spec("onnxruntime") is None:
        return None
    paths = {name: folder / record.file for name, record in graphs.items()}
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
    for one in graphs[FULL].outputs:
        if one.is_of_window:
            stale[out_of_window(one).name] = got[one.name][0]
        else:
            stale[one.name] = got[one.name]
    stale |= {one.name: expected[one.name].to(getattr(torch, one.dtype)) for one in kept}
    worst = [GraphError.between(value, expected[name]) for name, value in got.items() if name in expected]
    again = _outputs(paths[REUSE], stale | second)
    return {
        FULL: GraphError(max(error.maximum for error in worst), max(error.relative for error in worst)),
        REUSE: GraphError.between(again[model.output.name], reused),
    }


def is_rounding(errors: Mapping[str, GraphError], precision: str) -> bool:
    """Whether all errors are within the tolerance of the precision, which covers rounding and the order of sums."""
    return all(error.relative <= GRAPH_TOLERANCE[precision] for error in errors.values())


@contextmanager
def _computing_in_fp32(model: Model) -> Iterator[None]:
    """Widen the parameters of each layer to fp32 only during its call, so that the weights are not in memory twice."""
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
    # No graph optimization: it would keep the weights in memory three times (stored, widened, packed). In the default
    # execution order, every weight is widened before the first layer runs; the priority-based order avoids this.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        feeds = {one.name: inputs[one.name].numpy() for one in session.get_inputs()}
        names = [one.name for one in session.get_outputs()]
        outputs = session.run(names, feeds)
    except Exception as error:  # onnxruntime raises many exception classes
        raise ExportError(f"ONNX Runtime cannot run the exported {path.stem} graph: {error}") from error
    return {name: torch.from_numpy(output) for name, output in zip(names, outputs, strict=True)}
