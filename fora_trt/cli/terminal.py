"""What is said on a terminal: stages, bars and tables."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.table import Table

    from fora_trt.engines.plan_store import PlanSource
    from fora_trt.evaluate.tables import Table as Found


WIDTH = 120
"""Of tables that do not go to a terminal."""


def say(as_json: bool, stage: str) -> None:
    """Tell how far a command is, on the side where it is in nobody's way."""
    if not as_json:
        click.echo(f"{stage} ...", err=True)


def watched(what: str, quiet: bool) -> Callable[[Iterable[Any]], Iterator[Any]]:
    """A progress bar around an iteration, on a terminal only."""

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
    """One line that says what is going on, on a terminal only."""
    if quiet or not sys.stderr.isatty():
        yield lambda stage: None
        return
    from rich.console import Console

    with Console(stderr=True).status("") as shown:
        yield shown.update


@contextmanager
def bar(quiet: bool) -> Iterator[Callable[[float, str], None]]:
    """A bar that shows a fraction and a phase, on a terminal only."""
    if quiet or not sys.stderr.isatty():
        yield lambda fraction, phase: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("building", total=1.0)
        yield lambda fraction, phase: progress.update(task, completed=fraction, description=phase)


@contextmanager
def plan_source(engines: Path, batch: int, quiet: bool) -> Iterator[PlanSource]:
    """Where plans come from, with a word and a bar when some must be built."""
    from fora_trt.engines.plan_store import PlanSource

    with bar(quiet) as progress:
        yield PlanSource(engines, batch, lambda line: say(quiet, line), progress)


def new_table(title: str, *columns: str, texts: int = 1) -> Table:
    """An empty table; the first `texts` columns are words, all others are figures, to the right."""
    from rich import box
    from rich.table import Table

    table = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < texts else "right")
    return table


def print_found(found: Found) -> None:
    """A table of a report, or as much of it as fits a line; the report has all."""
    from rich.console import Console

    found = found.fitting(Console().width if sys.stdout.isatty() else WIDTH)
    table = new_table(found.title, *found.header, texts=found.texts)
    for row in found.rows:
        table.add_row(*row)
    print_table(table)


def print_table(table: Table) -> None:
    """Print on standard output, as wide as the terminal or `WIDTH`."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else WIDTH, markup=False).print(table)


def in_bytes(count: float) -> str:
    """A number of bytes with its unit."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
