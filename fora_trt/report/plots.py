"""The plots of a report. Each is a separate `Figure`, without pyplot's global state and without a display.

Plots fit the width of a page; their font is large enough for a phone, which shows them at half the size.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from fora_trt.metrics import SOLUTION_PSNR
from fora_trt.report.results import (
    CALIBRATED,
    FORA,
    FORECAST,
    NO_CACHE,
    Bench,
    BenchRow,
    Quality,
    QualityRow,
    Report,
)
from fora_trt.report.tables import batch_sizes, labels, rows_at

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

LATENCY_QUALITY, LATENCY_SOLUTION = "latency-quality.png", "latency-solution.png"
ERROR_OVER_STEPS, SPEEDUP, TIME_SPLIT = "error-over-steps.png", "speedup.png", "time-split.png"
PLOTS = (LATENCY_QUALITY, LATENCY_SOLUTION, SPEEDUP, TIME_SPLIT, ERROR_OVER_STEPS)
PSNR = "psnr"

WIDTH, HEIGHT, DPI = 6.4, 4.4, 200  # inches, inches, pixels per inch
TEXT, SMALL = 12.0, 10.5  # points
INK, PALE, RULE, GRID = "#26292e", "#6f757d", "#bcc4cd", "#e6e9ec"
# Okabe and Ito, Color Universal Design: distinguishable with every kind of colour vision
BLUE, ORANGE, GREEN, PURPLE, SKY, YELLOW = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00"
NEAR = 20  # points; a name farther from its point gets a line to it
PLACES: tuple[tuple[float, float, Literal["left", "center", "right"]], ...] = (
    (9, 0, "left"), (0, 11, "center"), (-9, 0, "right"), (0, -11, "center"), (8, 10, "left"), (8, -10, "left"),
    (16, 22, "left"), (-16, 22, "right"), (16, -22, "left"), (-16, -22, "right"), (16, 36, "left"), (-16, 36, "right"),
    (16, -36, "left"), (-16, -36, "right"),
)  # fmt: skip
"""Possible positions of a name: offset from its point in points (1/72 inch) and text alignment; the best first."""
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, YELLOW, SKY, INK)
SERIES = tuple(zip(COLOURS, "os^DvPX", strict=True))


def plots_of(report: Report) -> dict[str, bytes]:
    """PNG files by name; plots without data are left out."""
    figures: dict[str, Figure | None] = {}
    if report.quality is not None:
        figures[LATENCY_QUALITY] = latency_quality(report.quality, report.min_psnr)
        figures[LATENCY_SOLUTION] = latency_quality(report.quality, report.min_psnr, SOLUTION_PSNR)
        figures[ERROR_OVER_STEPS] = error_over_steps(report.quality)
    if report.bench is not None and report.bench.rows:
        figures[SPEEDUP] = speedup(report.bench)
        figures[TIME_SPLIT] = time_split(report.bench)
    return {name: _png(figure) for name in PLOTS if (figure := figures.get(name)) is not None}


def latency_quality(quality: Quality, min_psnr: float, metric: str = PSNR) -> Figure | None:
    """Time against PSNR, one line per method, and the Pareto front; None if no setting differs from no caching.

    `metric` is the PSNR to no caching, or to the fine solution. Each point has its number of full steps.
    """
    from matplotlib.ticker import MaxNLocator

    rows = [row for row in quality.rows if row.metrics.get(metric) is not None]
    if not rows:
        return None

    def points(some: Sequence[QualityRow]) -> tuple[list[float], list[float]]:
        return [row.seconds_per_image for row in some], [row.metrics[metric] or 0.0 for row in some]

    against = "no caching" if metric == PSNR else str(quality.solution)
    figure, axes = _figure("Latency against quality", "seconds per image", f"PSNR against {against} (dB)")
    plain = quality.rows[0].seconds_per_image
    _seconds_axis(axes, [plain, *(row.seconds_per_image for row in rows)])
    axes.axvline(plain, color=PALE, linestyle=(0, (1, 1.5)), linewidth=1.4, label="time without caching")
    axes.axhline(min_psnr, color=PALE, linestyle=(0, (5, 3)), linewidth=1.0, label=f"minimum, {min_psnr:g} dB")
    front = points(pareto_front(rows, metric))
    axes.plot(*front, color=RULE, linewidth=5, zorder=1, solid_joinstyle="round", label="Pareto front")
    for method, (colour, marker) in METHODS.items():
        own = sorted((row for row in rows if _method(row) == method), key=lambda row: row.seconds_per_image)
        if own:
            axes.plot(
                *points(own), marker=marker, color=colour, linewidth=1.6 if method in LINKED else 0.0, markersize=7.5,
                markerfacecolor="white" if method in HOLLOW else colour, markeredgewidth=2.0, zorder=3, label=method,
            )  # fmt: skip
    psnrs = [min_psnr, *points(rows)[1]]
    margin = max(1.0, 0.16 * (max(psnrs) - min(psnrs)))
    axes.set_ylim(min(psnrs) - margin, max(psnrs) + margin)
    axes.yaxis.set_major_locator(MaxNLocator(7, integer=True))
    _legend(axes, below=True)
    many = len({row.setting.steps for row in rows if row.setting.control_of is None}) > 1
    _label_points(axes, list(zip(*points(rows), [_evaluations(row, many) for row in rows], strict=True)))
    return figure


SOLVER = "fewer steps, best solver"
METHODS = {
    FORA: (BLUE, "o"),
    FORECAST: (ORANGE, "^"),
    CALIBRATED: (GREEN, "D"),
    SOLVER: (PURPLE, "s"),
    NO_CACHE: (INK, "v"),
}
"""Colour and marker of each method."""
LINKED, HOLLOW = (FORA, FORECAST, CALIBRATED, SOLVER), (SOLVER, NO_CACHE)


def _method(row: QualityRow) -> str:
    """The series of a row; results of older versions have no method, and their schedules are those of FORA."""
    setting = row.setting
    if setting.control_of is not None:
        return SOLVER
    return setting.method or (FORA if setting.caches else NO_CACHE)


def _evaluations(row: QualityRow, many_steps: bool) -> str:
    """The number of full steps; of how many, where settings differ in it."""
    setting = row.setting
    return f"{setting.full_steps} of {setting.nfe}" if many_steps and setting.caches else str(setting.full_steps)


def pareto_front(rows: Sequence[QualityRow], metric: str = PSNR) -> list[QualityRow]:
    """The settings that no other setting beats in both time and PSNR, the fastest first."""
    front: list[QualityRow] = []
    for row in sorted(rows, key=lambda row: (row.seconds_per_image, -(row.metrics[metric] or 0))):
        if not front or (row.metrics[metric] or 0) > (front[-1].metrics[metric] or 0):
            front.append(row)
    return front


def error_over_steps(quality: Quality) -> Figure | None:
    """Error of the latents after each step, one line per setting; None if all errors are 0."""
    names = labels([row.setting for row in quality.rows])
    lines = [(row, name) for row, name in zip(quality.rows, names, strict=True) if any(row.latent_errors)]
    if not lines:
        return None
    figure, axes = _figure("Error over the steps", "step", "relative error of the latents (%)")
    ends = []
    for k, (row, name) in enumerate(lines):
        colour, marker = SERIES[k % len(SERIES)]
        errors = [100 * error for error in row.latent_errors]
        steps = range(1, len(errors) + 1)
        every = max(1, len(errors) // 8)
        dashes = ("-", "--", ":")[k // len(SERIES) % 3]
        axes.plot(steps, errors, dashes, color=colour, linewidth=2.2, marker=marker, markevery=every, markersize=5)
        ends.append((len(errors), errors[-1], name, colour))
    axes.set_ylim(bottom=0)
    axes.set_xlim(1, max(end[0] for end in ends))
    _label_ends(axes, ends)
    return figure


def speedup(bench: Bench) -> Figure | None:
    """Speed-up of each schedule on each backend, with the ideal and the roofline; None without a cached schedule."""
    images = batch_sizes(bench)[0]
    rows = [row for row in rows_at(bench, images) if row.setting.control_of is None]
    ideal = {row.setting.label: row.ideal_speedup for row in sorted(rows, key=lambda row: row.ideal_speedup)}
    if not any(row.setting.caches for row in rows):
        return None
    figure, axes = _figure(f"Speed-up, {_at_once(images)}", "schedule", "speed-up over no caching")
    places = {label: place for place, label in enumerate(ideal)}
    axes.plot(
        range(len(ideal)), [*ideal.values()], color=PALE, linewidth=1.4,
        linestyle=(0, (5, 3)), label="ideal: reuse steps are free",
    )  # fmt: skip
    rooflines = {row.setting.label: row.roofline_seconds for row in rows}
    if NO_CACHE in rooflines and all(rooflines.values()):
        reachable = [rooflines[NO_CACHE] / rooflines[label] for label in ideal]
        axes.plot(
            range(len(ideal)), reachable, "_", color=INK, markersize=18, markeredgewidth=2.2,
            label="roofline: both graphs at peak rates",
        )  # fmt: skip
    for k, backend in enumerate(dict.fromkeys(row.backend for row in rows)):
        colour, marker = SERIES[k % len(SERIES)]
        own = sorted((places[row.setting.label], row.speedup) for row in rows if row.backend == backend)
        axes.plot(*zip(*own, strict=True), color=colour, marker=marker, linewidth=2.0, markersize=7, label=backend)
    axes.set_xticks(range(len(ideal)), [*ideal])
    axes.set_ylim(bottom=0)
    _legend(axes)
    return figure


def time_split(bench: Bench) -> Figure:
    """Every trajectory of the smallest batch as a bar: full steps, reuse steps, and the overhead outside the engines.

    The length of a bar is the time of the trajectory. Its end is the overhead; the rest is divided in proportion to the
    median times of full and reuse steps, which may themselves contain a part of the overhead.
    """
    images = batch_sizes(bench)[0]
    rows = rows_at(bench, images)
    figure, axes = _figure(f"Where the time goes, {_at_once(images)}", "seconds per trajectory", "")
    names = labels([row.setting for row in rows])
    places: list[float] = []
    place, previous = 0.0, rows[0].backend
    for row in rows:
        place += 0.0 if not places else 1.0 if row.backend == previous else 1.9
        places.append(place)
        previous = row.backend
    starts = [0.0] * len(rows)
    parts = [_parts(row) for row in rows]
    for k, (name, colour) in enumerate((("full steps", BLUE), ("reuse steps", YELLOW), ("overhead", PALE))):
        lengths = [part[k] for part in parts]
        axes.barh(places, lengths, left=starts, height=0.74, color=colour, label=name, linewidth=0)
        starts = [start + length for start, length in zip(starts, lengths, strict=True)]
    axes.set_yticks(places, names)
    axes.set_ylim(places[-1] + 0.7, places[0] - 1.6)
    axes.set_xlim(0, 1.02 * max(starts))
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    for first in (k for k, row in enumerate(rows) if k == 0 or row.backend != rows[k - 1].backend):
        axes.text(
            0, places[first] - 0.55, rows[first].backend, fontsize=SMALL, fontweight="bold", color=INK, va="bottom",
            parse_math=False,
        )  # fmt: skip
    figure.set_figheight(1.5 + 0.27 * (places[-1] + 2))
    _legend(axes, below=True)
    return figure


def _parts(row: BenchRow) -> tuple[float, float, float]:
    """Seconds of full steps, of reuse steps, and of overhead; their sum is the time of the trajectory."""
    full = row.setting.full_steps * row.full_step_seconds
    reuse = (row.setting.nfe - row.setting.full_steps) * (row.reuse_step_seconds or 0.0)
    overhead = row.overhead or 0.0
    inside = row.seconds * (1 - overhead)
    return inside * full / (full + reuse), inside * reuse / (full + reuse), row.seconds * overhead


def _at_once(images: int) -> str:
    return "1 image" if images == 1 else f"{images} images at once"


def _figure(title: str, across: str, upwards: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, facecolor="white", layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=TEXT + 1, fontweight="bold", color=INK, loc="left", pad=12)
    axes.set_xlabel(across, fontsize=TEXT, color=INK)
    axes.set_ylabel(upwards, fontsize=TEXT, color=INK)
    axes.tick_params(labelsize=SMALL + 0.5, colors=INK, color=PALE)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(PALE)
    return figure, axes


def _legend(axes: Axes, below: bool = False) -> None:
    looks: dict[str, Any] = {"fontsize": SMALL, "frameon": False, "labelcolor": INK, "handlelength": 1.6}
    if below:
        legend = axes.figure.legend(loc="outside lower center", ncols=3, columnspacing=1.4, **looks)
    else:
        legend = axes.legend(loc="upper left", **looks)
    for text in legend.get_texts():
        text.set_parse_math(False)


def _seconds_axis(axes: Axes, values: Sequence[float]) -> None:
    """Scale the time axis: linear from zero if the largest time is under 3 times the smallest, else logarithmic."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    least, most = min(values), max(values)
    if most < 3 * least:
        axes.set_xlim(0, most * 1.1)
        return
    axes.set_xscale("log")
    axes.set_xlim(least / 1.35, most * 1.2)
    axes.xaxis.set_major_locator(
        LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if most < 12 * least else (1.0, 2.0, 5.0))
    )
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())


