"""Reports of figures that are made up: what is written, what is said, what is refused."""

from __future__ import annotations

import csv
import html
import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fora_trt.bundle import Bundle
from fora_trt.errors import InputError
from fora_trt.files import sealed
from fora_trt.report import page as report_module
from fora_trt.report.advice import recommendation
from fora_trt.report.markdown import as_markdown
from fora_trt.report.page import (
    CSV,
    HTML,
    JSON,
    REPORT_NAMES,
    Part,
    check_report_folder,
    read_report,
    write_report,
)
from fora_trt.report.plots import plots_of
from fora_trt.report.quality_plots import pareto_front
from fora_trt.report.results import (
    About,
    Absent,
    Bench,
    BenchRow,
    PeakRates,
    Quality,
    QualityRow,
    Report,
    Setting,
)
from fora_trt.report.tables import bench_tables, environment_table, quality_table, seconds
from fora_trt.schedule import Schedule, fora_text
from tests.chromium import browser

ABOUT = About(
    name="digits", folder="export/digits", source="digits", architecture="DiT", precision="fp32",
    scheduler="DDIMScheduler", asks_for="--class-labels 0", sha256="ab" * 32,
)  # fmt: skip
MACHINE = {
    "processor": "Some CPU",
    "cores": 2,
    "gpu": None,
    "fora_trt": "0.1.0",
    "commit": "0123456789",
    "date": "today",
}


def setting(interval: int, steps: int = 50, control_of: int | None = None, scheduler: str = "DDIMScheduler") -> Setting:
    schedule = Schedule.fora(steps, interval)
    return Setting(
        scheduler=scheduler, steps=steps, nfe=steps, full_steps=schedule.full_steps, schedule=schedule.text,
        control_of=None if control_of is None else fora_text(control_of),
    )  # fmt: skip


def latency(images: int, one: Setting, backend: str = "onnxruntime") -> BenchRow:
    """A full step takes 80 ms, a reuse step 4 ms."""
    reuses = one.steps - one.full_steps
    time = (0.08 * one.full_steps + 0.004 * reuses) * images
    return BenchRow(
        backend=backend, images=images, setting=one, seconds=time, fastest=0.9 * time, slowest=1.2 * time,
        full_step_seconds=0.08 * images, reuse_step_seconds=0.004 * images if reuses else None, overhead=0.05,
        speedup=4 * images / time, ideal_speedup=50 / one.full_steps, roofline_seconds=0.5 * time,
        peak_memory_bytes=3 * 2**28,
    )  # fmt: skip


def bench(images: tuple[int, ...] = (1, 4)) -> Bench:
    settings = (setting(1), setting(2), setting(3), setting(1, 20, 3))
    return Bench(
        device="cpu", steps=50, guidance_scale=1.5, repeats=10, interrupted=False,
        peaks=PeakRates(flops=9e10, bytes=1.2e10),
        rows=tuple(latency(count, one) for count in images for one in settings),
        absent=(Absent(backend="tensorrt", why="there is no GPU"),),
    )  # fmt: skip


def likeness(one: Setting, seconds_per_image: float, psnr: float | None, **more: Any) -> QualityRow:
    errors = tuple(0.001 * k * (one.nfe / one.full_steps - 1) for k in range(one.steps))
    metrics = {"psnr": psnr, "ssim": 0.9, **more}
    return QualityRow(setting=one, seconds_per_image=seconds_per_image, metrics=metrics, latent_errors=errors)


def solved(found: Quality) -> Quality:
    """The same with a fine solution, to which no caching has 40 dB and every other setting 1 dB less than to it."""
    rows = [
        row.model_copy(update={"metrics": {**row.metrics, "solution_psnr": 40.0 if row.psnr is None else row.psnr - 1}})
        for row in found.rows
    ]
    return found.model_copy(update={"rows": tuple(rows), "solution": "250 steps of ddim"})


