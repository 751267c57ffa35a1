"""The Ray Serve application: `ServeConfig` has all settings, `application` builds it from them.

serve run fora_trt.serve.application:application bundles='["export/digits"]'
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from fora_trt.bundle import Bundle
from fora_trt.engines.backends import AUTO, how_to_install, installed_version
from fora_trt.errors import BackendError, InputError, first_line
from fora_trt.ray_cluster import cores
from fora_trt.serve.api import Limits

if TYPE_CHECKING:
    from fora_trt.pipeline import PipelineConfig
    from fora_trt.serve.requests import Served

NAME = "fora-trt"
"""Name of the application."""

FRONT = "front"
"""Name of the deployment that answers HTTP; a model cannot have it."""

HEALTH_PERIOD = 2.0
"""Seconds between two checks whether a replica lives."""


ROUTING_PERIOD = 0.02
"""Seconds between two looks whether a replica can take one of the requests that wait.

Ray Serve's own are up to 0.5 seconds, in which replicas of small models would have nothing to do.
"""


class ServeConfig(BaseModel):
    """All settings of a server. Names are those of the options of `fora-trt serve`.

    `pipeline` has further fields of `PipelineConfig` for all bundles. `api_keys` are SHA-256 digests in hexadecimal;
    without one, every client is served. `num_gpus` None means 1 for each replica on a GPU, `num_cpus` None 1 with a GPU
    and else a share of this machine's cores; a replica computes with so many threads.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    bundles: tuple[Path, ...] = Field(min_length=1)
    schedules: tuple[Path, ...] = ()
    backend: str = AUTO
    device: str = AUTO
    pipeline: dict[str, Any] = {}
    replicas: int = Field(1, ge=1)
    num_cpus: float | None = Field(None, ge=0)
    num_gpus: float | None = Field(None, ge=0)
    max_batch_size: int = Field(8, ge=1)
    max_wait_ms: float = Field(0.0, ge=0)
    join: bool = True
    limits: Limits = Limits()
    api_keys: tuple[str, ...] = ()

    @field_validator("bundles", "schedules", "api_keys", mode="before")
    @classmethod
    def _of_a_text(cls, value: Any) -> Any:
        """Several values with commas between them: `serve run` passes texts."""
        return value.split(",") if isinstance(value, str) else value

    @property
    def ongoing(self) -> int:
        """Requests that a replica works on at once; twice a batch, so that the next one is ready."""
        return 2 * self.max_batch_size


def application(config: ServeConfig | dict[str, Any]) -> Any:
    """The application: one deployment for each model, and the front. Raises `InputError` and `BundleError`."""
    config = ServeConfig.model_validate(config)
    check_installed()
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    from fora_trt.serve.front import Front
    from fora_trt.serve.replica import Replica
    from fora_trt.serve.requests import checked_schedules

    schedules = checked_schedules(config.schedules)
    gpus = gpus_of(config)
    handles = {}
    for name, folder in models_of(config).items():
        served = served_of(config, name, folder, schedules)
        deployment = serve.deployment(
            Replica,
            name=name,
            num_replicas=config.replicas,
            ray_actor_options={"num_cpus": cpus_of(config, gpus), "num_gpus": gpus},
            max_ongoing_requests=config.ongoing,
            max_queued_requests=config.limits.queue,
            request_router_config=RequestRouterConfig(initial_backoff_s=ROUTING_PERIOD, max_backoff_s=ROUTING_PERIOD),
            health_check_period_s=HEALTH_PERIOD,
            health_check_timeout_s=60.0,
        )
        handles[name] = deployment.bind(served)
    accepted = len(handles) * (config.limits.queue + config.replicas * config.ongoing)
    front = serve.deployment(
        serve.ingress()(Front),
        name=FRONT,
        num_replicas=1,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=4 * accepted + 100,
        max_queued_requests=4 * accepted + 100,
        backpressure_config={"status_code": 429, "retry_after_s": 1},
        health_check_period_s=HEALTH_PERIOD,
    )
    return front.bind(NAME, handles, config.limits, config.api_keys)


def check_installed() -> None:
    """Raise `BackendError` if the extra is not installed, or does not import."""
    if installed_version("ray") is None or installed_version("prometheus-client") is None:
        raise BackendError(f"fora-trt serve needs Ray Serve; {how_to_install('serve')}")
    try:
        import prometheus_client  # noqa: F401
        import ray.serve  # noqa: F401
    except Exception as error:  # packages that do not fit together raise anything
        raise BackendError(
            f"Ray Serve is installed but cannot be imported: {first_line(error)}; {how_to_install('serve')}"
        ) from error


def models_of(config: ServeConfig) -> dict[str, Path]:
    """The folders of all bundles by name. Raises `InputError` and `BundleError`."""
    found: dict[str, Path] = {}
    for given in config.bundles:
        folder = given.resolve()
        name = folder.name
        Bundle.read(given)  # raises for what is no bundle
        if name in found:
            raise InputError(f"two bundles are named {name}: {found[name]} and {folder}; rename one of the folders")
        if name == FRONT or "#" in name or "/" in name:
            raise InputError(f"a bundle cannot be served under the name {name}; rename its folder")
        found[name] = folder
    return found


def pipeline_config(config: ServeConfig, folder: Path) -> PipelineConfig:
    """The settings of the pipeline of a bundle."""
    from fora_trt.pipeline import PipelineConfig

    settings = {"backend": config.backend, "device": config.device, "batch_size": config.max_batch_size}
    return PipelineConfig(folder, **{**settings, **config.pipeline})


def served_of(config: ServeConfig, name: str, folder: Path, schedules: tuple[Path, ...]) -> Served:
    """A model as its replicas serve it."""
    from fora_trt.serve.requests import Served

    pipeline = pipeline_config(config, folder)
    return Served(name, pipeline, schedules, config.max_batch_size, config.max_wait_ms / 1000, config.join)


def gpus_of(config: ServeConfig) -> float:
    """GPUs of a replica: the configured ones, or 1 if the backend takes a GPU here."""
    from fora_trt.engines.backends import backend_from_name, device_from_name

    if config.num_gpus is not None:
        return config.num_gpus
    backend = backend_from_name(config.backend, Bundle.read(config.bundles[0]).manifest, config.device)
    return float(device_from_name(config.device, backend).type == "cuda")


def cpus_of(config: ServeConfig, gpus: float) -> float:
    """CPUs of a replica that has so many GPUs."""
    if config.num_cpus is not None:
        return config.num_cpus
    return 1.0 if gpus else float(max(1, cores() // (config.replicas * len(config.bundles))))


def digests_of(file: Path) -> tuple[str, ...]:
    """SHA-256 digests of the keys in a file, one a line; lines that begin with `#` are none. Raises `InputError`."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"the file of API keys {file} cannot be read ({first_line(error)}); "
            "give a text file in UTF-8 with one key a line"
        ) from error
    keys = [key for line in lines if (key := line.strip()) and not key.startswith("#")]
    if not keys:
        raise InputError(f"{file} contains no API key; write one per line")
    return tuple(hashlib.sha256(key.encode()).hexdigest() for key in keys)
