"""Terminal output: the display of work in progress, and tables."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from operator import length_hint
from pathlib import Path
from threading import Event, RLock, Thread
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID
    from rich.table import Table

    from fora_trt.engines.options import EngineOptions
    from fora_trt.report.tables import Table as Found


WIDTH = 120
"""Columns of a table that is not printed to a terminal."""


PAUSE = 30.0
"""Seconds between two lines about progress where standard error is not a terminal."""


class Display:
    """The one live display of the process, on standard error: all work in progress reports to it.

    A terminal shows one bar per task, in a single display that is there only while a task runs. Elsewhere a line about
    the innermost task is printed every `PAUSE` seconds, and an estimate after its first step if it takes longer.
    """

    def __init__(self) -> None:
        self._tasks: list[Task] = []
        self._bars: Progress | None = None
        self._ended: Event | None = None
        self._lock = RLock()

    @contextmanager
    def task(self, what: str, total: float | None = None) -> Iterator[Task]:
        """A task that is shown until the block ends; `total` is in the unit of its steps, None if unknown."""
        task = Task(self, what, total)
        with self._lock:
            self._tasks.append(task)
            if len(self._tasks) == 1:
                self._start()
            if self._bars is not None:
                task.row = self._bars.add_task(what, total=total)
        try:
            yield task
        finally:
            with self._lock:
                self._tasks.remove(task)
                if self._bars is not None and task.row is not None:
                    self._bars.remove_task(task.row)
                if not self._tasks:
                    self._stop()

    def show(self, task: Task) -> None:
        """Show what changed in a task."""
        if self._bars is not None and task.row is not None:
            self._bars.update(task.row, completed=task.done, total=task.total, description=task.what)
        elif not task.estimated and (left := task.seconds_left()) is not None:
            task.estimated = True
            if left > PAUSE:
                click.echo(f"{task.what}: about {in_time(left)} left, by the first of {task.total:g} steps", err=True)

    def _start(self) -> None:
        if not sys.stderr.isatty():
            self._ended = Event()
            Thread(target=self._print_lines, args=(self._ended,), daemon=True).start()
            return
        from rich.console import Console
        from rich.progress import Progress

        self._bars = Progress(console=Console(stderr=True, markup=False), transient=True, redirect_stdout=False)
        self._bars.start()

    def _stop(self) -> None:
        if self._bars is not None:
            self._bars.stop()
        if self._ended is not None:
            self._ended.set()
        self._bars = self._ended = None

    def _print_lines(self, ended: Event) -> None:
        while not ended.wait(PAUSE):
            with self._lock:
                if self._tasks:
                    click.echo(self._tasks[-1].line(), err=True)


class Task:
    """Work in progress: what it is, its steps, and how many of them are done."""

    def __init__(self, display: Display, what: str, total: float | None) -> None:
        self.what, self.total, self.done = what, total, 0.0
        self.row: TaskID | None = None
        self.estimated = False
        self._display, self._began = display, time.monotonic()

    def update(self, done: float | None = None, what: str | None = None) -> None:
        """Set the number of steps that are done, or the text."""
        self.done = self.done if done is None else done
        self.what = self.what if what is None else what
        self._display.show(self)

    def restart(self, total: float) -> None:
        """Count from 0 again, to another total."""
        self.done, self.total, self.estimated, self._began = 0.0, total, False, time.monotonic()

    def seconds_left(self) -> float | None:
        """Estimated seconds to the end; None before the first step, or if the number of steps is unknown."""
        if not self.total or not self.done:
            return None
        return (time.monotonic() - self._began) * (self.total - self.done) / self.done

    def line(self) -> str:
        """The task as one line of text."""
        part = f"{self.done / self.total:.0%} done, " if self.total else ""
        left = self.seconds_left()
        rest = "" if left is None else f", about {in_time(left)} left"
        return f"{self.what}: {part}{in_time(time.monotonic() - self._began)} so far{rest}"


DISPLAY = Display()


def say(as_json: bool, stage: str) -> None:
    """Print the current stage of a command to standard error; nothing with --json."""
    if not as_json:
        click.echo(f"{stage} ...", err=True)


def watched(what: str, quiet: bool) -> Callable[[Iterable[Any]], Iterator[Any]]:
    """A function that wraps an iterable and shows how much of it is done."""

    def watch(items: Iterable[Any]) -> Iterator[Any]:
        if quiet:
            yield from items
            return
        with DISPLAY.task(what, length_hint(items) or None) as task:
            for done, item in enumerate(items, 1):
                yield item
                task.update(done)

    return watch


@contextmanager
def status(quiet: bool, what: str) -> Iterator[Callable[..., None]]:
    """A function `tell(stage, total=None)` that shows the stage that begins; `total` counts the stages from here."""
    with ExitStack() as shown:
        task = None if quiet else shown.enter_context(DISPLAY.task(what))

        def tell(stage: str, total: float | None = None) -> None:
            if task is None:
                return
            if total is not None:
                task.restart(total)
                task.update(what=stage)
            else:
                task.update(task.done + 1 if task.total else None, stage)

        yield tell


@contextmanager
def bar(quiet: bool) -> Iterator[Callable[[float, str], None]]:
    """A function that shows a fraction and a phase, from the first call until fraction 1."""
    with ExitStack() as shown:
        tasks: list[Task] = []

        def show(fraction: float, phase: str) -> None:
            if not tasks and fraction < 1:
                tasks.append(shown.enter_context(DISPLAY.task(phase, 1.0)))
            for task in tasks:
                task.update(fraction, phase)
            if fraction >= 1:
                tasks.clear()
                shown.close()

        yield (lambda fraction, phase: None) if quiet else show


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


def in_time(seconds: float) -> str:
    """A duration, rounded to the unit in which it is read."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def in_bytes(count: float) -> str:
    """A number of bytes with its unit."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
