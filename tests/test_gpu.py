"""What only a GPU can show: every backend that works there, its captures, and what is copied between steps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_check import LAUNCHES, parity, transfers_between_steps, transfers_of
from fora_trt import Denoiser, Schedule, load
from fora_trt.bundle import Bundle
from fora_trt.engines.backends import BACKENDS
from fora_trt.engines.plan_store import PlanSource
from fora_trt.errors import InputError
from fora_trt.runtime.conditioning import conditioning_of_classes
from fora_trt.runtime.sampling import Sampler
from fora_trt.runtime.schedulers import scheduler_from_config
from fora_trt.runtime.updates import update_from_scheduler

CAPTURED = ("tensorrt", "tensorrt-rtx", "torch-compile")


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


def denoiser_of(bundle: Bundle, backend: str, engines: Path) -> Denoiser:
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU here that torch can use")
    if problem := BACKENDS[backend].problem():
        pytest.skip(problem)
    if not BACKENDS[backend].has_cuda():
        pytest.skip(f"{backend} is installed for the CPU alone")
    source = PlanSource(engines, batch=4)
    return load(bundle, schedule=Schedule.static(8, 3), backend=backend, device="cuda:0", plans=source)


def sampler_of(bundle: Bundle, backend: str, engines: Path, scheduler: str = "ddim") -> Sampler:
    denoiser = denoiser_of(bundle, backend, engines)
    chosen = scheduler_from_config(bundle.scheduler_config, scheduler, bundle.manifest.latents.learned_sigma)
    return Sampler(denoiser, update_from_scheduler(chosen, 8))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_equals_pytorch(exported: Bundle, engines: Path, backend: str) -> None:
    errors = parity(denoiser_of(exported, backend, engines), exported, batch=4)
    assert max(errors.values()) < 1e-4, errors


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_captured_trajectories_equal_the_first_and_those_on_the_cpu(
    exported: Bundle, engines: Path, backend: str
) -> None:
    sampler = sampler_of(exported, backend, engines)
    schedule, wanted = Schedule.static(8, 3), conditioning_of_classes(exported.manifest, [1, 2])
    runs = [sampler(schedule, wanted, [7, 8], 1.5).latents for _ in range(3)]  # warm-up, capture and replay, replay
    on_cpu = load(exported, schedule=schedule, backend="torch", device="cpu")
    expected = Sampler(on_cpu, sampler.update)(schedule, wanted, [7, 8], 1.5).latents
    for run in runs:
        torch.testing.assert_close(run, expected, atol=1e-3 * expected.abs().max().item(), rtol=0)
    other = sampler(schedule, conditioning_of_classes(exported.manifest, [3, 4]), [9, 10], 1.5).latents
    assert (other - runs[0]).abs().max() > 0.01, "a replay reads what is new in its tensors"


@pytest.mark.gpu
@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "dpm-solver++"])
@pytest.mark.parametrize("backend", CAPTURED)
def test_nothing_is_copied_or_waited_for_between_steps(
    exported: Bundle, engines: Path, backend: str, scheduler: str
) -> None:
    sampler = sampler_of(exported, backend, engines, scheduler)
    schedule, wanted = Schedule.static(8, 3), conditioning_of_classes(exported.manifest, [1, 2])
    for _ in range(2):
        sampler(schedule, wanted, [0, 1], 1.5)
    transfers = transfers_between_steps(sampler, schedule, images=2)
    launches = [transfers.pop(kind) for kind in LAUNCHES]
    assert launches[0] == schedule.full_steps, "a window is one graph"
    assert transfers == {"host to device": 0, "device to host": 0, "synchronizations": 0}


@pytest.mark.gpu
def test_onnxruntime_is_not_waited_for_between_steps(exported: Bundle, engines: Path) -> None:
    """It is launched kernel by kernel, on its own stream, in the order of the scheduler's work."""
    sampler = sampler_of(exported, "onnxruntime", engines)
    schedule, wanted = Schedule.static(8, 3), conditioning_of_classes(exported.manifest, [1, 2])
    for _ in range(2):
        sampler(schedule, wanted, [0, 1], 1.5)
    transfers = transfers_between_steps(sampler, schedule, images=2)
    assert transfers["synchronizations"] == transfers["device to host"] == transfers["launches of graphs"] == 0


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
    sampler = sampler_of(exported, backend, engines)
    schedule, both = Schedule.static(8, 3), conditioning_of_classes(exported.manifest, [1, 2])
    alone = [sampler(schedule, both.at([0]), [7], 1.5).latents for _ in range(3)][-1]
    pair = [sampler(schedule, both, [7, 8], 1.5).latents for _ in range(3)][-1]
    again = [sampler(schedule, both.at([0]), [7], 1.5).latents for _ in range(3)][-1]
    scale = pair.abs().max().item()
    torch.testing.assert_close(alone[0], pair[0], atol=1e-3 * scale, rtol=0)
    torch.testing.assert_close(alone, again, atol=1e-5 * scale, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_a_batch_outside_the_plans_is_named(exported: Bundle, engines: Path, backend: str) -> None:
    denoiser = denoiser_of(exported, backend, engines)
    with pytest.raises(InputError, match=r"the plans were built for 1:4:16 .* fora-trt build --batch 1:40:40"):
        denoiser.prepare(40)
    denoiser.prepare(2)


@pytest.mark.slow
def test_the_check_itself_runs_without_a_gpu(tmp_path: Path) -> None:
    """Its backends, figures and files, on the CPU; the copies are what it cannot count there."""
    script = [sys.executable, "-m", "benchmarks.gpu_check", "--device", "cpu", "--source", "digits", "--steps", "6"]
    subprocess.run([*script, "--repeats", "1", "--no-tests", "--out", str(tmp_path)], check=True)
    (path,) = tmp_path.glob("gpu-check_cpu_*.json")
    (model,) = json.loads(path.read_text())["models"]
    for backend in ("onnxruntime", "torch", "torch-compile"):
        row = model["backends"][backend]
        assert row["works"], row
        assert max(row["error"].values()) < 1e-4
        assert 0 < row["reuse_step_ms"] < row["full_step_ms"]
    assert model["backends"]["tensorrt"]["why"]
    assert "| torch-compile | " in path.with_suffix(".md").read_text()
