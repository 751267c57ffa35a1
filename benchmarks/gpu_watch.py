"""Ends a process of the GPU check with its parent, however that ended. It imports nothing large."""

from __future__ import annotations

import os
import signal
import threading


def end_with_parent(watched: int) -> None:
    """End this process and its group once the other end of the pipe `watched` is closed, which only the parent has."""

    def watch() -> None:
        os.read(watched, 1)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, name="parent", daemon=True).start()
