"""What `bench` and `quality` found: the content of `report.json`, and of the tables and plots that are made from it."""

from __future__ import annotations

import re
from typing import Any

from fora_trt.bundle import Bundle
from fora_trt.folders import MANIFEST, Record, sha256_of
from fora_trt.runtime.conditioning import way_to_condition

REPORT_VERSION = 1
_EXAMPLES = {"--class-labels": "--class-labels 0", "--prompt": '--prompt "..."'}

EAGER, COMPILED = "PyTorch eager", "PyTorch compiled"
"""In a benchmark: the module itself, as it is or under `torch.compile`, and with FORA by hooks or a split at its cache
sites. The backends `torch` and `torch-compile` run the graphs of the bundle instead."""

NO_CACHE = "no cache"
"""Label of the setting that all others are compared with."""


class About(Record):
    """Which bundle it is; `sha256` digests its manifest, and so all of it.

    `folder` is where it was, `scheduler` its own, `asks_for` the option that `run` must be given to know what to make.
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
        """The bundle of this folder."""
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
    """How trajectories are taken. `control_of` is the cache interval whose time is spent here on fewer steps.

    `calls` is how often the scheduler calls the model, where that is more often than it takes steps (Heun, PNDM).
    """

    scheduler: str
    steps: int
    full_steps: int
    cache_interval: int
    control_of: int | None = None
    calls: int | None = None

    @property
    def label(self) -> str:
        """What it is called in tables and plots."""
        if self.control_of is not None:
            return f"{self.steps} steps, no cache"
        return NO_CACHE if self.cache_interval == 1 else f"interval {self.cache_interval}"


class BenchRow(Record):
    """One setting on one backend: medians over the repeats, in seconds.

    `speedup` is over the same backend without caching at all the steps of the benchmark, and `ideal_speedup` what it
    would be if a reuse step cost nothing; of a control, with its fewer steps, too. `outside` is the share of the time
    that is spent outside of the engines, None for eager PyTorch on a GPU; `floor_seconds` what the arithmetic and the
    bytes of the graphs would take at the peak rates of this machine. `peak_memory_bytes` is the peak of a process
    that takes four steps at cache interval 1 or 3: of the process on the CPU, of the device's memory on a GPU.
    """

    backend: str
    images: int
    setting: Setting
    seconds: float
    fastest: float
    slowest: float
    full_step_seconds: float
    reuse_step_seconds: float | None
    outside: float | None
    speedup: float
    ideal_speedup: float
    floor_seconds: float
    peak_memory_bytes: int | None

    @property
    def of_ideal(self) -> float:
        """Which part of the ideal speed-up was reached."""
        return self.speedup / self.ideal_speedup


class Absent(Record):
    """A backend that could not run here, and why."""

    backend: str
    why: str


class PeakRates(Record):
    """What this machine does at best: operations a second in products of large matrices, bytes a second in copies."""

    flops: float
    bytes: float


class Bench(Record):
    """Latency. `repeats` is how often every row was timed, fewer than asked for where it was interrupted.

    `notes` says what could not be measured, and why.
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
        """How much faster a row is than plain PyTorch without caching; None where that could not run."""
        plain = (
            one.seconds
            for one in self.rows
            if (one.backend, one.images, one.setting.label) == (EAGER, row.images, NO_CACHE)
        )
        seconds = next(plain, None)
        return None if seconds is None else seconds / row.seconds


class QualityRow(Record):
    """One setting against no caching, from the same noise; means over all images.

    `psnr` is in dB, of pixels from 0 to 255; None where nothing differs. `latent_errors` holds the error of the
    latents after each step, relative to the norm of those without caching at as many steps. `frechet_distance`,
    `precision` and `recall` compare features of the images with those of the images without caching; `to_reference`
    is the Fréchet distance to the images of a reference, `as_asked` the part that a classifier reads as the class
    that was asked for.
    """

    setting: Setting
    seconds_per_image: float
    psnr: float | None
    ssim: float
    lpips: float | None
    latent_errors: tuple[float, ...]
    frechet_distance: float | None
    precision: float | None
    recall: float | None
    to_reference: float | None
    as_asked: float | None


class Quality(Record):
    """What caching costs. The first row is what all others are compared with: no caching.

    `features` says what extracted them, `notes` what was left out and why. `grid` is a file beside the report.
    """

    backend: str
    device: str
    images: int
    guidance_scale: float
    features: str | None
    notes: tuple[str, ...]
    rows: tuple[QualityRow, ...]
    grid: str


class Report(Record):
    """All of it. `measured_on` says hardware, versions and commit of each part.

    `min_psnr` is the stated loss, in dB against no caching; `recommendation` the sentence that follows from it.
    """

    format_version: int
    about: About
    measured_on: dict[str, dict[str, Any]]
    min_psnr: float = 30.0
    recommendation: str = ""
    bench: Bench | None = None
    quality: Quality | None = None
