"""Kills a process of the GPU check when its parent ends for any reason. It imports nothing large."""

from __future__ import annotations

import os
import signal
import threading


def end_with_parent(watched: int) -> None:
    """Kill this process and its group once the parent ends: the other end of the pipe `watched` then closes."""

    def watch() -> None:
        os.read(watched, 1)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, name="parent", daemon=True).start()
