"""Commands in processes that can be killed. They are forked from a server that has imported what takes seconds."""

from __future__ import annotations

import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from fora_trt.__main__ import main
from fora_trt.evaluate import peaks, targets
from tests.shared import measured_pilot, one_trace_for_all

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.warm"])


def started(
    *arguments: object, log: Path | None = None, environment: Mapping[str, str] | None = None
) -> ForkServerProcess:
    """`fora-trt` with arguments, running; it takes the share of a reuse step for measured.

    It appends what it prints to `log`, starts its own processes in this environment, and exports the model `pixels`
    without tracing it.
    """
    process = _CONTEXT.Process(target=_run, args=([str(one) for one in arguments], log, environment or {}))
    process.start()
    return process


def kill_after(batches: int, within: float, out: Path, *arguments: object) -> None:
    """Run `fora-trt` with arguments that end with --out, and kill it with SIGKILL.

    The moment is random, at most `within` seconds after `out` holds this number of batches.
    """
    process = started(*arguments, out)
    while process.is_alive() and len([*out.rglob("parts/*.npz")]) < batches:
        time.sleep(0.005)
    time.sleep(random.uniform(0, within))
    assert process.is_alive(), "it was to be killed"
    process.kill()
    process.join()


def _run(arguments: list[str], log: Path | None, environment: Mapping[str, str]) -> None:
    os.environ.update(environment)
    tempfile.tempdir = None  # that of the environment
    if log is not None:
        with log.open("ab") as file:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
    with measured_pilot(), one_trace_for_all(), small_benchmark():
        sys.argv = ["fora-trt", *arguments]
        main()


@contextmanager
def small_benchmark() -> Iterator[None]:
    """Benchmarks measure peak rates on little data, and without a compiler: both take most of their time."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(peaks.MATRIX, "cpu", 64)
        patched.setitem(peaks.COPIED, "cpu", 2**16)
        patched.setattr(targets, "compiler_problem", lambda: "there is no compiler in this test")
        yield
