"""Results of `bench` and `quality`: the content of `report.json`, from which tables and plots are made."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from fora_trt.bundle import Bundle
from fora_trt.files import MANIFEST, Record, sha256_of
from fora_trt.metrics import SOLUTION_PSNR
from fora_trt.sampling.conditioning import way_to_condition
from fora_trt.schedule import NONE

REPORT_VERSION = 3
_EXAMPLES = {"--class-labels": "--class-labels 0", "--prompt": '--prompt "..."'}

EAGER, COMPILED = "PyTorch eager", "PyTorch compiled"
"""Names of the PyTorch references in a benchmark. They run the original module, eager or under `torch.compile`; FORA is
applied by hooks (eager) or by splitting the module at its cache sites (compiled). The backends `torch` and
`torch-compile` are not references: they run the graphs of the bundle."""

NO_CACHE = "no cache"
"""Label of the setting without caching, which all others are compared with."""


FORA, FORECAST, CALIBRATED, PER_LAYER = "FORA", "forecast", "calibrated", "per layer"
"""What the steps of a setting that are not full do; without caching it is `NO_CACHE`."""


class About(Record):
    """The bundle of a report. `sha256` is the digest of its manifest, which has the digests of all its files.

    `folder` is the bundle's path, `scheduler` the class of its own scheduler, `asks_for` an example of the conditioning
    option that `fora-trt run` needs.
    """

    name: str
    folder: str
    source: str
    architecture: str
    precision: str
    scheduler: str
    asks_for: str | None
    sha256: str

    @classmethod
    def of(cls, bundle: Bundle) -> About:
        """The record of a bundle."""
        manifest = bundle.manifest
        asked = re.split(", | with ", way_to_condition(manifest) or "")[0]
        return cls(
            name=manifest.name,
            folder=str(bundle.folder),
            source=manifest.model.options.source,
            architecture=manifest.model.architecture,
            precision=manifest.precision,
            scheduler=str(bundle.scheduler_config.get("_class_name", "")),
            asks_for=_EXAMPLES.get(asked, asked) or None,
            sha256=sha256_of(bundle.folder / MANIFEST),
        )


class Setting(Record):
    """The sampling setting of a row. In an equal-time control, `control_of` is the schedule that it is the control of.

    `scheduler` is a class with the settings that replace the model's: `DPMSolverMultistepScheduler:order=3`. `schedule`
    is a text form or a file name. `nfe` is the number of model evaluations, which is larger than `steps` for some
    schedulers (Heun, PNDM). `method` is what the reuse steps do; empty in results of older versions.
    """

    scheduler: str
    steps: int
    nfe: int
    full_steps: int
    partial_steps: int = 0
    schedule: str
    method: str = ""
    control_of: str | None = None

    @property
    def caches(self) -> bool:
        """Whether the schedule is not `none`."""
        return self.schedule != NONE

    @property
    def computed(self) -> str:
        """How many steps are full or partial, in words."""
        partial = f" and {self.partial_steps} partial" if self.partial_steps else ""
        return f"{self.full_steps}{partial} of {self.nfe}"

    @property
    def label(self) -> str:
        """Name in tables and plots."""
        if self.control_of is not None:
            return f"{self.steps} steps, no cache"
        return Path(self.schedule).name if self.caches else NO_CACHE


class PartialSteps(Record):
    """The steps of one partial graph in a schedule: their number, and the median time of one, in seconds.

    `arithmetic` is that of a step, divided by that of a full step.
    """

    graph: str
    steps: int
    arithmetic: float
    seconds: float


class BenchRow(Record):
    """One setting on one backend: medians over the repeats, in seconds.

    `speedup` is relative to the same backend without caching at the benchmark's number of steps, also for a control
    with its fewer steps. `ideal_speedup` assumes that reuse steps cost nothing, and a partial step what
    its arithmetic is. `overhead` is the fraction of
    the time outside the engines; None for eager PyTorch on a GPU. `roofline_seconds` is the time that the arithmetic
    and memory traffic of the graphs take at the peak rates of this machine. `peak_memory_bytes` is measured in a
    separate process that runs the first steps without caching, with `fora:3` or with a forecast: memory of the process
    on the CPU, memory of the device on a GPU.
    """

    backend: str
    images: int
    setting: Setting
    seconds: float
    fastest: float
    slowest: float
    full_step_seconds: float
    reuse_step_seconds: float | None
    partial_steps: tuple[PartialSteps, ...] = ()
    overhead: float | None
    speedup: float
    ideal_speedup: float
    roofline_seconds: float
    peak_memory_bytes: int | None

    @property
    def of_ideal(self) -> float:
        """The speed-up as a fraction of the ideal speed-up."""
        return self.speedup / self.ideal_speedup


class Absent(Record):
    """A backend that could not run on this machine, and why."""

    backend: str
    why: str


class PeakRates(Record):
    """Measured peak rates of this machine: FLOP/s of large matrix products, bytes per second of large copies."""

    flops: float
    bytes: float


class Bench(Record):
    """Latency. `repeats` is the number of timed runs of every row; an interruption makes it smaller than requested.

    `notes` lists measurements that failed, and why.
    """

    device: str
    steps: int
    guidance_scale: float
    repeats: int
    interrupted: bool
    peaks: PeakRates
    rows: tuple[BenchRow, ...]
    absent: tuple[Absent, ...]
    notes: tuple[str, ...] = ()

    def over_eager(self, row: BenchRow) -> float | None:
        """Speed-up of a row over eager PyTorch without caching; None if that could not run."""
        plain = (
            one.seconds
            for one in self.rows
            if (one.backend, one.images, one.setting.label) == (EAGER, row.images, NO_CACHE)
        )
        seconds = next(plain, None)
        return None if seconds is None else seconds / row.seconds


class QualityRow(Record):
    """One setting compared with no caching, from the same noise.

    `metrics` has the measured metrics by their names in `fora_trt.metrics.METRICS`. `latent_errors` has the relative
    error of the latents after each step: norm of the difference to the same number of steps without caching, divided
    by the norm of the latents without caching.
    """

    setting: Setting
    seconds_per_image: float
    metrics: dict[str, float | None]
    latent_errors: tuple[float, ...]

    @property
    def psnr(self) -> float | None:
        """PSNR in dB to no caching; None if all images are identical."""
        return self.metrics["psnr"]

    @property
    def likeness(self) -> float:
        """PSNR in dB to no caching; infinite for identical images."""
        return _or_infinite(self.psnr)

    @property
    def accuracy(self) -> float:
        """PSNR in dB to the fine solution if it was measured, else `likeness`."""
        return _or_infinite(self.metrics[SOLUTION_PSNR]) if SOLUTION_PSNR in self.metrics else self.likeness


def _or_infinite(psnr: float | None) -> float:
    return math.inf if psnr is None else psnr


class Quality(Record):
    """Image quality. The first row is the setting without caching, which all others are compared with.

    `features` names the extractor of image features, `notes` lists what was not measured and why. `grid` is the file
    name of the image grid in the report folder. `solution` describes the fine solution (`250 steps of ddim`) that all
    settings are compared with too; None if there was none.
    """

    backend: str
    device: str
    images: int
    guidance_scale: float
    solution: str | None = None
    features: str | None
    notes: tuple[str, ...]
    rows: tuple[QualityRow, ...]
    grid: str

    @property
    def groups(self) -> list[tuple[QualityRow, ...]]:
        """The rows of each scheduler and number of steps: no caching, the cached settings, and their controls."""
        starts = [
            k
            for k, row in enumerate(self.rows)
            if k == 0 or not (row.setting.caches or row.setting.control_of is not None)
        ]
        return [self.rows[start:end] for start, end in zip(starts, [*starts[1:], len(self.rows)], strict=True)]


class Report(Record):
    """A whole report. `measured_on` has hardware, versions and commit for each part.

    `min_psnr` is the smallest PSNR against no caching, in dB, that a recommended setting must reach; `recommendation`
    is the resulting text.
    """

    format_version: int
    about: About
    measured_on: dict[str, dict[str, Any]]
    min_psnr: float = 30.0
    recommendation: str = ""
    bench: Bench | None = None
    quality: Quality | None = None
