"""The check that an export makes before it writes a bundle: the denoiser on the CPU against the module in memory.

It runs the graphs as `fora-trt run` does, through the same engines, buffers and bindings. So a bundle that passes also
runs. The reference is the module in fp32 arithmetic with the weights of its precision.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from fora_trt.bundle import Bundle, GraphError
from fora_trt.contract import FULL, LATENTS, PRECISIONS, REUSE, TIMESTEP
from fora_trt.engines.backends import AUTO, BACKENDS, backend_from_name
from fora_trt.engines.base import Engine
from fora_trt.engines.memory import free_bytes
from fora_trt.engines.torch.engine import widened_engines
from fora_trt.errors import BackendError, ExportError, first_line
from fora_trt.evaluate.eager_fora import forecast_of
from fora_trt.evaluate.first_difference import first_difference, first_not_finite
from fora_trt.evaluate.rate import flops_per_second
from fora_trt.export.check import Measured
from fora_trt.export.split import PartialStep, steps_of_module
from fora_trt.export.statistics import graph_statistics
from fora_trt.models.examples import example_inputs
from fora_trt.models.spec import Model
from fora_trt.plan import FULL_STEP, REUSE_STEP, Plan, Step, forecast
from fora_trt.runtime.denoiser import Denoiser
from fora_trt.runtime.inputs import inputs_of, noise_of
from fora_trt.runtime.interface import overflow_remedy

CPU = torch.device("cpu")

FORA = (FULL_STEP, REUSE_STEP, REUSE_STEP)
"""A window with more than one reuse step."""

FORECAST = forecast((FULL_STEP, FULL_STEP, REUSE_STEP), order=1)
"""A reuse step that reads two full steps."""

COPIES = 3
"""Copies of the weights, in fp32, that ONNX Runtime has in memory for a moment: stored, widened and packed."""

MOST_BYTES = 4 * 10**9
"""Most memory for these copies."""

LONGEST = 10.0
"""Seconds that steps in half precision may take on the CPU; longer ones are computed in fp32."""

LONGEST_CHECK = 1800.0
"""Seconds that all full steps of the check may take, in PyTorch and in the graphs."""

SAMPLES = 3 + 2
"""Samples of the full steps of both trajectories of the check."""

Runner: TypeAlias = tuple[str, Callable[[Bundle], dict[str, Engine]]]
"""What runs the graphs, in words, and its engines."""


class GraphCheck:
    """The `Check` of `bundle_from_model`."""

    def measure(self, model: Model, bundle: Bundle) -> Measured:
        """Errors of the graphs of a step, over two trajectories with batches of 3 and of 1.

        In the first, samples have different timesteps, and a window has two reuse steps; the second forecasts if the
        bundle can. A third runs all partial steps, if there are any. No batch is that of the trace, so that a batch
        that was traced as a constant is detected.

        A model whose steps would take longer than `LONGEST_CHECK` on this CPU is not measured; the result says why.
        Raises `ExportError` if the graphs cannot be run.
        """
        if (why := _too_large(bundle)) is not None:
            return Measured({}, f"not measured: {why}")
        cases = [(FORA, 3), (FORECAST if bundle.manifest.can_forecast else FORA[:2], 1)]
        if partial := [Step(graph) for graph in bundle.manifest.partial_graphs]:
            cases.append(((FULL_STEP, *partial, REUSE_STEP), 3))
        given = [_inputs(model, plan, batch) for plan, batch in cases]
        with model.in_fp32():
            expected = [_expected(model, bundle, plan, steps) for (plan, _), steps in zip(cases, given, strict=True)]
        full_samples = sum(batch * sum(step.computes for step in plan) for plan, batch in cases)
        errors: dict[str, GraphError] = {}
        names = []
        for name, engines in _runners(bundle, full_samples):
            try:
                denoiser = Denoiser(engines(bundle), bundle.manifest, name)
                for (plan, batch), steps, wanted in zip(cases, given, expected, strict=True):
                    for step, got, want in zip(plan, _predictions(denoiser, plan, batch, steps), wanted, strict=True):
                        errors[step.graph] = _worse(GraphError.between(got, want), errors.get(step.graph))
            except BackendError as error:
                raise ExportError(f"{bundle.manifest.name} is not written: {error}") from error
            names.append(name)
        order = (FULL, *bundle.manifest.partial_graphs, REUSE)  # each reads what those before it have computed
        return Measured({graph: errors[graph] for graph in order}, f"{' and '.join(names)} ({CPU})")

    def locate(self, model: Model, bundle: Bundle, graph: str) -> str:
        """The first node of a graph that differs from the same operation in PyTorch, and what to do, in words."""
        (_, engines), *_ = reversed(_runners(bundle, 1))
        try:
            found = first_difference(model, bundle, graph, engines)
        except Exception as error:  # the graphs are wrong, so anything can fail; that they are is the message
            found = f"the first node that differs could not be found ({first_line(error) or type(error).__name__})"
        return found if model.precision == "fp32" else f"{found}; {overflow_remedy(model.precision)}"


def _too_large(bundle: Bundle) -> str | None:
    """Why the graphs cannot be compared with PyTorch on this machine, in words; None if they can."""
    flops = graph_statistics(bundle.graph_path(FULL)).flops
    seconds = 2 * SAMPLES * flops / flops_per_second(CPU)
    if seconds <= LONGEST_CHECK:
        return None
    return (
        f"a full step has {flops / 1e12:.0f} TFLOP, so comparing with PyTorch would take about {seconds / 60:.0f} "
        "minutes on this CPU; fora-trt verify compares on a GPU"
    )


def _runners(bundle: Bundle, full_samples: int) -> list[Runner]:
    """What measures a bundle: the backend that `auto` selects on a CPU, and for half precision PyTorch too.

    ONNX Runtime computes fp16 in fp32 on a CPU and does not know bf16; PyTorch rounds every result to them. Where that
    would take long for so many samples of full steps, it computes in fp32. It needs less memory, so it also replaces a
    backend with too many copies of large weights.
    """
    manifest = bundle.manifest
    chosen = backend_from_name(AUTO, manifest, CPU.type)
    half = manifest.precision != "fp32"
    stored = sum(file.stat().st_size for file in bundle.folder.glob("*.onnx*"))
    if COPIES * stored * (2 if half else 1) > min(free_bytes(CPU), MOST_BYTES):
        chosen = BACKENDS["torch"]
    rounds = not half or _seconds_of_half(bundle, full_samples) <= LONGEST
    exact: Runner = "torch", lambda one: BACKENDS["torch"].engines(one, CPU)
    in_fp32: Runner = "torch in fp32 arithmetic", lambda one: widened_engines(one, CPU)
    if chosen.name == "torch":
        return [exact if rounds else in_fp32]
    usual: Runner = chosen.name, lambda one: chosen.engines(one, CPU)
    return [usual, exact] if half and rounds else [usual]


def _seconds_of_half(bundle: Bundle, full_samples: int) -> float:
    """Estimated time of full steps, at the rate of a small matrix product in the precision of the bundle."""
    size = 64
    matrix = torch.ones(size, size, dtype=getattr(torch, PRECISIONS[bundle.manifest.precision]))
    seconds = []
    for _ in range(3):  # the first warms up
        began = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - began)
    return graph_statistics(bundle.graph_path(FULL)).flops * full_samples * min(seconds) / (2 * size**3)


def _inputs(model: Model, plan: Plan, batch: int) -> list[dict[str, Tensor]]:
    """Seeded inputs for each step; latents, timesteps and noise differ between steps, the conditioning does not."""
    spec = model.spec
    steps = [example_inputs(spec.inputs, spec.conditioning, batch, seed) for seed in range(1, len(plan) + 1)]
    changing = [one.name for one in spec.inputs if one.role != "conditioning"]
    return [steps[0] | {name: value for name, value in one.items() if name in changing} for one in steps]


def _expected(model: Model, bundle: Bundle, plan: Plan, steps: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
    """The predictions of the module along a plan."""
    paths = [site.module for site in bundle.manifest.cache_sites]
    full, reuse = steps_of_module(model.module, model.spec, paths)
    kept: list[dict[str, Tensor]] = []
    predictions = []
    with torch.no_grad():
        for step, inputs in zip(plan, steps, strict=True):
            if step.is_full:
                prediction, *features = full(*inputs.values())
                kept.insert(0, dict(zip(full.features, features, strict=True)))
            elif step.computes:
                some = PartialStep(full, bundle.manifest.partial_graphs[step.graph])
                prediction, *features = some(*inputs.values(), *(kept[0][name] for name in some.given))
                kept.insert(0, kept[0] | dict(zip(some.full.features, features, strict=True)))
            else:
                reuse.features = full.features
                batch = len(inputs[LATENTS])
                read = [forecast_of([one[name] for one in kept], step.weights, batch) for name in full.features]
                (prediction,) = reuse(*inputs.values(), *read)
            predictions.append(prediction.clone())
    for inputs, prediction in zip(steps, predictions, strict=True):
        if not prediction.isfinite().all():
            first = first_not_finite(model, inputs)
            raise ExportError(
                f"{bundle.manifest.name} is not written: {model.spec.architecture} itself predicts values that are not "
                f"finite, in PyTorch and fp32, for example inputs{f' (first in {first})' if first else ''}; check its "
                "weights, and the ranges in its ModelSpec"
            )
    return predictions


def _predictions(denoiser: Denoiser, plan: Plan, batch: int, steps: Sequence[Mapping[str, Tensor]]) -> Iterator[Tensor]:
    given = {name: steps[0][name] for name in inputs_of(denoiser.manifest)}
    drawn = noise_of(denoiser.manifest)
    times = torch.stack([inputs.get(TIMESTEP, torch.zeros(batch)).float() for inputs in steps])  # (S, B)
    run = denoiser.begin(plan, times, given, [batch])
    for number, inputs in enumerate(steps):
        step = run.at(number, batch)
        noise = {name: inputs[name] for name in drawn}
        yield step.predict(run.offsets[number], inputs[LATENTS], times[number], **given, **noise)


def _worse(one: GraphError, other: GraphError | None) -> GraphError:
    if other is None:
        return one
    return GraphError(max(one.maximum, other.maximum), max(one.relative, other.relative))
