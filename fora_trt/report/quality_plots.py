"""The plots of image quality, one of each kind per scheduler and number of steps: time against PSNR, error over steps.

Plots of one kind have the same axes and, for time against PSNR, the same Pareto front, so that all settings can be
compared; a line never joins settings of different numbers of steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from fora_trt.metrics import SOLUTION_PSNR
from fora_trt.report.drawing import (
    BLUE,
    GREEN,
    HEIGHT,
    INK,
    MARKERS,
    ORANGE,
    PURPLE,
    YELLOW,
    Plot,
    Theme,
    label_ends,
    label_points,
    legend_below,
    new_figure,
    time_axis,
    time_unit,
    whole_numbers,
)
from fora_trt.report.results import CALIBRATED, FORA, FORECAST, NO_CACHE, PER_LAYER, Quality, QualityRow
from fora_trt.report.tables import group_names, reference_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = Callable[[Sequence[QualityRow]], tuple[list[float], list[float]]]
"""Horizontal and vertical positions of settings."""

LATENCY_QUALITY, LATENCY_SOLUTION, ERROR_OVER_STEPS = "latency-quality", "latency-solution", "error-over-steps"
PSNR = "psnr"
SOLVER = "fewer steps, best solver"
METHODS = {
    FORA: (BLUE, "o"),
    FORECAST: (ORANGE, "^"),
    CALIBRATED: (GREEN, "D"),
    PER_LAYER: (YELLOW, "P"),
    SOLVER: (PURPLE, "s"),
    NO_CACHE: (INK, "v"),
}
"""Colour and marker of each method."""
LINKED, HOLLOW = (FORA, FORECAST, SOLVER), (SOLVER, NO_CACHE)


def quality_plots(quality: Quality, min_psnr: float) -> Iterator[Plot]:
    """Time against PSNR to no caching, then to the fine solution if there is one, then the error over the steps."""
    groups, names = quality.groups, group_names(quality)
    several = len(groups) > 1
    for kind, metric in ((LATENCY_QUALITY, PSNR), (LATENCY_SOLUTION, SOLUTION_PSNR)):
        for number, name in enumerate(names):
            if len(_comparable(quality, number, metric)) > 0:
                yield Plot(
                    kind, name if several else "",
                    f"{name}: time per image against PSNR to {_reference(quality, metric)}, one point per setting. The "
                    "quality table has the numbers.",
                    _plane_caption(quality, metric),
                    partial(latency_quality, quality, min_psnr, metric, number),
                )  # fmt: skip
    for number, name in enumerate(names):
        if _erring(groups[number]):
            yield Plot(
                ERROR_OVER_STEPS, name if several else "",
                f"{name}: relative error of the latents after every step, one line per schedule. The quality table "
                "has the error after the last step, as latent error.",
                "The reference is no caching with the same solver and number of steps, from the same noise.",
                partial(error_over_steps, quality, number),
            )  # fmt: skip


def _plane_caption(quality: Quality, metric: str) -> str:
    if metric == SOLUTION_PSNR:
        return "The same against a fine solution, which has many more steps: no caching has an error of its own here."
    several = (
        " The Pareto front and the solvers with fewer steps are the same in all plots, and so is the dotted line, the "
        f"time of {reference_name(quality)}."
    )
    return (
        "Up and to the left is better; numbers are full steps. No setting is both faster and closer than one on the "
        "Pareto front. The dashed line is the minimum for a recommendation."
        + (several if len(quality.groups) > 1 else "")
    )


def _reference(quality: Quality, metric: str) -> str:
    """The images that a PSNR compares with."""
    return str(quality.solution) if metric == SOLUTION_PSNR else reference_name(quality)


def _comparable(quality: Quality, number: int, metric: str) -> list[QualityRow]:
    """The rows of a group, and the controls of all groups: fewer steps are an alternative to each of them.

    The reference of the PSNR itself is left out, and so are rows without this metric.
    """
    rows = [row for row in quality.rows if metric in row.metrics and (metric != PSNR or row is not quality.rows[0])]
    own = {id(row) for row in quality.groups[number]}
    return [row for row in rows if id(row) in own or row.setting.control_of is not None]


def latency_quality(quality: Quality, min_psnr: float, metric: str, number: int, theme: Theme) -> Figure:
    """Time against PSNR for one group, one line per method, and the Pareto front of all groups.

    `metric` is the PSNR to no caching, or to the fine solution. Each point has its number of full steps. Images that
    are identical to the reference have an infinite PSNR; their points are at the upper edge and say so.
    """
    every = [row for k in range(len(quality.groups)) for row in _comparable(quality, k, metric)]
    rows, plain = _comparable(quality, number, metric), quality.rows[0].seconds_per_image
    scale, unit = time_unit(max(plain, *(row.seconds_per_image for row in every)))
    several = len(quality.groups) > 1
    title = "Latency against quality" + (f", {group_names(quality)[number]}" if several else "")
    subtitle = f"PSNR to {_reference(quality, metric)}"
    height = HEIGHT + (0.6 if several else 0.3)  # inches; the legend has one row more
    figure, axes = new_figure(title, f"{unit} per image", "PSNR (dB)", theme, height, subtitle)
    time_axis(axes, [scale * seconds for seconds in (plain, *(row.seconds_per_image for row in every))])
    finite = [value for row in every if math.isfinite(value := psnr_of(row, metric))]
    bounds = [min_psnr, *finite]
    margin = max(1.0, 0.16 * (max(bounds) - min(bounds)))
    top = max(bounds) + margin
    axes.set_ylim(min(bounds) - margin, top)
    whole_numbers(axes.yaxis)

    def points(some: Sequence[QualityRow]) -> tuple[list[float], list[float]]:
        return [scale * row.seconds_per_image for row in some], [min(psnr_of(row, metric), top) for row in some]

    uncached = "time of the reference" if several else "time without caching"
    axes.axvline(scale * plain, color=theme.pale, linestyle=(0, (1, 1.5)), linewidth=1.4, label=uncached)
    axes.axhline(min_psnr, color=theme.pale, linestyle=(0, (5, 3)), linewidth=1.0, label=f"minimum, {min_psnr:g} dB")
    front = points(pareto_front(every, metric))
    axes.plot(*front, color=theme.band, linewidth=5, zorder=1, solid_joinstyle="round", label="Pareto front")
    _methods(axes, rows, points, theme)
    legend_below(axes, theme)
    label_points(axes, list(zip(*points(rows), [_point_name(row, metric) for row in rows], strict=True)), theme)
    return figure


def _methods(axes: Axes, rows: Sequence[QualityRow], points: Points, theme: Theme) -> None:
    """The settings of each method, joined by a line for each kind of schedule; the most full steps last."""
    for method, (colour, marker) in METHODS.items():
        own = sorted((row for row in rows if _method(row) == method), key=lambda row: row.setting.full_steps)
        kinds = list(dict.fromkeys(row.setting.schedule.partition(":")[0] for row in own))
        for kind in kinds:
            axes.plot(
                *points([row for row in own if row.setting.schedule.partition(":")[0] == kind]), marker=marker,
                color=theme.series[colour], linewidth=1.6 if method in LINKED else 0.0, markersize=7.5,
                markerfacecolor=theme.paper if method in HOLLOW else theme.series[colour], markeredgewidth=2.0,
                zorder=3, label=method if kind == kinds[0] else "_", clip_on=False,
            )  # fmt: skip


def _method(row: QualityRow) -> str:
    """The series of a row; results of older versions have no method, and their schedules are those of FORA."""
    setting = row.setting
    if setting.control_of is not None:
        return SOLVER
    return setting.method or (FORA if setting.caches else NO_CACHE)


def _point_name(row: QualityRow, metric: str) -> str:
    return f"{row.setting.full_steps}{', identical' if math.isinf(psnr_of(row, metric)) else ''}"


def psnr_of(row: QualityRow, metric: str = PSNR) -> float:
    """A PSNR of a row in dB; infinite for identical images."""
    value = row.metrics[metric]
    return math.inf if value is None else value


def pareto_front(rows: Sequence[QualityRow], metric: str = PSNR) -> list[QualityRow]:
    """The settings that no other setting beats in both time and PSNR, the fastest first."""
    front: list[QualityRow] = []
    for row in sorted(rows, key=lambda row: (row.seconds_per_image, -psnr_of(row, metric))):
        if not front or psnr_of(row, metric) > psnr_of(front[-1], metric):
            front.append(row)
    return front


def _erring(group: Sequence[QualityRow]) -> list[QualityRow]:
    return [row for row in group if any(row.latent_errors)]


def error_over_steps(quality: Quality, number: int, theme: Theme) -> Figure:
    """Error of the latents after each step for one group, one line per setting with an error."""
    group = quality.groups[number]
    rows = _erring(group)
    steps = len(rows[0].latent_errors)
    title = "Error over the steps" + (f", {group_names(quality)[number]}" if len(quality.groups) > 1 else "")
    height = max(HEIGHT, 1.3 + 0.2 * len(rows))  # inches; the names stand one below the other
    figure, axes = new_figure(title, "step", "relative error of the latents (%)", theme, height)
    ends = []
    for k, row in enumerate(rows):
        colour = theme.series[k % len(theme.series)]
        errors = [100 * error for error in row.latent_errors]
        dashes = ("-", "--", ":")[k // len(theme.series) % 3]
        axes.plot(
            range(1, steps + 1), errors, dashes, color=colour, linewidth=2.2, marker=MARKERS[k % len(MARKERS)],
            markevery=max(1, steps // 8), markersize=5,
        )  # fmt: skip
        ends.append((steps, errors[-1], row.setting.label, colour))
    largest = max(error for one in quality.groups for row in _erring(one) for error in row.latent_errors)
    axes.set_ylim(0, 105 * largest if math.isfinite(largest) else None)
    axes.set_xlim(1, max(2, steps))
    whole_numbers(axes.xaxis)
    label_ends(axes, ends, theme)
    return figure
