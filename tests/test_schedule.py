from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fora_trt.contract import REUSE
from fora_trt.errors import ScheduleError
from fora_trt.plan import FULL_STEP, REUSE_STEP, Step
from fora_trt.schedule import KINDS, OPEN_STEPS, Schedule, ScheduleKind

BY_HAND = [  # steps, interval, F for full and r for reuse
    (1, 1, "F"),
    (4, 1, "FFFF"),
    (4, 2, "FFrF"),  # numbers 3 2 1 0: 3 is the first, 2 and 0 are even
    (5, 2, "FrFrF"),
    (6, 3, "FrFrrF"),
    (7, 3, "FrrFrrF"),
    (8, 3, "FFrrFrrF"),
    (10, 5, "FrrrFrrrrF"),
    (10, 10, "FrrrrrrrrF"),
]


@pytest.mark.parametrize(("steps", "interval", "expected"), BY_HAND)
def test_the_schedule_of_fora_is_the_authors_rule(steps: int, interval: int, expected: str) -> None:
    schedule = Schedule.fora(steps, interval)
    assert "".join("F" if full else "r" for full in schedule.full) == expected
    assert schedule.steps == steps
    assert schedule.full_steps == expected.count("F")
    assert schedule.caches == ("r" in expected)
    assert schedule.plan == tuple(FULL_STEP if letter == "F" else REUSE_STEP for letter in expected)


def test_a_schedule_remembers_what_it_was_made_from() -> None:
    assert Schedule.fora(7, 3).text == "fora:3"
    assert Schedule.fora(7, 1).text == Schedule.none(7).text == "none"
    assert Schedule.from_flags((True, False)).text == "steps"
    assert Schedule.fora(5, 2) == Schedule.from_flags((True, False, True, False, True)), "its text makes no difference"


def test_without_a_number_of_steps_a_schedule_is_counted_from_the_first() -> None:
    assert "".join("F" if full else "r" for full in Schedule.open("fora:3").full[:8]) == "FrrFrrFr"
    assert Schedule.open("fora:3").steps == OPEN_STEPS == 1000
    assert Schedule.open("fora:3").text == "fora:3"
    assert Schedule.open("none").full_steps == Schedule.open("fora:1").full_steps == 1000
    assert Schedule.open("fora:5").full[:2] == (True, False)
    with pytest.raises(ScheduleError, match="cache interval is 0"):
        Schedule.open("fora:0")


def test_an_open_schedule_admits_fewer_steps_than_its_interval() -> None:
    assert Schedule.open("fora:3", 8) == Schedule.fora(8, 3)
    assert Schedule.open("fora:5", 2) == Schedule.fora(2, 2)
    assert Schedule.open("none", 5) == Schedule.none(5)
    with pytest.raises(ScheduleError, match="cache interval 5 is larger than the number of steps 2"):
        Schedule.from_text("fora:5", 2)
    with pytest.raises(ScheduleError, match="cache interval is 0"):
        Schedule.open("fora:0", 5)


def test_fifty_steps_at_interval_three_has_the_full_steps_of_the_design() -> None:
    schedule = Schedule.fora(50, 3)
    numbers = [49 - k for k, full in enumerate(schedule.full) if full]
    assert numbers == [49, 48, 45, 42, 39, 36, 33, 30, 27, 24, 21, 18, 15, 12, 9, 6, 3, 0]
    assert schedule.ideal_speedup() == pytest.approx(50 / 18)


@pytest.mark.parametrize(
    ("steps", "interval", "message"),
    [
        (0, 1, "number of steps is 0"),
        (-3, 1, "number of steps is -3"),
        (5, 0, "cache interval is 0"),
        (5, -1, "cache interval is -1"),
        (5, 6, "cache interval 6 is larger than the number of steps 5"),
    ],
)
def test_impossible_schedules_are_refused(steps: int, interval: int, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        Schedule.fora(steps, interval)


def test_a_schedule_cannot_begin_with_reuse() -> None:
    with pytest.raises(ScheduleError, match="begin with a full step"):
        Schedule.from_flags((False, True))
    with pytest.raises(ScheduleError, match="begin with a full step"):
        Schedule(())


# -- the text form ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "steps", "full_steps"),
    [
        ("dense:every=3", 50, 18),
        ("dense:every=3,forecast=2", 50, 18),
        ("dense:0.5,every=5,first=2", 50, 11),
        ("even:every=2", 20, 11),
        ("even:every=9,forecast=1", 4, 2),
        ("dense:every=1", 6, 6),
    ],
)
def test_every_means_as_many_full_steps_as_fora(text: str, steps: int, full_steps: int) -> None:
    schedule = Schedule.from_text(text, steps)
    assert schedule.full_steps == full_steps
    assert Schedule.from_text(schedule.text, steps) == schedule, "its text has the number"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("none", Schedule.none(8)), ("fora:1", Schedule.none(8)), ("fora:3", Schedule.fora(8, 3))],
)
def test_a_text_is_the_schedule_that_it_names(text: str, expected: Schedule) -> None:
    schedule = Schedule.from_text(text, 8)
    assert schedule == expected
    assert schedule.text == expected.text
    assert Schedule.from_text(schedule.text, 8) == schedule


