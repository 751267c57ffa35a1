"""What a row of the GPU check does, in a process of its own: a CUDA error is sticky, and would spoil the other rows.

    python -m benchmarks.gpu_work ROW --device cuda:0 --work FOLDER --found FILE

It writes what it found to a file, also if it fails on the way, and knows nothing of the other rows.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
from filelock import FileLock
from torch import Tensor

from benchmarks.gpu_rows import WINDOW_OF_ERRORS, Exported, Row, rows_of
from benchmarks.gpu_watch import end_with_parent
from fora_trt.bundle import Bundle, GraphError
from fora_trt.engines.plan_store import PlanSource
from fora_trt.errors import ForaError, first_line
from fora_trt.evaluate.circumstances import circumstances
from fora_trt.evaluate.eager_fora import EagerFora
from fora_trt.evaluate.entrants import steps_of
from fora_trt.evaluate.peak_memory import PeakMemory, release
from fora_trt.evaluate.peaks import measure_peaks
from fora_trt.evaluate.verify import GUIDANCE_SCALE, graph_errors
from fora_trt.export.write import bundle_from_model
from fora_trt.models.options import SourceOptions
from fora_trt.models.sources import model_from_source
from fora_trt.runtime.conditioning import Conditioning, example_conditioning
from fora_trt.runtime.denoiser import Denoiser
from fora_trt.runtime.sampling import Sampler, Steps, Trajectory, stretches_of
from fora_trt.runtime.schedulers import scheduler_from_config
from fora_trt.runtime.updates import update_from_scheduler
from fora_trt.schedule import Schedule

ROOT = Path(__file__).parents[1]
RUNS = 3
"""Of a trajectory before any is timed: as it is, captured, replayed."""

LAUNCHES = ("graph launches", "kernel launches")
TRANSFERS = {"copies": ("host to device", "device to host"), "waits": ("synchronizations",)}


@dataclass
class Found:
    """Numbers by name, which are judged, and what else is worth knowing."""

    values: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    failure: str = ""


@dataclass(frozen=True)
class Place:
    """Where a row runs and keeps what outlives it."""

    device: torch.device
    work: Path

    def plans(self, images: int) -> PlanSource:
        """Of the TensorRT backends, for guided images."""
        return PlanSource(self.work / "engines", batch=2 * images)


# -- bundles and what runs them --------------------------------------------------------------------------------------


def bundle_of(exported: Exported, work: Path) -> Bundle:
    """The bundle, exported unless it is there from before. Another process may want the same one."""
    folder = work / "bundles" / _digest_of_exporter() / exported.folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if folder.exists():
            return Bundle.open(folder)
        size = None if exported.image_size is None else (exported.image_size, exported.image_size)
        model = model_from_source(SourceOptions(source=exported.source, image_size=size), exported.precision)
        return bundle_from_model(
            model, folder, optimization=exported.optimization, report=lambda stage: print(stage, flush=True)
        )


def _digest_of_exporter() -> str:
    """Of the sources that a bundle depends on, so that another exporter does not take over old bundles."""
    package = ROOT / "fora_trt"
    return digest_of([*package.glob("models/**/*.py"), *package.glob("export/**/*.py"), package / "bundle.py"])


def digest_of(files: Sequence[Path]) -> str:
    """A few digits that change with any of the files."""
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{file.relative_to(ROOT)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def digest_of_sources() -> str:
    """Digest of the package and of this check: it tells code apart where there is no git, or uncommitted changes."""
    return digest_of([*(ROOT / "fora_trt").rglob("*.py"), *(ROOT / "benchmarks").glob("gpu_*.py")])


Start = Callable[[Bundle, str, Place, int, Sequence[int]], dict[int, Steps]]


def steps_by_interval(
    bundle: Bundle, entrant: str, place: Place, images: int, intervals: Sequence[int]
) -> dict[int, Steps]:
    """What takes the steps, for each cache interval its own: windows of another length void what was captured.

    Engines are started once, and bound for each interval.
    """
    steps = steps_of(bundle, entrant, place.device, place.plans(images))
    return {interval: steps.twin() if isinstance(steps, Denoiser) else steps for interval in intervals}


@dataclass(frozen=True)
class Course:
    """Guided trajectories of one bundle at one cache interval, by one denoiser."""

    sampler: Sampler
    schedule: Schedule
    given: Conditioning
    scale: float

    @classmethod
    def of(cls, bundle: Bundle, steps: Steps, row: Row, interval: int) -> Course:
        """With the DDIM scheduler, and the images and steps of the row."""
        given = example_conditioning(bundle.manifest, row.images)
        scheduler = scheduler_from_config(bundle.scheduler_config, "ddim", bundle.manifest.latents.learned_sigma)
        sampler = Sampler(steps, update_from_scheduler(scheduler, row.steps))
        scale = 1.0 if given.unconditional is None else GUIDANCE_SCALE
        return cls(sampler, Schedule.static(row.steps, interval), given, scale)

    def run(self) -> Trajectory:
        """Take a trajectory."""
        return self.sampler(self.schedule, self.given, range(self.given.images), self.scale)

    def transfers(self) -> dict[str, int]:
        """Of a trajectory that was captured before."""
        return transfers_between_steps(self.sampler, self.schedule, self.given, self.scale)


def transfers_between_steps(sampler: Sampler, schedule: Schedule, given: Conditioning, scale: float) -> dict[str, int]:
    """Copies, waits and launches between the first and the last step of a trajectory that was captured before."""
    with torch.inference_mode():
        steps = sampler.begin(schedule, given, range(given.images), scale, [scale > 1] * schedule.steps)
        torch.cuda.synchronize(sampler.denoiser.device)

        def launch() -> None:
            for first, length in stretches_of(steps).items():
                sampler.launch(first, steps[first : first + length])

        return transfers_of(launch)


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


# -- what rows do ----------------------------------------------------------------------------------------------------


def environment(row: Row, place: Place, found: Found) -> None:
    """Versions, hardware, and what the device does at best."""
    found.details["measured_on"] = {**circumstances(), "sources": digest_of_sources()}
    found.details["gpu"] = _told_by_driver()
    precision = "fp32" if place.device.type == "cpu" else "fp16"
    peaks = measure_peaks(place.device, precision)
    found.values |= {"TFLOP/s": peaks.flops / 1e12, "TB/s": peaks.bytes / 1e12}


def _told_by_driver() -> str:
    """Name, driver, memory and clocks of the GPUs; empty without one."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    asked = "name,driver_version,memory.total,clocks.max.sm,power.limit"
    done = subprocess.run([program, f"--query-gpu={asked}", "--format=csv"], capture_output=True, text=True, timeout=60)
    return done.stdout.strip()


