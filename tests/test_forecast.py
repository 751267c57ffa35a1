"""Forecasts: weights at formula level, where each step finds what it reads, and trajectories like those of hooks."""

import random
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiTPipeline, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from torch import Tensor

from fora_trt import Pipeline, Schedule, load
from fora_trt.bundle import Bundle
from fora_trt.contract import OPTIMIZATIONS, REUSE
from fora_trt.engines.onnxruntime.weighted_sum import kernel_library
from fora_trt.errors import ScheduleError
from fora_trt.evaluate.eager_fora import EagerFora
from fora_trt.evaluate.unfolded import UnfoldedFora
from fora_trt.pipeline import Sampling
from fora_trt.plan import FULL_STEP, REUSE_STEP, Plan, Step, adapted, depth_of, forecast, lagrange_weights, offsets_of
from fora_trt.runtime.accumulate import AccumulatingWindow
from fora_trt.runtime.denoiser import Denoiser
from fora_trt.runtime.forecast import ForecastWindow
from fora_trt.runtime.interface import Predictor
from fora_trt.runtime.layout import Layout, within
from fora_trt.runtime.sums import add_rows
from fora_trt.sampling.conditioning import example_conditioning
from fora_trt.sampling.guidance import Guidance
from tests.conftest import ON_CPU, BundleAt
from tests.hooks import Hooked

CPU = torch.device("cpu")
STEPS = 14
TOLERANCE = 1e-4
"""Of the latents after every step, relative to the largest value of the reference."""


def plan_of(text: str, order: int = 0) -> Plan:
    """F for a full step, r for a reuse step."""
    return forecast(Schedule.from_flags(sign == "F" for sign in text).plan, order)


def lengths(plan: Plan) -> list[int]:
    return [len(step.weights) for step in plan]


# -- weights -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_lagrange_weights_are_exact_on_polynomials_of_their_order(order: int) -> None:
    generator = random.Random(order)
    for _ in range(20):
        full_steps = sorted(generator.sample(range(40), order + 1))
        step = full_steps[-1] + generator.randint(1, 9)
        factors = [generator.uniform(-1, 1) for _ in range(order + 2)]

        def value(at: int, degree: int, factors: Sequence[float] = factors) -> float:
            return sum((factor * at**power for power, factor in enumerate(factors[: degree + 1])), 0.0)

        weights = lagrange_weights(full_steps, step)
        assert sum(weights) == pytest.approx(1, abs=1e-9)
        for degree in range(order + 1):
            found = sum(w * value(at, degree) for w, at in zip(weights, reversed(full_steps), strict=True))
            assert found == pytest.approx(value(step, degree), rel=1e-9, abs=1e-6)
        found = sum(w * value(at, order + 1) for w, at in zip(weights, reversed(full_steps), strict=True))
        assert found != pytest.approx(value(step, order + 1), rel=1e-6), "not of a higher one"


def test_weights_at_an_interval_of_three_are_those_of_the_formulas() -> None:
    assert lagrange_weights([0], 2) == (1.0,)
    assert lagrange_weights([0, 3], 5) == pytest.approx((5 / 3, -2 / 3))
    assert lagrange_weights([0, 3, 6], 7) == pytest.approx((14 / 9, -7 / 9, 2 / 9))


def test_the_order_is_lower_while_there_are_fewer_full_steps() -> None:
    plan = plan_of("FrFrrFrFr", 2)
    assert lengths(plan) == [0, 1, 0, 2, 2, 0, 3, 0, 3]
    assert plan[1] == REUSE_STEP
    assert plan[4].weights == pytest.approx((2.0, -1.0))
    assert depth_of(plan) == 3
    assert forecast(plan, 0) == plan_of("FrFrrFrFr")
    for order in (-1, 4):
        with pytest.raises(ScheduleError, match=f"^the forecast order is {order}; give 0 "):
            forecast(plan, order)


