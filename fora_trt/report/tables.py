"""Results as tables of text; the terminal, Markdown and HTML all show these tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from fora_trt.metrics import METRICS, Metric
from fora_trt.report.results import Bench, BenchRow, Quality, QualityRow, Report, Setting
from fora_trt.sampling.schedulers import SchedulerChoice


@dataclass(frozen=True)
class Table:
    """A table of text. The first `texts` columns are words, all others numbers. `chosen` is the recommended row."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    texts: int = 1
    chosen: int | None = None

    @classmethod
    def of(cls, title: str, columns: dict[str, Sequence[str]], texts: int, chosen: int | None = None) -> Table:
        """Create a table from columns by heading; columns that are empty in every row are left out."""
        filled = {heading: cells for heading, cells in columns.items() if any(cells)}
        return cls(title, tuple(filled), tuple(zip(*filled.values(), strict=True)), texts, chosen)

    def fitting(self, width: int) -> Table:
        """The table without the columns that do not fit the width; the least important are dropped first."""
        widths = [max(map(len, cells)) + 3 for cells in zip(self.header, *self.rows, strict=True)]  # a gap of three
        kept = [*range(len(self.header))]
        for heading in MISSED_LEAST:
            if sum(widths[k] for k in kept) >= width and heading in self.header:
                kept.remove(self.header.index(heading))
        rows = tuple(tuple(cells[k] for k in kept) for cells in (self.header, *self.rows))
        return replace(self, header=rows[0], rows=rows[1:])


MISSED_LEAST = (
    "spread", "roofline", "recall", "peak memory", "per image", "precision", "overhead", "full steps", "SSIM",
    "of ideal", "latent error", "ideal", "as asked", "full step", "partial step", "reuse step",
)  # fmt: skip
"""Columns that a narrow terminal leaves out, in the order in which they are dropped."""


def bench_tables(bench: Bench) -> list[Table]:
    """The latency tables, one per batch size."""
    return [_bench_table(bench, images) for images in batch_sizes(bench)]


def batch_sizes(bench: Bench) -> list[int]:
    """The measured batch sizes in images, the smallest first."""
    return sorted({row.images for row in bench.rows})


def at_once(images: int) -> str:
    """A batch size in words."""
    return "1 image" if images == 1 else f"{images} images at once"


def rows_at(bench: Bench, images: int) -> list[BenchRow]:
    """The rows of one batch size, grouped by backend in the order in which backends first appear."""
    backends = list(dict.fromkeys(row.backend for row in bench.rows))
    return sorted((row for row in bench.rows if row.images == images), key=lambda row: backends.index(row.backend))


def _bench_table(bench: Bench, images: int) -> Table:
    rows = rows_at(bench, images)
    names = labels([row.setting for row in rows])

    def column(cell: Callable[[BenchRow], str]) -> list[str]:
        return [cell(row) for row in rows]

    return Table.of(
        at_once(images),
        {
            "backend": column(lambda row: row.backend),
            "setting": names,
            "full steps": column(lambda row: row.setting.computed),
            "ideal": column(lambda row: f"{row.ideal_speedup:.2f}x"),
            "speed-up": column(lambda row: f"{row.speedup:.2f}x"),
            "of ideal": column(lambda row: f"{row.of_ideal:.0%}"),
            "over PyTorch": column(lambda row: "" if (gain := bench.over_eager(row)) is None else f"{gain:.2f}x"),
            "time": column(lambda row: seconds(row.seconds)),
            "spread": column(lambda row: _spread(row.fastest, row.slowest)),
            "per image": column(lambda row: "" if images == 1 else seconds(row.seconds / images)),
            "full step": column(lambda row: seconds(row.full_step_seconds)),
            **({"partial step": column(_partial_step)} if any(row.partial_steps for row in rows) else {}),
            "reuse step": column(lambda row: seconds(row.reuse_step_seconds)),
            "overhead": column(lambda row: _figure(row.overhead, ".1%")),
            "roofline": column(lambda row: seconds(row.roofline_seconds)),
            "peak memory": column(lambda row: memory(row.peak_memory_bytes)),
        },
        texts=2,
    )


def _partial_step(row: BenchRow) -> str:
    """The time of a partial step, from the shortest to the longest kind."""
    times = [one.seconds for one in row.partial_steps]
    return _spread(min(times), max(times)) if len(times) > 1 else "".join(map(seconds, times))