def export(row: Row, place: Place, found: Found) -> None:
    """Export a bundle for later rows."""
    _bundle_of_row(row, place, found)


def parity(row: Row, place: Place, found: Found, start: Start = steps_by_interval) -> None:
    """The latents of the first three runs of a trajectory, and both graphs, against eager FORA in fp32."""
    bundle = _bundle_of_row(row, place, found)
    reference = EagerFora(bundle, place.device)
    for interval, steps in start(bundle, row.entrant, place, row.images, row.intervals).items():
        course = Course.of(bundle, steps, row, interval)
        expected = Course.of(bundle, reference, row, interval).run().latents
        runs = [course.run().latents for _ in range(RUNS)]
        for k, latents in enumerate(runs, start=1):
            found.values[f"latents/{interval}/run {k}"] = GraphError.between(latents, expected).relative
        found.values |= replay_differences(interval, runs)
        _note_graph_errors(steps, reference, row.images, found)


def _bundle_of_row(row: Row, place: Place, found: Found) -> Bundle:
    """The exporter falls back to a lower level where a higher one is wrong, which this check must not hide."""
    if row.bundle is None:
        raise ValueError(f"the row {row.name} has no bundle")
    bundle = bundle_of(row.bundle, place.work)
    if bundle.manifest.optimization != row.bundle.optimization:
        raise ForaError(f"{row.bundle.folder} was exported at the level {bundle.manifest.optimization} instead")
    return bundle


def _note_graph_errors(steps: Steps, reference: EagerFora, images: int, found: Found) -> None:
    if isinstance(steps, Denoiser):
        errors = graph_errors(steps, reference, 2 * images)
        found.values |= {f"error/{graph}": error.relative for graph, error in errors}


def replay_differences(interval: int, runs: Sequence[Tensor]) -> dict[str, float]:
    """By how much each later run differs from the first; 0 is bit for bit."""
    return {
        f"replay/{interval}/run {k}": float("inf") if not run.isfinite().all() else (run - runs[0]).abs().max().item()
        for k, run in enumerate(runs[1:], start=2)
    }


