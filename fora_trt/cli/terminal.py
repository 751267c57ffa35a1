"""Terminal output: progress lines, progress bars and tables."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.table import Table

    from fora_trt.engines.options import EngineOptions
    from fora_trt.report.tables import Table as Found


WIDTH = 120
"""Columns of a table that is not printed to a terminal."""


def say(as_json: bool, stage: str) -> None:
    """Print the current stage of a command to standard error; nothing with --json."""
    if not as_json:
        click.echo(f"{stage} ...", err=True)


def watched(what: str, quiet: bool) -> Callable[[Iterable[Any]], Iterator[Any]]:
    """A function that wraps an iterable in a progress bar, on a terminal only."""

    def watch(items: Iterable[Any]) -> Iterator[Any]:
        if quiet or not sys.stderr.isatty():
            yield from items
            return
        from rich.console import Console
        from rich.progress import track

        yield from track(items, description=what, console=Console(stderr=True), transient=True)

    return watch


@contextmanager
def status(quiet: bool) -> Iterator[Callable[[str], None]]:
    """A status line that shows the current stage, on a terminal only."""
    if quiet or not sys.stderr.isatty():
        yield lambda stage: None
        return
    from rich.console import Console

    with Console(stderr=True).status("") as shown:
        yield shown.update


@contextmanager
def bar(quiet: bool) -> Iterator[Callable[[float, str], None]]:
    """A progress bar with a fraction and a phase, on a terminal only; shown from the first call until fraction 1."""
    if quiet or not sys.stderr.isatty():
        yield lambda fraction, phase: None
        return
    from rich.console import Console
    from rich.progress import Progress

    progress = Progress(console=Console(stderr=True), transient=True)
    task = progress.add_task("building", total=1.0)

    def show(fraction: float, phase: str) -> None:
        progress.start()
        progress.update(task, completed=fraction, description=phase)
        if fraction >= 1:
            progress.stop()

    try:
        yield show
    finally:
        progress.stop()


@contextmanager
def plan_source(engines: Path, batch: int, quiet: bool) -> Iterator[EngineOptions]:
    """Engine options with this folder of plans; building missing plans prints a line and shows a progress bar."""
    from fora_trt.engines.options import EngineOptions

    with bar(quiet) as progress:
        yield EngineOptions(engines, batch, lambda line: say(quiet, line), progress)


def new_table(title: str, *columns: str, texts: int = 1) -> Table:
    """An empty table; the first `texts` columns are text (aligned left), all others are numbers (aligned right)."""
    from rich import box
    from rich.table import Table

    table = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < texts else "right")
    return table


def print_found(found: Found) -> None:
    """Print a table of a report; columns that do not fit the line are left out (the report has all)."""
    from rich.console import Console

    found = found.fitting(Console().width if sys.stdout.isatty() else WIDTH)
    table = new_table(found.title, *found.header, texts=found.texts)
    for row in found.rows:
        table.add_row(*row)
    print_table(table)


def print_table(table: Table) -> None:
    """Print a table to standard output, with the width of the terminal or `WIDTH`."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else WIDTH, markup=False).print(table)


def in_bytes(count: float) -> str:
    """A number of bytes with its unit."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
