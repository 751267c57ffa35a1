"""Runs one row of the GPU check in a separate process: after a CUDA error, all CUDA calls of the process fail.

    python -m benchmarks.gpu_work ROW --device cuda:0 --work FOLDER --found FILE

It writes its results to a file. If the row fails, the file has the results so far and the error.
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

from benchmarks.gpu_rows import SCHEDULE_OF_ERRORS, Exported, Row, rows_of
from benchmarks.gpu_watch import end_with_parent
from fora_trt.bundle import Bundle, GraphError
from fora_trt.engines.options import EngineOptions
from fora_trt.errors import ForaError, first_line
from fora_trt.evaluate.eager_fora import EagerFora
from fora_trt.evaluate.export_check import GraphCheck
from fora_trt.evaluate.peak_memory import PeakMemory, release
from fora_trt.evaluate.peaks import measure_peaks
from fora_trt.evaluate.targets import predictor_of
from fora_trt.evaluate.verify import GUIDANCE_SCALE, graph_errors
from fora_trt.export.write import bundle_from_model
from fora_trt.models.options import SourceOptions
from fora_trt.models.sources import model_from_source
from fora_trt.pipeline import Pipeline
from fora_trt.report.environment import environment as measured_on
from fora_trt.runtime.denoiser import Denoiser
from fora_trt.runtime.interface import Predictor
from fora_trt.sampling.conditioning import Conditioning, example_conditioning
from fora_trt.sampling.guidance import Guidance
from fora_trt.sampling.loop import Sampler, Trajectory, stretches_of
from fora_trt.schedule import NONE, Schedule

ROOT = Path(__file__).parents[1]
RUNS = 3
"""Untimed runs of a trajectory: the first runs eagerly, the second captures CUDA graphs, the third replays them."""

LAUNCHES = ("graph launches", "kernel launches")
TRANSFERS = {"copies": ("host to device", "device to host"), "waits": ("synchronizations",)}


@dataclass
class Found:
    """Results of a row: `values` are compared with expected ranges, `details` are only recorded."""

    values: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    failure: str = ""


@dataclass(frozen=True)
class Place:
    """The device of a row, and its folder for files that later rows use."""

    device: torch.device
    work: Path

    def plans(self, images: int) -> EngineOptions:
        """Options of the TensorRT backends for this number of guided images."""
        return EngineOptions(self.work / "engines", batch=2 * images)


# -- bundles and what runs them --------------------------------------------------------------------------------------


def bundle_of(exported: Exported, work: Path) -> Bundle:
    """Open the bundle, or export it if it does not exist; a lock keeps other processes from exporting it too."""
    folder = folder_of(exported, work)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if folder.exists():
            return Bundle.open(folder)
        size = None if exported.image_size is None else (exported.image_size, exported.image_size)
        model = model_from_source(SourceOptions(source=exported.source, image_size=size), exported.precision)
        return bundle_from_model(
            model,
            folder,
            check=GraphCheck(),
            optimization=exported.optimization,
            report=lambda stage: print(stage, flush=True),
        )


def folder_of(exported: Exported, work: Path) -> Path:
    """The folder of the bundle: a new one after every change of the exporter."""
    return work / "bundles" / _digest_of_exporter() / exported.folder


def _digest_of_exporter() -> str:
    """Digest of the sources that a bundle depends on, so that bundles of an older exporter are not reused."""
    package = ROOT / "fora_trt"
    own = [package / "bundle.py", package / "contract.py"]
    return digest_of([*package.glob("models/**/*.py"), *package.glob("export/**/*.py"), *own])


def digest_of(files: Sequence[Path]) -> str:
    """First 12 hexadecimal digits of a SHA-256 over names and contents of the files."""
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{file.relative_to(ROOT)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def digest_of_sources() -> str:
    """Digest of the package and this check; it identifies the code also without git or with uncommitted changes."""
    return digest_of([*(ROOT / "fora_trt").rglob("*.py"), *(ROOT / "benchmarks").glob("gpu_*.py")])


@dataclass(frozen=True)
class Course:
    """Guided trajectories of one bundle with one schedule, by one predictor."""

    sampler: Sampler
    given: Conditioning
    guidance: Guidance

    @classmethod
    def of(cls, bundle: Bundle, predictor: Predictor, row: Row, schedule: str) -> Course:
        """The trajectories of a row, with the DDIM scheduler."""
        given = example_conditioning(bundle.manifest, row.images)
        pipeline = Pipeline(bundle, predictor=predictor, scheduler="ddim", steps=row.steps)
        scale = 1.0 if given.unconditional is None else GUIDANCE_SCALE
        return cls(pipeline.sampler(pipeline.sampling(schedule=schedule)), given, Guidance(scale))

    def run(self) -> Trajectory:
        """Run one trajectory."""
        return self.sampler(self.given, range(self.given.images), self.guidance)

    def transfers(self) -> dict[str, int]:
        """Copies, waits and launches of a trajectory that has been captured before."""
        return transfers_between_steps(self.sampler, self.given, self.guidance)


def transfers_between_steps(sampler: Sampler, given: Conditioning, guidance: Guidance) -> dict[str, int]:
    """Copies, waits and launches between the first and the last step of a trajectory that has been captured before."""
    with torch.inference_mode():
        begun = sampler.begin(given, range(given.images), guidance)
        torch.cuda.synchronize(sampler.denoiser.device)

        def launch() -> None:
            for first, count in stretches_of(begun.steps).items():
                begun.launch(first, count)

        return transfers_of(launch)


def transfers_of(run: Callable[[], None]) -> dict[str, int]:
    """Number of host-device copies, synchronizations and launches of `run`, counted by torch's profiler."""
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
    # the profiler itself synchronizes once, when it stops
    counts["synchronizations"] = max(0, counts["synchronizations"] - 1)
    return dict(counts)


