"""Commands in processes that can be killed. They are forked from a server that has imported what takes seconds."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerProcess

import pytest

from fora_trt.cli import main

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.conftest", "onnxruntime", "fora_trt.cli"])


def started(*arguments: object, pilot: float | None = None) -> ForkServerProcess:
    """`fora-trt` with arguments, running; `pilot` is the share of a reuse step that it takes for measured."""
    process = _CONTEXT.Process(target=_run, args=([str(one) for one in arguments], pilot))
    process.start()
    return process


def _run(arguments: list[str], pilot: float | None) -> None:
    with pytest.MonkeyPatch.context() as patched:
        if pilot is not None:
            patched.setattr("fora_trt.evaluate.rounds.reuse_share_of", lambda *_: pilot)
        main(arguments)
