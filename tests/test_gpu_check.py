"""No finished row of the GPU check is lost, nothing is left running, and a wrong result makes its row fail."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks import gpu_check, gpu_work
from benchmarks.gpu_driver import Driver, Journal, Record, newest_of, taken_over
from benchmarks.gpu_rows import FORECAST, Expected, Exported, Row, chosen_of, rows_of
from benchmarks.gpu_tables import as_markdown
from benchmarks.gpu_work import Found, Place, found_of
from fora_trt import Denoiser
from fora_trt.bundle import Bundle
from fora_trt.contract import Optimization
from fora_trt.engines.backends import BACKENDS
from fora_trt.engines.base import Launch
from fora_trt.evaluate.targets import REFERENCES
from fora_trt.runtime.window import Window
from fora_trt.sampling.loop import Trajectory

ROOT = Path(__file__).parents[1]
IDENTITY = {"type": "cpu", "device": "a processor", "sources": "sources 1"}


def row_named(name: str, limit: float = 30, **more: object) -> Row:
    return Row(name, "parity", limit, 0, **more)  # type: ignore[arg-type]


def writing(found: Path, body: str = "", values: str = "{}") -> list[str]:
    """A process that runs `body` and then writes what it found."""
    written = f"open({str(found)!r}, 'w').write('{{\"values\": {values}}}')"
    return [sys.executable, "-c", f"import os, sys, time\n{body}\n{written}"]


def driver_of(folder: Path, command: Callable[[Row, Path, int], list[str]], **more: object) -> Driver:
    journal = Journal(folder / "rows.jsonl")
    return Driver(journal, folder, command, identity=IDENTITY, report=lambda _: None, **more)  # type: ignore[arg-type]


def statuses_of(journal: Journal) -> dict[str, str]:
    return {name: record["status"] for name, record in newest_of(journal.read()).items()}


# -- the journal -----------------------------------------------------------------------------------------------------


def test_a_half_written_last_line_is_dropped_and_the_next_record_is_whole(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "rows.jsonl")
    journal.append({"row": "a", "status": "passed"})
    with journal.path.open("a") as file:
        file.write('{"row": "b", "stat')
    assert [record["row"] for record in journal.read()] == ["a"]
    journal.append({"row": "c", "status": "failed"})
    assert [record["row"] for record in journal.read()] == ["a", "c"]


def test_rows_of_other_sources_or_devices_and_failed_rows_are_not_taken_over() -> None:
    records: list[Record] = [
        {"row": "a", "status": "passed", "identity": IDENTITY},
        {"row": "b", "status": "failed", "identity": IDENTITY},
        {"row": "c", "status": "passed", "identity": IDENTITY | {"sources": "sources 2"}},
        {"row": "d", "status": "look", "identity": IDENTITY},
    ]
    done, sentences = taken_over(records, IDENTITY)
    assert [*done] == ["a", "d"]
    assert sentences == [
        "1 rows of the journal are not reused: they belong to cpu, a processor, sources 2; this run is cpu, "
        "a processor, sources 1"
    ]


def test_the_rows_of_an_earlier_run_are_set_aside_and_not_lost(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "rows.jsonl")
    assert journal.set_aside() is None
    for number in (1, 2):
        journal.append({"row": str(number)})
        assert journal.set_aside() == tmp_path / f"rows.{number}.jsonl"


# -- the driver ------------------------------------------------------------------------------------------------------


def test_every_outcome_is_a_record_with_its_reason(tmp_path: Path) -> None:
    bodies = {
        "good": "",
        "wrong": "",
        "far": "",
        "raises": "raise RuntimeError('CUDA error: an illegal memory access was encountered')",
        "crashes": "os.abort()",
        "hangs": "time.sleep(60)",
    }
    values = {"good": '{"x": 1}', "wrong": '{"x": 3}', "far": '{"x": 2}'}
    expects = (Expected("x", 0, 2, fixed=True), Expected("x", 0, 1))
    rows = [row_named(name, limit=1 if name == "hangs" else 30, expects=expects) for name in bodies]
    rows.append(row_named("needs", needs="wrong"))

    def command(row: Row, found: Path, watched: int) -> list[str]:
        return writing(found, bodies[row.name], values.get(row.name, "{}"))

    driver = driver_of(tmp_path, command)
    driver.run(rows, {})
    why = {name: record["why"] for name, record in newest_of(driver.journal.read()).items()}
    assert statuses_of(driver.journal) == {
        "good": "passed",
        "wrong": "failed",
        "far": "look",
        "raises": "failed",
        "crashes": "failed",
        "hangs": "timed out",
        "needs": "failed",
    }
    assert why["wrong"] == "x is 3; expected 0 to 2 (fixed); x is 3; expected 0 to 1"
    assert why["raises"].endswith("RuntimeError: CUDA error: an illegal memory access was encountered")
    assert why["crashes"].startswith("the process was killed by SIGABRT")
    assert why["hangs"] == "it was killed after 1 s"
    assert why["needs"] == "it needs the row wrong, which failed"


def test_a_row_without_enough_time_left_is_skipped_with_a_word(tmp_path: Path) -> None:
    driver = driver_of(tmp_path, lambda row, found, watched: writing(found), deadline=time.monotonic() + 20)
    rows = [Row("long", "time", 100, 50), Row("short", "time", 10, 1)]
    assert driver.run(rows, {}) == ["long takes about 50 s; 20 s are left"]
    assert statuses_of(driver.journal) == {"short": "passed"}


def test_only_rows_that_go_together_run_at_the_same_time(tmp_path: Path) -> None:
    rows = [
        row_named("export", background=True),
        row_named("a", together=True),
        row_named("b", together=True),
        row_named("timed"),
        row_named("large", needs="export"),
    ]
    sleeps = {"export": 1.5}
    command = lambda row, found, watched: writing(found, f"time.sleep({sleeps.get(row.name, 0.3)})")  # noqa: E731
    driver = driver_of(tmp_path, command, jobs=2)
    driver.run(rows, {})
    beside = {name: {*record["beside"]} for name, record in newest_of(driver.journal.read()).items()}
    assert beside["a"] == {"export", "b"}
    assert beside["timed"] <= {"export"}
    assert beside["large"] == set()


def test_what_a_row_leaves_running_is_ended_with_it(tmp_path: Path) -> None:
    body = "import subprocess; child = subprocess.Popen(['sleep', '60']); open('{}', 'w').write(str(child.pid))"
    left = tmp_path / "pid"
    driver = driver_of(tmp_path, lambda row, found, watched: writing(found, body.format(left)))
    driver.run([row_named("a")], {})
    assert wait_until(lambda: not is_running(int(left.read_text())))


def is_running(pid: int) -> bool:
    """Whether it runs; what waits for its parent to look has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


