"""Checks every backend on a GPU within a time budget of about half an hour: errors, times and host-device copies.

    python -m benchmarks.gpu_check --minutes 28
    python -m benchmarks.gpu_check --resume
    python -m benchmarks.gpu_check --device cpu --minutes 8

Each row of `benchmarks/gpu_rows.py` is a process with a time limit. A finished row is written to the disk at once, and
to results/gpu-check_<hardware>_<date>.json and .md. The check needs no checkpoint and no network; backends that are not
installed, such as TensorRT, are recorded as absent.
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
def why_absent(target: str, device_type: str) -> str | None:
    """Why a backend does not work on this machine; None if it works, and for a PyTorch reference."""
    if (backend := BACKENDS.get(target)) is None:
        return None
    if problem := backend.problem():
        return problem
    if device_type == "cuda" and not backend.has_cuda():
        return f"the installed {target} supports only the CPU"
    return None


def why_row_absent(row: Row, device_type: str) -> str | None:
    """Why a row cannot run on this machine; None if it can."""
    if row.kind == "tests" and find_spec("pytest") is None:
        return "pytest is not installed"
    return why_absent(row.target, device_type)


def _named(context: click.Context, parameter: click.Parameter, value: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", value):
        raise click.BadParameter(f"{value!r} is not a device; give cpu, cuda or cuda:N")
    return value


def _check_device(name: str) -> None:
    import torch

    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise click.BadParameter(
            f"torch cannot use {name} on this machine; see 'fora-trt doctor', or give --device cpu",
            param_hint="--device",
        )


def _listing(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        expected = ", ".join(f"{one.of} {one}{' (fixed)' if one.fixed else ''}" for one in row.expects)
        lines.append(
            f"{row.name}: about {row.estimate:.0f} s, at most {row.limit:.0f} s; expected {expected or 'to finish'}"
        )
    return "\n".join(lines)


def _default_jobs(device_type: str) -> int:
    return max(1, min(4, len(os.sched_getaffinity(0)) // 4)) if device_type == "cuda" else 1


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _identity_of(record: Record, device_type: str) -> dict[str, str]:
    """The identity of a run, which must match for a row to be reused: device type, device name, digest of all sources.

    The commit is not part of it: a commit that adds a result changes no source, and a tree with uncommitted changes or
    without git has no commit.
    """
    about = record["details"]["measured_on"]
    name = about["gpu"] if device_type == "cuda" else about["processor"]
    return {"type": device_type, "device": str(name), "sources": f"sources {about['sources']}"}


class Check:
    """One run of the check: the environment row, then the rows without a reusable result, then the result files."""

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
        """The reused records and those of this run."""
        return [record for record in self.journal.read() if record.get("identity") == self.driver.identity]

    def run(self, rows: Sequence[Row]) -> int:
        """Run the rows; return the exit code."""
        code = 0
        try:
            if not self._find_environment(rows[0]):
                return 1
            self._run_rest(rows[1:])
        except KeyboardInterrupt:
            click.echo("interrupted; continue with --resume", err=True)
            code = INTERRUPTED
        path = self._write()
        click.echo(path.read_text())
        click.echo(f"wrote {path} and {path.with_suffix('.json').name}; the journal is {self.journal.path}")
        return code or int(any(record["status"] in FAILED for record in newest_of(self.records()).values()))

    def _find_environment(self, row: Row) -> bool:
        """Run the environment row, which determines the identity of this run; return whether it passed."""
        before = len(self.journal.read())
        self.driver.identity = {"type": self.device_type}
        self.driver.run([row], {})
        record = self.journal.read()[before]
        if record["status"] in FAILED or "measured_on" not in record["details"]:
            click.echo(f"the environment cannot be determined: {record['why']}", err=True)
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
                click.echo(f"{row.name}: {done[row.name]['status']} in an earlier run", err=True)
            elif why := why_row_absent(row, self.device_type):
                self.driver.keep_absent(row, why)
            else:
                left.append(row)
        self.driver.run(left, done)

    def _write(self) -> Path:
        return write_result(self.records(), self.all_rows, self.out)


def _report(path: Path, out: Path) -> int:
    """Write the result of an earlier run from its journal: of the rows with the device and sources of its last row."""
    records = Journal(path).read()
    if not records:
        raise click.BadParameter(f"{path} has no finished row; give the journal of a run", param_hint="--report")
    same = [record for record in records if record.get("identity") == records[-1].get("identity")]
    rows = rows_of(device_type_of(same))
    click.echo(as_markdown(same, rows))
    click.echo(f"wrote {write_result(same, rows, out)}")
    return int(any(record["status"] in FAILED for record in newest_of(same).values()))


@click.command()
@click.option(
    "--device", default="cuda:0", show_default=True, callback=_named, help="cuda:N, or cpu for a reduced set of rows."
)
@click.option(
    "--minutes", type=click.FloatRange(min=0, min_open=True), help="Time budget for all rows.  [default: no limit]"
)
@click.option(
    "--rows", "patterns", multiple=True, help="Rows to run: names, patterns or prefixes, such as 'time/digits'."
)
@click.option("--list", "listed", is_flag=True, help="Print the rows with their time limits and expected values.")
@click.option("--resume", is_flag=True, help="Keep passed rows of the journal; run those that failed or did not run.")
@click.option(
    "--report",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Write the result of this journal again; run nothing.",
)
@click.option(
    "--jobs", type=click.IntRange(min=1), help="Number of rows without timings run at once.  [default: cores / 4]"
)
@click.option("--work", type=click.Path(path_type=Path), default=WORK, help="Folder of bundles, logs and journal.")
@click.option("--journal", type=click.Path(path_type=Path), help="File of finished rows.  [default: WORK/rows.jsonl]")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, help="Folder of the .json and .md results.")
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
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, _interrupt)
    try:
        with FileLock(work / ".lock", timeout=0):
            if not resume and (aside := kept.set_aside()):
                click.echo(f"the rows of the previous run are kept in {aside}", err=True)
            check = Check(device, work.resolve(), out, kept, math.inf if minutes is None else minutes, jobs)
            context.exit(check.run(rows))
    except Timeout:
        raise click.ClickException(f"another check is running in {work}; give --work another folder") from None


if __name__ == "__main__":
    main()
