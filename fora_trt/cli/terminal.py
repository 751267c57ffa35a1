"""Terminal output: the display of work in progress, and tables."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from operator import length_hint
from pathlib import Path
from threading import Event, RLock, Thread
from typing import TYPE_CHECKING, Any

import click

from fora_trt import __version__

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID
    from rich.table import Table

    from fora_trt.engines.options import EngineOptions
    from fora_trt.report.tables import Table as Found


VERBOSITY = "fora_trt.verbosity"
"""Key of the option that was given, `verbose` or `quiet`, in the `meta` of a context."""

WIDTH = 120
"""Columns of a table that is not printed to a terminal."""


PAUSE = 30.0
"""Seconds between two lines about progress where standard error is not a terminal."""

SURE_AFTER = 3.0
"""Seconds of work before the first estimate."""


class Display:
    """The one live display of the process, on standard error: all work in progress reports to it.

    A terminal shows a bar, which is there only while a task runs. Elsewhere a line is printed every `PAUSE` seconds,
    and an estimate soon after a task begins that takes longer. Tasks can begin within another; then the outermost with
    a known number of steps is shown, and a task within it counts as a part of its next step. `quiet` shows nothing.
    """

    def __init__(self) -> None:
        self.quiet = False
        self._tasks: list[Task] = []
        self._stage: Task | None = None
        self._bar: tuple[Progress, TaskID] | None = None
        self._in_bar: Task | None = None
        self._ended: Event | None = None
        self._lock = RLock()

    def say(self, stage: str) -> None:
        """Print a stage that begins, unless `quiet`; it lasts until the next stage or task begins."""
        if self.quiet:
            return
        with self._lock:
            self._stage = Task(self, stage)
            click.echo(f"{stage} ...", err=True)
            self._start_lines()

    @contextmanager
    def task(self, what: str, total: float | None = None, nests: bool = True) -> Iterator[Task]:
        """A task that is shown until the block ends; `total` is in the unit of its steps, None if unknown.

        `nests` says whether a task within it counts as a part of its next step.
        """
        task = Task(self, what, total, nests)
        if self.quiet:
            yield task
            return
        with self._lock:
            self._stage = None
            self._tasks.append(task)
            self._start_bar() if sys.stderr.isatty() else self._start_lines()
            self.show()
        try:
            yield task
        finally:
            with self._lock:
                self._tasks.remove(task)
                if not self._tasks:
                    self.end()

    def show(self) -> None:
        """Show what changed in a task."""
        if not self._tasks:
            return
        task = self._shown()
        done = self._done(task)
        if self._bar is not None:
            bars, row = self._bar
            if task is not self._in_bar:  # its speed is that of another
                self._in_bar = task
                bars.reset(row, total=1.0 if task.total else None)
            bars.update(row, completed=done, total=1.0 if task.total else None, description=task.what)
        elif not task.estimated and (left := task.seconds_left(done)) is not None and task.seconds() > SURE_AFTER:
            task.estimated = True
            if left > PAUSE:
                click.echo(f"{task.what}: about {in_time(left)} left, judging by {done:.1%} of it", err=True)

    def line(self) -> str:
        """The work in progress as one line of text."""
        task = self._shown()
        done = self._done(task)
        left = task.seconds_left(done)
        part = f"{done:.0%} done, " if task.total else ""
        rest = "" if left is None else f", about {in_time(left)} left"
        return f"{task.what}: {part}{in_time(task.seconds())} so far{rest}"

    def end(self) -> None:
        """End what is shown."""
        with self._lock:
            self._stage = self._in_bar = None
            if self._bar is not None:
                self._bar[0].stop()
            if self._ended is not None:
                self._ended.set()
            self._bar = self._ended = None

    def _shown(self) -> Task:
        """The outermost task with a known number of steps, or else the innermost; the stage if there is no task."""
        tasks = self._tasks or ([self._stage] if self._stage else [])
        return next((one for one in tasks if one.total), tasks[-1])

    def _done(self, task: Task) -> float:
        """The fraction of a task that is done, with the part of its next step that is done. 0 if it is unknown."""
        if not task.total:
            return 0.0
        inner = self._tasks[self._tasks.index(task) + 1 :] if task.nests else []
        return min(1.0, (task.done + (self._done(inner[0]) if inner else 0.0)) / task.total)

    def _start_bar(self) -> None:
        if self._bar is not None:
            return
        from rich.console import Console
        from rich.progress import Progress

        bars = Progress(console=Console(stderr=True, markup=False), transient=True, redirect_stdout=False)
        self._bar = bars, bars.add_task("", total=None)
        bars.start()

    def _start_lines(self) -> None:
        if self._ended is None and not sys.stderr.isatty():
            self._ended = Event()
            Thread(target=self._print_lines, args=(self._ended,), daemon=True).start()

    def _print_lines(self, ended: Event) -> None:
        while not ended.wait(PAUSE):
            with self._lock:
                if not ended.is_set():
                    click.echo(self.line(), err=True)


class Task:
    """Work in progress: what it is, its steps, and how many of them are done."""

    def __init__(self, display: Display, what: str, total: float | None = None, nests: bool = True) -> None:
        self.what, self.total, self.nests, self.done = what, total, nests, 0.0
        self.estimated = False
        self._display, self._began = display, time.monotonic()

    def update(self, done: float | None = None, what: str | None = None) -> None:
        """Set the number of steps that are done, or the text."""
        self.done = self.done if done is None else done
        self.what = self.what if what is None else what
        self._display.show()

    def restart(self, total: float) -> None:
        """Count from 0 again, to another total."""
        self.done, self.total, self.estimated, self._began = 0.0, total, False, time.monotonic()

    def seconds(self) -> float:
        """Seconds since the task began."""
        return time.monotonic() - self._began

    def seconds_left(self, part: float) -> float | None:
        """Estimated seconds to the end if this part is done; None if it is 0."""
        return self.seconds() * (1 - part) / part if part else None


DISPLAY = Display()


def say(stage: str) -> None:
    """Print the stage of a command that begins to standard error."""
    DISPLAY.say(stage)


def watched(what: str) -> Callable[[Iterable[Any]], Iterator[Any]]:
    """A function that wraps an iterable and shows how much of it is done."""

    def watch(items: Iterable[Any]) -> Iterator[Any]:
        with DISPLAY.task(what, length_hint(items) or None) as task:
            for done, item in enumerate(items, 1):
                yield item
                task.update(done)

    return watch


@contextmanager
def status(what: str) -> Iterator[Callable[..., None]]:
    """A function `tell(stage, total=None)` that shows the stage that begins; `total` counts the stages from here."""
    with DISPLAY.task(what) as task:

        def tell(stage: str, total: float | None = None) -> None:
            if total is not None:
                task.restart(total)
                task.update(what=stage)
            else:
                task.update(task.done + 1 if task.total else None, stage)

        yield tell


@contextmanager
def bar() -> Iterator[Callable[[float, str], None]]:
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

        yield show


@contextmanager
def plan_source(engines: Path, batch: int) -> Iterator[EngineOptions]:
    """Engine options with this folder of plans; building missing plans prints a line and shows a progress bar."""
    from fora_trt.engines.options import EngineOptions

    with bar() as progress:
        yield EngineOptions(engines, batch, say, progress)


def print_json(result: Mapping[str, Any]) -> None:
    """Print the result of the running command as one JSON object, with the options that it was called with."""
    context = click.get_current_context()
    options = {name: value for name, value in context.params.items() if name != "as_json"}
    called = {"command": context.info_name, "fora_trt": __version__, "options": options}
    click.echo(json.dumps({**called, **result}, default=str))


def new_table(title: str, *columns: str, texts: int = 1) -> Table:
    """An empty table; the first `texts` columns are text (aligned left), all others are numbers (aligned right)."""
    from rich import box
    from rich.table import Table

    table = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < texts else "right", overflow="fold")
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
