"""Fill a GPU's half hour so that no result is lost: every backend, how exact and how fast it is, what it copies.

    python -m benchmarks.gpu_check --minutes 28
    python -m benchmarks.gpu_check --resume
    python -m benchmarks.gpu_check --device cpu --minutes 8

Each row of `benchmarks/gpu_rows.py` is a process with a time limit. A finished row is on the disk at once, and in
results/gpu-check_<hardware>_<date>.json and .md. It needs no checkpoint, no network and no TensorRT.
"""

from __future__ import annotations

import math
import os
import re
import signal
import time
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

import click
from filelock import FileLock, Timeout

from benchmarks.gpu_driver import FAILED, Driver, Journal, Record, command_of, newest_of, taken_over
from benchmarks.gpu_rows import Row, chosen_of, rows_of
from benchmarks.gpu_tables import as_markdown, device_type_of, write_result
from fora_trt.engines.backends import BACKENDS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
WORK = ROOT / "export" / ".gpu-check"
INTERRUPTED = 130


@cache
def why_absent(entrant: str, device_type: str) -> str | None:
    """Why a backend cannot be used on this machine; None for one that can, and for a reference."""
    if (backend := BACKENDS.get(entrant)) is None:
        return None
    if problem := backend.problem():
        return problem
    if device_type == "cuda" and not backend.has_cuda():
        return f"{entrant} is installed for the CPU alone"
    return None


def why_row_absent(row: Row, device_type: str) -> str | None:
    """Why a row cannot be run on this machine; None for one that can."""
    if row.kind == "tests" and find_spec("pytest") is None:
        return "pytest is not installed"
    return why_absent(row.entrant, device_type)


