"""The plots of a report, in the order of the page."""

from __future__ import annotations

import re

from fora_trt.report.bench_plots import SPEEDUP, TIME_SPLIT, bench_plots
from fora_trt.report.drawing import Plot
from fora_trt.report.quality_plots import ERROR_OVER_STEPS, LATENCY_QUALITY, LATENCY_SOLUTION, quality_plots
from fora_trt.report.results import Report

KINDS = (LATENCY_QUALITY, LATENCY_SOLUTION, SPEEDUP, TIME_SPLIT, ERROR_OVER_STEPS)
_NAME = re.compile(rf"({'|'.join(KINDS)})(-[a-z0-9.-]+)?\.png")


def plots_of(report: Report) -> list[Plot]:
    """All plots for which the report has data."""
    plots = [] if report.quality is None else [*quality_plots(report.quality, report.min_psnr)]
    plots += [] if report.bench is None or not report.bench.rows else bench_plots(report.bench)
    return sorted(plots, key=lambda plot: KINDS.index(plot.kind))


def is_plot(name: str) -> bool:
    """Whether a file of a report folder is a plot, by its name."""
    return _NAME.fullmatch(name) is not None


def grouped(plots: list[Plot]) -> list[list[Plot]]:
    """The plots as they stand together: single plots first, then those of each kind that has several."""
    kinds = [[plot for plot in plots if plot.kind == kind] for kind in KINDS]
    single = [plot for kind in kinds if len(kind) == 1 for plot in kind]
    return [group for group in (single, *(kind for kind in kinds if len(kind) > 1)) if group]
