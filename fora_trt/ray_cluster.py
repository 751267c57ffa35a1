"""Ray: a local one that ends with its block, or a connection to a cluster. Only this module starts it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil

from fora_trt.engines.backends import how_to_install, installed_version
from fora_trt.errors import BackendError, InputError, first_line
from fora_trt.interruption import caught

CONNECTS = 25.0
"""Seconds in which a cluster has to answer."""

LONGEST_FOLDER = 40
"""Characters of a folder for temporary files in which Ray's sockets have valid names (at most 107 characters)."""

SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
}
"""Environment variables where they are not set: no statistics to Ray's makers, no notes on changes to come."""

LOCAL_SETTINGS = {"RAY_AUTH_MODE": "token"}
"""The same for a local Ray: other users of the machine cannot use it."""


def check_ray(what: str, address: str | None) -> None:
    """Check what can be checked before Ray is imported, and set its environment variables; `what` needs it.

    Raises `BackendError` if Ray is not installed or no cluster answers, `InputError` for what is no address.
    """
    if installed_version("ray") is None:
        raise BackendError(f"{what} needs Ray, which is not installed: {how_to_install('serve')}")
    settings = dict(SETTINGS)
    if address is None:
        settings |= {**LOCAL_SETTINGS, "RAY_AUTH_TOKEN": uuid4().hex}
    elif "://" in address:
        raise InputError(f"{address!r} is not an address of a Ray cluster; give HOST:PORT of its head, or auto")
    else:
        _check_answers(address)
    for name, value in settings.items():  # Ray reads them when it is imported
        os.environ.setdefault(name, value)


@contextmanager
def ray_started(address: str | None, cpus: int, gpus: int, verbose: bool) -> Iterator[Any]:
    """Ray, on the cluster at `address`, or a local one with so many CPUs and GPUs; it ends with the block.

    Raises `BackendError` if it cannot be used.
    """
    import ray

    given: dict[str, Any] = {"log_to_driver": verbose, "configure_logging": verbose}
    folder = None
    if address is not None:
        given |= {"address": address}
    else:
        place = tempfile.gettempdir()
        folder = Path(tempfile.mkdtemp(prefix="fora-", dir=place if len(place) < LONGEST_FOLDER else "/tmp"))  # noqa: S108 # a random name in it
        given |= {
            "address": "local",
            "num_cpus": cpus,
            "num_gpus": gpus,
            "include_dashboard": False,
            "_temp_dir": str(folder / "ray"),  # Ray lets all users write into it
            "_node_ip_address": "127.0.0.1",
        }
    if not verbose:
        _silence()
    # In the main thread, Ray would replace handlers of signals. Its processes end with the thread that starts them.
    starter, others = ThreadPoolExecutor(1), _children()
    starting = starter.submit(_initialized, folder, given)
    try:
        try:
            starting.result()
        except (OSError, RuntimeError, ValueError) as error:
            where = "on this machine" if address is None else f"at {address}"
            raise BackendError(f"Ray cannot be used {where}: {first_line(error)}; see it with --verbose") from error
        _take_signals_back()
        yield ray
    except KeyboardInterrupt:
        caught()  # ending Ray takes seconds
        raise
    finally:
        wait([starting])  # a Ray that is half started cannot end
        processes = _children() - others
        ray.shutdown()
        starter.shutdown()
        if folder is not None:
            for one in psutil.wait_procs([*processes], timeout=1)[1]:  # on a busy machine, Ray forgets its agents
                with suppress(psutil.NoSuchProcess):
                    one.kill()
            shutil.rmtree(folder, ignore_errors=True)


def _take_signals_back() -> None:
    """Install the handlers of Python again: Ray's libraries print a stack at SIGTERM, whatever thread starts them."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            if (handler := signal.getsignal(number)) is not None:
                signal.signal(number, handler)


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _children() -> set[psutil.Process]:
    return {*psutil.Process().children(recursive=True)}


def _silence() -> None:
    """Keep Ray from printing to standard output what its daemons report, such as a worker that died.

    It does so even with `log_to_driver=False`, and there is no option for it.
    """
    from ray._private import worker

    if hasattr(worker, "print_to_stdstream"):
        worker.print_to_stdstream = lambda *_, **__: None


def _check_answers(address: str) -> None:
    """Raise `BackendError` unless a cluster answers: in a process of its own, as Ray would try for two minutes."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    ask = partial(subprocess.run, capture_output=True, timeout=CONNECTS, stdin=subprocess.DEVNULL)
    with suppress(subprocess.TimeoutExpired):
        if not ask(command).returncode:
            return
    raise BackendError(
        f"no Ray cluster answers at {address}; start one with 'ray start --head', and give its HOST:PORT, or auto on a "
        "machine of the cluster"
    )


def _initialized(folder: Path | None, given: dict[str, Any]) -> None:
    """Start Ray; its processes write temporary files into the folder: those that are killed leave them."""
    import ray

    before = os.environ.get("TMPDIR")
    if folder is not None:
        os.environ["TMPDIR"] = str(folder)
    try:
        ray.init(**given)
    finally:
        os.environ.pop("TMPDIR", None)
        if before is not None:
            os.environ["TMPDIR"] = before