def _named(context: click.Context, parameter: click.Parameter, value: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", value):
        raise click.BadParameter(f"{value!r} is neither cpu nor cuda:N")
    return value


def _check_device(name: str) -> None:
    import torch

    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise click.BadParameter(
            f"torch can use no {name} here; see 'fora-trt doctor', or give --device cpu", param_hint="--device"
        )


def _listing(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        expected = ", ".join(f"{one.of} {one}{' (fixed)' if one.fixed else ''}" for one in row.expects)
        lines.append(
            f"{row.name}: about {row.estimate:.0f} s, at most {row.limit:.0f} s; expects {expected or 'to end'}"
        )
    return "\n".join(lines)


def _default_jobs(device_type: str) -> int:
    return max(1, min(4, len(os.sched_getaffinity(0)) // 4)) if device_type == "cuda" else 1


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _identity_of(record: Record, device_type: str) -> dict[str, str]:
    """What a row may only be taken over with: type and name of the device, and a digest of all sources.

    Not the commit: one that adds a result changes no source, and a tree with changes or without git has none.
    """
    about = record["details"]["measured_on"]
    name = about["gpu"] if device_type == "cuda" else about["processor"]
    return {"type": device_type, "device": str(name), "sources": f"sources {about['sources']}"}


class Check:
    """One call of the check: the environment first, then the rows that are left, then the result."""

    def __init__(self, device: str, work: Path, out: Path, journal: Journal, minutes: float, jobs: int | None) -> None:
        self.device_type, self.out, self.journal = device.partition(":")[0], out, journal
        self.all_rows = rows_of(self.device_type)
        self.driver = Driver(
            journal,
            work,
            command_of(device, work),
            jobs or _default_jobs(self.device_type),
            time.monotonic() + 60 * minutes,
            report=lambda line: click.echo(line, err=True),
        )

    def records(self) -> list[Record]:
        """Those that were taken over, and those of this call."""
        return [record for record in self.journal.read() if record.get("identity") == self.driver.identity]

    def run(self, rows: Sequence[Row]) -> int:
        """Run the rows; returns the exit code."""
        code = 0
        try:
            if not self._find_environment(rows[0]):
                return 1
            self._run_rest(rows[1:])
        except KeyboardInterrupt:
            click.echo("interrupted; --resume goes on", err=True)
            code = INTERRUPTED
        path = self._write()
        click.echo(path.read_text())
        click.echo(f"wrote {path} and {path.with_suffix('.json').name}; the journal is {self.journal.path}")
        return code or int(any(record["status"] in FAILED for record in newest_of(self.records()).values()))

    def _find_environment(self, row: Row) -> bool:
        """Always run: it tells which device and which sources this is."""
        before = len(self.journal.read())
        self.driver.identity = {"type": self.device_type}
        self.driver.run([row], {})
        record = self.journal.read()[before]
        if record["status"] in FAILED or "measured_on" not in record["details"]:
            click.echo(f"the environment cannot be told: {record['why']}", err=True)
            return False
        self.driver.identity = _identity_of(record, self.device_type)
        self.journal.append({**record, "identity": {**self.driver.identity}})
        return True

    def _run_rest(self, rows: Sequence[Row]) -> None:
        self.driver.finished = self._write
        others = [one for one in self.journal.read() if one["kind"] != "environment"]
        done, sentences = taken_over(others, self.driver.identity)
        for sentence in sentences:
            click.echo(sentence, err=True)
        left = []
        for row in rows:
            if row.name in done:
                click.echo(f"{row.name}: {done[row.name]['status']} before", err=True)
            elif why := why_row_absent(row, self.device_type):
                self.driver.keep_absent(row, why)
            else:
                left.append(row)
        self.driver.run(left, done)

    def _write(self) -> Path:
        return write_result(self.records(), self.all_rows, self.out)


def _report(path: Path, out: Path) -> int:
    """The result of an earlier run, from its journal: of the device and sources of its last row."""
    records = Journal(path).read()
    if not records:
        raise click.BadParameter(f"{path} has no finished row", param_hint="--report")
    same = [record for record in records if record.get("identity") == records[-1].get("identity")]
    rows = rows_of(device_type_of(same))
    click.echo(as_markdown(same, rows))
    click.echo(f"wrote {write_result(same, rows, out)}")
    return int(any(record["status"] in FAILED for record in newest_of(same).values()))


@click.command()
@click.option(
    "--device", default="cuda:0", show_default=True, callback=_named, help="cuda:N; cpu runs what a CPU can show."
)
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), help="Time for all rows; no limit without it.")
@click.option("--rows", "patterns", multiple=True, help="Names, patterns or beginnings, such as 'time/digits'.")
@click.option("--list", "listed", is_flag=True, help="Print the rows with their limits and what they expect.")
@click.option("--resume", is_flag=True, help="Go on: rows that failed or did not run.")
@click.option("--report", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="Of an earlier journal.")
@click.option(
    "--jobs", type=click.IntRange(min=1), help="Rows at a time, of those without times.  [default: cores / 4]"
)
@click.option("--work", type=click.Path(path_type=Path), default=WORK, help="Bundles, logs and journal.")
@click.option("--journal", type=click.Path(path_type=Path), help="Finished rows.  [default: WORK/rows.jsonl]")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, help="Folder of the .json and .md.")
@click.pass_context
def main(
    context: click.Context,
    device: str,
    minutes: float | None,
    patterns: tuple[str, ...],
    listed: bool,
    resume: bool,
    report: Path | None,
    jobs: int | None,
    work: Path,
    journal: Path | None,
    out: Path,
) -> None:
    """Check every backend on this GPU; exits with 1 if a row failed."""
    if report is not None:
        context.exit(_report(report, out))
    try:
        rows = chosen_of(rows_of(device.partition(":")[0]), patterns)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--rows") from None
    if listed:
        click.echo(_listing(rows))
        return
    _check_device(device)
    work.mkdir(parents=True, exist_ok=True)
    kept = Journal(journal or work / "rows.jsonl")
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, _interrupt)
    try:
        with FileLock(work / ".lock", timeout=0):
            if not resume and (aside := kept.set_aside()):
                click.echo(f"the rows of before are kept in {aside}", err=True)
            check = Check(device, work.resolve(), out, kept, math.inf if minutes is None else minutes, jobs)
            context.exit(check.run(rows))
    except Timeout:
        raise click.ClickException(f"another check is running in {work}; give --work another folder") from None


if __name__ == "__main__":
    main()
