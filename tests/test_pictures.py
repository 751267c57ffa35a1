"""What the demo shows: the sheet that compares images, the figures beside them, and the conclusion."""

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from fora_trt.bundle import Bundle
from fora_trt.cli import main
from fora_trt.evaluate.pictures import Shown, calibrated_schedule, conclusion_of, sheet_of
from fora_trt.images.sheet import FACTOR, GAP, MARGIN, SMALLEST_SIDE, SheetRow, comparison_sheet
from fora_trt.metrics import latent_psnr
from fora_trt.pipeline import Pipeline
from fora_trt.report.results import BenchRow, Setting


def shown(schedule: str, speedup: float, close: float | None, control_of: str | None = None) -> Shown:
    setting = Setting(
        scheduler="DDIMScheduler", steps=50, nfe=50, full_steps=18, schedule=schedule, control_of=control_of
    )
    row = BenchRow(
        backend="torch", images=2, setting=setting, seconds=1, fastest=1, slowest=1, full_step_seconds=1,
        reuse_step_seconds=None, overhead=None, speedup=speedup, ideal_speedup=2.8, roofline_seconds=0,
        peak_memory_bytes=None,
    )  # fmt: skip
    return Shown(row, setting.label, torch.zeros(2, 8, 8, 1, dtype=torch.uint8), close)


def test_a_sheet_has_the_images_and_their_differences_to_the_first_row() -> None:
    plain = np.full((2, 8, 8, 1), 100, np.uint8)
    other = plain.copy()
    other[0, 2, 3] += 10
    other[1, 7, 7] -= 10
    sheet = np.asarray(comparison_sheet([SheetRow("plain", "", plain), SheetRow("other", "detail", other)]))
    scale = SMALLEST_SIDE // 8
    width = 2 * (SMALLEST_SIDE + GAP) - GAP
    right, y = sheet.shape[1] - MARGIN - width, MARGIN + 44 + SMALLEST_SIDE + 3 * GAP

    def at(k: int, row: int, column: int) -> list[int]:
        found: list[int] = sheet[
            y + row * scale + scale // 2, right + k * (SMALLEST_SIDE + GAP) + column * scale + scale // 2
        ].tolist()
        return found

    assert at(0, 0, 0) == [244, 244, 244]
    red, blue = at(0, 2, 3), at(1, 7, 7)
    assert red[0] > red[2] + 20, "brighter than the first row"
    assert blue[2] > blue[0] + 20, "darker"
    strength = 10 * FACTOR / 255
    assert red[0] == pytest.approx(244 * (1 - strength) + 178 * strength, abs=1)
    left = right - MARGIN - width
    assert sheet[y + 2 * scale + 1, left + 3 * scale + 1].tolist() == [110, 110, 110], "the image itself"


def test_a_sheet_keeps_the_size_of_large_images_and_their_colours() -> None:
    images = np.zeros((1, 70, 90, 3), np.uint8)
    images[..., 1] = 200
    sheet = comparison_sheet([SheetRow("one", "", images)] * 2)
    assert isinstance(sheet, Image.Image)
    assert sheet.getpixel((sheet.width - 2 * MARGIN - 2 * 90 + 5, MARGIN + 44 + 5)) == (0, 200, 0)


def test_the_conclusion_names_the_closest_row_and_its_rivals() -> None:
    rows = [
        shown("none", 1.0, None),
        shown("fora:3", 2.5, 37.5),
        shown("none", 2.7, 37.4, control_of="fora:3"),
        shown("calibrated", 2.6, 61.0),
    ]
    assert conclusion_of(rows) == (
        "The schedule calibrated is 2.6 times as fast as no caching, and its images come within 61.0 dB of those "
        "(PSNR, higher is closer); from the same noise: fora:3 37.5 dB at 2.5x, 50 steps, no cache 37.4 dB at 2.7x."
    )
    assert conclusion_of(rows[:1]) == "No cached row differs from no caching."
    assert [one.title for one in rows[:2]] == ["no cache, 1.0x", "fora:3, 2.5x"]
    assert rows[1].detail == "18 of 50 steps full, PSNR 37.5 dB"
    assert rows[0].detail == "18 of 50 steps full"
    assert sheet_of(rows).height > 4 * SMALLEST_SIDE


@pytest.mark.slow
def test_the_schedule_of_the_digits_is_as_good_as_it_says(digits: Bundle) -> None:
    """On images that its calibration saw neither for the search nor for its comparison."""
    schedule = calibrated_schedule()
    assert (schedule.steps, schedule.full_steps, schedule.text) == (50, 18, "calibrated")
    latents = {}
    for one in ("none", schedule, "fora:3"):
        pipeline = Pipeline(digits, schedule=one, guidance_scale=1.5, backend="onnxruntime", device="cpu")
        latents[str(one)] = pipeline(class_labels=[k % 10 for k in range(16)], seed=9000).latents
    plain, calibrated, fora = latents.values()
    found = [float(latent_psnr(one, plain, pixels=True).mean()) for one in (calibrated, fora)]
    print(found)
    assert found[0] > 58
    assert found[1] < 40


@pytest.mark.slow
def test_the_demo_writes_a_sheet_and_ends_with_a_conclusion(tmp_path: Path) -> None:
    output = tmp_path / "demo.png"
    options = ["--steps", "50", "--repeats", "1", "--out", str(tmp_path), "-o", str(output), "--device", "cpu"]
    done = CliRunner().invoke(main, ["demo", *options])
    assert done.exit_code == 0, done.output
    last = done.stdout.splitlines()[-1]
    print(last)
    assert last.startswith("The schedule calibrated is ")
    assert "fora:3 3" in last
    assert "steps, best solver " in last
    with Image.open(output) as sheet:
        assert sheet.height > 4 * SMALLEST_SIDE