KNOWN = r"none, fora:N, even:F\[,first=K\]\[,last=K\], dense:F\[,EXPONENT\]\[,first=K\]\[,last=K\], full:0,K,\.\.\."
PER_LAYER = r"l2c:FILE\[,threshold=T\], KIND:N,KIND:N,\.\.\."


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", rf"^there is no schedule ''; give {KNOWN}, {PER_LAYER}, or a \.json file$"),
        ("forra:3", rf"^there is no schedule 'forra:3'; give {KNOWN}, {PER_LAYER}, or a \.json file$"),
        ("FORA:3", "^there is no schedule 'FORA:3'"),
        ("fora", "^the schedule 'fora' lacks the cache interval; the form is fora:N$"),
        ("fora:three", "^'three' in the schedule 'fora:three' is not an integer; give the cache interval$"),
        ("fora:2:3", "^'2:3' in the schedule 'fora:2:3' is not an integer; give the cache interval$"),
        ("fora:2,3", "^'3' in the schedule 'fora:2,3' is not understood; the form is fora:N$"),
        ("dense:18,every=3", "^the exponent of the density is 18.0; give a finite number below 1"),
        ("dense:every=0", "^the cache interval is 0; it must be at least 1"),
        (
            "dense:every=x",
            "^'every=x' in the schedule 'dense:every=x' is not an integer; give the cache interval of FORA$",
        ),
        ("fora:2,frist=1", "^'frist=1' in the schedule 'fora:2,frist=1' is not understood; the form is fora:N$"),
        ("fora:0", r"^the cache interval is 0; it must be at least 1 \(no caching\)$"),
        ("fora:9", "^the cache interval 9 is larger than the number of steps 8; choose an interval from 1 to 8$"),
        ("none:3", "^'3' in the schedule 'none:3' is not understood; the form is none$"),
        (
            "even",
            "^the schedule 'even' lacks the number of full steps, or every=N for as many as fora:N has; the form is ",
        ),
        ("even:9", "^the number of full steps is 9; give 1 to 8, the number of steps$"),
        ("even:0", "^the number of full steps is 0; give 1 to 8, the number of steps$"),
        ("even:4,first=x", "^'first=x' in the schedule 'even:4,first=x' is not an integer; give the number of full"),
        ("even:4,first=1,first=2", "^'first=2' in the schedule .* gives first a second time; remove it$"),
        ("even:4,first=0", "^first=0 and last=1 are not possible; give at least first=1 and last=0$"),
        ("even:4,first=3,last=2", "^first=3 and last=2 need 5 full steps; the schedule has 4$"),
        ("dense:4,x", "^'x' in the schedule 'dense:4,x' is not a number; give the exponent of the density$"),
        ("dense:4,1", "^the exponent of the density is 1.0; give a finite number below 1$"),
        ("dense:4,nan", "^the exponent of the density is nan; give a finite number below 1$"),
        ("dense:4,0.3,0.4", "^'0.4' in the schedule 'dense:4,0.3,0.4' is not understood; the form is dense:F"),
        ("full:", "^the schedule 'full' lacks the number of a full step; the form is "),
        ("full:0,x", "^'x' in the schedule 'full:0,x' is not an integer; give the number of a full step$"),
        ("full:1,2", "^the full steps are 1,2; give numbers of steps that rise from 0 to at most 7$"),
        ("full:0,3,3", "^the full steps are 0,3,3; give numbers of steps that rise from 0 to at most 7$"),
        ("full:0,8", "^the full steps are 0,8; give numbers of steps that rise from 0 to at most 7$"),
        ("fora:2,forecast=4", "^the forecast order is 4; give 0 .FORA., 1 .linear., 2 .quadratic. or 3 .cubic.$"),
        ("fora:2,forecast=x", "^'forecast=x' in the schedule 'fora:2,forecast=x' is not an integer; give the forecast"),
        (
            "fora:2,forecast=1,forecast=2",
            "^'forecast=2' in the schedule .* comes after 'forecast=1'; give one of them$",
        ),
        ("missing.json", r"^the schedule missing\.json cannot be read \(No such file or directory\)$"),
    ],
)
def test_a_text_that_names_no_schedule_is_refused(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ScheduleError, match=message):
        Schedule.from_text(text, 8)


