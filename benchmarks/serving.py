"""Throughput and latency of `fora-trt serve` for one image at a time, batches, and images that join a running batch.

    python -m benchmarks.serving cpu-2-cores

A client with 32 requests at once measures the throughput, for each kind of requests: equal ones, mixed ones with twelve
settings, and varied ones that hardly ever share a setting. A second client sends the same requests at random times (a
Poisson process), the same for every way to batch, and measures latency; the ways take turns in several rounds, so that
whatever else the machine does meets all of them. Every picture is compared with that of `Pipeline` with the same seed.
The command writes benchmarks/results/serving_<hardware>_<date>.json and prints the table of docs/serving.md.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import aiohttp
import click
import numpy
from numpy.typing import NDArray
from PIL import Image

from benchmarks.readme_tables import write_content
from fora_trt.pipeline import Pipeline

WAYS = {
    "one at a time": ("--max-batch-size", "1", "--join", "none"),
    "batches": ("--max-batch-size", "16", "--max-wait-ms", "50", "--join", "none"),
    "joining": ("--max-batch-size", "16", "--join", "windows"),
}
"""Options of `fora-trt serve` by way."""

AT_ONCE = 32
STEPS, SCHEDULES = (12, 20, 30), ("none", "fora:3", "fora:5,forecast=1", "dense:8,0.3,forecast=2")
VARIED_STEPS, GUIDANCE_SCALES = range(12, 31), (1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0)
LOAD = 0.6
"""Rate of the random requests, as a share of the highest throughput of any way with the same requests at once."""

ROUNDS = 3
"""Turns of each way with the random requests; each sends its part of them."""

Request = dict[str, Any]


def mixed(count: int, seed: int) -> list[Request]:
    """Requests of all classes with different steps and schedules."""
    chosen = random.Random(seed)
    return [
        {
            "class_label": chosen.randrange(10),
            "seed": 1000 * seed + number,
            "num_inference_steps": chosen.choice(STEPS),
            "schedule": chosen.choice(SCHEDULES),
        }
        for number in range(count)
    ]


def equal(count: int, seed: int) -> list[Request]:
    """Requests of all classes with the same steps and schedule."""
    return [{**one, "num_inference_steps": 20, "schedule": "fora:3"} for one in mixed(count, seed)]


def varied(count: int, seed: int) -> list[Request]:
    """Requests of all classes, each with one of 608 settings."""
    chosen = random.Random(seed)
    return [
        {
            **one,
            "num_inference_steps": chosen.choice(VARIED_STEPS),
            "guidance_scale": chosen.choice(GUIDANCE_SCALES),
        }
        for one in mixed(count, seed)
    ]


KINDS = {"equal": equal, "mixed": mixed, "varied": varied}
"""Makes requests, by kind."""


@dataclass(frozen=True)
class Outcome:
    """What a client saw: seconds of the whole run and of each request, and what is lost or differs.

    `differing` are pictures that are not those of `Pipeline` in every pixel.
    """

    requests: int
    seconds: float
    latencies: tuple[float, ...]
    lost: int
    differing: int

    @property
    def throughput(self) -> float:
        """Requests per second."""
        return self.requests / self.seconds

    def __add__(self, other: Outcome) -> Outcome:
        """Both runs, one after the other."""
        return Outcome(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))

    def latency(self, share: float) -> float:
        """The latency that this share of the requests does not exceed."""
        return float(numpy.quantile(self.latencies, share))

    def figures(self) -> dict[str, float | int]:
        """The figures of the result file."""
        latencies = {f"p{share * 100:.0f}_seconds": round(self.latency(share), 4) for share in (0.5, 0.95)}
        kept = {name: one for name, one in asdict(self).items() if name not in ("latencies", "seconds")}
        return {**kept, "seconds": round(self.seconds, 3), "per_second": round(self.throughput, 3), **latencies}


@contextmanager
def server(bundle: Path, options: Sequence[str]) -> Iterator[str]:
    """The address of a server for the time of a block."""
    command = [sys.executable, "-m", "fora_trt", "serve", str(bundle), "--port", "0", "--json", "--queue", "100000"]
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True) as process:
        try:
            yield str(json.loads(next(iter(process.stdout or ())))["url"])
        finally:
            process.terminate()
            process.wait(120)


Send = Callable[[int], Coroutine[Any, Any, None]]
"""Sends a request by number and waits for its answer."""

Run = Callable[[Send, Sequence[Request]], Awaitable[None]]
"""Decides when each request is sent."""


def measured(url: str, requests: Sequence[Request], run: Run) -> Outcome:
    """Send requests as `run` says, and compare the pictures."""
    answers: dict[int, tuple[float, NDArray[Any] | None]] = {}

    async def all_of_them() -> float:
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=1200)
        ) as session:

            async def send(number: int) -> None:
                began = time.monotonic()
                async with session.post(f"{url}/v1/images/generations", json=requests[number]) as answer:
                    body = await answer.json()
                taken = time.monotonic() - began
                answers[number] = taken, _picture(body["data"][0]["b64_json"]) if answer.status == 200 else None

            began = time.monotonic()
            await run(send, requests)
            return time.monotonic() - began

    seconds = asyncio.run(all_of_them())
    found = [answers[number] for number in range(len(requests))]
    made = [(request, picture) for request, (_, picture) in zip(requests, found, strict=True) if picture is not None]
    return Outcome(
        len(requests),
        seconds,
        tuple(taken for taken, _ in found),
        len(requests) - len(made),
        sum(not numpy.array_equal(picture, expected(json.dumps(request))) for request, picture in made),
    )


async def at_once(send: Send, requests: Sequence[Request]) -> None:
    """`AT_ONCE` requests at a time."""
    places = asyncio.Semaphore(AT_ONCE)

    async def one(number: int) -> None:
        async with places:
            await send(number)

    await asyncio.gather(*map(one, range(len(requests))))


def at_random(rate: float, seed: int) -> Run:
    """Requests at the times of a Poisson process with this rate per second."""

    async def run(send: Send, requests: Sequence[Request]) -> None:
        chosen = random.Random(seed)
        sent = []
        for number in range(len(requests)):
            sent.append(asyncio.create_task(send(number)))
            await asyncio.sleep(chosen.expovariate(rate))
        await asyncio.gather(*sent)

    return run


def _picture(text: str) -> NDArray[Any]:
    return numpy.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


@cache
def _pipeline(schedule: str, scale: float | None) -> Pipeline:
    return Pipeline("export/digits", schedule=schedule, guidance_scale=scale)


@cache
def expected(request: str) -> NDArray[Any]:
    """The picture of a request, as JSON, that `Pipeline` makes."""
    wanted = json.loads(request)
    pipeline = _pipeline(wanted["schedule"], wanted.get("guidance_scale"))
    made = pipeline(class_labels=[wanted["class_label"]], seed=wanted["seed"], steps=wanted["num_inference_steps"])
    return numpy.asarray(made.images[0])


def table_of(result: Mapping[str, Any]) -> Iterator[str]:
    """The lines of the table."""
    yield f"| requests | way | {AT_ONCE} at once | at random | p50 | p95 |"
    yield "| --- | --- | --: | --: | --: | --: |"
    for kind in KINDS:
        for way, runs in result["ways"].items():
            found = runs["random"][kind]
            latencies = (f"{found[f'{share}_seconds']:.2f} s" for share in ("p50", "p95"))
            rates = (runs["at_once"][kind]["per_second"], result["rates"][kind])
            yield f"| {kind} | {way} | {' | '.join([*(f'{rate:.1f} per second' for rate in rates), *latencies])} |"


@click.command()
@click.argument("hardware")
@click.option("--requests", type=click.IntRange(min=10), default=500, show_default=True, help="Requests of each run.")
def main(hardware: str, requests: int) -> None:
    """Measure all ways to batch; HARDWARE names the machine in the file name."""
    given = {kind: make(requests, 1 + number) for number, (kind, make) in enumerate(KINDS.items())}
    found: dict[str, dict[str, dict[str, Outcome]]] = {way: {"at_once": {}, "random": {}} for way in WAYS}

    def run(way: str, plan: Mapping[str, tuple[Run, Sequence[Request]]], name: str) -> None:
        with server(Path("export/digits"), WAYS[way]) as url:
            measured(url, mixed(3 * AT_ONCE, 9), at_once)  # all shapes of batches have been seen
            for kind, (when, some) in plan.items():
                outcome = measured(url, some, when)
                before = found[way][name].get(kind)
                found[way][name][kind] = outcome if before is None else before + outcome
                click.echo(f"{way}, {kind}, {name}: {json.dumps(outcome.figures())}", err=True)

    for way in WAYS:
        run(way, {kind: (at_once, some) for kind, some in given.items()}, "at_once")
    best = {kind: max(runs["at_once"][kind].throughput for runs in found.values()) for kind in KINDS}
    rates = {kind: round(LOAD * one, 1) for kind, one in best.items()}
    for turn in range(ROUNDS):
        for way in WAYS:
            parts = {kind: (at_random(rates[kind], turn), some[turn::ROUNDS]) for kind, some in given.items()}
            run(way, parts, "random")
    ways = {
        way: {name: {kind: one.figures() for kind, one in kinds.items()} for name, kinds in runs.items()}
        for way, runs in found.items()
    }
    result = {"at_once": AT_ONCE, "load": LOAD, "rounds": ROUNDS, "rates": rates, "options": WAYS, "ways": ways}
    write_content(f"serving_{hardware}", result)
    click.echo("\n".join(table_of(result)))


if __name__ == "__main__":
    main()