def test_a_plan_is_adapted_to_additional_full_steps_and_to_what_is_forgotten() -> None:
    plan = plan_of("FrFrFrrFr", 2)
    assert adapted(plan) == plan
    more = adapted(plan, full=[6])
    assert more == plan_of("FrFrFrFFr", 2), "weights are those of the full steps that there are"
    fewer = adapted(plan, forgotten=[4])
    assert lengths(fewer) == [0, 1, 0, 2, 0, 1, 1, 0, 2]
    assert fewer[8].weights == pytest.approx(lagrange_weights([4, 7], 8))
    assert lengths(adapted(plan, order=1)) == [0, 1, 0, 2, 0, 2, 2, 0, 2]
    own = (FULL_STEP, FULL_STEP, Step(REUSE, (0.5, 0.25)), FULL_STEP, Step(REUSE, (0.9,)))
    assert adapted(own, full=[0, 3]) == own, "weights of one's own stay where their full steps stay"
    assert adapted(own, forgotten=[1])[2:] == (REUSE_STEP, FULL_STEP, Step(REUSE, (0.9,)))


# -- the layout --------------------------------------------------------------------------------------------------------


def test_offsets_are_counted_from_the_full_step() -> None:
    assert offsets_of(Schedule.fora(8, 3).plan) == [0, 0, 1, 2, 0, 1, 2, 0]


def test_each_step_reads_the_rows_that_the_full_steps_wrote_for_it() -> None:
    plan = plan_of("FrrFrFrr", 1)
    layout = Layout.of(plan)
    assert layout.windows == [0, 0, 0, 1, 1, 2, 2, 2]
    assert [*map(list, layout.readers)] == [[1, 2, 4], [], [], [4, 6, 7], [], [6, 7], [], []]
    assert [(read.window, read.row) for read in layout.reads[4]] == [(1, 0), (0, 2)]
    assert [(read.window, read.row) for read in layout.reads[7]] == [(2, 1), (1, 2)]
    assert [read.weight for read in layout.reads[4]] == pytest.approx(list(plan[4].weights))
    assert (layout.rows, layout.depth, layout.weighted, layout.reach) == (3, 2, True, 4)
    part = layout.part(3, 3)
    assert (part.offsets, part.windows) == ([0, 1, 0], [1, 1, 2])
    assert part.readers == [[1], [], []], "steps after the part are left out"
    assert not Layout.of(plan_of("FrrFr")).weighted