def quality_table(quality: Quality, chosen: Setting | None = None) -> Table:
    """The quality table; metrics that were not measured have no column."""
    rows, plain = quality.rows, quality.rows[0].seconds_per_image

    def column(cell: Callable[[QualityRow], str]) -> list[str]:
        return [cell(row) for row in rows]

    solution = f"; solution: {quality.solution}" if quality.solution else ""
    title = f"{quality.images} images on {quality.backend} ({quality.device}), guidance {quality.guidance_scale:g}"
    return Table.of(
        f"{title}{solution}",
        {
            "setting": labels([row.setting for row in rows]),
            "full steps": column(lambda row: row.setting.computed),
            "per image": column(lambda row: seconds(row.seconds_per_image)),
            "speed-up": column(lambda row: f"{plain / row.seconds_per_image:.2f}x"),
            **{one.column: column(partial(_metric, one)) for one in METRICS.values() if one.each is not None},
            "latent error": [
                "" if not row.setting.caches else _figure(last(row.latent_errors), ".1%") for row in rows
            ],  # a row without caching is its own reference
            **{one.column: column(partial(_metric, one)) for one in METRICS.values() if one.each is None},
        },
        texts=1,
        chosen=next((k for k, row in enumerate(rows) if row.setting == chosen), None),
    )


def environment_table(report: Report) -> Table:
    """Hardware, versions, commit and date; one column per part, or a single column if both parts are equal."""
    parts = list(report.measured_on.items())
    if len(parts) == 2 and parts[0][1] == parts[1][1]:
        parts = [("both", parts[0][1])]
    keys = dict.fromkeys(key for _, found in parts for key, value in found.items() if value is not None)
    rows = tuple((key, *(_text(found.get(key)) for _, found in parts)) for key in keys)
    return Table("measured on", ("", *(part for part, _ in parts)), rows, texts=1 + len(parts))


def labels(settings: Sequence[Setting], schedulers: bool = True) -> list[str]:
    """A name for each setting; it has the number of steps and the scheduler where settings differ in them."""
    asked = [setting for setting in settings if setting.control_of is None]
    many_steps = len({setting.steps for setting in asked}) > 1
    usual = {setting.scheduler for setting in asked}
    return [
        setting.label
        + (f", {setting.steps} steps" if many_steps and setting.control_of is None else "")
        + (f", {scheduler_label(setting)}" if schedulers and {setting.scheduler} != usual else "")
        for setting in settings
    ]


def group_names(quality: Quality) -> list[str]:
    """A name for each of the quality's groups: the number of steps, and the scheduler where groups differ in it."""
    firsts = [group[0].setting for group in quality.groups]
    several = len({setting.scheduler for setting in firsts}) > 1
    return [
        f"{setting.steps} step{'s' if setting.steps > 1 else ''}" + (f", {scheduler_label(setting)}" if several else "")
        for setting in firsts
    ]


def reference_name(quality: Quality) -> str:
    """The setting that all others are compared with, with its number of steps if there are several."""
    return "no caching" if len(quality.groups) == 1 else f"no caching ({group_names(quality)[0]})"


def scheduler_label(setting: Setting) -> str:
    """The short name of the scheduler with its settings."""
    return SchedulerChoice.from_text(setting.scheduler).label


def last(errors: Sequence[float]) -> float | None:
    """The error at the end of the trajectory; None if none was measured."""
    return errors[-1] if errors else None


def seconds(value: float | None) -> str:
    """A time with its unit, to about three significant digits."""
    if value is None:
        return ""
    if value < 0.9995:
        return f"{value * 1e3:.{2 if value < 0.00995 else 1 if value < 0.0995 else 0}f} ms"
    return f"{value:.{2 if value < 99.5 else 0}f} s"


def _spread(fastest: float, slowest: float) -> str:
    """The fastest and the slowest time; the unit only once if both have the same."""
    least, most = seconds(fastest), seconds(slowest)
    return f"{least.split()[0] if least.split()[1] == most.split()[1] else least} to {most}"


def memory(count: int | None) -> str:
    """Bytes as MiB or GiB."""
    if count is None:
        return ""
    return f"{count / 2**20:.0f} MiB" if count < 2**30 else f"{count / 2**30:.2f} GiB"


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _metric(metric: Metric, row: QualityRow) -> str:
    return metric.shown(row.metrics[metric.name]) if metric.name in row.metrics else ""


def _text(value: Any) -> str:
    return "" if value is None else str(value)
