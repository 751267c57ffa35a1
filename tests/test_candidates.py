"""Settings to compare and their equal-time controls."""

import json
from pathlib import Path

import pytest

from fora_trt.bundle import Bundle
from fora_trt.errors import ScheduleError
from fora_trt.evaluate.candidates import (
    Candidate,
    candidates_of,
    control_of,
    evaluations_of,
    file_name_of,
    method_of,
    paces_of,
    steps_at_equal_time,
    with_controls,
)
from fora_trt.evaluate.solvers import best_solver
from fora_trt.pipeline import Pipeline
from fora_trt.schedule import Schedule

SHARE = 0.1


def test_candidates_are_all_products_each_once(exported: Bundle) -> None:
    schedules = ["none", "fora:2", "fora:3", "fora:2"]
    pipeline = Pipeline(exported)
    found = candidates_of(pipeline, [None, "DDIMScheduler", "heun"], [8, 12, 8], schedules)
    settings = [one.setting for one in found]
    assert [(one.scheduler, one.steps, one.schedule) for one in settings] == [
        (name, steps, schedule)
        for name in ("DDIMScheduler", "HeunDiscreteScheduler")
        for steps in (12, 8)
        for schedule in ("none", "fora:2", "fora:3")
    ]
    paces = paces_of(found)
    assert [[one.setting.schedule for one in pace] for pace in paces] == [["fora:2"], ["fora:3"]] * 4
    few = candidates_of(pipeline, [None], [5], ["dense:every=2", "dense:every=3"])
    assert [one.setting.schedule for one in few] == ["none", "dense:3,0.3"]
    controls = [pipeline.uncached("unipc", number) for number in (8, 7, 9, 8, 5, 4, 6, 4)]
    everything = with_controls(found, controls)
    assert len({file_name_of(one.setting) for one in everything}) == len(everything) == 12 + len({*controls}) - 2


def test_settings_of_the_same_time_share_a_control_that_follows_them(exported: Bundle) -> None:
    pipeline = Pipeline(exported)
    found = candidates_of(pipeline, [None], [12], ["fora:2", "dense:every=2,forecast=2", "fora:3", "even:every=3"])
    controls = [pipeline.uncached(text, steps) for text, steps in (("unipc:spacing=trailing", 7), ("ddim", 4))]
    labels = [(one.setting.label, one.setting.method, one.setting.scheduler) for one in with_controls(found, controls)]
    ddim, unipc = "DDIMScheduler", "UniPCMultistepScheduler:spacing=trailing"
    assert labels == [
        ("no cache", "no cache", ddim),
        ("fora:2", "FORA", ddim),
        ("dense:7,0.3,forecast=2", "forecast", ddim),
        ("7 steps, no cache", "no cache", unipc),
        ("fora:3", "FORA", ddim),
        ("even:5", "FORA", ddim),
        ("4 steps, no cache", "no cache", ddim),
    ]
    (fast, *_) = paces_of(found)
    assert evaluations_of(fast, {"fora:2": 0.0, "dense:7,0.3,forecast=2": 0.0}) == 7
    assert evaluations_of(fast, {"fora:2": 0.0, "dense:7,0.3,forecast=2": 0.2}) == 8, "the slowest decides"


def test_a_schedule_file_is_compared_only_where_it_fits(exported: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    Schedule.fora(8, 2).to_file(path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "made_from": {"command": "by hand"}}))
    found = candidates_of(Pipeline(exported), [None], [8, 12], ["fora:3", str(path)])
    assert [one.setting.label for one in found] == ["no cache", "fora:3", "no cache", "fora:3", "mine.json"]
    assert found[4].setting.method == "calibrated" == method_of(Schedule.from_file(path))
    with pytest.raises(ScheduleError, match="is for 8 model evaluations, but this trajectory has 12"):
        candidates_of(Pipeline(exported), [None], [12], [str(path)])
    with pytest.raises(ScheduleError, match="the cache interval 9 is larger than the number of steps 8"):
        candidates_of(Pipeline(exported), [None], [8, 12], ["fora:9"])


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
    evaluations = cached.setting.full_steps + (cached.setting.nfe - cached.setting.full_steps) * share
    assert evaluations_of([cached], {schedule: share}) == round(evaluations)
    assert steps_at_equal_time(cached, evaluations) == expected
    control = control_of(cached, expected)
    assert control.setting.control_of == schedule
    assert control.setting.full_steps == control.sampling.nfe
    assert cached.setting.nfe == cached.sampling.nfe == cached.sampling.schedule.steps
    assert (cached.setting.nfe > steps) == (scheduler in ("heun", "pndm"))
    assert plain.setting.control_of is None


def test_the_best_solver_is_the_closest(exported: Bundle) -> None:
    pipeline = Pipeline(exported)
    wanted = "DPMSolverMultistepScheduler:order=3,spacing=lu"
    best = best_solver(pipeline, 6, lambda one: 40.0 if one.name == wanted else 30.0)
    assert (best.name, best.steps, best.schedule.caches) == (wanted, 6, False)
    assert Candidate.of(best, "fora:3").setting.label == "6 steps, no cache"