def test_engines_with_few_rows_get_a_lower_order_or_more_full_steps() -> None:
    plan = plan_of("FrrFrrFrr", 2)
    assert Layout.of(plan).rows == 6
    assert within(plan, 6) == plan
    assert within(plan, 4) == plan_of("FrrFrrFrr", 1)
    assert within(plan, 3) == plan_of("FrrFrrFrr")
    assert within(plan, 1) == plan_of("FrFFrFFrF", 1), "a longer window is split"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_are_added_with_their_weights_in_fp32(dtype: torch.dtype) -> None:
    rows = torch.randn(5, 3, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    target, weights = torch.zeros(3, 7, dtype=dtype), torch.tensor([[1.5, -0.75, 0.25]])
    add_rows(rows.flatten(1), torch.tensor([[4, 0, 4]]), weights, target.view(1, -1))
    wanted = (1.5 * rows[4].double() - 0.75 * rows[0].double() + 0.25 * rows[4].double()).to(dtype)
    torch.testing.assert_close(
        target, wanted, rtol=1e-6 if dtype == torch.float32 else None, atol=None if dtype != torch.float32 else 1e-6
    )


# -- trajectories ------------------------------------------------------------------------------------------------------


def largest_error(
    pipeline: Pipeline, reference: Predictor, sampling: Sampling, guidance: Guidance | float = 2.0
) -> float:
    """Of the latents after every step: the largest difference, relative to the reference's largest value."""
    given = example_conditioning(pipeline.manifest, 2)
    observed: list[list[Tensor]] = []
    for one in (pipeline, pipeline.over(reference)):
        observed.append([])
        own = Sampling.of(deepcopy(sampling.scheduler), sampling.steps, sampling.schedule)
        one.sampler(own)(given, [0, 1], guidance, observe=lambda latents: observed[-1].append(latents.clone()))
    (got, want), steps = observed, range(len(observed[0]))
    assert len(got) == len(want) == sampling.nfe
    return max(((got[k] - want[k]).abs().max() / want[k].abs().max()).item() for k in steps)


@pytest.fixture(scope="module")
def reference(exported: Bundle) -> EagerFora:
    return EagerFora(exported, CPU)


UNEVEN = "FrrFrFrrrrFrFr"
"""Windows of different lengths, so that full steps compute different numbers of sums."""

OWN_WEIGHTS = tuple(
    step if step.is_full else Step(REUSE, tuple(0.6 / (1 + k) for k in range(len(step.weights))))
    for step in plan_of(UNEVEN, 2)
)
"""Weights whose sum is not 1."""


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("level", OPTIMIZATIONS)
@pytest.mark.parametrize(
    "plan", [*(plan_of(UNEVEN, order) for order in (1, 2, 3)), OWN_WEIGHTS], ids=["1", "2", "3", "own"]
)
def test_a_forecast_equals_eager_pytorch_at_every_level(
    plan: Plan, level: Any, backend: str, bundle_at: BundleAt, reference: EagerFora
) -> None:
    pipeline = Pipeline(bundle_at(level, "fp32"), steps=STEPS, backend=backend, device="cpu")
    sampling = pipeline.sampling(schedule=Schedule(tuple(plan)))
    assert largest_error(pipeline, reference, sampling) < TOLERANCE
    assert largest_error(pipeline, reference, sampling) < TOLERANCE, "again, on the same memory"
    assert isinstance(pipeline.denoiser, Denoiser)
    full = pipeline.denoiser.engines["full"]
    assert full.accumulates == (backend == "onnxruntime" and level == "fold" and kernel_library() is not None)
    assert isinstance(pipeline.denoiser.window, AccumulatingWindow if full.accumulates else ForecastWindow)
    full.accumulates = False
    assert largest_error(pipeline, reference, sampling) < TOLERANCE, "a reuse step reads several sums"
    assert isinstance(pipeline.denoiser.window, ForecastWindow)
    changed = pipeline.sampling(schedule="fora:4,forecast=1")
    assert largest_error(pipeline, reference, changed) < TOLERANCE, "with another schedule"


@pytest.mark.slow
@pytest.mark.parametrize("level", OPTIMIZATIONS)
def test_a_forecast_equals_eager_pytorch_where_it_is_compiled(
    level: Any, bundle_at: BundleAt, reference: EagerFora
) -> None:
    pipeline = Pipeline(bundle_at(level, "fp32"), steps=STEPS, backend="torch-compile", device="cpu")
    sampling = pipeline.sampling(schedule=Schedule(tuple(plan_of(UNEVEN, 2))))
    assert largest_error(pipeline, reference, sampling) < TOLERANCE


def test_the_reference_is_the_module_with_hooks(exported: Bundle, reference: EagerFora) -> None:
    """So are both references: the module and, without a checkpoint, the unfolded graph."""
    plan = plan_of(UNEVEN, 2)
    hooked = EagerFora(exported, CPU)
    plain = EagerFora(exported, CPU)
    for path in sites_of(exported):  # the sites' own forward, without the reference's hooks
        plain.module.get_submodule(path).__dict__.pop("forward")
    Hooked(plain.module, sites_of(exported), plan)
    schedule = Schedule(tuple(plan))
    pipeline = Pipeline(exported, predictor=plain, steps=STEPS)
    for one in (hooked, UnfoldedFora(exported, CPU)):
        assert largest_error(pipeline, one, pipeline.sampling(schedule=schedule)) < 1e-5


def sites_of(bundle: Bundle) -> list[str]:
    return [site.module for site in bundle.manifest.cache_sites]


@pytest.mark.parametrize("scheduler", ["ddpm", "dpm-solver++", "heun", "unipc"])
@pytest.mark.parametrize("level", ["none", "fold"])
def test_a_forecast_goes_with_every_scheduler(
    scheduler: str, level: Any, bundle_at: BundleAt, reference: EagerFora
) -> None:
    pipeline = Pipeline(bundle_at(level, "fp32"), steps=STEPS, scheduler=scheduler, backend="onnxruntime", device="cpu")
    assert largest_error(pipeline, reference, pipeline.sampling(schedule="fora:3,forecast=2")) < TOLERANCE


@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler])
def test_a_forecast_goes_with_flow_matching(scheduler: Any, optimized: dict[str, Bundle], reference: EagerFora) -> None:
    pipeline = Pipeline(optimized["fold"], backend="onnxruntime", device="cpu")
    assert largest_error(pipeline, reference, Sampling.of(scheduler(), STEPS, "fora:3,forecast=2")) < TOLERANCE