# -- what rows do ----------------------------------------------------------------------------------------------------


def environment(row: Row, place: Place, found: Found) -> None:
    """Record versions, hardware and the peak rates of the device."""
    found.details["measured_on"] = {**measured_on(), "sources": digest_of_sources()}
    found.details["gpu"] = _gpus_from_driver()
    precision = "fp32" if place.device.type == "cpu" else "fp16"
    peaks = measure_peaks(place.device, precision)
    found.values |= {"TFLOP/s": peaks.flops / 1e12, "TB/s": peaks.bytes / 1e12}


def _gpus_from_driver() -> str:
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


def parity(row: Row, place: Place, found: Found) -> None:
    """Compare the latents of the first three runs of a trajectory, and both graphs, with eager FORA in fp32."""
    bundle = _bundle_of_row(row, place, found)
    reference = EagerFora(bundle, place.device)
    predictor = predictor_of(bundle, row.target, place.device, place.plans(row.images))
    for text in row.schedules:
        course = Course.of(bundle, predictor, row, text)
        expected = Course.of(bundle, reference, row, text).run().latents
        runs = [course.run().latents for _ in range(RUNS)]
        for k, latents in enumerate(runs, start=1):
            found.values[f"latents/{text}/run {k}"] = GraphError.between(latents, expected).relative
        found.values |= replay_differences(text, runs)
        _note_graph_errors(predictor, reference, row.images, found)


def _bundle_of_row(row: Row, place: Place, found: Found) -> Bundle:
    """The bundle of a row. Raises `ForaError` if the exporter fell back to a lower optimization level."""
    if row.bundle is None:
        raise ValueError(f"the row {row.name} has no bundle")
    bundle = bundle_of(row.bundle, place.work)
    if bundle.manifest.optimization != row.bundle.optimization:
        raise ForaError(
            f"{row.bundle.folder} was exported with optimization {bundle.manifest.optimization}, expected "
            f"{row.bundle.optimization}; the exporter fell back to a lower level"
        )
    return bundle


def _note_graph_errors(predictor: Predictor, reference: EagerFora, images: int, found: Found) -> None:
    if isinstance(predictor, Denoiser):
        errors = graph_errors(predictor, reference, 2 * images)
        found.values |= {f"error/{graph}": error.relative for graph, error in errors}


def replay_differences(schedule: str, runs: Sequence[Tensor]) -> dict[str, float]:
    """Largest absolute difference of each later run to the first; 0 means bit-identical."""
    return {
        f"replay/{schedule}/run {k}": float("inf") if not run.isfinite().all() else (run - runs[0]).abs().max().item()
        for k, run in enumerate(runs[1:], start=2)
    }


