import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from fora_trt import interruption
from fora_trt.bundle import Bundle
from fora_trt.interruption import interruptible

BOTH = [signal.SIGINT, signal.SIGTERM]

WHILE_IMPORTING = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background ignore it
from fora_trt.__main__ import main
_, module, signals, raises, *sys.argv[1:] = sys.argv
class Finder:
    def find_spec(self, name, *_):
        if name == module:
            try:
                for number in signals.split(","):
                    os.kill(os.getpid(), int(number))
            except KeyboardInterrupt as error:
                if raises == "KeyboardInterrupt":
                    raise
                raise ImportError("initialization failed") from error  # as extensions do
sys.meta_path.insert(0, Finder())
main()
"""


@pytest.fixture(autouse=True)
def as_a_program_begins() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background ignore it
    yield
    signal.signal(signal.SIGINT, before)


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.001)  # Python handles it between two instructions


@pytest.mark.parametrize("second", BOTH)
@pytest.mark.parametrize("first", BOTH)
def test_a_second_signal_does_not_disturb_the_clean_up(first: signal.Signals, second: signal.Signals) -> None:
    cleaned = False
    with pytest.raises(KeyboardInterrupt), interruptible():
        try:
            send(first)
        finally:
            send(second)
            cleaned = True
    assert cleaned
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_later_signal_interrupts_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interruption, "TOGETHER", 0.01)
    with interruptible():
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                send(signal.SIGTERM)
            time.sleep(0.02)


def test_an_interruption_that_is_swallowed_is_raised_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interruption, "TOGETHER", 0.01)
    monkeypatch.setattr(interruption, "LOST", 0.05)
    with interruptible():
        for caught in (False, True):
            with suppress(KeyboardInterrupt):
                send(signal.SIGTERM)
            if caught:
                interruption.caught()
                time.sleep(0.2)
            else:
                with pytest.raises(KeyboardInterrupt):
                    time.sleep(5)
                interruption.caught()
                time.sleep(0.02)


def test_a_signal_that_a_parent_ignores_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with interruptible():
        send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGTERM)


def test_at_the_end_of_a_program_signals_come_too_late() -> None:
    try:
        with interruptible(ends=True):
            pass
        for number in BOTH:
            send(number)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.mark.parametrize("second", BOTH)
@pytest.mark.parametrize("first", BOTH)
def test_a_signal_during_the_imports_is_a_word_and_130(first: signal.Signals, second: signal.Signals) -> None:
    check_interrupted("fora_trt.cli.bench", f"{first:d},{second:d}", "KeyboardInterrupt")


@pytest.mark.parametrize("number", BOTH)
@pytest.mark.parametrize("module", ["fora_trt.cli.verify", "tensorrt_rtx_bindings"])
def test_an_extension_that_is_interrupted_is_not_said_to_be_damaged(
    module: str, number: signal.Signals, digits: Bundle, tmp_path: Path
) -> None:
    if module != "fora_trt.cli.verify":
        pytest.importorskip("tensorrt_rtx")
    build = ["build", digits.folder, "--backend", "tensorrt-rtx", "--out", tmp_path]
    check_interrupted(module, f"{number:d}", "ImportError", *build)


def check_interrupted(module: str, signals: str, raises: str, *command: object) -> None:
    """Run a command that gets signals while it imports a module, whose import then raises this."""
    run = [sys.executable, "-c", WHILE_IMPORTING, module, signals, raises, *map(str, command)]
    ended = subprocess.run(run, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "interrupted\n")


def test_the_timer_of_another_program_is_no_interruption() -> None:
    signal.setitimer(signal.ITIMER_REAL, 600)  # as pytest-timeout does
    try:
        with pytest.raises(ImportError, match="is missing"), interruption.unmasked():
            raise ImportError("libnvinfer.so is missing")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def test_the_package_imports_nothing_before_it_is_asked() -> None:
    """Before signals are handled, the program imports this package and one module of it."""
    code = "import sys, fora_trt.__main__; print(*sorted(one for one in sys.modules if one.startswith('fora_trt.')))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ["fora_trt.__main__", "fora_trt.interruption"]