@pytest.mark.parametrize("guidance", [1.0, Guidance(2.0, 0, 6), Guidance(2.0, 5, 11), Guidance(2.0, 4)], ids=str)
@pytest.mark.parametrize("level", OPTIMIZATIONS)
def test_guidance_on_some_steps_begins_a_forecast_anew(
    guidance: Any, level: Any, bundle_at: BundleAt, reference: EagerFora
) -> None:
    pipeline = Pipeline(bundle_at(level, "fp32"), steps=STEPS, backend="onnxruntime", device="cpu")
    sampling = pipeline.sampling(schedule="fora:3,forecast=2")
    assert largest_error(pipeline, reference, sampling, guidance) < TOLERANCE


@pytest.mark.parametrize("level", OPTIMIZATIONS)
def test_batches_that_end_smaller_have_the_same_pictures(level: Any, bundle_at: BundleAt) -> None:
    made = [
        Pipeline(
            bundle_at(level, "fp32"),
            schedule="fora:3,forecast=2",
            steps=STEPS,
            batch_size=size,
            backend="torch",
            device="cpu",
        )(class_labels=[1, 2, 3], seed=5).latents
        for size in (3, 2)
    ]
    torch.testing.assert_close(*made, rtol=0, atol=1e-4)


def test_a_forecast_needs_sums_that_are_linear_in_the_features(optimized: dict[str, Bundle]) -> None:
    denoiser = load(optimized["fold"], schedule="fora:3", forecast=2, backend="torch", device="cpu")
    graphs = dict(denoiser.manifest.graphs)
    inputs = [replace(one, role="function") if one.role == "sum" else one for one in graphs[REUSE].inputs]
    graphs[REUSE] = graphs[REUSE].model_copy(update={"inputs": tuple(inputs)})
    denoiser.manifest = denoiser.manifest.model_copy(update={"graphs": graphs})
    denoiser.reset(Schedule.fora(6, 3), torch.linspace(999, 1, 6))
    denoiser(torch.zeros(1, 4, 8, 8), 999.0, class_labels=torch.tensor([1]))
    denoiser.reset(Schedule.fora(6, 3).with_forecast(1), torch.linspace(999, 1, 6))
    with pytest.raises(ScheduleError, match=r"^tiny cannot forecast: .* export it with --optimize conditioning"):
        denoiser(torch.zeros(1, 4, 8, 8), 999.0, class_labels=torch.tensor([1]))


# -- other ways to call ------------------------------------------------------------------------------------------------


