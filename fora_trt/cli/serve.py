"""The command `serve`: answers requests for images over HTTP until it is told to end."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fora_trt.cli.options import (
    AS_JSON,
    BACKEND,
    DEVICE,
    ENGINES,
    SCHEDULER,
    TIMESTEP_SPACING,
    VAE,
    WITHOUT_PLANS,
    grouped,
    is_given,
    refuse_given,
)
from fora_trt.cli.terminal import DISPLAY, VERBOSITY, print_json, say
from fora_trt.errors import BackendError
from fora_trt.interruption import caught

if TYPE_CHECKING:
    from fora_trt.serve.server import Server

LIMITS = grouped(
    "limits",
    click.option(
        "--queue", type=click.IntRange(min=1), default=64, help="Requests that wait for a model; more get 429."
    ),
    click.option("--max-body", "body_bytes", type=click.IntRange(min=1), default=262144, help="Bytes of a request."),
    click.option(
        "--body-seconds",
        type=click.FloatRange(min=0, min_open=True),
        default=20.0,
        help="Seconds to send a request in.",
    ),
    click.option(
        "--max-prompt", "prompt_characters", type=click.IntRange(min=1), default=4000, help="Characters of a prompt."
    ),
    click.option("--max-images", "images", type=click.IntRange(min=1), default=10, help="Images of a request."),
    click.option("--max-steps", "steps", type=click.IntRange(min=1), default=250, help="Denoising steps of a request."),
)
RAY = grouped(
    "scaling",
    click.option("--replicas", type=click.IntRange(min=1), default=1, help="Processes for each model."),
    click.option(
        "--num-gpus",
        type=click.FloatRange(min=0),
        help="GPUs of a replica.  [default: 1, or 0 on a CPU]",
        show_default=False,
    ),
    click.option(
        "--num-cpus",
        type=click.FloatRange(min=0),
        help="CPUs of a replica, and its threads.  [default: 1 with a GPU, else its share of the cores]",
        show_default=False,
    ),
)
BATCHING = grouped(
    "batching",
    click.option("--max-batch-size", type=click.IntRange(min=1), default=8, help="Images that are denoised together."),
    click.option(
        "--max-wait-ms",
        type=click.FloatRange(min=0),
        default=0.0,
        help="Milliseconds to wait for more images of a batch.",
    ),
    click.option(
        "--join",
        type=click.Choice(["none", "windows"]),
        default="windows",
        help="none: a batch starts and ends together; windows: images join one that runs at its full steps.",
    ),
)
MODEL = grouped("model", BACKEND, DEVICE, ENGINES, VAE, SCHEDULER, TIMESTEP_SPACING)


LOOK_PERIOD = 5.0
"""Seconds between two looks whether every model has a replica."""


@click.command()
@click.argument("bundles", type=click.Path(path_type=Path), nargs=-1, required=True, metavar="BUNDLE...")
@click.option("--host", default="127.0.0.1", help="Address to listen at; 0.0.0.0 for all.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, help="Port to listen at; 0 for a free one.")
@click.option("--api-key-file", type=click.Path(path_type=Path), help="File with API keys, one a line.")
@click.option(
    "--schedule",
    "schedules",
    type=click.Path(path_type=Path),
    multiple=True,
    help="A .json schedule that requests can name, by its name without .json. Repeatable.",
)
@LIMITS
@BATCHING
@RAY
@click.option("--ray-address", help="Ray cluster to join.  [default: a local one for this command]", show_default=False)
@click.option(
    "--drain-seconds",
    type=click.FloatRange(min=0),
    default=60.0,
    help="Seconds to answer accepted requests at the end.",
)
@MODEL
@AS_JSON
def serve(host: str, port: int, ray_address: str | None, drain_seconds: float, as_json: bool, **settings: Any) -> None:
    """Serve bundles over HTTP, with the API of OpenAI for images; needs the extra `serve`.

    Ctrl-C or SIGTERM ends the server: new requests are refused, accepted ones are answered. The exit code is 0 if
    all of them were.

    \b
    Examples:
      fora-trt serve export/digits
      fora-trt serve export/dit-xl-2-256 export/digits --host 0.0.0.0 --api-key-file keys.txt
      fora-trt serve export/dit-xl-2-256 --replicas 4 --ray-address auto
    """
    from fora_trt.serve.server import served

    verbose = click.get_current_context().meta.get(VERBOSITY) == "verbose"
    config = _config(**settings)
    refuse_without_effect(config.join, None if ray_address else (config.bundles, config.backend, config.device))
    say("starting")
    with served(config, host, port, ray_address, verbose) as server:
        DISPLAY.end()
        about = {"url": server.url, "models": server.models, "pid": os.getpid()}
        print_json(about) if as_json else click.echo(f"{', '.join(server.models)} at {server.url}")
        try:
            _watch(server)
        except KeyboardInterrupt:
            caught()
        say("answering the accepted requests")
        left = server.drain(drain_seconds)
    if left:
        raise BackendError(f"{left} requests were not answered within {drain_seconds:g} s; give more --drain-seconds")


def _watch(server: Server) -> None:
    """Say which models have no running replica, and when they have one again, until a signal comes."""
    absent: dict[str, str] = {}
    while True:
        time.sleep(LOOK_PERIOD)
        before = absent
        if (found := server.absent()) is not None:
            absent = found
        for name in absent.keys() - before.keys():
            click.echo(f"no replica of {name} runs, and its requests wait: {absent[name]}", err=True)
        for name in before.keys() - absent.keys():
            click.echo(f"a replica of {name} runs again", err=True)


def refuse_without_effect(join: bool, here: tuple[tuple[Path, ...], str, str] | None = None) -> None:
    """Refuse options that do nothing: exit code 2. `here` are bundles, backend and device of this machine."""
    if join:
        refuse_given("images join a batch at once; give --join none", "max_wait_ms")
    if here is None or not is_given("engines"):
        return
    from fora_trt.bundle import Bundle
    from fora_trt.engines.backends import backend_from_name

    bundles, backend, device = here
    chosen = [backend_from_name(backend, Bundle.read(bundle).manifest, device) for bundle in bundles]
    if not any(one.builds for one in chosen):
        refuse_given(WITHOUT_PLANS.format(chosen[0].name), "engines")


def _config(
    bundles: tuple[Path, ...],
    api_key_file: Path | None,
    schedules: tuple[Path, ...],
    limits: dict[str, Any],
    batching: dict[str, Any],
    scaling: dict[str, Any],
    model: dict[str, Any],
) -> Any:
    from fora_trt.serve.api import Limits
    from fora_trt.serve.application import ServeConfig, digests_of

    pipeline = {name: model[name] for name in ("engines", "vae", "scheduler", "timestep_spacing")}
    pipeline["engines"] = pipeline["engines"].resolve()
    return ServeConfig(
        bundles=bundles,
        schedules=schedules,
        backend=model["backend"],
        device=model["device"],
        pipeline=pipeline,
        limits=Limits(**limits),
        api_keys=digests_of(api_key_file) if api_key_file else (),
        join=batching.pop("join") == "windows",
        **batching,
        **scaling,
    )
