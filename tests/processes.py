"""Commands in processes that can be killed. They are forked from a server that has imported what takes seconds."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerProcess

from fora_trt.cli import main
from tests.shared import measured_pilot

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.conftest", "onnxruntime", "fora_trt.cli"])


def started(*arguments: object) -> ForkServerProcess:
    """`fora-trt` with arguments, running; it takes the share of a reuse step for measured."""
    process = _CONTEXT.Process(target=_run, args=([str(one) for one in arguments],))
    process.start()
    return process


def _run(arguments: list[str]) -> None:
    with measured_pilot():
        main(arguments)