def by_steps(denoiser: Denoiser, timesteps: Tensor, batches: Sequence[int], announced: bool) -> list[Tensor]:
    """Predictions of consecutive calls on fixed latents; from call to call the batch may change."""
    denoiser.reset(denoiser.schedule, timesteps if announced else None)
    latents = torch.randn(len(timesteps), max(batches), 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return [
        denoiser(latents[k, :batch], timesteps[k], class_labels=torch.full((batch,), 7)).clone()
        for k, batch in enumerate(batches)
    ]


@pytest.mark.parametrize(
    ("level", "announced"), [("none", False), ("conditioning", False), ("conditioning", True), ("fold", True)]
)
def test_calls_step_by_step_forecast_as_eager_pytorch(level: Any, announced: bool, bundle_at: BundleAt) -> None:
    """At the fifth call the batch changes: nothing before it can be read any more."""
    text, timesteps = "FrFrFrrFrr", torch.linspace(990, 9, 10)
    batches = [2] * 4 + [1] * 6
    denoiser = load(bundle_at(level, "fp32"), schedule=Schedule(tuple(plan_of(text, 2))), backend="torch", device="cpu")
    eager = EagerFora(bundle_at(level, "fp32"), CPU)
    plan = adapted(plan_of(text, 2), forgotten=[4])
    eager.begin(plan, timesteps, {}, [2])
    latents = torch.randn(10, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    wanted = [
        eager.compute(step, latents[k, : batches[k]], timesteps[k], class_labels=torch.full((batches[k],), 7))
        for k, step in enumerate(plan)
    ]
    for _ in range(2):
        got = by_steps(denoiser, timesteps, batches, announced)
        for one, other in zip(got, wanted, strict=True):
            assert (one - other).abs().max() < TOLERANCE * other.abs().max()


def test_a_sum_that_was_not_announced_ends_a_forecast(optimized: dict[str, Bundle]) -> None:
    """A folded bundle runs a full step instead, and the steps after it forecast from there on."""
    text, timesteps = "FrFrFrFr", torch.linspace(990, 9, 8)
    denoiser = load(optimized["fold"], schedule=Schedule(tuple(plan_of(text, 2))), backend="torch", device="cpu")
    denoiser.reset(denoiser.schedule, timesteps)
    eager = EagerFora(optimized["fold"], CPU)
    plan = adapted(plan_of(text, 2), full=[3], forgotten=[3, 4])  # step 3 runs alone, a run of all others begins at 4
    eager.begin(plan, timesteps, {}, [1])
    latents, given = torch.randn(8, 1, 4, 8, 8), {"class_labels": torch.tensor([7])}
    for step in range(8):
        time = timesteps[step] + (0.5 if step == 3 else 0)
        if step == 3:
            with pytest.warns(UserWarning, match="running a full step instead of a reuse step"):
                got = denoiser(latents[step], time, **given).clone()
        else:
            got = denoiser(latents[step], time, **given).clone()
        want = eager.compute(plan[step], latents[step], time, **given)
        assert (got - want).abs().max() < TOLERANCE * want.abs().max(), step


@pytest.mark.parametrize("level", OPTIMIZATIONS)
def test_the_drop_in_forecasts_as_hooks_in_the_pipeline(level: Any, bundle_at: BundleAt, pipeline_folder: Any) -> None:
    def images() -> Any:
        made = pipe(class_labels=[1, 2], num_inference_steps=STEPS, generator=torch.manual_seed(3), output_type="np")
        return np.asarray(made.images)

    bundle = bundle_at(level, "fp32")
    pipe = DiTPipeline.from_pretrained(pipeline_folder)
    pipe.set_progress_bar_config(disable=True)
    Hooked(pipe.transformer, sites_of(bundle), Schedule.fora(STEPS, 3).with_forecast(2).plan)
    wanted = images()
    denoiser = load(bundle, cache_interval=3, forecast=2, backend="onnxruntime", device="cpu")
    pipe.transformer = denoiser.as_transformer(pipe.scheduler)
    assert np.abs(images() - wanted).max() < 1 / 255
    fora = load(bundle, cache_interval=3, backend="onnxruntime", device="cpu")
    pipe.transformer = fora.as_transformer(pipe.scheduler)
    assert np.abs(images() - wanted).max() > 1 / 255, "without a forecast the pictures are others"
