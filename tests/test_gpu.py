"""What only a GPU can show: every backend that works there, its captures, and what is copied between steps."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_rows import GRAPH_BOUND, LATENTS_BOUND
from benchmarks.gpu_work import LAUNCHES, transfers_between_steps, transfers_of
from fora_trt import Denoiser, Schedule, load
from fora_trt.bundle import Bundle, GraphError
from fora_trt.contract import OPTIMIZATIONS, Optimization
from fora_trt.engines.backends import BACKENDS
from fora_trt.engines.options import EngineOptions
from fora_trt.errors import InputError
from fora_trt.evaluate.eager_fora import EagerFora
from fora_trt.evaluate.verify import graph_errors
from fora_trt.pipeline import Pipeline
from fora_trt.runtime.interface import Predictor
from fora_trt.sampling.conditioning import Conditioning, conditioning_of_classes
from fora_trt.sampling.guidance import Guidance
from fora_trt.sampling.loop import Sampler
from tests.conftest import ON_CPU, BundleAt

CAPTURED = ("tensorrt", "tensorrt-rtx", "torch", "torch-compile")
SCHEDULE, FORECAST, GUIDANCE = Schedule.fora(8, 3), Schedule.fora(8, 3).with_forecast(2), Guidance(1.5)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


def gpu_for(backend: str) -> str:
    """The first GPU; skips where there is none, or none that the backend can use."""
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU here that torch can use")
    if problem := BACKENDS[backend].problem():
        pytest.skip(problem)
    if not BACKENDS[backend].has_cuda():
        pytest.skip(f"{backend} is installed for the CPU alone")
    return "cuda:0"


def denoiser_of(bundle: Bundle, backend: str, engines: Path, device: str | None = None) -> Denoiser:
    where = gpu_for(backend) if device is None else device
    return load(bundle, schedule=SCHEDULE, backend=backend, device=where, plans=EngineOptions(engines, batch=4))


def sampler_of(bundle: Bundle, predictor: Predictor, scheduler: str = "ddim", schedule: Schedule = SCHEDULE) -> Sampler:
    pipeline = Pipeline(bundle, predictor=predictor, scheduler=scheduler)
    return pipeline.sampler(pipeline.sampling(schedule.steps, schedule))


def two_classes(bundle: Bundle) -> Conditioning:
    return conditioning_of_classes(bundle.manifest, [1, 2])


def check_three_runs(bundle: Bundle, denoiser: Denoiser) -> None:
    """The first as it is, the second captured, the third replayed: all equal eager FORA on the same schedule.

    So do those of a forecast, whose windows take turns with the outputs of the full engine.
    """
    precision, reference = bundle.manifest.precision, EagerFora(bundle, denoiser.device)
    given = two_classes(bundle)
    for schedule in (SCHEDULE, FORECAST):
        sampler = sampler_of(bundle, denoiser, schedule=schedule)
        runs = [sampler(given, [7, 8], GUIDANCE).latents for _ in range(3)]
        expected = sampler_of(bundle, reference, schedule=schedule)(given, [7, 8], GUIDANCE).latents
        for run in runs:
            assert GraphError.between(run, expected).relative < LATENTS_BOUND[precision]
            assert torch.equal(run, runs[0]), "bit for bit"
        other = sampler(conditioning_of_classes(bundle.manifest, [3, 4]), [9, 10], GUIDANCE).latents
        assert (other - runs[0]).abs().max() > 0.01, "a replay reads what is new in its tensors"
    errors = {graph: error.relative for graph, error in graph_errors(denoiser, reference, batch=4)}
    assert max(errors.values()) < GRAPH_BOUND[precision], errors


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("level", OPTIMIZATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_first_captured_and_replayed_runs_equal_eager_fora(
    bundle_at: BundleAt, engines: Path, backend: str, level: Optimization, precision: str
) -> None:
    gpu_for(backend)  # before anything is exported
    bundle = bundle_at(level, precision)
    assert bundle.manifest.optimization == level
    check_three_runs(bundle, denoiser_of(bundle, backend, engines))


@pytest.mark.parametrize("precision", ["fp32", pytest.param("fp16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("level", OPTIMIZATIONS)
@pytest.mark.parametrize("backend", ON_CPU)
def test_three_runs_equal_eager_fora_on_the_cpu(
    bundle_at: BundleAt, engines: Path, backend: str, level: Optimization, precision: str
) -> None:
    bundle = bundle_at(level, precision)
    check_three_runs(bundle, denoiser_of(bundle, backend, engines, device="cpu"))


def check_alternating_schedules(bundle: Bundle, denoiser: Denoiser) -> None:
    """Windows of two lengths, each captured and replayed while the other is in between."""
    samplers = [sampler_of(bundle, denoiser, schedule=Schedule.fora(8, interval)) for interval in (2, 3)]
    given = two_classes(bundle)
    rounds = [[sampler(given, [7, 8], GUIDANCE).latents for sampler in samplers] for _ in range(4)]
    for again in rounds[1:]:
        assert all(map(torch.equal, again, rounds[0])), "bit for bit"
    assert not torch.equal(*rounds[0])


@pytest.mark.gpu
@pytest.mark.parametrize("backend", CAPTURED)
def test_schedules_alternate(bundle_at: BundleAt, engines: Path, backend: str) -> None:
    gpu_for(backend)  # before anything is exported
    bundle = bundle_at("fold", "fp32")
    check_alternating_schedules(bundle, denoiser_of(bundle, backend, engines))


@pytest.mark.parametrize("backend", ON_CPU)
def test_schedules_alternate_on_the_cpu(bundle_at: BundleAt, engines: Path, backend: str) -> None:
    bundle = bundle_at("fold", "fp32")
    check_alternating_schedules(bundle, denoiser_of(bundle, backend, engines, device="cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "dpm-solver++"])
@pytest.mark.parametrize("backend", CAPTURED)
def test_nothing_is_copied_or_waited_for_between_steps(
    exported: Bundle, engines: Path, backend: str, scheduler: str
) -> None:
    sampler = sampler_of(exported, denoiser_of(exported, backend, engines), scheduler)
    wanted = two_classes(exported)
    for _ in range(2):
        sampler(wanted, [0, 1], GUIDANCE)
    transfers = transfers_between_steps(sampler, wanted, GUIDANCE)
    launches = [transfers.pop(kind) for kind in LAUNCHES]
    assert launches[0] == SCHEDULE.full_steps, "a window is one graph"
    assert transfers == {"host to device": 0, "device to host": 0, "synchronizations": 0}


@pytest.mark.gpu
def test_onnxruntime_is_not_waited_for_between_steps(exported: Bundle, engines: Path) -> None:
    """It is launched kernel by kernel, on its own stream, in the order of the scheduler's work."""
    sampler = sampler_of(exported, denoiser_of(exported, "onnxruntime", engines))
    wanted = two_classes(exported)
    for _ in range(2):
        sampler(wanted, [0, 1], GUIDANCE)
    transfers = transfers_between_steps(sampler, wanted, GUIDANCE)
    assert transfers["synchronizations"] == transfers["device to host"] == transfers[LAUNCHES[0]] == 0