SCRIPT = """
    import sys, textwrap
    from pathlib import Path
    from benchmarks.gpu_driver import Driver, Journal, taken_over
    from benchmarks.gpu_rows import Row

    folder, identity = Path(sys.argv[1]), {identity!r}
    rows = [Row(f"row {{k}}", "parity", 30, 0) for k in range(8)]
    child = '''
        import os, sys, time
        from benchmarks.gpu_watch import end_with_parent
        end_with_parent(int(sys.argv[2]))
        open(sys.argv[1] + ".pid", "a").write(f"{{os.getpid()}}\\\\n")
        time.sleep(0.2)
        open(sys.argv[1], "w").write("{{}}[:1] and {{}}")
        open(sys.argv[1], "w").write('{{"values": {{"x": 1}}}}')
    '''
    command = lambda row, found, watched: [sys.executable, "-c", textwrap.dedent(child), str(found), str(watched)]
    journal = Journal(folder / "rows.jsonl")
    done, _ = taken_over(journal.read(), identity)
    driver = Driver(journal, folder, command, identity=identity)
    driver.run([row for row in rows if row.name not in done], done)
"""


@pytest.mark.slow
def test_killed_at_any_moment_it_keeps_what_is_finished_and_goes_on(tmp_path: Path) -> None:
    script = tmp_path / "drive.py"
    script.write_text(textwrap.dedent(SCRIPT).format(identity=IDENTITY))
    command = [sys.executable, str(script), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    journal = Journal(tmp_path / "rows.jsonl")
    moment = random.uniform(0.1, 1.2)
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    assert wait_until(journal.path.exists, 60)
    time.sleep(moment)
    process.kill()
    process.wait()
    finished = [record["row"] for record in journal.read()]
    assert 0 < len(finished) < 8, f"killed {moment:.2f} s after the first row"
    pids = [int(pid) for path in tmp_path.rglob("*.pid") for pid in path.read_text().split()]
    assert wait_until(lambda: not any(map(is_running, pids))), "children end with their parent"
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
    assert [record["row"] for record in journal.read()] == [f"row {k}" for k in range(8)], "each of them once"


@pytest.mark.slow
def test_the_check_itself_is_killed_and_goes_on(digits_by_level: dict[Optimization, Bundle], tmp_path: Path) -> None:
    """The real rows, on the CPU; the page and the data file have all of them in the end."""
    bundle = gpu_work.folder_of(Exported("digits", "fp32", optimization="none"), tmp_path / "work")
    shutil.copytree(digits_by_level["none"].folder, bundle)
    rows = [f"parity/none/fp32/{backend}" for backend in ("torch", "onnxruntime")]
    places = ["--device", "cpu", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    command = [sys.executable, "-m", "benchmarks.gpu_check", *places, "--rows", rows[0], "--rows", rows[1]]
    journal = Journal(tmp_path / "work" / "rows.jsonl")
    process = subprocess.Popen(command, cwd=ROOT)
    assert wait_until(lambda: rows[0] in newest_of(journal.read()), 180)
    time.sleep(random.uniform(0, 3))
    process.kill()
    process.wait()
    kept = [record for record in journal.read() if record["row"] == rows[0]]
    done = subprocess.run([*command, "--resume"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{rows[0]}: passed in an earlier run" in done.stderr
    assert [record for record in journal.read() if record["row"] == rows[0]] == kept
    assert {name: statuses_of(journal)[name] for name in rows} == dict.fromkeys(rows, "passed")
    (path,) = (tmp_path / "out").glob("gpu-check_cpu-*-cores_*.json")
    assert {row["row"] for row in json.loads(path.read_text())["rows"]} == {"environment", *rows}
    again = subprocess.run([*command[:3], "--report", str(journal.path), "--out", str(tmp_path / "again")], cwd=ROOT)
    assert again.returncode == 0
    assert (tmp_path / "again" / path.name).read_text() == path.read_text()


# -- what is expected ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, 1.1])
def test_a_value_outside_of_a_fixed_range_fails(value: float) -> None:
    row = row_named("a", expects=(Expected("latents/*", 0, 1, fixed=True),))
    status, (sentence,) = row.judged({"latents/3/run 1": 0.5, "latents/3/run 2": value})
    assert status == "failed"
    assert sentence.startswith("latents/3/run 2 is ")


def test_what_was_not_measured_fails_too() -> None:
    row = row_named("a", expects=(Expected("waits/*", 0, 0, fixed=True),))
    assert row.judged({}) == ("failed", ["waits/* was not measured; expected 0 (fixed)"])


@pytest.mark.parametrize("device_type", ["cuda", "cpu"])
def test_rows_have_names_of_their_own_and_need_rows_before_them(device_type: str) -> None:
    rows = rows_of(device_type)
    names = [row.name for row in rows]
    assert len({*names}) == len(names)
    assert rows[0].kind == "environment"
    for place, row in enumerate(rows):
        assert not row.needs or row.needs in names[:place]
        assert row.estimate < row.limit <= 900
        assert {row.target} <= {"", *BACKENDS, *REFERENCES}


def test_a_row_is_absent_where_its_backend_is_and_a_reference_never_is() -> None:
    why = {row.target: gpu_check.why_row_absent(row, "cpu") for row in rows_of("cuda") if row.kind == "time"}
    assert {"PyTorch eager", "PyTorch compiled", "tensorrt", "torch"} <= why.keys()
    assert why["PyTorch eager"] is why["PyTorch compiled"] is why["torch"] is None
    assert "tensorrt is not installed" in str(why["tensorrt"])


def test_a_choice_of_rows_takes_those_they_need() -> None:
    chosen = chosen_of(rows_of("cuda"), ["time/dit-xl-2-512/fp16/1/torch-compile"])
    assert [row.name for row in chosen] == [
        "environment",
        "export/dit-xl-2-512/fp16",
        "time/dit-xl-2-512/fp16/1/torch-compile",
    ]


# -- planted faults --------------------------------------------------------------------------------------------------

FAULTY = Row(
    "parity/fold/fp32/torch",
    "parity",
    60,
    1,
    next(row for row in rows_of("cpu") if row.name == "parity/fold/fp32/torch").expects,
    Exported("digits", "fp32"),
    "torch",
    images=1,
    steps=6,
    schedules=("fora:3", "even:3,forecast=1"),
)


@pytest.fixture
def parity(optimized: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch) -> Callable[[], Found]:
    """The row of parity, on the small DiT."""
    monkeypatch.setattr(gpu_work, "bundle_of", lambda exported, work: optimized["fold"])
    return lambda: found_of(FAULTY, Place(torch.device("cpu"), Path()))


def test_without_a_fault_the_row_passes(parity: Callable[[], Found]) -> None:
    found = parity()
    assert not found.failure
    assert FAULTY.judged(found.values) == ("passed", [])


def test_a_reuse_step_that_reads_a_stale_address_fails(
    parity: Callable[[], Found], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launch that was bound to the memory of before."""
    launch_of = Window._launch

    def stale(self: Window, offset: int, *where: int) -> Launch:
        with monkeypatch.context() as patched:
            patched.setattr(self, "_sums", {name: sums.clone() for name, sums in self._sums.items()})
            return launch_of(self, offset, *where)

    monkeypatch.setattr(Window, "_launch", stale)
    status, deviations = FAULTY.judged(parity().values)
    assert status == "failed"
    assert any(sentence.startswith("latents/fora:3/run 1 is ") for sentence in deviations)


@pytest.mark.slow
def test_a_reuse_step_that_reads_the_sum_of_another_fails(
    digits: Bundle, half_digits: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the digits: sums of random weights hardly differ within a window."""
    launch_of = Window._launch
    monkeypatch.setattr(Window, "_launch", lambda self, offset, *where: launch_of(self, min(offset, 1), *where))
    bundles = {"fp32": digits, "fp16": half_digits}
    monkeypatch.setattr(gpu_work, "bundle_of", lambda exported, work: bundles[exported.precision])
    for row in (row for row in rows_of("cpu") if row.name in ("parity/fold/fp32/torch", "parity/fold/fp16/torch")):
        found = found_of(row, Place(torch.device("cpu"), Path()))
        assert not found.failure
        status, deviations = row.judged(found.values)
        assert status == "failed"
        assert any(sentence.startswith("latents/fora:3/run 1 is ") for sentence in deviations)


def test_a_sum_that_is_scaled_fails(parity: Callable[[], Found], monkeypatch: pytest.MonkeyPatch) -> None:
    run = Window.run

    def scaled(self: Window, offset: int, *where: int) -> None:
        run(self, offset, *where)
        for sums in self._sums.values() if offset == 0 else ():
            sums.mul_(1.01)

    monkeypatch.setattr(Window, "run", scaled)
    status, deviations = FAULTY.judged(parity().values)
    assert status == "failed"
    assert any(sentence.startswith("error/reuse is ") for sentence in deviations)


def test_a_replay_that_differs_from_the_first_run_is_named(
    parity: Callable[[], Found], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a graph that was captured with tensors that have moved since."""
    run = gpu_work.Course.run
    runs: list[int] = []

    def stale(self: gpu_work.Course) -> Trajectory:
        done = run(self)
        if isinstance(self.sampler.denoiser, Denoiser):
            runs.append(1)
            done.latents = done.latents + 1e-6 * (len(runs) == 3)
        return done

    monkeypatch.setattr(gpu_work.Course, "run", stale)
    values = parity().values
    assert values["replay/fora:3/run 2"] == 0 < values["replay/fora:3/run 3"]
    expected = next(row for row in rows_of("cuda") if row.name == FAULTY.name).expects
    replays = next(one for one in expected if one.of == "replay/*")
    assert replays.fixed
    assert [sentence.split(" is ")[0] for sentence in replays.deviations(values)] == ["replay/fora:3/run 3"]


def test_an_error_keeps_what_was_found_before_it() -> None:
    def work(row: Row, place: Place, found: Found) -> None:
        found.values["x"] = 1
        raise RuntimeError("CUDA error: out of memory\nmore")

    found = found_of(row_named("a"), Place(torch.device("cpu"), Path()), {"parity": work})
    assert (found.values, found.failure) == ({"x": 1}, "RuntimeError: CUDA error: out of memory")


# -- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--device", "tpu"], "'tpu' is not a device; give cpu, cuda or cuda:N"),
        (["--device", "cpu", "--rows", "nothing"], "no row matches 'nothing'"),
        (["--device", "cpu", "--minutes", "0"], "0.0 is not in the range x>0"),
        (["--device", "cuda:99"], "torch cannot use cuda:99 on this machine"),
    ],
)
def test_wrong_values_are_named(options: list[str], said: str) -> None:
    done = CliRunner().invoke(gpu_check.main, options)
    assert done.exit_code == 2
    assert said in done.output


def test_the_page_begins_with_a_table_of_times_and_names_what_is_missing() -> None:
    name = "time/digits/fp32/1/torch"
    values = {"full ms/none": 2.0, "reuse ms/fora:3": 0.5, "seconds/none": 0.1, "ideal/fora:3": 2.78}
    values |= {"speed-up/fora:3": 2.0, "waits/fora:3": 0, f"reuse ms/{FORECAST}": 0.75, f"speed-up/{FORECAST}": 2.5}
    records: list[Record] = [
        {"row": name, "kind": "time", "status": "look", "why": "speed-up/fora:3 is 2", "values": values, "seconds": 3},
        {"row": "tests", "kind": "tests", "status": "absent", "why": "pytest is not installed", "seconds": 0},
    ]
    page = as_markdown(records, rows_of("cpu"))
    assert page.splitlines()[4] == (
        "| digits | fp32 | 1 | torch | 2.000 ms | 0.500 ms | 0.750 ms | 0.100 s | 2.78x | 2.00x |  | 2.50x |  | look |"
    )
    assert "- tests: pytest is not installed" in page
    assert f"- {name} (look): speed-up/fora:3 is 2" in page
    assert "- parity/fold/fp16/torch\n" in page


def test_ctrl_c_ends_the_children_and_writes_the_result(tmp_path: Path) -> None:
    """The environment alone takes seconds: that is when it is interrupted."""
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--device", "cpu", "--rows", "parity/none/fp32/torch"]
    command += ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in the background ignore it
    )
    assert wait_until((tmp_path / "work" / "logs" / "environment.log").exists, 60)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted; continue with --resume" in said
