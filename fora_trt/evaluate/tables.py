"""What was found as rows of text, in one place, so that the terminal, Markdown and HTML show the same figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fora_trt.evaluate.results import Bench, BenchRow, Quality, QualityRow, Report, Setting
from fora_trt.runtime.schedulers import FLOW_SHORT_NAMES, SHORT_NAMES


@dataclass(frozen=True)
class Table:
    """The first `texts` columns are words, all others are figures. `chosen` is the row that is recommended."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    texts: int = 1
    chosen: int | None = None

    @classmethod
    def of(cls, title: str, columns: dict[str, Sequence[str]], texts: int, chosen: int | None = None) -> Table:
        """From columns by their headings; those in which no row has anything are left out."""
        filled = {heading: cells for heading, cells in columns.items() if any(cells)}
        return cls(title, tuple(filled), tuple(zip(*filled.values(), strict=True)), texts, chosen)

    def fitting(self, width: int) -> Table:
        """The same with as many columns as fit; those that are missed least go first."""
        widths = [max(map(len, cells)) + 3 for cells in zip(self.header, *self.rows, strict=True)]  # a gap of three
        kept = [*range(len(self.header))]
        for heading in MISSED_LEAST:
            if sum(widths[k] for k in kept) >= width and heading in self.header:
                kept.remove(self.header.index(heading))
        rows = tuple(tuple(cells[k] for k in kept) for cells in (self.header, *self.rows))
        return replace(self, header=rows[0], rows=rows[1:])


MISSED_LEAST = (
    "spread", "floor", "recall", "peak memory", "per image", "full step", "precision", "outside", "full steps", "SSIM",
    "of ideal", "latent error", "ideal", "as asked", "reuse step",
)  # fmt: skip
"""Columns that a narrow terminal goes without, those first."""


def bench_tables(bench: Bench) -> list[Table]:
    """Latency, a table for each number of images at once; the ideal stands before what was measured."""
    return [_bench_table(bench, images) for images in batch_sizes(bench)]


def batch_sizes(bench: Bench) -> list[int]:
    """How many images at once were measured, the fewest first."""
    return sorted({row.images for row in bench.rows})


def rows_at(bench: Bench, images: int) -> list[BenchRow]:
    """Those of one batch size, backend by backend, in the order in which backends first appear."""
    backends = list(dict.fromkeys(row.backend for row in bench.rows))
    return sorted((row for row in bench.rows if row.images == images), key=lambda row: backends.index(row.backend))


def _bench_table(bench: Bench, images: int) -> Table:
    rows = rows_at(bench, images)
    names = labels([row.setting for row in rows])

    def column(cell: Callable[[BenchRow], str]) -> list[str]:
        return [cell(row) for row in rows]

    return Table.of(
        f"{images} {'image' if images == 1 else 'images at once'}",
        {
            "backend": column(lambda row: row.backend),
            "setting": names,
            "full steps": column(lambda row: f"{row.setting.full_steps} of {row.setting.calls or row.setting.steps}"),
            "ideal": column(lambda row: f"{row.ideal_speedup:.2f}x"),
            "speed-up": column(lambda row: f"{row.speedup:.2f}x"),
            "of ideal": column(lambda row: f"{row.of_ideal:.0%}"),
            "over PyTorch": column(lambda row: "" if (gain := bench.over_eager(row)) is None else f"{gain:.2f}x"),
            "time": column(lambda row: seconds(row.seconds)),
            "spread": column(lambda row: _spread(row.fastest, row.slowest)),
            "per image": column(lambda row: "" if images == 1 else seconds(row.seconds / images)),
            "full step": column(lambda row: seconds(row.full_step_seconds)),
            "reuse step": column(lambda row: seconds(row.reuse_step_seconds)),
            "outside": column(lambda row: _figure(row.outside, ".1%")),
            "floor": column(lambda row: seconds(row.floor_seconds)),
            "peak memory": column(lambda row: memory(row.peak_memory_bytes)),
        },
        texts=2,
    )