@pytest.mark.gpu
def test_the_count_of_transfers_can_fail() -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU here that torch can use")
    tensor = torch.ones(4, device="cuda:0")
    transfers = transfers_of(lambda: print(tensor.sum().item(), torch.ones(3).to("cuda:0").shape))
    assert transfers["device to host"] >= 1
    assert transfers["host to device"] >= 1


@pytest.mark.gpu
@pytest.mark.parametrize("backend", CAPTURED)
def test_another_batch_is_captured_anew(exported: Bundle, engines: Path, backend: str) -> None:
    sampler = sampler_of(exported, denoiser_of(exported, backend, engines))
    both = two_classes(exported)
    alone = [sampler(both.at([0]), [7], GUIDANCE).latents for _ in range(3)][-1]
    pair = [sampler(both, [7, 8], GUIDANCE).latents for _ in range(3)][-1]
    again = [sampler(both.at([0]), [7], GUIDANCE).latents for _ in range(3)][-1]
    scale = pair.abs().max().item()
    torch.testing.assert_close(alone[0], pair[0], atol=1e-3 * scale, rtol=0)
    torch.testing.assert_close(alone, again, atol=1e-5 * scale, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_a_batch_outside_the_plans_is_named(exported: Bundle, engines: Path, backend: str) -> None:
    denoiser, labels = denoiser_of(exported, backend, engines), torch.tensor([1])
    begin = partial(denoiser.begin, SCHEDULE.plan, torch.zeros(SCHEDULE.steps), {"class_labels": labels})
    with pytest.raises(InputError, match=r"the plans were built for 1:4:16 .* fora-trt build --batch 1:40:40"):
        begin(batches=[40])
    begin(batches=[2])
