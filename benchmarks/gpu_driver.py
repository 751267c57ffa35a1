"""Runs the rows of the GPU check, each in a separate process, and keeps every finished row whatever happens.

A finished row is a line in a journal, which is written to the disk before the next row begins. This module does not
depend on what rows measure.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu_rows import Row

Record = dict[str, Any]
"""A line of the journal: `row`, `status`, `why`, `values` and more."""

DONE = ("passed", "look")
FAILED = ("failed", "timed out")
POLLED_EVERY = 0.05
LEAST_SECONDS = 1.0


class Journal:
    """Records of finished rows, one JSON object per line. An incomplete last line is ignored."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[Record]:
        """All complete records, in the order in which rows finished."""
        if not self.path.exists():
            return []
        lines = self.path.read_bytes().split(b"\n")[:-1]  # a line without a line end is incomplete
        return [record for line in lines if (record := _record_from(line)) is not None]

    def append(self, record: Record) -> None:
        """Add a record, and flush it to the disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            _end_last_line(file)
            file.write(json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def set_aside(self) -> Path | None:
        """Start an empty journal; rename the old one to a numbered file, and return its path (None if none exists)."""
        if not self.path.exists():
            return None
        number = 1 + sum(1 for _ in self.path.parent.glob(f"{self.path.stem}.*{self.path.suffix}"))
        return self.path.rename(self.path.with_suffix(f".{number}{self.path.suffix}"))


def _record_from(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "row" in record else None


def _end_last_line(file: Any) -> None:
    """End an incomplete last line, so that the next record starts on a new line; `read` ignores the incomplete one."""
    if file.seek(0, os.SEEK_END):
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")


def newest_of(records: Sequence[Record]) -> dict[str, Record]:
    """The latest record of each row."""
    return {record["row"]: record for record in records}


def taken_over(records: Sequence[Record], identity: Mapping[str, Any]) -> tuple[dict[str, Record], list[str]]:
    """The records to reuse, by row, and a message about records of other sources or another device."""
    foreign = [record for record in records if record.get("identity") != identity]
    newest = newest_of([record for record in records if record.get("identity") == identity])
    kept = {name: record for name, record in newest.items() if record["status"] in DONE}
    if not foreign:
        return kept, []
    seen = {tuple((record.get("identity") or {}).values()) for record in foreign}
    others = "; ".join(sorted(", ".join(map(str, values)) for values in seen))
    this = ", ".join(map(str, identity.values()))
    return kept, [f"{len(foreign)} rows of the journal are not reused: they belong to {others}; this run is {this}"]


@dataclass
class Running:
    """A running row; its process leads a process group."""

    row: Row
    process: subprocess.Popen[bytes]
    began: float
    limit: float
    found: Path
    log: Path
    beside: set[str]

    def end(self) -> None:
        """Kill the process and all processes that it started."""
        with suppress(ProcessLookupError):  # the group has already ended
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


Command = Callable[[Row, Path, int], list[str]]
"""Returns the command line of a row, from the row, its result file, and a pipe that closes when the parent ends."""


@dataclass
class Driver:
    """Runs rows in order while time is left until `deadline`; at most `jobs` rows that may run together."""

    journal: Journal
    work: Path
    command: Command
    jobs: int = 1
    deadline: float = math.inf
    identity: Mapping[str, Any] = field(default_factory=dict)
    report: Callable[[str], None] = print
    finished: Callable[[], object] = lambda: None

    def __post_init__(self) -> None:
        self._running: list[Running] = []
        self._watched, self._alive = os.pipe()  # the OS closes the second end when this process ends, however it does

    def run(self, rows: Sequence[Row], done: Mapping[str, Record]) -> list[str]:
        """Run the rows; `done` has records of earlier rows. Returns a message for each skipped row.

        All children are killed if this raises, for example on Ctrl-C.
        """
        waiting, skipped = [*rows], list[str]()
        statuses = {name: record["status"] for name, record in done.items()}
        try:
            while waiting or self._running:
                skipped += self._skip(waiting)
                self._start(waiting, statuses)
                statuses |= self._collect()
                if waiting or self._running:
                    time.sleep(POLLED_EVERY)
        finally:
            self.end()
        return skipped

    def end(self) -> None:
        """Kill all children."""
        for one in self._running:
            one.end()
        self._running = []

    def _skip(self, waiting: list[Row]) -> list[str]:
        left = self.deadline - time.monotonic()
        late = [row for row in waiting if row.estimate > left]
        for row in late:
            waiting.remove(row)
        sentences = [f"{row.name} takes about {row.estimate:.0f} s; {max(0, left):.0f} s are left" for row in late]
        for sentence in sentences:
            self.report(f"skipped: {sentence}")
        return sentences

    def _start(self, waiting: list[Row], statuses: dict[str, str]) -> None:
        for row in [*waiting]:
            needed = statuses.get(row.needs, "")
            if row.needs and needed not in DONE:
                if needed or not self._is_coming(row.needs, waiting):
                    waiting.remove(row)
                    why = f"it needs the row {row.needs}, which {needed or 'did not run'}"
                    self._keep(row, {"status": "failed", "why": why}, 0.0, set())
                    statuses[row.name] = "failed"
            elif self._may_start(row):
                waiting.remove(row)
                self._running.append(self._started(row))

    def _is_coming(self, name: str, waiting: Sequence[Row]) -> bool:
        return name in {row.name for row in (*waiting, *(one.row for one in self._running))}

    def _may_start(self, row: Row) -> bool:
        front = [one.row for one in self._running if not one.row.background]
        if row.background:
            return len(front) == len(self._running)
        return not front or (row.together and all(one.together for one in front) and len(front) < self.jobs)

    def _started(self, row: Row) -> Running:
        stem = row.name.replace("/", "_")
        found, log = self.work / "found" / f"{stem}.json", self.work / "logs" / f"{stem}.log"
        for path in (found, log):
            path.parent.mkdir(parents=True, exist_ok=True)
        found.unlink(missing_ok=True)
        limit = max(LEAST_SECONDS, min(row.limit, self.deadline - time.monotonic()))
        beside = {one.row.name for one in self._running}
        for one in self._running:
            one.beside.add(row.name)
        self.report(f"{row.name} (at most {limit:.0f} s)")
        with log.open("wb") as output:
            process = subprocess.Popen(
                self.command(row, found, self._watched),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a separate process group, which can be killed as a whole
                pass_fds=[self._watched],
            )
        return Running(row, process, time.monotonic(), limit, found, log, beside)

    def _collect(self) -> dict[str, str]:
        """Collect rows that ended or exceeded their time limit; return their statuses."""
        statuses = {}
        for one in [*self._running]:
            seconds = time.monotonic() - one.began
            ended = one.process.poll() is not None
            if ended or seconds > one.limit:
                one.end()  # also kills processes that the row left behind
                self._running.remove(one)
                outcome = outcome_of(one, timed_out=not ended)
                statuses[one.row.name] = outcome["status"]
                self._keep(one.row, outcome, seconds, one.beside)
        return statuses

    def _keep(self, row: Row, outcome: Record, seconds: float, beside: set[str]) -> None:
        self.journal.append(
            {
                "row": row.name,
                "kind": row.kind,
                **outcome,
                "expected": {one.of: f"{one}{' (fixed)' if one.fixed else ''}" for one in row.expects},
                "seconds": round(seconds, 1),
                "beside": sorted(beside),
                "identity": {**self.identity},
                "at": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            }
        )
        self.report(f"{row.name}: {outcome['status']}{'; ' if outcome['why'] else ''}{outcome['why']}")
        self.finished()

    def keep_absent(self, row: Row, why: str) -> None:
        """Record that a row cannot run on this machine."""
        self._keep(row, {"status": "absent", "why": why}, 0.0, set())


def outcome_of(running: Running, timed_out: bool) -> Record:
    """Status, reason, values and details of a row whose process has ended."""
    found = _found_in(running.found)
    values, details = found.get("values", {}), found.get("details", {})
    content = {"values": {name: _written(value) for name, value in values.items()}, "details": details}
    if timed_out and not found:
        return {"status": "timed out", "why": f"it was killed after {running.limit:.0f} s", **content}
    code = running.process.returncode
    if not found or found.get("failure"):
        return {"status": "failed", "why": found.get("failure") or _last_words(running.log, code), **content}
    status, deviations = running.row.judged(values)
    if code and not timed_out:
        deviations.append(f"the process exited with {code} after it had written its result")
        status = "look" if status == "passed" else status
    return {"status": status, "why": "; ".join(deviations), **content}


def _written(value: float) -> float | str:
    """A value for JSON, which cannot represent NaN and infinity: they become strings."""
    return value if math.isfinite(value) else str(value)


def _found_in(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found


def _last_words(log: Path, code: int) -> str:
    ended = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
    lines = log.read_text(errors="replace").strip().splitlines()
    return f"the process {ended}{': ' if lines else ' and printed nothing'}{lines[-1] if lines else ''}"


def command_of(device: str, work: Path) -> Command:
    """The command of this project's rows: `benchmarks.gpu_work` in this interpreter."""

    def command(row: Row, found: Path, watched: int) -> list[str]:
        options = ["--device", device, "--work", str(work), "--found", str(found), "--watched", str(watched)]
        return [sys.executable, "-m", "benchmarks.gpu_work", row.name, *options]

    return command