def quality_table(quality: Quality, chosen: Setting | None = None) -> Table:
    """What caching costs; measures that were not taken have no column."""
    rows, plain = quality.rows, quality.rows[0].seconds_per_image

    def column(cell: Callable[[QualityRow], str]) -> list[str]:
        return [cell(row) for row in rows]

    return Table.of(
        f"{quality.images} images on {quality.backend} ({quality.device}), guidance {quality.guidance_scale:g}",
        {
            "setting": labels([row.setting for row in rows]),
            "full steps": column(lambda row: f"{row.setting.full_steps} of {row.setting.calls or row.setting.steps}"),
            "per image": column(lambda row: seconds(row.seconds_per_image)),
            "speed-up": column(lambda row: f"{plain / row.seconds_per_image:.2f}x"),
            "PSNR": column(lambda row: "identical" if row.psnr is None else f"{row.psnr:.1f} dB"),
            "SSIM": column(lambda row: f"{row.ssim:.4f}"),
            "LPIPS": column(lambda row: _figure(row.lpips, ".4f")),
            "latent error": [
                "" if row.setting.cache_interval == 1 else _figure(last(row.latent_errors), ".1%") for row in rows
            ],  # without caching they would be compared with themselves
            "Fréchet": column(lambda row: _distance(row.frechet_distance)),
            "precision": column(lambda row: _figure(row.precision, ".3f")),
            "recall": column(lambda row: _figure(row.recall, ".3f")),
            "to reference": column(lambda row: _distance(row.to_reference)),
            "as asked": column(lambda row: _figure(row.as_asked, ".1%")),
        },
        texts=1,
        chosen=next((k for k, row in enumerate(rows) if row.setting == chosen), None),
    )


def circumstances_table(report: Report) -> Table:
    """Hardware, versions, commit and date; a column for each part, or one where both parts share them all."""
    parts = list(report.measured_on.items())
    if len(parts) == 2 and parts[0][1] == parts[1][1]:
        parts = [("both", parts[0][1])]
    keys = dict.fromkeys(key for _, found in parts for key, value in found.items() if value is not None)
    rows = tuple((key, *(_said(found.get(key)) for _, found in parts)) for key in keys)
    return Table("measured on", ("", *(part for part, _ in parts)), rows, texts=1 + len(parts))


def labels(settings: Sequence[Setting], schedulers: bool = True) -> list[str]:
    """A name for each, with its number of steps and its scheduler only where these tell settings apart."""
    many_steps = len({setting.steps for setting in settings if setting.control_of is None}) > 1
    many_schedulers = schedulers and len({setting.scheduler for setting in settings}) > 1
    return [
        setting.label
        + (f", {setting.steps} steps" if many_steps and setting.control_of is None else "")
        + (f", {scheduler_label(setting)}" if many_schedulers else "")
        for setting in settings
    ]


def scheduler_label(setting: Setting) -> str:
    """The short name of its scheduler, or else its class without the suffix that all have."""
    names = [*SHORT_NAMES.items(), *FLOW_SHORT_NAMES.items()]
    return {name: short for short, name in names}.get(setting.scheduler, setting.scheduler.removesuffix("Scheduler"))


def last(errors: Sequence[float]) -> float | None:
    """The error that a trajectory ends with."""
    return errors[-1] if errors else None


def seconds(value: float | None) -> str:
    """A time with its unit, to about three digits."""
    if value is None:
        return ""
    if value < 0.9995:
        return f"{value * 1e3:.{2 if value < 0.00995 else 1 if value < 0.0995 else 0}f} ms"
    return f"{value:.{2 if value < 99.5 else 0}f} s"


def _spread(fastest: float, slowest: float) -> str:
    """Two times, with one unit where it fits both."""
    least, most = seconds(fastest), seconds(slowest)
    return f"{least.split()[0] if least.split()[1] == most.split()[1] else least} to {most}"


def memory(count: int | None) -> str:
    """Bytes as MiB or GiB."""
    if count is None:
        return ""
    return f"{count / 2**20:.0f} MiB" if count < 2**30 else f"{count / 2**30:.2f} GiB"


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _distance(value: float | None) -> str:
    """Of features; what rounding leaves of a distance to the same images is none."""
    return _figure(value if value is None or value > 1e-6 else 0.0, ".3g")


def _said(value: Any) -> str:
    return "" if value is None else str(value)
