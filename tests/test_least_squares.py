"""Weights by least squares: the fit, and what is observed along trajectories without caching."""

import pytest
import torch
from torch import Tensor

from fora_trt import Pipeline, Schedule
from fora_trt.contract import OPTIMIZATIONS, Optimization, of_window
from fora_trt.evaluate.least_squares import VALUES, Observed
from fora_trt.plan import FULL_STEP, REUSE_STEP, Step, forecast
from fora_trt.runtime.denoiser import Denoiser
from fora_trt.runtime.window import folded_of
from fora_trt.sampling.conditioning import example_conditioning
from fora_trt.sampling.guidance import Guidance
from tests.conftest import BundleAt

STEPS, IMAGES = 8, 3
PLAN = forecast((FULL_STEP, REUSE_STEP, FULL_STEP, REUSE_STEP, REUSE_STEP), 1)


def random_values(rows: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(min(rows, 5 - step), 400, generator=generator) for step in range(5)]


def test_the_weights_that_make_what_steps_should_read_are_found() -> None:
    """Step 3 should read what full steps 2 and 0 computed for it with weights that do not add up to 1."""
    values = random_values()
    values[3][0] = 1.25 * values[2][1] - 0.5 * values[0][3]
    fitted = Observed(values).fitted(PLAN, 0.0)
    assert fitted[3] == Step("reuse", (1.25, -0.5))
    assert [step.is_full for step in fitted] == [step.is_full for step in PLAN]
    assert [len(step.weights) for step in fitted] == [len(step.weights) for step in PLAN]


def test_the_error_on_what_was_observed_is_the_least() -> None:
    observed = Observed(random_values())

    def error(weights: tuple[float, ...]) -> float:
        read = [observed.read(full, 4) for full in (2, 0)]
        wanted = observed.read(4, 4)
        assert wanted is not None
        total = sum(weight * one for weight, one in zip(weights, read, strict=True) if one is not None)
        return float((total - wanted).square().sum())

    one, other = observed.fitted(PLAN, 0.0)[4].weights
    least = error((one, other))
    assert least < error(PLAN[4].weights)
    for by in (-0.01, 0.01):
        assert least < min(error((one + by, other)), error((one, other + by)))


def test_damped_weights_come_close_to_those_of_lagrange() -> None:
    observed = Observed(random_values())
    distances = []
    for damping in (0.0, 0.1, 10.0, 1e6):
        found = observed.fitted(PLAN, damping)[4].weights
        distances.append(max(abs(a - b) for a, b in zip(found, PLAN[4].weights, strict=True)))
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 0.5
    assert distances[-1] < 1e-5


def test_where_nothing_was_observed_weights_stay() -> None:
    """Gates of an untrained model are 0, and so are its sums."""
    fitted = Observed([torch.zeros_like(one) for one in random_values()]).fitted(PLAN, 1e-6)
    for step, before in zip(fitted, PLAN, strict=True):
        assert step.weights == pytest.approx(before.weights, abs=1e-6)


def test_steps_that_read_too_far_keep_their_weights() -> None:
    """With three rows, full step 0 computed nothing for steps 3 and 4."""
    fitted = Observed(random_values(rows=3)).fitted(PLAN, 0.0)
    assert fitted[3:] == PLAN[3:]
    assert fitted[1] != PLAN[1]


def observed_of(pipeline: Pipeline, guidance: Guidance, batch_size: int = IMAGES, ahead: int = 3) -> Observed:
    given = example_conditioning(pipeline.manifest, IMAGES)
    plain, denoiser = pipeline.sampling(schedule="none"), pipeline.denoiser
    assert isinstance(denoiser, Denoiser)
    return Observed.of(denoiser, plain, given, range(IMAGES), guidance, batch_size, ahead)


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
@pytest.mark.parametrize("level", OPTIMIZATIONS)
def test_what_is_observed_is_what_reuse_steps_read(level: Optimization, backend: str, bundle_at: BundleAt) -> None:
    """The first window of FORA begins as the trajectory without caching does."""
    pipeline = Pipeline(bundle_at(level, "fp32"), steps=STEPS, backend=backend, device="cpu")
    observed = observed_of(pipeline, Guidance(3.0))
    assert len(observed.steps) == STEPS
    sampling = pipeline.sampling(schedule=Schedule.of_full_steps(STEPS, [0]))
    begun = pipeline.sampler(sampling).begin(
        example_conditioning(pipeline.manifest, IMAGES), range(IMAGES), Guidance(3.0)
    )
    with torch.inference_mode():
        begun.launch(0, 1)
    denoiser = pipeline.denoiser
    assert isinstance(denoiser, Denoiser)
    window = denoiser.window
    assert window is not None
    folded = folded_of(window.full, window.reuse)
    rows = range(1, 4) if folded else range(1)
    names = [of_window(name) for name in folded] or [
        name for name in window.reuse.inputs if name in window.full.outputs
    ]
    for row in rows:  # of steps 1 to 3: FORA folds no sum for the full step itself
        each = -(-VALUES // len(names))
        read = [window.tensors[name][row - 1] if folded else window.tensors[name] for name in names]
        wanted = torch.cat([one.flatten(1)[:, :: max(1, one[0].numel() // each)] for one in read], dim=1)
        found = observed.read(0, row)
        assert found is not None
        assert (found - wanted.flatten()).abs().max() <= 1e-5 * wanted.abs().max()


def test_batches_and_guidance_on_an_interval_are_observed(bundle_at: BundleAt) -> None:
    """In unguided steps there are no unconditional samples: the others are kept of all steps."""
    pipeline = Pipeline(bundle_at("fold", "fp32"), steps=STEPS, backend="torch", device="cpu")
    whole, parts = (observed_of(pipeline, Guidance(3.0), size).steps for size in (IMAGES, 2))
    for one, other in zip(whole, parts, strict=True):
        assert one.shape == other.shape
        ordered = [part.sort(dim=1).values for part in (one, other)]
        assert (ordered[0] - ordered[1]).abs().max() < 1e-5 * one.abs().max()
    guided = observed_of(pipeline, Guidance(3.0, 2, 5)).steps
    assert {one.shape[1] for one in guided} == {whole[0].shape[1] // 2}