def tests(row: Row, place: Place, found: Found) -> None:
    """Run the project's tests that need a GPU."""
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


def time(row: Row, place: Place, found: Found) -> None:
    """Measure peak memory, times, replays, copies and errors of a target with several schedules.

    The last schedule runs twice: alone to measure its memory, and again in the order of the schedules, because
    preparing another one may move the memory that captured steps use.
    """
    bundle = _bundle_of_row(row, place, found)
    last = row.schedules[-1]
    with PeakMemory(place.device) as memory:  # its sampling thread would disturb timings
        predictor = predictor_of(bundle, row.target, place.device, place.plans(row.images))
        courses = {text: Course.of(bundle, predictor, row, text) for text in row.schedules}
        alone = [courses[last].run().latents for _ in range(RUNS)]
    found.values["peak MiB"] = memory.bytes / 2**20
    runs = {text: [course.run().latents for _ in range(RUNS)] for text, course in courses.items()}
    runs[last] = [*alone, *runs[last]]
    timed: dict[str, list[Trajectory]] = {text: [] for text in row.schedules}
    for _ in range(row.repeats):
        for text, course in courses.items():
            timed[text].append(course.run())
    _note_times(row, timed, found)
    for text in row.schedules:
        found.values |= replay_differences(text, [*runs[text], timed[text][-1].latents])
    if place.device.type == "cuda":
        _note_transfers(courses, found)
    release(place.device)
    reference = EagerFora(bundle, place.device)
    for text in row.schedules:
        expected = Course.of(bundle, reference, row, text).run().latents
        worst = max(GraphError.between(run, expected).relative for run in runs[text])
        found.values[f"latents/{text}"] = worst
    if SCHEDULE_OF_ERRORS in row.schedules:
        _note_graph_errors(predictor, reference, row.images, found)


def _note_times(row: Row, timed: Mapping[str, Sequence[Trajectory]], found: Found) -> None:
    medians = {text: statistics.median(one.seconds for one in done) for text, done in timed.items()}
    for text, done in timed.items():
        times = [one.seconds for one in done]
        found.values[f"seconds/{text}"] = medians[text]
        found.details[f"spread/{text}"] = [min(times), max(times)]
        for kind in ("full", "reuse"):
            steps = [seconds for one in done for seconds in getattr(one, f"{kind}_seconds")]
            if steps:
                found.values[f"{kind} ms/{text}"] = statistics.median(steps) * 1e3
        if text != NONE:
            found.values[f"ideal/{text}"] = Schedule.from_text(text, row.steps).ideal_speedup()
            found.values[f"speed-up/{text}"] = medians[NONE] / medians[text]


def _note_transfers(courses: Mapping[str, Course], found: Found) -> None:
    for text, course in courses.items():
        counts = course.transfers()
        for name, kinds in TRANSFERS.items():
            found.values[f"{name}/{text}"] = sum(counts[kind] for kind in kinds)
        found.values |= {f"{kind}/{text}": counts[kind] for kind in LAUNCHES}


WORK: dict[str, Callable[[Row, Place, Found], None]] = {
    "environment": environment,
    "export": export,
    "parity": parity,
    "tests": tests,
    "time": time,
}


def found_of(row: Row, place: Place, work: Mapping[str, Callable[[Row, Place, Found], None]] = WORK) -> Found:
    """Do the work of a row; if it raises, return the results so far with the error."""
    found = Found()
    try:
        work[row.kind](row, place, found)
    except ForaError as error:
        found.failure = str(error)
    except Exception as error:  # the check reports any failure on this GPU
        traceback.print_exc()
        found.failure = f"{type(error).__name__}: {first_line(error)}"
    return found


# -- the process -----------------------------------------------------------------------------------------------------


def _empty(folder: Path) -> Path:
    """An empty compiler cache for a row, so that incomplete files of a killed row affect neither others nor a retry."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


@click.command()
@click.argument("name")
@click.option("--device", required=True)
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--found", "target", type=click.Path(path_type=Path), required=True)
@click.option("--watched", type=int, help="File descriptor of a pipe that closes when the parent ends.")
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
