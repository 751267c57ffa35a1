"""Which backends work on this GPU, how exact and how fast they are, and what they copy between steps.

    python -m benchmarks.gpu_check

runs the tests that need a GPU, then every backend on the digits and on a DiT with random weights, and writes
benchmarks/results/gpu-check_<gpu>_<date>.json and .md. A backend that is not installed or fails is a line that says so.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import torch

from fora_trt import Denoiser, Schedule, load
from fora_trt.bundle import Bundle
from fora_trt.engines.backends import BACKENDS
from fora_trt.engines.plan_store import PlanSource
from fora_trt.errors import ForaError
from fora_trt.evaluate.circumstances import circumstances
from fora_trt.evaluate.eager_fora import EagerFora
from fora_trt.evaluate.verify import graph_errors
from fora_trt.export.write import bundle_from_model
from fora_trt.models.sources import model_from_source
from fora_trt.models.spec import FULL, REUSE
from fora_trt.runtime.conditioning import conditioning_of_classes
from fora_trt.runtime.sampling import Sampler, stretches_of
from fora_trt.runtime.schedulers import scheduler_from_config
from fora_trt.runtime.updates import update_from_scheduler
from fora_trt.schedule import places_in_windows

RESULTS = Path(__file__).parent / "results"
CACHE_INTERVALS = (1, 2, 3, 5)
GUIDANCE_SCALE = 1.5


LAUNCHES = ("launches of graphs", "launches of kernels")


def transfers_of(run: Callable[[], None]) -> dict[str, int]:
    """How often `run` copies between host and device, waits for the device or launches, as torch's profiler sees it."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
    kinds = {
        "host to device": r"Memcpy HtoD",
        "device to host": r"Memcpy DtoH",
        "synchronizations": r"cuda(Stream|Device|Event)Synchronize",
        LAUNCHES[0]: r"cudaGraphLaunch",
        LAUNCHES[1]: r"cu(da)?LaunchKernel",
    }
    counts = Counter(dict.fromkeys(kinds, 0))
    for event in profile.events() or ():
        counts.update(kind for kind, pattern in kinds.items() if re.match(pattern, event.name))
    # the profiler itself waits for the device once, when it stops
    counts["synchronizations"] = max(0, counts["synchronizations"] - 1)
    return dict(counts)


def parity(denoiser: Denoiser, bundle: Bundle, batch: int) -> dict[str, float]:
    """Largest error of the full and of the reuse graph, relative to PyTorch in fp32."""
    reference = EagerFora(bundle, denoiser.device)
    return {graph: error.relative for graph, error in graph_errors(denoiser, reference, batch)}


def row_of(bundle: Bundle, backend: str, device: torch.device, images: int, steps: int, repeats: int) -> dict[str, Any]:
    """Parity, times, speed-ups, copies and memory of one backend; repeats go through all intervals in turn."""
    source = PlanSource(batch=2 * images, report=lambda line: click.echo(f"  {line}", err=True))
    with _memory_of(device) as memory:
        denoiser = load(bundle, schedule=Schedule.static(steps, 1), backend=backend, device=device, plans=source)
        errors = parity(denoiser, bundle, 2 * images)
        scheduler = scheduler_from_config(bundle.scheduler_config, "ddim", bundle.manifest.latents.learned_sigma)
        sampler = Sampler(denoiser, update_from_scheduler(scheduler, steps))
        wanted = conditioning_of_classes(bundle.manifest, [0] * images)
        seconds: dict[int, list[float]] = {interval: [] for interval in CACHE_INTERVALS}
        full, reuse = [], []
        for repeat in range(repeats + 1):
            for interval in CACHE_INTERVALS:
                done = sampler(Schedule.static(steps, interval), wanted, range(images), GUIDANCE_SCALE)
                if repeat:  # the first warms up and captures
                    seconds[interval].append(done.seconds)
                    full += done.full_seconds
                    reuse += done.reuse_seconds
        between = Schedule.static(steps, 3)
        transfers = transfers_between_steps(sampler, between, images) if device.type == "cuda" else None
    medians = {interval: statistics.median(times) for interval, times in seconds.items()}
    return {
        "works": True,
        "error": errors,
        "full_step_ms": statistics.median(full) * 1e3,
        "reuse_step_ms": statistics.median(reuse) * 1e3,
        "seconds": {str(interval): median for interval, median in medians.items()},
        "spread": {str(interval): [min(times), max(times)] for interval, times in seconds.items()},
        "speedup": {str(interval): medians[1] / median for interval, median in medians.items()},
        "transfers": transfers,
        "device_memory_bytes": memory[0],
    }


def transfers_between_steps(sampler: Sampler, schedule: Schedule, images: int) -> dict[str, int]:
    """Of a guided trajectory that was captured before, from before its first to after its last step."""
    sampler.update.begin(sampler.denoiser.manifest.latents.shape, range(images), sampler.denoiser.device)
    steps = [(place, True) for place in places_in_windows(schedule.full)]
    torch.cuda.synchronize()

    def run() -> None:
        for first, length in stretches_of(steps).items():
            sampler.launch(first, steps[first : first + length])

    return transfers_of(run)


