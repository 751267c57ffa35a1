"""The display of work in progress: one at a time, and lines where standard error is no terminal."""

from __future__ import annotations

import io
import time

import pytest

from fora_trt.cli import terminal
from fora_trt.cli.terminal import DISPLAY, bar, in_time, status, watched


class Screen(io.StringIO):
    """A terminal that keeps what is written to it."""

    def isatty(self) -> bool:
        return True


def test_a_pipe_gets_an_estimate_and_then_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal, "PAUSE", 0.05)
    monkeypatch.setattr(terminal, "SURE_AFTER", 0.01)
    for _ in watched("sampling")(range(4)):
        time.sleep(0.08)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("sampling: about 0 s left, judging by 25.0% of it") == 1
    assert "sampling: 50% done, 0 s so far, about 0 s left" in err


def test_a_task_within_another_is_a_part_of_its_next_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal, "PAUSE", 1e-3)
    monkeypatch.setattr(terminal, "SURE_AFTER", 0.0)
    shown = []
    for _ in watched("sampling")(range(2)):
        for _ in watched("denoising")(range(5)):
            shown.append(DISPLAY.line().partition(" so far")[0])
            time.sleep(5e-3)
    assert shown == [f"sampling: {done}% done, 0 s" for done in range(0, 100, 10)]
    assert capsys.readouterr().err.count("sampling: about 0 s left, judging by 10.0% of it") == 1


def test_a_stage_lasts_until_the_next_task(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(terminal, "PAUSE", 0.02)
    DISPLAY.say("loading")
    time.sleep(0.1)
    with status("bench"):
        time.sleep(0.1)
    first, *lines = capsys.readouterr().err.splitlines()
    assert (first, lines[0], lines[-1]) == ("loading ...", "loading: 0 s so far", "bench: 0 s so far")


def test_quiet_shows_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(terminal, "PAUSE", 1e-3)
    monkeypatch.setattr(DISPLAY, "quiet", True)
    DISPLAY.say("loading")
    for _ in watched("sampling")(range(2)):
        time.sleep(0.01)
    assert capsys.readouterr() == ("", "")


def test_short_work_prints_nothing_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(watched("sampling")(range(3))) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_nested_work_shares_one_display(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    monkeypatch.setattr("sys.stderr", screen)
    with status("quality"):
        assert DISPLAY._bar is not None
        bars, _ = DISPLAY._bar
        for _ in watched("comparing")(range(2)):
            for _ in watched("denoising")(range(5)):
                (task,) = bars.tasks
                assert task.description == "comparing"
            assert task.completed in (0.5, 1.0)
    assert DISPLAY._bar is None
    assert screen.getvalue().count("\x1b[?25l") == 1  # the cursor is hidden once: one display


def test_a_bar_is_shown_only_while_something_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    monkeypatch.setattr("sys.stderr", screen)
    with bar() as progress:
        assert DISPLAY._bar is None
        progress(0.5, "building full.onnx")
        assert DISPLAY._bar is not None
        progress(1.0, "building full.onnx")
        assert DISPLAY._bar is None
    assert "building full.onnx" in screen.getvalue()


def test_a_new_total_counts_from_here(capsys: pytest.CaptureFixture[str]) -> None:
    with status("bench") as tell:
        tell("warm-up")
        (task,) = DISPLAY._tasks
        assert (task.done, task.total) == (0, None)
        tell("repeat 1", 10)
        tell("repeat 2")
        assert (task.what, task.done, task.total) == ("repeat 2", 1, 10)
    assert capsys.readouterr().out == ""


def test_durations_are_read_in_their_unit() -> None:
    assert [in_time(seconds) for seconds in (3.2, 130, 7200)] == ["3 s", "2 min", "2.0 h"]
