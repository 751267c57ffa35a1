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
    for _ in watched("sampling", False)(range(4)):
        time.sleep(0.08)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("left, by the first of 4 steps") == 1
    assert "sampling: 50% done, 0 s so far, about 0 s left" in err


def test_short_work_prints_nothing_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(watched("sampling", False)(range(3))) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_nested_work_shares_one_display(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    monkeypatch.setattr("sys.stderr", screen)
    with status(False, "quality"):
        bars = DISPLAY._bars
        for _ in watched("comparing", False)(range(2)):
            assert DISPLAY._bars is bars
            assert bars is not None
            assert [task.description for task in bars.tasks] == ["quality", "comparing"]
    assert DISPLAY._bars is None
    assert screen.getvalue().count("\x1b[?25l") == 1  # the cursor is hidden once: one display


def test_a_bar_is_shown_only_while_something_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    monkeypatch.setattr("sys.stderr", screen)
    with bar(False) as progress:
        assert DISPLAY._bars is None
        progress(0.5, "building full.onnx")
        assert DISPLAY._bars is not None
        progress(1.0, "building full.onnx")
        assert DISPLAY._bars is None
    assert "building full.onnx" in screen.getvalue()


def test_a_new_total_counts_from_here(capsys: pytest.CaptureFixture[str]) -> None:
    with status(False, "bench") as tell:
        tell("warm-up")
        (task,) = DISPLAY._tasks
        assert (task.done, task.total) == (0, None)
        tell("repeat 1", 10)
        tell("repeat 2")
        assert (task.what, task.done, task.total) == ("repeat 2", 1, 10)
    assert capsys.readouterr().out == ""


def test_durations_are_read_in_their_unit() -> None:
    assert [in_time(seconds) for seconds in (3.2, 130, 7200)] == ["3 s", "2 min", "2.0 h"]
