"""Commands in processes that can be killed. They are forked from a server that has imported what takes seconds."""

from __future__ import annotations

import multiprocessing
import random
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from fora_trt.cli import main
from tests.shared import measured_pilot

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.conftest", "onnxruntime", "fora_trt.cli"])


def started(*arguments: object) -> ForkServerProcess:
    """`fora-trt` with arguments, running; it takes the share of a reuse step for measured."""
    process = _CONTEXT.Process(target=_run, args=([str(one) for one in arguments],))
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


def _run(arguments: list[str]) -> None:
    with measured_pilot():
        main(arguments)
