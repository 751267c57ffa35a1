"""What `bench` and `quality` found: the content of `report.json`, and of the tables and plots that are made from it."""

from __future__ import annotations

from typing import Any

from fora_trt.bundle import Bundle
from fora_trt.folders import MANIFEST, Record, sha256_of

REPORT_VERSION = 1


class About(Record):
    """Which bundle it is; `sha256` digests its manifest, and so all of it."""

    name: str
    source: str
    architecture: str
    precision: str
    sha256: str

    @classmethod
    def of(cls, bundle: Bundle) -> About:
        """The bundle of this folder."""
        manifest = bundle.manifest
        return cls(
            name=manifest.name,
            source=manifest.model.options.source,
            architecture=manifest.model.architecture,
            precision=manifest.precision,
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
    def ideal_speedup(self) -> float:
        """Over no caching in as many steps, if a reuse step cost nothing."""
        return (self.calls or self.steps) / self.full_steps

    @property
    def label(self) -> str:
        """What it is called in tables and plots."""
        if self.control_of is not None:
            return f"{self.steps} steps, no cache"
        return "no cache" if self.cache_interval == 1 else f"interval {self.cache_interval}"


class BenchRow(Record):
    """One setting on one backend: medians over the repeats, in seconds.

    `speedup` is over the same backend without caching at as many steps as the benchmark has; for those fewer steps
    of a control too. `outside` is the share of the time that is spent outside of the engines; `floor_seconds` what the
    arithmetic and the bytes of the graphs would take at the peak rates of this machine.
    """

    backend: str
    images: int
    setting: Setting
    seconds: float
    fastest: float
    slowest: float
    full_step_seconds: float
    reuse_step_seconds: float | None
    outside: float
    speedup: float
    floor_seconds: float
    peak_memory_bytes: int | None

    @property
    def of_ideal(self) -> float:
        """Which part of the ideal speed-up was reached."""
        return self.speedup / self.setting.ideal_speedup


class Absent(Record):
    """A backend that could not run here, and why."""

    backend: str
    why: str


class PeakRates(Record):
    """What this machine does at best: operations a second in products of large matrices, bytes a second in copies."""

    flops: float
    bytes: float


class Bench(Record):
    """Latency. `repeats` is how often every row was timed, fewer than asked for where it was interrupted."""

    device: str
    steps: int
    guidance_scale: float
    repeats: int
    interrupted: bool
    peaks: PeakRates
    rows: tuple[BenchRow, ...]
    absent: tuple[Absent, ...]


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
    """All of it. `measured_on` says hardware, versions and commit of each part."""

    format_version: int
    about: About
    measured_on: dict[str, dict[str, Any]]
    bench: Bench | None = None
    quality: Quality | None = None
