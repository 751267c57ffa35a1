"""The plots of a benchmark, one of each kind per batch size: speed-up by schedule, and where the time goes.

Plots of one kind have the same horizontal axis, so that batch sizes can be compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from fora_trt.report.drawing import (
    BLUE,
    GREEN,
    MARKERS,
    SMALL,
    YELLOW,
    Plot,
    Theme,
    legend_below,
    new_figure,
    short,
    time_unit,
)
from fora_trt.report.results import NO_CACHE, Bench, BenchRow
from fora_trt.report.tables import at_once, batch_sizes, labels, rows_at, seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SPEEDUP, TIME_SPLIT = "speedup", "time-split"
UNKNOWN_OVERHEAD = " Where the overhead is unknown (PyTorch eager on a GPU), it is part of the steps."


def bench_plots(bench: Bench) -> Iterator[Plot]:
    """Speed-up of every batch size with a cached schedule, then the time split of every batch size."""
    sizes = batch_sizes(bench)
    for images in sizes:
        if _cached(bench, images):
            yield Plot(
                SPEEDUP, _of(sizes, images),
                f"Speed-up of each schedule over no caching, {at_once(images)}: one mark per backend, beside the "
                "roofline and the ideal. The latency table has the numbers.",
                "Speed-up over the same backend without caching. The ideal counts reuse steps as "
                "free; the roofline counts their arithmetic and memory traffic.",
                partial(speedup, bench, images),
            )  # fmt: skip
    for images in sizes:
        yield Plot(
            TIME_SPLIT, _of(sizes, images),
            f"Time per image, {at_once(images)}: one bar per row of the latency table, divided into full steps, reuse "
            "steps and overhead.",
            "Caching replaces full steps by reuse steps; it does not reduce the overhead, the time outside the engines."
            + (UNKNOWN_OVERHEAD if any(row.overhead is None for row in rows_at(bench, images)) else ""),
            partial(time_split, bench, images),
        )  # fmt: skip


def _of(sizes: list[int], images: int) -> str:
    return f"batch {images}" if len(sizes) > 1 else ""


def _cached(bench: Bench, images: int) -> list[BenchRow]:
    return [row for row in rows_at(bench, images) if row.setting.caches]


def speedup(bench: Bench, images: int, theme: Theme) -> Figure:
    """Speed-up of each schedule on each backend, with the ideal and the roofline; the smallest ideal at the top."""
    rows = sorted(_cached(bench, images), key=lambda row: row.ideal_speedup)
    places = {schedule: place for place, schedule in enumerate(dict.fromkeys(row.setting.schedule for row in rows))}
    backends = list(dict.fromkeys(row.backend for row in bench.rows if row.setting.caches))
    height = 1.9 + len(places) * max(0.34, 0.15 * len(backends))
    figure, axes = new_figure(f"Speed-up, {at_once(images)}", "times as fast as no caching", "", theme, height)
    plain = {row.backend: row for row in rows_at(bench, images) if row.setting.label == NO_CACHE}
    for row in rows:
        place, free = places[row.setting.schedule], row.ideal_speedup
        axes.vlines(free, place - 0.4, place + 0.4, theme.band, linewidth=5, label="ideal: reuse steps are free")
        if row.backend in plain and plain[row.backend].roofline_seconds and row.roofline_seconds:
            reachable = plain[row.backend].roofline_seconds / row.roofline_seconds
            axes.vlines(reachable, place - 0.4, place + 0.4, theme.ink, linewidth=1.6, label="roofline")
    axes.axvline(1, color=theme.pale, linestyle=(0, (1, 1.5)), linewidth=1.4, label="no caching")
    for k, backend in enumerate(backends):
        own = [row for row in rows if row.backend == backend]
        shift = (k - (len(backends) - 1) / 2) * 0.8 / len(backends)
        axes.plot(
            [row.speedup for row in own], [places[row.setting.schedule] + shift for row in own],
            MARKERS[k % len(MARKERS)], color=theme.series[k % len(theme.series)], markersize=6.5, label=short(backend),
        )  # fmt: skip
    names = {row.setting.schedule: short(row.setting.label) for row in rows}
    _named_rows(axes, [*places.values()], [names[schedule] for schedule in places])
    axes.set_ylim(len(places) - 0.4, -0.6)
    every = [row for row in bench.rows if row.setting.caches]
    axes.set_xlim(0, 1.06 * max(max(row.speedup, row.ideal_speedup) for row in every))
    _each_once(axes)
    legend_below(axes, theme)
    return figure


def _each_once(axes: Axes) -> None:
    """Keep the first legend entry of each name."""
    seen: set[str] = set()
    for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
        if name in seen:
            handle.set_label("_")  # matplotlib's sign for no entry
        seen.add(name)


def time_split(bench: Bench, images: int, theme: Theme) -> Figure:
    """Every trajectory of a batch size as a bar: full, partial and reuse steps, and the overhead outside the engines.

    The length of a bar is the time of the trajectory per image. Its end is the overhead; the rest is divided in
    proportion to the median times of the kinds of steps, which may themselves contain a part of the overhead.
    """
    rows = rows_at(bench, images)
    places = _bar_places(rows)
    longest = max(row.seconds / row.images for row in bench.rows)
    scale, unit = time_unit(longest)
    height = 1.7 + 0.27 * (places[-1] + 2)
    figure, axes = new_figure(f"Where the time goes, {at_once(images)}", f"{unit} per image", "", theme, height)
    starts = [0.0] * len(rows)
    parts = [[scale * part / images for part in _parts(row)] for row in rows]
    colours = (theme.series[BLUE], theme.series[GREEN], theme.series[YELLOW], theme.pale)
    names = ("full steps", "partial steps", "reuse steps", "overhead")
    for k, (name, colour) in enumerate(zip(names, colours, strict=True)):
        lengths = [part[k] for part in parts]
        if name == "partial steps" and not any(lengths):
            continue
        axes.barh(places, lengths, left=starts, height=0.74, color=colour, label=name, linewidth=0)
        starts = [start + length for start, length in zip(starts, lengths, strict=True)]
    _named_rows(axes, places, list(map(short, labels([row.setting for row in rows]))))
    axes.set_ylim(places[-1] + 0.7, places[0] - 1.6)
    for place, row, end in zip(places, rows, starts, strict=True):
        axes.annotate(
            seconds(row.seconds / images), (end, place), (4, 0), textcoords="offset points", va="center",
            fontsize=SMALL - 1, color=theme.ink,
        )  # fmt: skip
    axes.set_xlim(0, 1.16 * scale * longest)
    for first in (k for k, row in enumerate(rows) if k == 0 or row.backend != rows[k - 1].backend):
        axes.text(
            0, places[first] - 0.55, short(rows[first].backend), fontsize=SMALL, fontweight="bold", color=theme.ink,
            va="bottom", parse_math=False,
        )  # fmt: skip
    legend_below(axes, theme)
    return figure


def _bar_places(rows: list[BenchRow]) -> list[float]:
    """The vertical position of each bar; the bars of a backend stand together, below its name."""
    places, place = [0.0], 0.0
    for row, previous in zip(rows[1:], rows, strict=False):
        place += 1.0 if row.backend == previous.backend else 1.9
        places.append(place)
    return places


def _named_rows(axes: Axes, places: list[float] | list[int], names: list[str]) -> None:
    axes.set_yticks(places, names)
    for text in axes.get_yticklabels():
        text.set_parse_math(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")


def _parts(row: BenchRow) -> tuple[float, ...]:
    """Seconds of full, partial and reuse steps, and of overhead; their sum is the time of the trajectory."""
    setting = row.setting
    full = setting.full_steps * row.full_step_seconds
    partial = sum(one.steps * one.seconds for one in row.partial_steps)
    reuse = (setting.nfe - setting.full_steps - setting.partial_steps) * (row.reuse_step_seconds or 0.0)
    overhead = row.overhead or 0.0
    inside = row.seconds * (1 - overhead) / (full + partial + reuse)
    return inside * full, inside * partial, inside * reuse, row.seconds * overhead