def tests(row: Row, place: Place, found: Found) -> None:
    """The project's own tests that need a GPU."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        "tests/test_gpu.py",
        "-rfEs",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, stdin=subprocess.DEVNULL)
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or [""]
    print(done.stdout, done.stderr, sep="\n")
    counts = {what: int(number) for number, what in re.findall(r"(\d+) (passed|failed|skipped|error)", lines[-1])}
    found.values |= {"passed": counts.get("passed", 0), "failed": counts.get("failed", 0) + counts.get("error", 0)}
    found.details |= {"summary": lines[-1], "output": lines[-60:]}
    if done.returncode not in (0, 1):
        raise ForaError(f"pytest ended with {done.returncode}: {lines[-1]}")


def time(row: Row, place: Place, found: Found, start: Start = steps_by_interval) -> None:
    """Memory, three runs, timed repeats, copies and errors of an entrant at several cache intervals."""
    bundle = _bundle_of_row(row, place, found)
    widest = row.intervals[-1]
    with PeakMemory(place.device) as memory:  # nothing is timed in here
        steps = start(bundle, row.entrant, place, row.images, row.intervals)
        courses = {interval: Course.of(bundle, one, row, interval) for interval, one in steps.items()}
        runs = {widest: [courses[widest].run().latents for _ in range(RUNS)]}
    found.values["peak MiB"] = memory.bytes / 2**20
    for interval in row.intervals[:-1]:
        runs[interval] = [courses[interval].run().latents for _ in range(RUNS)]
    timed: dict[int, list[Trajectory]] = {interval: [] for interval in row.intervals}
    for _ in range(row.repeats):
        for interval, course in courses.items():
            timed[interval].append(course.run())
    _note_times(row, timed, found)
    for interval in row.intervals:
        last = timed[interval][-1].latents
        found.values |= replay_differences(interval, [*runs[interval], last])
    if place.device.type == "cuda":
        _note_transfers(courses, found)
    release(place.device)
    reference = EagerFora(bundle, place.device)
    for interval in row.intervals:
        expected = Course.of(bundle, reference, row, interval).run().latents
        worst = max(GraphError.between(run, expected).relative for run in runs[interval])
        found.values[f"latents/{interval}"] = worst
    if WINDOW_OF_ERRORS in steps:
        _note_graph_errors(steps[WINDOW_OF_ERRORS], reference, row.images, found)


def _note_times(row: Row, timed: Mapping[int, Sequence[Trajectory]], found: Found) -> None:
    medians = {interval: statistics.median(one.seconds for one in done) for interval, done in timed.items()}
    for interval, done in timed.items():
        times = [one.seconds for one in done]
        found.values[f"seconds/{interval}"] = medians[interval]
        found.details[f"spread/{interval}"] = [min(times), max(times)]
        for kind in ("full", "reuse"):
            steps = [seconds for one in done for seconds in getattr(one, f"{kind}_seconds")]
            if steps:
                found.values[f"{kind} ms/{interval}"] = statistics.median(steps) * 1e3
        if interval > 1:
            found.values[f"ideal/{interval}"] = Schedule.static(row.steps, interval).ideal_speedup
            found.values[f"speed-up/{interval}"] = medians[1] / medians[interval]


def _note_transfers(courses: Mapping[int, Course], found: Found) -> None:
    for interval, course in courses.items():
        counts = course.transfers()
        for name, kinds in TRANSFERS.items():
            found.values[f"{name}/{interval}"] = sum(counts[kind] for kind in kinds)
        found.values |= {f"{kind}/{interval}": counts[kind] for kind in LAUNCHES}


WORK: dict[str, Callable[[Row, Place, Found], None]] = {
    "environment": environment,
    "export": export,
    "parity": parity,
    "tests": tests,
    "time": time,
}


def found_of(row: Row, place: Place, work: Mapping[str, Callable[[Row, Place, Found], None]] = WORK) -> Found:
    """Do the work of a row; what it had found before an error is kept, with the error."""
    found = Found()
    try:
        work[row.kind](row, place, found)
    except ForaError as error:
        found.failure = str(error)
    except Exception as error:  # what goes wrong on this GPU is what the check is to find out
        traceback.print_exc()
        found.failure = f"{type(error).__name__}: {first_line(error)}"
    return found


# -- the process -----------------------------------------------------------------------------------------------------


def _empty(folder: Path) -> Path:
    """A folder for what a row compiles: one that was ended while it compiled must not spoil another, nor its retry."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


@click.command()
@click.argument("name")
@click.option("--device", required=True)
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--found", "target", type=click.Path(path_type=Path), required=True)
@click.option("--watched", type=int, help="A pipe that the parent closes when it ends.")
def main(name: str, device: str, work: Path, target: Path, watched: int | None) -> None:
    """Do the work of the row NAME."""
    if watched is not None:
        end_with_parent(watched)
    where = torch.device(device)
    row = next(row for row in rows_of(where.type) if row.name == name)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(_empty(work / "inductor" / target.stem))
    found = found_of(row, Place(where, work))
    unfinished = target.with_suffix(".part")
    unfinished.write_text(json.dumps(asdict(found)))
    unfinished.replace(target)


if __name__ == "__main__":
    main()
