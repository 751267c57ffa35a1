"""What the plots of a report share: two colour themes, figures, axes, legends, labels, and PNG files.

A plot is a separate `Figure`, without pyplot's global state and without a display. It fits the width of a page; its
font is large enough for a phone, which shows it at half the size.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

WIDTH, HEIGHT, DPI = 6.4, 4.4, 200  # inches, inches, pixels per inch
TEXT, SMALL = 12.0, 10.5  # points
LONGEST_NAME, LONGEST_LEGEND_ROW, LONGEST_TITLE = 26, 64, 54  # characters
NEAR = 20  # points; a name farther from its point gets a line to it
PLACES: tuple[tuple[float, float, Literal["left", "center", "right"]], ...] = (
    (9, 0, "left"), (0, 11, "center"), (-9, 0, "right"), (0, -11, "center"), (8, 10, "left"), (8, -10, "left"),
    (16, 22, "left"), (-16, 22, "right"), (16, -22, "left"), (-16, -22, "right"), (16, 36, "left"), (-16, 36, "right"),
    (16, -36, "left"), (-16, -36, "right"),
)  # fmt: skip
"""Possible positions of a name: offset from its point in points (1/72 inch) and text alignment; the best first."""


@dataclass(frozen=True)
class Theme:
    """Colours of a plot: background, text, secondary lines, wide bands, grid lines, and those of the series.

    All but the grid and the bands have a contrast of at least 3 to the background (WCAG 2.1, 1.4.11), text of 4.5.
    """

    paper: str
    ink: str
    pale: str
    band: str
    grid: str
    series: tuple[str, ...]


# After Okabe and Ito, Color Universal Design: distinguishable with every kind of colour vision
BLUE, ORANGE, GREEN, PURPLE, YELLOW, SKY, INK = range(7)
"""Positions in `Theme.series`."""
LIGHT = Theme(
    "#ffffff", "#26292e", "#6f757d", "#bcc4cd", "#e6e9ec",
    ("#0072b2", "#d55e00", "#00875f", "#b8588c", "#b57a00", "#2a8fc9", "#26292e"),
)  # fmt: skip
DARK = Theme(
    "#1c2024", "#e4e6e8", "#98a1ab", "#56606a", "#31373d",
    ("#4ba3e3", "#f28543", "#35c495", "#de90bd", "#ecb63f", "#9ad4f5", "#e4e6e8"),
)  # fmt: skip
MARKERS = "os^DvPX"


@dataclass(frozen=True)
class Plot:
    """A plot, drawn in any theme by `draw`. `of` tells plots of one kind apart, such as a batch size; else empty."""

    kind: str
    of: str
    alternative: str
    caption: str
    draw: Callable[[Theme], Figure]

    @property
    def name(self) -> str:
        """The name of its PNG file."""
        return f"{'-'.join([self.kind, *re.findall('[a-z0-9.]+', self.of.lower())])}.png"

    def png(self, theme: Theme) -> bytes:
        """The plot as a PNG file of 1280 pixels width."""
        return png(self.draw(theme))


def new_figure(
    title: str, across: str, upwards: str, theme: Theme, height: float = HEIGHT, subtitle: str = ""
) -> tuple[Figure, Axes]:
    """An empty figure of `height` inches with one pair of axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor=theme.paper, layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor(theme.paper)
    looks: dict[str, Any] = {"color": theme.ink, "parse_math": False}
    figure.get_layout_engine().set(w_pad=0.09, h_pad=0.09)  # type: ignore[union-attr, call-arg] # inches
    figure.suptitle(
        textwrap.fill(title, LONGEST_TITLE), fontsize=TEXT + 1, fontweight="bold", x=0.015, ha="left", **looks
    )
    axes.set_title(textwrap.fill(subtitle, 70, break_on_hyphens=False), fontsize=SMALL, loc="left", **looks)
    axes.set_xlabel(across, fontsize=TEXT, **looks)
    axes.set_ylabel(upwards, fontsize=TEXT, **looks)
    axes.tick_params(labelsize=SMALL + 0.5, colors=theme.ink, color=theme.pale)
    axes.grid(color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(theme.pale)
    return figure, axes


def figure_of(axes: Axes) -> Figure:
    """The figure of these axes."""
    from matplotlib.figure import Figure

    assert isinstance(axes.figure, Figure)
    return axes.figure


def short(name: str) -> str:
    """A name of at most `LONGEST_NAME` characters; a longer one loses its middle, since names differ at their ends."""
    half = LONGEST_NAME // 2
    return name if len(name) <= LONGEST_NAME else f"{name[: half - 1]}…{name[-half:]}"


def legend_below(axes: Axes, theme: Theme) -> None:
    """Put the legend under the axes, in as many columns as fit: three of names of usual length."""
    names = axes.get_legend_handles_labels()[1]
    columns = 3 if sum(sorted(map(len, names))[-3:]) <= LONGEST_LEGEND_ROW else 2
    legend = figure_of(axes).legend(
        loc="outside lower center", ncols=columns, columnspacing=1.4, fontsize=SMALL, frameon=False,
        labelcolor=theme.ink, handlelength=1.6,
    )  # fmt: skip
    for text in legend.get_texts():
        text.set_parse_math(False)


def whole_numbers(axis: Axis, ticks: int = 8) -> None:
    """Put ticks at integers only."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(ticks, integer=True, steps=[1, 2, 5, 10]))


def time_unit(most: float) -> tuple[float, str]:
    """The unit for an axis up to `most` seconds: its number per second, and its name."""
    return (1e3, "milliseconds") if most < 1 else (1.0, "seconds")


def time_axis(axes: Axes, values: Sequence[float]) -> None:
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


def label_points(axes: Axes, points: Sequence[tuple[float, float, str]], theme: Theme) -> None:
    """Put each name beside its point, at the first position where it covers no point and no other name."""
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox

    figure = figure_of(axes)
    figure.draw_without_rendering()  # computes the layout, and so the positions of points
    dot = 5 * figure.dpi / 72
    centres = [axes.transData.transform((x, y)) for x, y, _ in points]
    taken = [Bbox.from_extents(x - dot, y - dot, x + dot, y + dot) for x, y in centres]
    frame, edge = axes.get_window_extent(), figure.bbox.x1

    def placed(k: int, dx: float, dy: float, side: Literal["left", "center", "right"]) -> tuple[Annotation, Bbox]:
        x, y, name = points[k]
        line = {"arrowstyle": "-", "color": theme.pale, "linewidth": 0.8} if abs(dy) > NEAR else None
        note = axes.annotate(
            name, (x, y), (dx, dy), textcoords="offset points", ha=side, va="center", fontsize=SMALL, color=theme.ink,
            parse_math=False, path_effects=[withStroke(linewidth=3, foreground=theme.paper)], arrowprops=line,
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


def label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]], theme: Theme) -> None:
    """Put the name of each line to the right of its end; names are moved apart so that they do not overlap.

    An end is x, y, name and colour; one that is not finite gets no name.
    """
    least, most = axes.get_ylim()
    gap = 0.2 / (figure_of(axes).get_figheight() - 1.1) * (most - least)  # 0.2 inches
    above = least - gap
    for x, y, name, colour in sorted((end for end in ends if math.isfinite(end[1])), key=lambda end: end[1]):
        above = max(y, above + gap)
        place = (1.05, (above - least) / (most - least))
        axes.annotate(
            short(name), (x, y), place, textcoords="axes fraction", va="center", fontsize=SMALL, color=theme.ink,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 1.4, "relpos": (0, 0.5)},
            annotation_clip=False, parse_math=False,
        )  # fmt: skip


def png(figure: Figure) -> bytes:
    """The figure as a PNG file with a palette, a third of the size of one with 24 bits per pixel."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas, file = FigureCanvasAgg(figure), io.BytesIO()
    canvas.draw()  # type: ignore[no-untyped-call] # of matplotlib's stubs
    drawn = numpy.asarray(canvas.buffer_rgba())  # type: ignore[no-untyped-call] # of matplotlib's stubs
    image = Image.fromarray(drawn).convert("RGB")
    image.quantize(128, dither=Image.Dither.NONE).save(file, format="png", optimize=True)
    return file.getvalue()