def quality(*rows: QualityRow) -> Quality:
    chosen = rows or (
        likeness(setting(2), 0.055, 38.0, frechet_distance=0.25),
        likeness(setting(3), 0.04, 31.5),
        likeness(setting(5), 0.025, 27.0),
        likeness(setting(1, 20, 3), 0.042, 33.0),
    )
    return Quality(
        backend="onnxruntime", device="cpu", images=100, guidance_scale=1.5, features="a classifier",
        notes=("LPIPS was left out",), rows=(likeness(setting(1), 0.1, None), *chosen), grid="grid.png",
    )  # fmt: skip


def report_of(**parts: Any) -> Report:
    return Report(format_version=2, about=ABOUT, measured_on={}, **parts)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pictures, where they are not what is tested."""
    monkeypatch.setattr(report_module, "plots_of", lambda report: {})


def test_all_files_are_written_and_hold_the_figures(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "report"
    check_report_folder(folder, "bench", ABOUT)
    write_report(folder, ABOUT, MACHINE, bench=bench())
    Image.new("L", (40, 30)).save(folder / "grid.png")
    written = write_report(folder, ABOUT, MACHINE, quality=solved(quality()))
    assert {path.name for path in folder.iterdir() if path.name[0] != "."} == {*REPORT_NAMES} - {"quality"}
    assert read_report(folder) == written

    content = json.loads((folder / JSON).read_text())
    assert content["bench"]["rows"][1]["seconds"] == pytest.approx(26 * 0.08 + 24 * 0.004)
    assert content["quality"]["rows"][2]["metrics"]["psnr"] == 31.5
    assert "30 dB of PSNR to 250 steps of ddim is 20 steps, no cache (2.38 times" in content["recommendation"]

    rows = list(csv.DictReader(io.StringIO((folder / CSV).read_text())))
    assert [row["part"] for row in rows] == ["bench"] * 8 + ["quality"] * 5
    assert float(rows[5]["seconds_per_image"]) == pytest.approx(26 * 0.08 + 24 * 0.004)
    assert float(rows[3]["ideal_speedup"]) == 2.5  # of a control: 20 full steps and not 50
    assert (rows[10]["psnr"], rows[10]["frechet_distance"], rows[10]["schedule"]) == ("31.5", "", "fora:3")

    page, text = html.unescape((folder / HTML).read_text()), as_markdown(written)
    for figure in (
        "2.18 s",
        "1.96 to 2.61 s",
        "1.84x",
        "96%",
        "768 MiB",
        "31.5 dB",
        "2.50x",
        "0.25",
        "there is no GPU",
    ):
        assert figure in page, figure
        assert figure in text, figure
    assert page.count('src="data:image/png;base64,') == len(PLOTS) + 1
    for name in PLOTS:
        assert Image.open(folder / name).width == 1280


def test_a_page_asks_for_nothing_and_hostile_names_stay_text(tmp_path: Path) -> None:
    evil = '<script>alert("http://x")</script>'
    about = ABOUT.model_copy(update={"name": evil, "source": f"http://{evil}", "folder": "export/a b; rm"})
    found = solved(quality(likeness(setting(3, scheduler="$\\frac{$"), 0.04, 31.5))).model_copy(
        update={"notes": (evil,), "grid": "../grid.png", "features": evil}
    )
    measured = bench().model_copy(update={"absent": (Absent(backend=evil, why=evil),)})
    Image.new("L", (4, 4)).save(tmp_path / "grid.png")
    written = write_report(tmp_path / "out", about, {evil: evil}, bench=measured, quality=found)
    page = (tmp_path / "out" / HTML).read_text()
    assert "<script" not in page
    assert not re.findall(r'(?:src|href|url\(|@import|action)\s*=?\s*["\'(]?\s*(?!data:)(?:https?:|//)', page)
    assert re.findall(r'\ssrc="(?!data:)', page) == re.findall(r"\shref=", page) == []
    assert page.count('src="data:') == len(PLOTS)  # the grid is not in this folder, so it is not shown
    assert "<script" not in as_markdown(written)
    assert "fora-trt run 'export/a b; rm' --steps 50 --schedule fora:3" in written.recommendation
    assert "--scheduler '$\\frac{$'" in written.recommendation


def test_the_fastest_within_the_loss_is_recommended() -> None:
    both = report_of(bench=bench(), quality=quality())
    assert recommendation(both, 30) == (
        "The fastest way to keep 30 dB of PSNR is 20 steps, no cache (2.38 times as fast as no caching, 33.0 dB), so "
        "caching does not pay here; the best with caching is fora:3 (2.50 times as fast as no caching, 31.5 dB): "
        "fora-trt run export/digits --steps 20 --schedule none --guidance-scale 1.5 --backend onnxruntime "
        "--class-labels 0\n"
        "In about the same time: fora:3, 31.5 dB."
    )
    assert "fora:5 (4.00 times" in recommendation(both, 25)
    assert "the same time" not in recommendation(both, 25)
    assert "fora:2 (1.82 times" in recommendation(both, 35)
    assert quality_table(quality(), setting(3)).chosen == 2


def test_a_control_that_is_faster_is_said_to_be() -> None:
    control = likeness(setting(1, 18, 3), 0.036, 32.0)
    slower = likeness(setting(3), 0.04, 31.5)
    sentence = recommendation(report_of(bench=bench(), quality=quality(slower, control)), 30)
    assert "is 18 steps, no cache (2.78 times as fast as no caching, 32.0 dB), so caching does not pay here" in sentence
    assert "the best with caching is fora:3 (2.50 times" in sentence
    assert "--steps 18 --schedule none " in sentence
    alone = recommendation(report_of(bench=bench(), quality=quality(control)), 30)
    assert "no cached setting keeps it" in alone


def test_where_nothing_is_to_be_recommended_that_is_said() -> None:
    strict = recommendation(report_of(bench=bench(), quality=quality()), 45)
    assert strict == (
        "No setting keeps 45 dB of PSNR; the closest is fora:2 (1.82 times as fast as no caching, 38.0 dB)."
    )
    slow = quality(likeness(setting(2), 0.11, None))
    assert recommendation(report_of(bench=bench(), quality=slow), 30).startswith("No setting that keeps 30 dB")
    plain = quality().model_copy(update={"rows": quality().rows[:1]})
    assert (
        recommendation(report_of(bench=bench(), quality=plain), 30) == "Only the setting without caching was measured."
    )


def test_one_part_alone_says_what_the_other_would_add() -> None:
    time_alone = recommendation(report_of(bench=bench()), 30)
    assert time_alone.startswith("The largest speed-up is that of fora:3 on onnxruntime: 2.55 times as fast")
    assert "fora-trt quality export/digits" in time_alone
    empty = bench().model_copy(update={"rows": ()})
    assert recommendation(report_of(bench=empty), 30).startswith("No schedule with caching was measured.")
    assert "fora-trt bench export/digits" in recommendation(report_of(quality=quality()), 30)


@pytest.mark.usefixtures("undrawn")
def test_a_part_replaces_itself_and_lets_the_other_stand(tmp_path: Path) -> None:
    write_report(tmp_path, ABOUT, {"date": "first"}, quality=quality(), min_psnr=35)
    write_report(tmp_path, ABOUT, {"date": "second"}, bench=bench())
    merged = write_report(tmp_path, ABOUT, {"date": "third"}, bench=bench((2,)))
    assert merged.measured_on == {"quality": {"date": "first"}, "bench": {"date": "third"}}
    assert {row.images for row in merged.bench.rows} == {2} if merged.bench else False
    assert merged.quality == quality()
    assert merged.min_psnr == 35
    assert "keep 35 dB" in merged.recommendation
    assert environment_table(merged).header == ("", "quality", "bench")
    same = merged.model_copy(update={"measured_on": {"bench": MACHINE, "quality": MACHINE}})
    assert environment_table(same).header == ("", "both")


@pytest.mark.usefixtures("undrawn")
def test_a_damaged_or_newer_report_is_refused_in_a_sentence(tmp_path: Path) -> None:
    assert read_report(tmp_path) is None
    write_report(tmp_path, ABOUT, MACHINE, bench=bench())
    path = tmp_path / JSON
    whole = path.read_text()
    content = {key: value for key, value in json.loads(whole).items() if key != "sha256"}
    for text, problem in (
        (whole[:100], "is not the manifest of a report"),
        ("[]", "is not the manifest of a report"),
        (whole.replace("1.5", "1.6", 1), "was altered"),
        (sealed({**content, "format_version": 2}), "has format version 2 of an older fora-trt"),
        (sealed({**content, "format_version": 4}), "has format version 4; this fora-trt reads up to 3"),
        (sealed({**content, "bench": {}}), "is damaged at bench"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=problem) as caught:
            read_report(tmp_path)
        assert "\n" not in str(caught.value)
        with pytest.raises(InputError, match=problem):
            write_report(tmp_path, ABOUT, MACHINE, quality=quality())
        assert path.read_text() == text


@pytest.mark.usefixtures("undrawn")
def test_a_folder_is_refused_before_the_work(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(InputError, match="is a file"):
        check_report_folder(file, "bench", ABOUT)
    with pytest.raises(InputError, match="cannot be written"):
        check_report_folder(file / "below", "bench", ABOUT)
    with pytest.raises(InputError, match="cannot be written"):
        write_report(file / "below", ABOUT, MACHINE, bench=bench())

    out = tmp_path / "out"
    write_report(out, ABOUT, MACHINE, bench=bench())
    (out / "quality").mkdir()
    check_report_folder(out, "quality", ABOUT)
    with pytest.raises(InputError, match="already contains the bench part of a report of digits; give --force"):
        check_report_folder(out, "bench", ABOUT)
    check_report_folder(out, "bench", ABOUT, replace=True)
    other = ABOUT.model_copy(update={"name": "other", "sha256": "cd" * 32})
    parts: tuple[Part, ...] = ("bench", "quality")
    for part in parts:
        with pytest.raises(InputError, match=r"a report of digits .* not of this other"):
            check_report_folder(out, part, other, replace=True)
    with pytest.raises(InputError, match="not of this other"):
        write_report(out, other, MACHINE, quality=quality())
    write_report(out, ABOUT, MACHINE, quality=quality())
    with pytest.raises(InputError, match="give --resume"):
        check_report_folder(out, "quality", ABOUT)

    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "thesis.tex").write_text("")
    with pytest.raises(InputError, match=r"contains thesis\.tex, which is not a file of a report"):
        check_report_folder(strange, "bench", ABOUT)


def test_missing_packages_are_named_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_module, "find_spec", lambda name: None if name == "jinja2" else object())
    with pytest.raises(InputError, match=r"a report needs jinja2; pip install 'fora-trt\[report\]'"):
        check_report_folder(tmp_path, "bench", ABOUT)
    with pytest.raises(InputError, match="needs jinja2"):
        write_report(tmp_path, ABOUT, MACHINE, bench=bench())
    assert read_report(tmp_path) is not None  # what was measured is kept all the same


def test_about_a_bundle(exported: Bundle) -> None:
    about = About.of(exported)
    assert (about.name, about.folder) == ("tiny", str(exported.folder))
    assert (about.scheduler, about.asks_for) == ("DDIMScheduler", "--class-labels 0")


def test_tables() -> None:
    one, four = bench_tables(bench())
    assert (one.title, four.title) == ("1 image", "4 images at once")
    assert one.header.index("ideal") < one.header.index("speed-up")
    assert "per image" not in one.header
    assert dict(zip(four.header, four.rows[2], strict=True))["per image"] == "1.57 s"
    mingled = bench().model_copy(update={"rows": (latency(1, setting(1), "a"), latency(1, setting(1), "b"),
                                                  latency(1, setting(2), "a"))})  # fmt: skip
    assert [row[0] for row in bench_tables(mingled)[0].rows] == ["a", "a", "b"]
    table = quality_table(quality())
    assert "LPIPS" not in table.header
    assert [row[0] for row in table.rows] == [
        "no cache",
        "fora:2",
        "fora:3",
        "fora:5",
        "20 steps, no cache",
    ]
    mixed = quality(
        likeness(setting(3, 20), 0.02, 30.0), likeness(setting(3, scheduler="UniPCMultistepScheduler"), 0.04, 30.0)
    )
    assert [row[0] for row in quality_table(mixed).rows][1:] == [
        "fora:3, 20 steps, ddim",
        "fora:3, 50 steps, unipc",
    ]
    assert replace(table, chosen=1).chosen == 1
    assert [seconds(value) for value in (0.00123, 0.0456, 0.789, 0.9999, 12.3, 123.4)] == [
        "1.23 ms", "45.6 ms", "789 ms", "1.00 s", "12.30 s", "123 s"
    ]  # fmt: skip


def test_tables_fit_a_narrow_terminal() -> None:
    for table in (*bench_tables(bench()), quality_table(quality())):
        whole = table.fitting(1000)
        assert whole == table
        narrow = table.fitting(80)
        assert sum(max(map(len, cells)) + 3 for cells in zip(narrow.header, *narrow.rows, strict=True)) <= 80
        assert {"setting", "speed-up"} <= {*narrow.header}
        assert len(narrow.rows) == len(table.rows)
        kept = [table.header.index(heading) for heading in narrow.header]
        assert [tuple(row[k] for k in kept) for row in table.rows] == [*narrow.rows]


def test_plots_of_little_or_much_are_drawn() -> None:
    alone = report_of(quality=quality().model_copy(update={"rows": quality().rows[:1]}))
    assert plots_of(alone) == {}
    plain = bench().model_copy(update={"rows": (latency(1, setting(1)),)})
    assert list(plots_of(report_of(bench=plain))) == ["time-split.png"]
    crowd = quality(*(likeness(setting(2, 50 + k), 0.05, 30.0) for k in range(12)))
    assert set(plots_of(report_of(quality=crowd))) == {"latency-quality.png", "error-over-steps.png"}
    front = [row.setting.schedule for row in pareto_front(quality().rows[1:])]
    assert front == ["fora:5", "fora:3", "none", "fora:2"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="Chromium is not on PATH")
def test_the_page_fits_wide_and_narrow_screens(tmp_path: Path) -> None:
    """Plots and grid are visible, nothing overflows, nothing is asked of the network."""
    out = tmp_path / "out"
    out.mkdir()
    Image.new("RGB", (3000, 2000), "teal").save(out / "grid.png")
    write_report(out, ABOUT, MACHINE | {"long": "x" * 300}, bench=bench((1, 4, 16)), quality=solved(quality()))
    with browser(str(shutil.which("chromium")), tmp_path / "profile") as page:
        for width in (1280, 400):
            for dark in (False, True):
                found = page.open(out / HTML, width, dark)
                assert found["width"] == width
                assert found["scrolls"] <= width
                assert len(found["images"]) == len(PLOTS) + 1
                for image in found["images"]:
                    assert image["pixels"] >= 1280, image
                    assert image["shown"] > 0.7 * min(width, 600), image
                    assert 0 <= image["left"] < image["left"] + image["shown"] <= width, image
                assert all(right <= width for right in found["boxes"])
        asked = {url.partition(":")[0] for url in page.requests}
    assert asked == {"file", "data"}
