"""What a benchmark compares: backends that work here, and plain PyTorch."""

import pytest
import torch

from fora_trt import Schedule
from fora_trt.bundle import Bundle
from fora_trt.engines.options import EngineOptions
from fora_trt.evaluate.bench import Benchmark
from fora_trt.evaluate.targets import EngineClock, predictor_of, targets_of
from fora_trt.pipeline import Pipeline
from fora_trt.report.results import EAGER
from tests.test_bench import measured, target_of

CPU = torch.device("cpu")


def test_references_come_along_and_absent_backends_say_why(exported: Bundle) -> None:
    pipeline = Pipeline(exported, steps=8)
    schedules = [Schedule.fora(8, interval) for interval in (2, 4)]
    targets, absent = targets_of(
        pipeline, ["onnxruntime", "tensorrt"], schedules, lambda name: CPU, EngineOptions(), references=[EAGER]
    )
    shown = {one.backend: ([schedule.text for schedule in one.schedules], one.controls) for one in targets}
    assert shown == {
        "onnxruntime": (["none", "fora:2", "fora:4"], ("fora:2", "fora:4")),
        EAGER: (["none", "fora:2"], ()),
    }
    (missing,) = absent
    assert missing.backend == "tensorrt"
    assert "cannot be used" in missing.why


@pytest.mark.parametrize("backend", ["onnxruntime", EAGER])
def test_the_clock_sees_the_engines_of_real_backends(exported: Bundle, backend: str) -> None:
    engines, pipeline = EngineClock(), Pipeline(exported, steps=8)
    predictor = predictor_of(exported, backend, CPU, EngineOptions(), engines)
    one = Benchmark(pipeline, [target_of(pipeline, backend, predictor, engines, "fora:3", controls=False)])
    measured(one, 2, 2)
    for row in one.result().rows:
        assert row.overhead is not None
        assert 0 < row.overhead < 0.9
        assert 0 < row.roofline_seconds < row.seconds
