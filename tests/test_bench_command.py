import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from fora_trt.bundle import Bundle
from fora_trt.evaluate import bench, targets
from fora_trt.evaluate.targets import predictor_of
from fora_trt.report.page import read_report, write_report
from fora_trt.report.results import COMPILED, EAGER, Bench, PeakRates
from tests.test_cli import fora

QUICK = ["--backends", "onnxruntime,tensorrt", "--cache-intervals", "2,3", "--steps", "6", "--no-memory"]


def as_bench(text: str) -> Bench:
    """The result in the output of --json."""
    said = json.loads(text)
    return Bench.model_validate({name: said[name] for name in Bench.model_fields})


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled here takes half a minute; that a backend is named suffices."""

    def eager(bundle: Bundle, backend: str, *others: Any) -> Any:
        return predictor_of(bundle, EAGER if backend == COMPILED else backend, *others)

    monkeypatch.setattr(targets, "predictor_of", eager)


@pytest.mark.usefixtures("uncompiled")
def test_all_rows_are_there_with_those_a_user_would_pick_instead(exported: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "report"
    command = ["bench", exported.folder, *QUICK, "--batch-sizes", "1,2", "--repeats", "2", "--out", out]
    done = fora(*command, "--json")
    assert done.exit_code == 0, done.output
    found = as_bench(done.stdout)
    for images in (1, 2):
        rows = [(row.backend, row.setting.schedule, row.setting.control_of) for row in found.rows
                if row.images == images]  # fmt: skip
        assert rows == [
            ("onnxruntime", "none", None),
            ("onnxruntime", "fora:2", None),
            ("onnxruntime", "none", "fora:2"),
            ("onnxruntime", "fora:3", None),
            ("onnxruntime", "none", "fora:3"),
            (EAGER, "none", None),
            (EAGER, "fora:3", None),
            (COMPILED, "none", None),
            (COMPILED, "fora:3", None),
        ]
    assert [one.backend for one in found.absent] == ["tensorrt"]
    assert (found.steps, found.repeats, found.guidance_scale) == (6, 2, 1.5)
    report = read_report(out)
    assert report is not None
    assert report.bench == found
    with (out / "report.csv").open() as file:
        assert [float(row["seconds"]) for row in csv.DictReader(file)] == [row.seconds for row in found.rows]
    assert {path.name for path in out.glob("*.*") if not path.name.startswith(".")} == {
        "report.html", "report.json", "report.csv", "speedup-batch-1.png", "speedup-batch-2.png",
        "time-split-batch-1.png", "time-split-batch-2.png",
    }  # fmt: skip

    refused = fora(*command)
    assert refused.exit_code == 1
    assert "already contains the bench part of a report of tiny; give --force to measure it again" in refused.stderr
    again = fora(*command, "--force", "--batch-sizes", "1")
    assert again.exit_code == 0, again.output
    for shown in ("1 image", "onnxruntime", "fora:3", "over PyTorch", "tensorrt: ", "The largest speed-up is that of"):
        assert shown in again.stdout, shown
    assert max(map(len, again.stdout.partition("tensorrt: ")[0].splitlines())) <= 120


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("done", [0, 2])
def test_ctrl_c_keeps_the_rows_that_are_done(
    done: int, exported: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = iter(range(9))

    def pressed(device: object, precision: str) -> PeakRates:
        """At the beginning of a repeat."""
        if next(began) == done:
            raise KeyboardInterrupt
        return PeakRates(flops=1e9, bytes=1e9)

    monkeypatch.setattr(bench, "measure_peaks", pressed)
    out = tmp_path / "report"
    stopped = fora("bench", exported.folder, *QUICK, "--batch-sizes", "1", "--repeats", "9", "--json", "--out", out)
    if not done:
        assert stopped.exit_code == 130
        assert stopped.stderr.endswith("interrupted\n")
        assert not out.exists()
        return
    assert stopped.exit_code == 130
    assert "interrupted: the results above were measured before" in stopped.stderr
    found = as_bench(stopped.stdout)
    assert (found.interrupted, found.repeats, len(found.rows)) == (True, done, 9)
    report = read_report(out)
    assert report is not None
    assert report.bench == found
    assert "the measurement was interrupted" in (out / "report.html").read_text()

    whole = found.model_copy(update={"interrupted": False, "repeats": 9})
    write_report(out, report.about, {}, bench=whole)
    began = iter(range(9))
    stopped = fora("bench", exported.folder, *QUICK, "--batch-sizes", "1", "--repeats", "9", "--out", out, "--force")
    assert stopped.exit_code == 130
    assert stopped.stderr.endswith(f"measured before; the report in {out} is unchanged\n")
    report = read_report(out)
    assert report is not None
    assert report.bench == whole


BAD = {
    "an interval over the steps": (
        ["--steps", "4", "--cache-intervals", "5"],
        1,
        "the cache interval 5 is larger than the number of steps 4",
    ),
    "no interval": (["--cache-intervals", "0"], 1, "the cache interval is 0"),
    "no batch": (["--batch-sizes", "4,0"], 1, "a batch size is 0; at least 1 is needed"),
    "a batch that does not fit": (
        ["--batch-sizes", "10000000", "--cache-intervals", "2", "--steps", "2"],
        1,
        "at a batch of 10000000: a batch of 20000000 (with guidance twice the number of images) needs ",
    ),
    "no number": (["--batch-sizes", "four"], 2, "'four' is not a list of integers"),
    "an unknown backend": (["--backends", "onnx"], 1, "unknown backend 'onnx'"),
    "an unknown schedule": (["--schedule", "forra:3"], 1, "there is no schedule 'forra:3'; give none, fora:N, even"),
    "an unknown scheduler": (["--scheduler", "x"], 1, "no scheduler 'x'"),
    "no repeat": (["--repeats", "0"], 2, "0 is not in the range x>=1"),
    "a guidance scale that is none": (["--guidance-scale", "nan"], 1, "the guidance scale is nan"),
    "a file where the report goes": (["--out", "FILE"], 1, "is a file; give a folder for the report"),
    "a folder of other things": (["--out", "FOLDER"], 1, "contains thesis.txt, which is not a file of a report"),
    "a place that cannot be written": (["--out", "/proc/report"], 1, "/proc"),
}


@pytest.mark.parametrize("mistake", BAD)
@pytest.mark.usefixtures("uncompiled")
def test_a_mistake_gets_a_sentence_and_leaves_nothing(
    mistake: str, exported: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    kept = tmp_path / "folder" / "thesis.txt"
    kept.write_text("years of work")
    places = {"FILE": str(kept), "FOLDER": str(kept.parent)}
    options, code, message = BAD[mistake]
    result = fora("bench", exported.folder, "--backends", "onnxruntime", *(places.get(one, one) for one in options))
    assert result.exit_code == code, result.output
    assert message in " ".join(result.stderr.split())
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [kept]


@pytest.mark.usefixtures("uncompiled")
def test_memory_that_was_not_measured_is_told(
    exported: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    command = [one for one in QUICK if one != "--no-memory"]
    done = fora(
        "bench", exported.folder, *command, "--batch-sizes", "1", "--repeats", "1", "--out", tmp_path / "report"
    )
    assert done.exit_code == 0, done.output
    why = "the process exited with 1 and printed nothing"
    missing = f"peak memory of onnxruntime at a batch of 1 could not be measured: {why}"
    for shown in (done.stdout, *((tmp_path / "report" / name).read_text() for name in ("report.html", "report.json"))):
        assert missing in shown


@pytest.mark.usefixtures("memory_in_this_process")
def test_json_of_a_bench_is_one_object(exported: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets.targets_of, "__defaults__", ((EAGER,), lambda stage: None))
    done = fora(
        "bench", exported.folder, "--backends", "onnxruntime", "--cache-intervals", "2", "--batch-sizes", "1",
        "--steps", "4", "--repeats", "1", "--json",
    )  # fmt: skip
    rows = json.loads(done.stdout)["rows"]
    assert [row["peak_memory_bytes"] > 50 * 2**20 for row in rows] == [True] * 5
