"""Settings to compare and their equal-time controls."""

import pytest

from fora_trt.bundle import Bundle
from fora_trt.evaluate.candidates import candidates_of, controls_of, file_name_of, with_controls
from fora_trt.pipeline import Pipeline

SHARE = 0.1


def test_candidates_are_all_products_each_once(exported: Bundle) -> None:
    schedules = ["none", "fora:2", "fora:3", "fora:2"]
    found = candidates_of(Pipeline(exported), [None, "DDIMScheduler", "heun"], [8, 12, 8], schedules)
    settings = [one.setting for one in found]
    assert [(one.scheduler, one.steps, one.schedule) for one in settings] == [
        (name, steps, schedule)
        for name in ("DDIMScheduler", "HeunDiscreteScheduler")
        for steps in (8, 12)
        for schedule in ("none", "fora:2", "fora:3")
    ]
    everything = with_controls(found, controls_of(found, dict.fromkeys(("fora:2", "fora:3"), SHARE)))
    assert len({file_name_of(one.setting) for one in everything}) == len(everything) == 20


@pytest.mark.parametrize(
    ("scheduler", "steps", "interval", "share", "expected"),
    [
        ("ddim", 50, 3, 0.0, 18),
        ("ddim", 50, 3, 0.12, round(18 + 32 * 0.12)),
        ("ddim", 50, 3, 1.0, 50),
        ("ddim", 2, 2, 0.0, 2),
        ("heun", 50, 3, 0.0, 17),  # 99 calls, 34 of them full; 17 steps make 33 calls
        ("pndm", 20, 5, 0.0, 4),  # it supports no fewer
    ],
)
def test_a_control_takes_as_long(
    exported: Bundle, scheduler: str, steps: int, interval: int, share: float, expected: int
) -> None:
    schedule = f"fora:{interval}"
    plain, cached = candidates_of(Pipeline(exported), [scheduler], [steps], [schedule])
    assert controls_of([plain, cached], {schedule: share}) == [0, expected]
    control = with_controls([plain, cached], [0, expected])[-1]
    assert control.setting.control_of == schedule
    assert control.setting.full_steps == control.sampling.nfe
    assert cached.setting.nfe == cached.sampling.nfe == cached.sampling.schedule.steps
    assert (cached.setting.nfe > steps) == (scheduler in ("heun", "pndm"))
