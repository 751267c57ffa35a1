"""Ctrl-C and SIGTERM: both raise `KeyboardInterrupt` in the main thread, once, so that a command cleans up.

It knows no command and imports only what Python has loaded anyway.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread
from types import FrameType

INTERRUPTED = 130
"""The exit code after Ctrl-C or SIGTERM."""

SIGNALS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
"""What is replaced: another handler is that of a caller, and a parent may want a signal ignored."""

TOGETHER = 1.0
"""Seconds in which further signals are one with the first: a terminal, `timeout` or a supervisor may send several."""

LOST = 4.0
"""Seconds after which an interruption that nobody has caught is raised again: libraries swallow exceptions at times."""

_pending = False
"""Whether an interruption was raised that nobody has caught. The timer does not say it: others may use that too."""


@contextmanager
def interruptible(ends: bool = False) -> Iterator[None]:
    """Raise `KeyboardInterrupt` for Ctrl-C and SIGTERM during a block; further signals do not disturb its clean-up.

    With `ends` the process ends after the block: signals are ignored from there on.
    """
    last = float("-inf")

    def interrupt(number: int, frame: FrameType | None) -> None:
        global _pending
        nonlocal last
        before, last = last, time.monotonic()
        if last - before > TOGETHER:
            signal.setitimer(signal.ITIMER_REAL, LOST)
            _pending = True
            raise KeyboardInterrupt

    if current_thread() is not main_thread():
        yield
        return
    replaced = {number: old for number, old in SIGNALS.items() if signal.getsignal(number) == old}
    for number in replaced:
        signal.signal(number, interrupt)
    if replaced:
        signal.signal(signal.SIGALRM, interrupt)
    try:
        yield
    finally:
        caught()
        for number, old in replaced.items():
            signal.signal(number, signal.SIG_IGN if ends else old)


@contextmanager
def unmasked() -> Iterator[None]:
    """Raise `KeyboardInterrupt` for any exception of a block while an interruption is pending that nobody has caught.

    A library may make another exception of it: an extension that is interrupted while it is imported raises
    `ImportError: initialization failed`.
    """
    try:
        yield
    except Exception:
        if _pending:
            raise KeyboardInterrupt from None
        raise


def caught() -> None:
    """Say that an interruption has arrived where a command handles it."""
    global _pending
    _pending = False
    signal.setitimer(signal.ITIMER_REAL, 0)
