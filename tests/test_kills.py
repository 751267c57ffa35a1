"""Commands that are killed at moments spread over their whole life, and what is there afterwards.

`KILLS=8 pytest -m slow tests/test_kills.py` kills each of the five commands eight times with each of both signals.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest

from fora_trt.bundle import Bundle
from fora_trt.engines.tensorrt.library import TENSORRT_RTX, library_from_name
from fora_trt.engines.tensorrt.plan_store import open_plans
from fora_trt.evaluate.work_folder import LOCK
from fora_trt.files import clear_unfinished
from fora_trt.report.page import _is_whole, read_report
from tests.processes import started

KILLS = int(os.environ.get("KILLS", "1"))
"""Of each command with each signal."""

LOCKS = {LOCK, ".report.lock"}
"""Empty files that stay and are used again."""

SECONDS = 10.0
"""In which a command ends after SIGTERM, and a process that it started after its end."""

MARK = "FORA_TEST_KILLS"


@dataclass(frozen=True)
class Case:
    """A command without --out, and the result in its folder: what must be the same as without a kill."""

    command: tuple[object, ...]
    result: Callable[[Path], Any]
    replaces: bool


@dataclass
class Ended:
    """A command that has ended, or was killed."""

    code: int | None
    hit: bool
    """Whether the signal came before its end."""
    said: str
    after: float
    """Seconds from its start to the signal."""
    seconds: float
    """From there, or without a signal from its start, to its end."""
    orphans: list[str]


@dataclass
class Place:
    """Folders of one command: --out, temporary files, and what it prints."""

    folder: Path
    case: Case

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def run(self, kill: signal.Signals | None = None, after: float = 0.0, twice: float | None = None) -> Ended:
        """Run the command, and send it a signal `after` these seconds, a second one `twice` seconds later."""
        log, mark = self.folder / "log", uuid4().hex
        (self.folder / "tmp").mkdir(parents=True, exist_ok=True)
        log.write_bytes(b"")
        began, hit = time.monotonic(), False
        process = started(
            *self.case.command,
            "--out",
            self.out,
            log=log,
            environment={"TMPDIR": str(self.folder / "tmp"), MARK: mark},
        )
        if kill is not None:
            pid = process.pid
            assert pid is not None
            process.join(after)
            hit = process.is_alive()
            began = time.monotonic()
            for pause in (0.0,) if twice is None else (0.0, twice):
                process.join(pause)
                if process.is_alive():
                    with suppress(ProcessLookupError):  # it ends just now
                        os.kill(pid, kill)
        process.join(120)
        taken = time.monotonic() - began
        if kill == signal.SIGKILL:
            until = time.monotonic() + SECONDS
            while orphans_of(mark) and time.monotonic() < until:
                time.sleep(0.1)
        return Ended(process.exitcode, hit, log.read_text(), after, taken, orphans_of(mark))

    def names(self) -> list[str]:
        """All files and folders, temporary ones too."""
        return sorted(str(one.relative_to(self.folder)) for one in self.folder.rglob("*"))


def orphans_of(mark: str) -> list[str]:
    """Commands of processes that have this mark in their environment."""
    found = []
    for one in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is another user's
            if mark.encode() in (one / "environ").read_bytes():
                found.append((one / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return found


def exported(out: Path) -> object:
    return Bundle.open(out / "px").manifest.files


def sampled(out: Path) -> object:
    return (out / "samples.npz").read_bytes()


def compared(out: Path) -> object:
    report = read_report(out)
    assert report is not None
    assert report.quality is not None
    assert _is_whole(out)
    rows = [row.model_dump(exclude={"seconds_per_image"}) for row in report.quality.rows]
    pictures = {path.name: np.load(path)["arr_0"].tobytes() for path in sorted((out / "quality").glob("*.npz"))}
    assert len(pictures) == len(rows)
    return json.dumps(rows), pictures, (out / "grid.png").read_bytes()


def timed(out: Path) -> object:
    report = read_report(out)
    assert report is not None
    assert report.bench is not None
    assert _is_whole(out)
    assert not report.bench.interrupted
    return sorted(
        (row.backend, row.setting.model_dump_json()) for row in report.bench.rows if not row.setting.control_of
    )


@pytest.fixture
def cases(pixels: Bundle, run_folder: Path) -> dict[str, Case]:
    def built(out: Path) -> object:
        clear_unfinished(out / pixels.manifest.name)  # as each command does that looks for plans
        (folder,) = (out / pixels.manifest.name).iterdir()
        return folder.name, [*open_plans(folder, pixels, library_from_name(TENSORRT_RTX)).manifest.plans]

    quick = (pixels.folder, "--steps", 6)
    checkpoint = run_folder / "checkpoints" / "pixels"
    many = (*quick, "--num-images", 160, "--batch-size", 8, "--resume")
    few = (*quick, "--num-images", 24, "--batch-size", 4, "--cache-intervals", 2, "--resume")
    rows = (
        *quick,
        "--backends",
        "onnxruntime",
        "--cache-intervals",
        "1,3",
        "--batch-sizes",
        1,
        "--repeats",
        2,
        "--no-memory",
    )
    return {
        "export": Case(("export", checkpoint, "--name", "px", "--force"), exported, replaces=True),
        "build": Case(("build", pixels.folder, "--backend", TENSORRT_RTX, "--force"), built, replaces=True),
        "sample": Case(("sample", *many), sampled, replaces=False),
        "quality": Case(("quality", *few), compared, replaces=False),
        "bench": Case(("bench", *rows, "--force"), timed, replaces=True),
    }


def moments(command: str, seconds: float) -> Iterator[tuple[signal.Signals, int, float]]:
    """`KILLS` moments for each signal, one in each equal part of the duration and a little beyond."""
    for kill in (signal.SIGKILL, signal.SIGTERM):
        chance = random.Random(f"{command} {kill}")
        for number in range(KILLS):
            yield kill, number, seconds * 1.02 * (number + chance.random()) / KILLS


@pytest.mark.slow
@pytest.mark.parametrize("command", ["export", "build", "sample", "quality", "bench"])
def test_killed_at_any_moment_nothing_is_lost_or_left(command: str, cases: dict[str, Case], tmp_path: Path) -> None:
    """Every second kill hits a command that replaces a result, if it can; every second SIGTERM comes twice."""
    if command == "build":
        pytest.importorskip("tensorrt_rtx")
    case = cases[command]
    started("--version").join()  # the server is there now
    whole = Place(tmp_path / "whole", case)
    for _ in range(2 if case.replaces else 1):  # the second one replaces
        undisturbed = whole.run()
        assert undisturbed.code == 0, undisturbed.said
    wanted, names = case.result(whole.out), whole.names()
    for kill, number, after in moments(command, undisturbed.seconds):
        replaces = case.replaces and number % 2 == 0
        place, ended = whole, None
        while ended is None or not ended.hit:  # it was faster this time
            place = whole if replaces else Place(tmp_path / uuid4().hex, case)
            ended = place.run(kill, after, twice=0.02 if kill == signal.SIGTERM and number % 2 else None)
            after *= 0.9
        print(
            f"{command} {kill.name} {number}: after {ended.after:.2f} of {undisturbed.seconds:.2f} s, "
            f"{'replacing' if replaces else 'new'}; exit code {ended.code} after {ended.seconds:.2f} s"
        )
        assert not ended.orphans
        if kill == signal.SIGTERM and (ended.code or ended.seconds > 2):  # else it was at its very end
            check_terminated(ended, place, command)
        if replaces:
            assert case.result(place.out) == wanted
        again = place.run()
        assert again.code == 0, again.said
        assert case.result(place.out) == wanted
        assert place.names() == names


def check_terminated(ended: Ended, place: Place, command: str) -> None:
    """Exit code 130 in time, one sentence, and nothing temporary."""
    assert ended.code == 130, ended.said
    assert ended.seconds < SECONDS
    assert [line[:11] for line in ended.said.splitlines()].count("interrupted") == 1, ended.said
    assert ("--resume" in ended.said) == (command in ("sample", "quality")), ended.said
    assert "Traceback" not in ended.said, ended.said
    left = [Path(one) for one in place.names()]
    assert not [one for one in left if one.parts[0] == "tmp" and one != Path("tmp")]
    assert not [one for one in left if one.name.startswith(".") and one.name not in LOCKS]
