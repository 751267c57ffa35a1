"""Reports of figures that are made up: what is written, what is said, what is refused."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image, ImageColor

from fora_trt.bundle import Bundle
from fora_trt.errors import InputError
from fora_trt.files import sealed
from fora_trt.images.grid import grid, rows_of
from fora_trt.metrics import METRICS
from fora_trt.report import page as report_module
from fora_trt.report.advice import recommendation
from fora_trt.report.drawing import DARK, LIGHT, Plot, Theme, figure_of
from fora_trt.report.glossary import STEPS, TERMS, visible_text
from fora_trt.report.html import LARGE_GRID, Picture, as_html, strips_of
from fora_trt.report.markdown import as_markdown
from fora_trt.report.page import (
    CSV,
    HTML,
    JSON,
    REPORT_NAMES,
    ROOM,
    Part,
    check_report_folder,
    read_report,
    write_report,
)
from fora_trt.report.plots import grouped, is_plot, plots_of
from fora_trt.report.quality_plots import ERROR_OVER_STEPS, pareto_front
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
from fora_trt.schedule import KINDS, Schedule, fora_text
from tests.chromium import browser

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

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
    monkeypatch.setattr(report_module, "plots_of", lambda report: [])


def test_an_interruption_while_plots_are_drawn_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results that are new are written without the page; those that replace others are not."""

    def interrupted(report: Report) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(report_module, "plots_of", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_report(tmp_path, ABOUT, MACHINE, bench=bench())
    there = read_report(tmp_path)
    assert there is not None and there.bench == bench()
    assert not (tmp_path / HTML).exists()
    check_report_folder(tmp_path, "bench", ABOUT, replace=True)  # writes what is missing
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert HTML in before
    monkeypatch.setattr(report_module, "plots_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_report(tmp_path, ABOUT, MACHINE, bench=bench().model_copy(update={"repeats": 77}))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_all_files_are_written_and_hold_the_figures(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "report"
    check_report_folder(folder, "bench", ABOUT)
    write_report(folder, ABOUT, MACHINE, bench=bench())
    Image.new("L", (40, 30)).save(folder / "grid.png")
    written = write_report(folder, ABOUT, MACHINE, quality=solved(quality()))
    plots = {
        "latency-quality.png", "latency-solution.png", "error-over-steps.png", "speedup-batch-1.png",
        "speedup-batch-4.png", "time-split-batch-1.png", "time-split-batch-4.png",
    }  # fmt: skip
    assert {path.name for path in folder.iterdir() if path.name[0] != "."} == {*REPORT_NAMES, *plots} - {"quality"}
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
    assert page.count('src="data:image/png;base64,') == len(plots) + 1
    assert page.count('srcset="data:image/png;base64,') == len(plots)
    for name in plots:
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
    assert re.findall(r'\ssrc(?:set)?="(?!data:)', page) == re.findall(r'\shref="(?!#)', page) == []
    plots = plots_of(report_of(bench=measured, quality=found))
    assert page.count('src="data:') == len(plots)  # the grid is not in this folder, so it is not shown
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
    assert plots_of(alone) == []
    plain = bench().model_copy(update={"rows": (latency(1, setting(1)),)})
    assert [plot.name for plot in plots_of(report_of(bench=plain))] == ["time-split.png"]
    crowd = report_of(quality=quality(*(likeness(setting(k), 0.05, 30.0) for k in range(2, 30))))
    assert [plot.name for plot in plots_of(crowd)] == ["latency-quality.png", "error-over-steps.png"]
    for plot in plots_of(crowd):
        plot.draw(LIGHT).draw_without_rendering()
    front = [row.setting.schedule for row in pareto_front(quality().rows[1:])]
    assert front == ["fora:5", "fora:3", "none", "fora:2"]


def drawn(plot: Plot, theme: Theme = LIGHT) -> Axes:
    """The axes of a plot, after its layout."""
    figure = plot.draw(theme)
    figure.draw_without_rendering()
    return figure.axes[0]


def title_of(axes: Axes) -> str:
    return str(figure_of(axes).get_suptitle())


def shown_ticks(axis: Axis) -> list[float]:
    least, most = sorted(axis.get_view_interval())
    return [place for place in axis.get_majorticklocs() if least <= place <= most]


def test_axes_that_count_steps_show_whole_numbers() -> None:
    for steps in (2, 3, 4, 5, 7, 10, 50, 250):
        rows = [row.model_copy(update={"latent_errors": [0.01 * k for k in range(steps)]}) for row in quality().rows]
        found = quality().model_copy(update={"rows": tuple(rows)})
        (plot,) = (plot for plot in plots_of(report_of(quality=found)) if plot.kind == ERROR_OVER_STEPS)
        axes = drawn(plot)
        ticks = shown_ticks(axes.xaxis)
        assert len(ticks) >= 2, steps
        assert all(tick == round(tick) for tick in ticks), (steps, ticks)
        names = [text.get_text() for text in axes.get_xticklabels()]
        assert not any("." in name for name in names), names


def by_steps(*numbers: int, schedulers: tuple[str, ...] = ("DDIMScheduler",)) -> Quality:
    """Each number of steps without caching, with two schedules, and with a control, as `quality --steps` measures."""
    rows: list[QualityRow] = []
    for scheduler in schedulers:
        for steps in numbers:
            rows.append(likeness(setting(1, steps, scheduler=scheduler), 0.002 * steps, 30.0 if rows else None))
            rows += [
                likeness(one, 0.0021 * one.full_steps, 35.0 - one.full_steps / steps)
                for one in (setting(2, steps, scheduler=scheduler), setting(3, steps, scheduler=scheduler))
            ]
            control = likeness(setting(1, steps // 2, 2), 0.001 * steps, 33.0)
            rows.append(control.model_copy(update={"latent_errors": ()}))
    return quality().model_copy(update={"rows": tuple(rows)})


def test_numbers_of_steps_have_plots_of_their_own_with_the_same_axes() -> None:
    found = by_steps(20, 50)
    plots = plots_of(report_of(quality=found))
    assert [plot.name for plot in plots] == [
        "latency-quality-20-steps.png", "latency-quality-50-steps.png",
        "error-over-steps-20-steps.png", "error-over-steps-50-steps.png",
    ]  # fmt: skip
    axes = [drawn(plot) for plot in plots]
    for steps, one in zip((20, 50), axes[2:], strict=True):
        assert {np.size(line.get_xdata()) for line in one.get_lines()} == {steps}
        assert one.get_xlim() == (1, steps)
    for one, other in (axes[:2], axes[2:]):
        assert one.get_ylim() == other.get_ylim()
    assert axes[0].get_xlim() == axes[1].get_xlim()
    for plot, one in zip(plots, axes, strict=True):
        assert title_of(one).endswith(plot.of)
    for one, steps in zip(axes[:2], (20, 50), strict=True):
        series = {line.get_label(): line.get_xdata() for line in one.get_lines()}
        full = [setting(interval, steps).full_steps for interval in (3, 2)]
        assert series["FORA"] == pytest.approx([2.1 * number for number in full])
        assert series["fewer steps, best solver"] == pytest.approx([20, 50])
        assert np.size(series["Pareto front"]) == len(pareto_front(found.rows[1:]))
        assert one.get_title(loc="left") == "PSNR to no caching (20 steps)"
    assert "times as fast as no caching (20 steps)" in recommendation(report_of(quality=found), 30)

    both = by_steps(20, 50, schedulers=("DDIMScheduler", "UniPCMultistepScheduler"))
    names = [plot.name for plot in plots_of(report_of(quality=both)) if plot.kind == ERROR_OVER_STEPS]
    assert names == [f"error-over-steps-{n}-steps-{solver}.png" for solver in ("ddim", "unipc") for n in (20, 50)]
    assert all(is_plot(plot.name) for plot in plots)
    assert not is_plot("thesis.png")


def test_every_batch_size_is_shown() -> None:
    sizes = (1, 4, 16)
    report = report_of(bench=bench(sizes))
    plots = plots_of(report)
    assert [plot.name for plot in plots] == [
        f"{kind}-batch-{size}.png" for kind in ("speedup", "time-split") for size in sizes
    ]
    for kind in ("speedup", "time-split"):
        axes = [drawn(plot) for plot in plots if plot.kind == kind]
        assert len({one.get_xlim() for one in axes}) == 1
        titles = [title_of(one) for one in axes]
        assert [title.partition(", ")[2] for title in titles] == ["1 image", "4 images at once", "16 images at once"]
    assert [[plot.kind for plot in group] for group in grouped(plots)] == [["speedup"] * 3, ["time-split"] * 3]
    bars = [text.get_text() for text in drawn(plots[3]).texts]
    assert "4.00 s" in bars
    assert "1.57 s" in bars
    said = recommendation(report, 30).splitlines()[0]
    assert said.endswith("for 1 image; 2.55 times for 4 images at once; 2.55 times for 16 images at once.")
    both = recommendation(report_of(bench=bench(sizes), quality=quality()), 35)
    assert "Speed-up of fora:2 in the benchmark: 1.84 times for 1 image, 1.84 times for 4 images at once, 1." in both


def test_identical_images_stand_at_the_upper_edge() -> None:
    found = quality(likeness(setting(2), 0.055, None), likeness(setting(3), 0.04, 31.5))
    axes = drawn(plots_of(report_of(quality=found))[0])
    (series,) = (line for line in axes.get_lines() if line.get_label() == "FORA")
    assert np.asarray(series.get_ydata()).tolist() == [31.5, axes.get_ylim()[1]]
    assert {"18", "26, identical"} <= {text.get_text() for text in axes.texts}
    assert len(pareto_front(found.rows[1:])) == 2
    every = report_of(quality=quality(likeness(setting(2), 0.055, None)))
    drawn(plots_of(every)[0])


@pytest.mark.usefixtures("undrawn")
def test_plots_that_are_no_longer_made_are_removed(tmp_path: Path) -> None:
    (tmp_path / "speedup.png").touch()
    write_report(tmp_path, ABOUT, MACHINE, bench=bench())
    assert (tmp_path / "speedup.png").exists()  # not of a report that is known
    (tmp_path / "speedup-batch-16.png").touch()
    (tmp_path / "other.png").touch()
    check_report_folder(tmp_path, "quality", ABOUT, replace=True)
    write_report(tmp_path, ABOUT, MACHINE, quality=quality())
    assert {path.name for path in tmp_path.glob("*.png")} == {"other.png"}


def contrast(one: str, other: str) -> float:
    """The contrast of two colours as WCAG 2.1 defines it."""

    def luminance(colour: str) -> float:
        levels = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        linear = [level / 12.92 if level <= 0.04045 else ((level + 0.055) / 1.055) ** 2.4 for level in levels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted(map(luminance, (one, other)))
    return (light + 0.05) / (dark + 0.05)


def test_every_plot_has_a_dark_variant_with_the_colour_of_the_page() -> None:
    report = report_of(bench=bench((1,)), quality=quality())
    plots = plots_of(report)
    page = as_html(report, [[Picture(plot, plot.png(LIGHT), plot.png(DARK)) for plot in plots]])
    in_the_dark = r'<source media="screen and \(prefers-color-scheme: dark\)" srcset='
    for theme, start in ((LIGHT, "<img src="), (DARK, in_the_dark)):
        found = re.findall(f'{start}"data:image/png;base64,([^"]*)"', page)
        assert len(found) == len(plots)
        for content in found:
            image = Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB")
            colours = sorted(image.getcolors(1 << 20) or ())
            assert colours[-1][1] == ImageColor.getrgb(theme.paper)
        assert f"--card: {theme.paper};" in page
        assert contrast(theme.ink, theme.paper) >= 4.5
        assert all(contrast(colour, theme.paper) >= 3 for colour in (theme.pale, *theme.series))


def test_the_grid_has_no_white_background(tmp_path: Path) -> None:
    found = quality()
    names = [row[0] for row in quality_table(found).rows]
    images = [[Image.new("L", (8, 8), 10 * row + column) for column in range(8)] for row in range(len(names))]
    sheet = grid(images, names)
    sheet.save(tmp_path / "grid.png")
    strips = strips_of(found, (tmp_path / "grid.png").read_bytes())
    assert [strip.name for strip in strips] == names
    assert (strips[0].detail, strips[1].detail) == ("the reference", "1.82x, 38.0 dB")
    for number, strip in enumerate(strips):
        image = Image.open(io.BytesIO(base64.b64decode(strip.uri.partition(",")[2])))
        colours = {colour: count for count, colour in image.getcolors() or ()}
        gaps = colours.pop((0, 0, 0, 0))
        assert colours == {(*[10 * number + k] * 3, 255): 64 * 64 for k in range(8)}
        assert gaps == 7 * 4 * 64
    page = as_html(report_of(quality=found), [], (tmp_path / "grid.png").read_bytes())
    assert page.count('alt="Images of ') == len(names)

    other = Image.new("RGB", sheet.size, "teal")
    assert rows_of(other, names, 8) is None
    assert rows_of(Image.new("L", (3, 3)), names, 8) is None
    other.save(tmp_path / "other.png")
    (whole,) = strips_of(found, (tmp_path / "other.png").read_bytes())
    assert whole.name == ""
    assert strips_of(found, b"damaged") == []


def test_a_large_grid_is_reduced() -> None:
    noise = Image.effect_noise((320, 320), 100).convert("RGB")
    names = [row[0] for row in quality_table(quality()).rows]
    file = io.BytesIO()
    grid([[noise] * 8] * len(names), names).save(file, format="png")
    strips = strips_of(quality(), file.getvalue())
    assert len(file.getvalue()) > LARGE_GRID
    for strip in strips:
        image = Image.open(io.BytesIO(base64.b64decode(strip.uri.partition(",")[2])))
        assert (image.format, image.width) == ("WEBP", 1280)


def test_the_words_of_a_page_are_explained_and_no_others() -> None:
    dense = setting(3).model_copy(update={"schedule": "dense:18,0.3,first=2,forecast=2", "method": "forecast"})
    reports = {
        "bench": report_of(bench=bench()),
        "quality": report_of(quality=quality()),
        "both": report_of(bench=bench(), quality=solved(by_steps(20, 50))),
        "dense": report_of(quality=quality(likeness(dense, 0.04, 40.0))),
    }
    words = {}
    for name, report in reports.items():
        page = as_html(report, [[Picture(plot, b"", b"") for plot in plots_of(report)]])
        before, _, explained = page.partition('<section id="words"')
        words[name] = {html.unescape(word) for word in re.findall("<dt>([^<]*)</dt>", explained)}
        metrics = {metric for row in report.quality.rows for metric in row.metrics} if report.quality else set()
        columns = {METRICS[metric].column for metric in metrics}
        assert columns <= words[name]
        for term in TERMS:
            if re.search(term.pattern, visible_text(before)):
                assert term.word in words[name], (name, term.word)
            if term.word in words[name]:
                assert re.search(term.pattern, visible_text(page)), (name, term.word)
        tables = [*(bench_tables(report.bench) if report.bench else ())]
        tables += [quality_table(report.quality)] if report.quality else []
        for heading in {heading for table in tables for heading in table.header} - columns:
            terms = [term for term in TERMS if term.word in words[name]]
            assert any(heading in term.word.split(", ") or re.search(term.pattern, heading) for term in terms), heading
    assert {"roofline", "spread", "peak memory"} <= {part for word in words["bench"] for part in word.split(", ")}
    assert not {"dB", "Pareto front", "latents", "dense:F,B"} & words["bench"]
    assert {"Pareto front", "dB", "fora:N", "cache interval", "S steps, no cache"} <= words["quality"]
    assert not {"roofline", "solution, fine solution", "forecast, forecast=K"} & words["quality"]
    assert {"solution, fine solution", "PSNR to solution"} <= words["both"]
    assert {"dense:F,B", "first=K, last=K", "forecast, forecast=K"} <= words["dense"]
    for kind in KINDS.values():
        assert any(re.search(term.pattern, f"schedule {kind.usage}") for term in TERMS[1:] if term.topic == STEPS)


@pytest.mark.slow
def test_a_large_page_has_room(tmp_path: Path) -> None:
    """Eight batch sizes, and four numbers of steps with two schedulers."""
    schedulers = ("DDIMScheduler", "UniPCMultistepScheduler")
    found = by_steps(10, 20, 50, 100, schedulers=schedulers)
    write_report(tmp_path, ABOUT, MACHINE, bench=bench((1, 2, 4, 8, 16, 32, 64, 128)), quality=found)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < ROOM


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="Chromium is not on PATH")
def test_the_page_fits_wide_and_narrow_screens(tmp_path: Path) -> None:
    """Plots and grid are visible, nothing overflows, nothing is asked of the network."""
    out = tmp_path / "out"
    out.mkdir()
    Image.new("RGB", (3000, 2000), "teal").save(out / "grid.png")
    write_report(out, ABOUT, MACHINE | {"long": "x" * 300}, bench=bench((1, 4, 16)), quality=solved(quality()))
    plots = len([*out.glob("*.png")]) - 1
    with browser(str(shutil.which("chromium")), tmp_path / "profile") as page:
        for width in (1280, 400):
            for dark in (False, True):
                found = page.open(out / HTML, width, dark)
                assert found["width"] == width
                assert found["scrolls"] <= width
                assert len(found["images"]) == plots + 1
                for image in found["images"]:
                    assert image["pixels"] >= 1280, image
                    assert image["shown"] > 0.7 * min(width, 600), image
                    assert 0 <= image["left"] < image["left"] + image["shown"] <= width, image
                assert all(right <= width for right in found["boxes"])
        asked = {url.partition(":")[0] for url in page.requests}
    assert asked == {"file", "data"}