@contextmanager
def _memory_of(device: torch.device) -> Iterator[list[int | None]]:
    """Device memory in use at the end of the block and not before it, by torch and by others in this process."""
    found: list[int | None] = [None]
    if device.type != "cuda":
        yield found
        return
    torch.cuda.empty_cache()
    before = torch.cuda.mem_get_info(device)[0]
    yield found
    found[0] = before - torch.cuda.mem_get_info(device)[0]


def check(bundle: Bundle, device: torch.device, images: int, steps: int, repeats: int) -> dict[str, dict[str, Any]]:
    """A row for every backend."""
    rows: dict[str, dict[str, Any]] = {}
    for name, backend in BACKENDS.items():
        click.echo(f"{bundle.manifest.name} on {name} ...", err=True)
        if problem := backend.problem():
            rows[name] = {"works": False, "why": problem}
            continue
        try:
            rows[name] = row_of(bundle, name, device, images, steps, repeats)
        except ForaError as error:
            rows[name] = {"works": False, "why": str(error)}
        except Exception as error:  # what goes wrong on this GPU is what this script is to find out
            rows[name] = {"works": False, "why": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"}
    return rows


def tests() -> dict[str, Any]:
    """Run the tests that need a GPU; what they said last."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-rs"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines()
    return {"passed": done.returncode == 0, "summary": lines[-1] if lines else "", "output": lines[-40:]}


def as_markdown(result: dict[str, Any]) -> str:
    """The result as a page."""
    measured_on = ", ".join(f"{key} {value}" for key, value in result["measured_on"].items() if value is not None)
    lines = ["# GPU check", "", measured_on, ""]
    if "tests" in result:
        lines += [f"Tests that need a GPU: {result['tests']['summary']}", ""]
    for model in result["models"]:
        lines += [
            f"## {model['source']}, {model['precision']}, {model['images']} guided images, {model['steps']} DDIM steps",
            "",
            "| backend | error, full | error, reuse | full step | reuse step | interval 1 | 3 | 5 | ideal at 3 | at 5 "
            "| copies and waits between steps | launches | memory |",
            "| --- | --: | --: | --: | --: | --: | --: | --: | --: | --: | --: | --: | --: |",
        ]
        ideal = {interval: Schedule.static(model["steps"], interval).ideal_speedup for interval in (3, 5)}
        for name, row in model["backends"].items():
            if not row["works"]:
                lines.append(f"| {name} | {row['why']} |" + " |" * 11)
                continue
            counts = row["transfers"] or {}
            launches = " + ".join(str(counts[kind]) for kind in LAUNCHES if kind in counts)
            transfers = str(sum(count for kind, count in counts.items() if kind not in LAUNCHES)) if counts else ""
            memory = row["device_memory_bytes"]
            lines.append(
                f"| {name} | {row['error'][FULL]:.1e} | {row['error'][REUSE]:.1e} | {row['full_step_ms']:.3f} ms "
                f"| {row['reuse_step_ms']:.3f} ms | {row['seconds']['1']:.3f} s | {row['speedup']['3']:.2f}x "
                f"| {row['speedup']['5']:.2f}x | {ideal[3]:.2f}x | {ideal[5]:.2f}x | {transfers} | {launches} "
                f"| {'' if memory is None else f'{memory / 2**20:.0f} MiB'} |"
            )
        lines.append("")
    return "\n".join(lines)


@click.command()
@click.option("--device", default="cuda:0", show_default=True, help="cuda:N; cpu tries the script itself.")
@click.option("--source", "sources", multiple=True, default=["digits", "random:DiT-XL/2"], show_default=True)
@click.option("--precision", default="fp16", show_default=True, help="Of all but the digits, which stay in fp32.")
@click.option("--images", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--steps", type=click.IntRange(min=5), default=50, show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), default=10, show_default=True)
@click.option("--tests/--no-tests", "with_tests", default=True, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
def main(
    device: str,
    sources: tuple[str, ...],
    precision: str,
    images: int,
    steps: int,
    repeats: int,
    with_tests: bool,
    out: Path,
) -> None:
    """Check every backend on this GPU and write down what was found."""
    where = torch.device(device)
    if where.type == "cuda" and not torch.cuda.is_available():
        raise click.ClickException("there is no GPU here that torch can use; see 'fora-trt doctor'")
    result: dict[str, Any] = {"measured_on": circumstances()}
    if with_tests:
        click.echo("running the tests that need a GPU ...", err=True)
        result["tests"] = tests()
    result["models"] = []
    with tempfile.TemporaryDirectory() as folder:
        for source in sources:
            chosen = "fp32" if source == "digits" else precision
            name = re.sub(r"\W", "-", source)
            bundle = bundle_from_model(model_from_source(source, chosen), Path(folder) / name)
            rows = check(bundle, where, images, steps, repeats)
            about = {"source": source, "precision": chosen, "images": images, "steps": steps, "repeats": repeats}
            result["models"].append({**about, "backends": rows})
    gpu = re.sub(r"\W+", "-", (result["measured_on"]["gpu"] if where.type == "cuda" else None) or "cpu").lower()
    out.mkdir(parents=True, exist_ok=True)
    stem = out / f"gpu-check_{gpu}_{result['measured_on']['date']}"
    stem.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    stem.with_suffix(".md").write_text(as_markdown(result))
    click.echo(as_markdown(result))
    click.echo(f"wrote {stem}.json and .md")


if __name__ == "__main__":
    main()
