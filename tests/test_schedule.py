import pytest

from fora_trt.errors import ScheduleError
from fora_trt.schedule import Schedule, places_in_windows

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
def test_static_schedule_is_the_authors_rule(steps: int, interval: int, expected: str) -> None:
    schedule = Schedule.static(steps, interval)
    assert "".join("F" if full else "r" for full in schedule.full) == expected
    assert schedule.steps == steps
    assert schedule.full_steps == expected.count("F")


def test_a_schedule_remembers_its_interval() -> None:
    assert Schedule.static(7, 3).cache_interval == 3
    assert Schedule((True, False)).cache_interval is None


def test_from_the_first_step_on_a_schedule_can_be_cut_anywhere() -> None:
    assert "".join("F" if full else "r" for full in Schedule.from_first(8, 3).full) == "FrrFrrFr"
    assert Schedule.from_first(8, 3).full == Schedule.from_first(1000, 3).full[:8]
    assert Schedule.from_first(5, 1).full_steps == 5
    assert Schedule.from_first(2, 5).full == (True, False)
    with pytest.raises(ScheduleError, match="cache interval is 0"):
        Schedule.from_first(5, 0)


def test_fifty_steps_at_interval_three_has_the_full_steps_of_the_design() -> None:
    schedule = Schedule.static(50, 3)
    numbers = [49 - k for k, full in enumerate(schedule.full) if full]
    assert numbers == [49, 48, 45, 42, 39, 36, 33, 30, 27, 24, 21, 18, 15, 12, 9, 6, 3, 0]
    assert schedule.ideal_speedup == pytest.approx(50 / 18)


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
        Schedule.static(steps, interval)


def test_a_schedule_cannot_begin_with_reuse() -> None:
    with pytest.raises(ScheduleError, match="begin with a full step"):
        Schedule((False, True))
    with pytest.raises(ScheduleError, match="begin with a full step"):
        Schedule(())


def test_places_in_windows_are_counted_from_the_full_step() -> None:
    assert places_in_windows(Schedule.static(8, 3).full) == [0, 0, 1, 2, 0, 1, 2, 0]
    assert places_in_windows([False, False, True, False]) == [1, 2, 0, 1]
