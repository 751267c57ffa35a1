"""Starts Ray and Ray Serve for one application, drains it, and ends what was started."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch

from fora_trt.bundle import Bundle
from fora_trt.errors import BackendError, InputError, first_line
from fora_trt.ray_cluster import check_ray, cores, ray_started
from fora_trt.serve.application import (
    NAME,
    ServeConfig,
    application,
    check_installed,
    cpus_of,
    gpus_of,
    models_of,
    served_of,
)
from fora_trt.serve.deployments import deployments_of, running_replicas
from fora_trt.serve.guard import environment_of
from fora_trt.serve.requests import check_steps
from fora_trt.untrusted import one_line

LINGER = 1.0
"""Seconds between the last answer and the end of the proxy, in which answers reach their clients."""

POLL = 0.2


@dataclass
class Server:
    """A running server; `handle` is that of the front."""

    host: str
    port: int
    models: tuple[str, ...]
    handle: Any

    @property
    def url(self) -> str:
        """The address."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    def absent(self) -> dict[str, str] | None:
        """The models without a running replica, each with what Ray says of it; None if Ray does not answer."""
        from ray.exceptions import RayError

        try:
            found = deployments_of(NAME, self.models)
        except (RayError, KeyError, TimeoutError):
            return None
        return {
            name: one_line(one.message.strip().rpartition("\n")[2]) or "it is being started"
            for name, one in found.items()
            if not running_replicas(one)
        }

    def drain(self, seconds: float) -> int:
        """Refuse new requests and wait until all accepted ones are answered; return how many are not after `seconds`.

        If the front dies meanwhile, `drain` tells its replacement too.
        """
        until, left = time.monotonic() + seconds, 1
        while left and time.monotonic() < until:
            with suppress(Exception):  # a front that is being replaced
                left = self.handle.drain.remote().result(timeout_s=5)
            time.sleep(POLL)
        time.sleep(LINGER)
        return left


@contextmanager
def served(
    config: ServeConfig,
    host: str = "127.0.0.1",
    port: int = 8000,
    ray_address: str | None = None,
    verbose: bool = False,
) -> Iterator[Server]:
    """A server for the time of a block: on a local cluster of its own, or in the one at `ray_address`.

    Raises `InputError` for a port that is taken, `BackendError` if Ray or a model does not start.
    """
    if verbose:
        os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "1")
    check_ray("fora-trt serve", ray_address)
    check_installed()
    names = check(config)
    port = free_port(host, port)
    with ray_started(ray_address, cores(), torch.cuda.device_count(), verbose) as ray:
        from ray import serve

        if ray_address is None:
            check_room(config, ray.cluster_resources())

        if serve.status().proxies:
            raise InputError(
                "Ray Serve runs in this cluster already; deploy there with: "
                "serve run fora_trt.serve.application:application"
            )
        try:
            built = application(config)
            serve.start(
                http_options={"host": host, "port": port},
                logging_config={"log_level": "INFO" if verbose else "ERROR", "enable_access_log": verbose},
                controller_options={"runtime_env": {"env_vars": environment_of(config.limits)}},
            )
            handle = serve.run(built, name=NAME, route_prefix="/")
            yield Server(host, port, names, handle)
        except (RuntimeError, TimeoutError, ValueError) as error:
            raise BackendError(f"the server did not start: {first_line(error)}; -v shows what Ray says") from error
        finally:
            serve.shutdown()


def check(config: ServeConfig) -> tuple[str, ...]:
    """The names of the models. Raises `ForaError` for what would end the replicas, before Ray starts."""
    from fora_trt.pipeline import Pipeline
    from fora_trt.sampling.prompts import PromptEncoder
    from fora_trt.serve.requests import checked_schedules
    from fora_trt.serve.whole import default_steps, pipeline_of

    schedules = checked_schedules(config.schedules)
    models = models_of(config)
    for name, folder in models.items():
        served = served_of(config, name, folder, schedules)
        if Bundle.read(folder).manifest.pipeline is not None:
            check_steps(name, default_steps(pipeline_of(served)), config.limits.steps)
            continue
        pipeline = Pipeline(served.pipeline)
        pipeline.manifest.check_one_network("serve")
        pipeline.decoder  # noqa: B018 # raises for a missing VAE
        if pipeline.manifest.text is not None:
            PromptEncoder(pipeline.manifest, pipeline.device).check()
        check_steps(name, pipeline.sampling(pipeline.bundle.scheduled_steps).schedule.steps, config.limits.steps)
    return tuple(models)


def free_port(host: str, port: int) -> int:
    """The port, or a free one for 0. Raises `InputError` if it cannot be bound."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return int(probe.getsockname()[1])
    except OSError as error:
        raise InputError(
            f"{host} port {port} cannot be bound: {first_line(error)}; give another --port or --host"
        ) from error


def check_room(config: ServeConfig, there: dict[str, float]) -> None:
    """Raise `InputError` if the replicas need more than this machine has: they would wait for ever."""
    many = config.replicas * len(config.bundles)
    gpus = gpus_of(config)
    for what, each, option in (("CPU", cpus_of(config, gpus), "--num-cpus"), ("GPU", gpus, "--num-gpus")):
        if many * each > there.get(what, 0.0):
            raise InputError(
                f"{many} replicas with {each:g} {what}s each need {many * each:g}; this machine has "
                f"{there.get(what, 0.0):g}; give fewer --replicas, or {option} with a smaller number such as "
                f"{there.get(what, 0.0) / many:g}"
            )
