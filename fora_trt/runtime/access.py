"""Who may use a denoiser: one thread at a time, in the process that started its engines."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from fora_trt.errors import BusyError


class Access:
    """Admits one thread at a time. Engines write into buffers that the next step reads, so none may come in between.

    The threads of ONNX Runtime, OpenMP and CUDA do not exist in a process that is forked after they started: an engine
    would wait for them for ever.
    """

    def __init__(self) -> None:
        self._process, self._lock = os.getpid(), threading.RLock()
        self._owner = 0

    def own(self, begun: bool) -> bool:
        """Let this thread own the trajectory; False if it has `begun` in another thread."""
        if begun and self._owner != threading.get_ident():
            return False
        self._owner = threading.get_ident()
        return True

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Raise `BusyError` in a forked process and while another thread is in the block."""
        self.check_process()
        if not self._lock.acquire(blocking=False):
            raise BusyError("another thread is using this denoiser; load one for each thread, or call it in turn")
        try:
            yield
        finally:
            self._lock.release()

    def check_process(self) -> None:
        """Raise `BusyError` in a process that was forked after the engines were started."""
        if os.getpid() != self._process:
            raise BusyError(
                f"the engines of this denoiser were started in process {self._process}, before this process was "
                'forked; load it in the new process, or start that with multiprocessing.get_context("spawn")'
            )