def _label_points(axes: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Put each name beside its point, at the first position where it covers no point and no other name."""
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox

    figure = axes.figure.get_figure(root=True)
    figure.draw_without_rendering()  # computes the layout, and so the positions of points
    dot = 5 * figure.dpi / 72
    centres = [axes.transData.transform((x, y)) for x, y, _ in points]
    taken = [Bbox.from_extents(x - dot, y - dot, x + dot, y + dot) for x, y in centres]
    frame, edge = axes.get_window_extent(), figure.bbox.x1

    def placed(k: int, dx: float, dy: float, side: Literal["left", "center", "right"]) -> tuple[Annotation, Bbox]:
        x, y, name = points[k]
        line = {"arrowstyle": "-", "color": PALE, "linewidth": 0.8} if abs(dy) > NEAR else None
        note = axes.annotate(
            name, (x, y), (dx, dy), textcoords="offset points", ha=side, va="center", fontsize=SMALL, color=INK,
            parse_math=False, path_effects=[withStroke(linewidth=3, foreground="white")], arrowprops=line,
        )  # fmt: skip
        note.set_in_layout(False)
        return note, note.get_window_extent()

    for k in range(len(points)):
        rivals = taken[:k] + taken[k + 1 :]
        for place in PLACES:
            note, box = placed(k, *place)
            inside = frame.x0 <= box.x0 and box.x1 <= edge and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if inside and not any(box.overlaps(other) for other in rivals):
                break
            note.remove()
        else:
            continue  # no free position; the table has the name
        taken.append(box)


def _label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Put the name of each line to the right of its end; names are moved apart so that they do not overlap."""
    least, most = axes.get_ylim()
    gap = (most - least) * 0.062
    above = least - gap
    for x, y, name, colour in sorted(ends, key=lambda end: end[1]):
        above = max(y, above + gap)
        place = (1.05, (above - least) / (most - least))
        axes.annotate(
            name, (x, y), place, textcoords="axes fraction", va="center", fontsize=SMALL, color=INK,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 1.4, "relpos": (0, 0.5)},
            annotation_clip=False, parse_math=False,
        )  # fmt: skip


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()
