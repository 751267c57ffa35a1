"""Whole trajectories of the digits and of DiT-S/2: exact, of digits that can be read, in memory that does not grow."""

import subprocess
import sys

import pytest
import torch

from benchmarks.digits_accuracy import digits_accuracy
from fora_trt import Schedule, load
from fora_trt.bundle import Bundle
from fora_trt.evaluate.verify import compare_with_pytorch
from fora_trt.models.sources import model_from_source
from fora_trt.pipeline import Pipeline
from fora_trt.schedule import fora_text
from tests.test_denoiser import eager_fora, two_graphs

pytestmark = pytest.mark.slow
SOURCES = ("digits", "random:DiT-S/2")


@pytest.fixture(scope="module")
def bundles(digits: Bundle, dit_s: Bundle) -> dict[str, Bundle]:
    return dict(zip(SOURCES, (digits, dit_s), strict=True))


def test_digits_are_what_was_asked_for_and_caching_keeps_them(digits: Bundle) -> None:
    accuracy = digits_accuracy(digits, ("none", "fora:3"), per_class=5)
    print(accuracy)
    assert accuracy["real"] > 0.98
    assert accuracy["none"] >= 0.95
    assert accuracy["fora:3"] >= accuracy["none"] - 0.03


@pytest.mark.parametrize(("source", "intervals"), [("digits", (2, 3, 5)), ("random:DiT-S/2", (3,))])
def test_graphs_and_trajectories_equal_pytorch(
    bundles: dict[str, Bundle], source: str, intervals: tuple[int, ...]
) -> None:
    pipeline = Pipeline(bundles[source], steps=50, backend="onnxruntime", device="cpu")
    for comparison in compare_with_pytorch(pipeline, [fora_text(interval) for interval in intervals]):
        print(comparison)
        assert comparison.passed, comparison
        if comparison.what.endswith("graph"):
            assert comparison.error.maximum <= 1e-4


@pytest.mark.parametrize(("source", "interval"), [("digits", 2), ("digits", 3), ("digits", 5), ("random:DiT-S/2", 3)])
def test_trajectories_equal_the_ten_lines(bundles: dict[str, Bundle], source: str, interval: int) -> None:
    bundle = bundles[source]
    denoiser = load(bundle, schedule=Schedule.fora(50, interval), backend="onnxruntime", device="cpu")
    shape = denoiser.engines["full"].inputs["latents"].sized(2)
    latents, labels = torch.randn(shape, generator=torch.Generator().manual_seed(9)), torch.tensor([3, 7])
    with torch.no_grad():
        expected = eager_fora(model_from_source(source).module, latents, labels, 50, interval)
    errors = [
        ((got - want).abs().max() / want.abs().max()).item()
        for got, want in zip(two_graphs(denoiser, latents, labels), expected, strict=True)
    ]
    print(f"{source}, interval {interval}: largest error of any step {max(errors):.1e}")
    assert max(errors) <= 1e-3


PEAK = """
import sys
from pathlib import Path
from fora_trt import Schedule, load
from fora_trt.sampling.conditioning import conditioning_of_classes
from fora_trt.sampling.loop import Sampler
from fora_trt.sampling.schedulers import scheduler_from_config
from fora_trt.sampling.scheduler_step import scheduler_step_from
from fora_trt.bundle import Bundle
bundle, steps = Bundle.open(sys.argv[1]), int(sys.argv[2])
denoiser = load(bundle, schedule=Schedule.fora(steps, 3), backend="onnxruntime", device="cpu")
scheduler = scheduler_from_config(bundle.scheduler_config, None, True)
wanted = conditioning_of_classes(bundle.manifest, [1, 2])
Sampler(denoiser, scheduler_step_from(scheduler, steps), denoiser.schedule)(wanted, [0, 1], 1.5)
status = Path("/proc/self/status").read_text()  # getrusage would count the larger process that started this one
print(status.partition("VmHWM:")[2].split()[0])
"""


def test_peak_memory_does_not_grow_with_steps(dit_s: Bundle) -> None:
    """All features of DiT-S/2 at this batch are 37 MiB; a copy of them per step, or of their sum, would show.

    Seven steps have three full steps: ONNX Runtime plans its memory at the second run of a shape.
    """

    def peak(steps: int) -> float:
        command = [sys.executable, "-c", PEAK, str(dit_s.folder), str(steps)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) / 1024  # MiB

    few, many = peak(7), peak(16)
    print(f"peak memory {few:.0f} MiB at 7 steps, {many:.0f} MiB at 16")
    assert many - few < 20