def test_another_kind_of_schedule_can_be_registered() -> None:
    def make(steps: int, arguments: str) -> Schedule:
        return Schedule.from_flags((number < int(arguments) for number in range(steps)), f"first:{arguments}")

    KINDS.register(ScheduleKind("first", "first:K", make))
    try:
        assert Schedule.from_text("first:2", 4) == Schedule.from_flags((True, True, False, False))
        assert Schedule.open("first:2", 3) == Schedule.from_flags((True, True, False))
        with pytest.raises(
            ScheduleError, match=r"^the schedule 'first:2' needs the number of steps; give Schedule.from_text"
        ):
            Schedule.open("first:2")
        with pytest.raises(ScheduleError, match=r"give none, .*, full:0,K,\.\.\., .*, first:K, KIND:N,"):
            Schedule.from_text("last:2", 4)
    finally:
        KINDS.unregister("first")
    with pytest.raises(ScheduleError, match="there is no schedule 'first:2'"):
        Schedule.from_text("first:2", 4)


# -- the file form ---------------------------------------------------------------------------------------------------

OF_TWO = Step(REUSE, (1.5, -0.5))
"""A step that reads two full steps before it."""


def test_a_schedule_in_a_file_is_the_one_that_was_written(tmp_path: Path) -> None:
    path, made_from = tmp_path / "own.json", {"rule": "by hand", "threshold": 0.25}
    Schedule((FULL_STEP, FULL_STEP, OF_TWO, REUSE_STEP), made_from=made_from).to_file(path)
    assert json.loads(path.read_text()) == {
        "format_version": 1,
        "steps": ["full", "full", [1.5, -0.5], [1.0]],
        "made_from": made_from,
    }
    for schedule in (Schedule.from_file(path), Schedule.from_text(str(path), 4), Schedule.open(str(path), 4)):
        assert schedule.plan == (FULL_STEP, FULL_STEP, OF_TWO, REUSE_STEP)
        assert schedule.text == str(path)
        assert schedule.made_from == made_from


def test_a_schedule_in_a_file_is_for_its_number_of_steps(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    Schedule.fora(4, 2).to_file(path)
    message = (
        r"own\.json is for 4 model evaluations, but this trajectory has 5; "
        r"change the number of steps to match, or give another schedule$"
    )
    for read in (Schedule.from_text, Schedule.open):
        with pytest.raises(ScheduleError, match=message):
            read(str(path), 5)
    schedule = Schedule.from_file(path)
    assert schedule.checked(4) is schedule


WRONG: dict[str, tuple[Any, str]] = {
    "a list": ([], "expected an object with the keys format_version, steps, masks and made_from"),
    "an unknown key": (
        {"format_version": 1, "steps": ["full"], "stesp": []},
        "expected an object with the keys format_version, steps, masks and made_from",
    ),
    "no version": ({"steps": ["full"]}, "format_version is None; this version of fora-trt reads 1"),
    "a later version": (
        {"format_version": 2, "steps": ["full"]}, "format_version is 2; this version of fora-trt reads 1"
    ),
    "no steps": ({"format_version": 1}, "'steps' must be a list and 'made_from' an object"),
    "an origin in words": (
        {"format_version": 1, "steps": ["full"], "made_from": "hand"},
        "'steps' must be a list and 'made_from' an object",
    ),
    "a misspelt step": (
        {"format_version": 1, "steps": ["full", "reuse"]},
        "step 1 is 'reuse'; expected 'full', a list of weights such as [1.0], or the name of a mask",
    ),
    "a weight in words": (
        {"format_version": 1, "steps": ["full", ["1"]]},
        "step 1 is ['1']; expected 'full', a list of weights such as [1.0], or the name of a mask",
    ),
    "a weight that is a flag": (
        {"format_version": 1, "steps": ["full", [True]]},
        "step 1 is [True]; expected 'full', a list of weights such as [1.0], or the name of a mask",
    ),
    "no step": ({"format_version": 1, "steps": []}, "a schedule must begin with a full step"),
    "reuse first": ({"format_version": 1, "steps": [[1.0], "full"]}, "a schedule must begin with a full step"),
    "a huge weight": (
        {"format_version": 1, "steps": ["full", [float("inf")]]}, "step 1 has the weights [inf]; give finite numbers"
    ),
    "no weight": ({"format_version": 1, "steps": ["full", []]}, "step 1 has the weights []; give finite numbers"),
    "too many weights": (
        {"format_version": 1, "steps": ["full", [1, 1]]},
        "step 1 has 2 weights; the number of full steps before it is 1",
    ),
    "a weight that is no number": (
        {"format_version": 1, "steps": ["full", [float("nan")]]}, "step 1 has the weights [nan]; give finite numbers"
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", WRONG)
def test_a_file_that_is_no_schedule_is_refused(mistake: str, tmp_path: Path) -> None:
    content, message = WRONG[mistake]
    path = tmp_path / "own.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ScheduleError) as raised:
        Schedule.from_text(str(path), 2)
    assert str(raised.value).startswith(f"the schedule {path} is invalid: {message}")


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    broken, folder = tmp_path / "broken.json", tmp_path / "folder.json"
    broken.write_text('{"steps": ')
    folder.mkdir()
    with pytest.raises(ScheduleError, match=r"broken\.json is not JSON: "):
        Schedule.from_file(broken)
    broken.write_bytes(b"\xff")
    with pytest.raises(ScheduleError, match=r"broken\.json is not JSON: "):
        Schedule.from_file(broken)
    with pytest.raises(ScheduleError, match=r"folder\.json is a link or not a regular file"):
        Schedule.from_file(folder)


# -- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((), r"step 2 has the weights \[\]; give finite numbers"),
        ((1.0, float("inf")), r"step 2 has the weights \[1\.0, inf\]; give finite numbers"),
        ((1.0, 0.0, 0.0), "step 2 has 3 weights; the number of full steps before it is 2"),
    ],
)
def test_weights_belong_to_full_steps_before_a_reuse_step(weights: tuple[float, ...], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        Schedule((FULL_STEP, FULL_STEP, Step(REUSE, weights)))


def test_weights_are_a_part_of_the_schedule() -> None:
    one, other = (Schedule((FULL_STEP, FULL_STEP, step)) for step in (OF_TWO, REUSE_STEP))
    assert one.full == other.full == (True, True, False)
    assert one != other


def test_readers_of_a_full_step_are_the_reuse_steps_whose_weights_reach_it() -> None:
    schedule = Schedule.fora(8, 3)  # FFrrFrrF
    assert schedule.readers() == {0: [], 1: [2, 3], 4: [5, 6], 7: []}
    assert schedule.longest_window == 2
    schedule = Schedule((FULL_STEP, REUSE_STEP, FULL_STEP, OF_TWO, FULL_STEP, REUSE_STEP, OF_TWO))
    assert schedule.readers() == {0: [1, 3], 2: [3, 6], 4: [5, 6]}
    assert schedule.longest_window == 2
    assert schedule.kept_sums == 2
    assert Schedule.none(5).kept_sums == 0
    assert Schedule.none(5).longest_window == 0


def test_a_file_is_a_schedule_for_any_caller_of_its_number_of_steps(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    Schedule.from_flags([True, False, True]).to_file(path)
    assert Schedule.open(str(path)).full == Schedule.open(str(path), 3).full == (True, False, True)
    with pytest.raises(ScheduleError, match="is for 3 model evaluations, but this trajectory has 4"):
        Schedule.open(str(path), 4)


def test_a_digest_tells_plans_apart() -> None:
    assert Schedule.fora(6, 3).digest() == Schedule.from_flags(Schedule.fora(6, 3).full, "other").digest()
    assert len({Schedule.fora(6, 3).digest(), Schedule.fora(6, 2).digest(), Schedule.none(6).digest()}) == 3


def test_no_steps_are_named_before_the_interval() -> None:
    with pytest.raises(ScheduleError, match="the number of steps is 0"):
        Schedule.open("fora:3", 0)
