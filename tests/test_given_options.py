"""Options that were given and would have no effect are refused; defaults that do not fit are adapted."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from fora_trt import Schedule
from fora_trt.bundle import Bundle
from fora_trt.engines import memory
from fora_trt.files import record_of, write_manifest
from fora_trt.runtime import buffers
from tests.test_cli import fora

ONE = ("--class-labels", "1", "--steps", "3")

WITHOUT_EFFECT: dict[str, tuple[Sequence[object], str]] = {
    "force of run": (("run", "BUNDLE", *ONE, "--force"), "--force has no effect: without -o and --latents-out"),
    "a VAE for latents": (
        ("run", "BUNDLE", *ONE, "--latents-out", "x.npy", "--vae", "some/vae"),
        "--vae has no effect: only latents are written; give -o for images",
    ),
    "labels beside prompts": (
        ("sample", "BUNDLE", "--labels", "drawn", "--prompts", "LINES", "--out", "out"),
        "--labels has no effect: these images have no class labels",
    ),
    "a negative prompt for classes": (
        ("sample", "BUNDLE", "--negative-prompt", "blurred", "--out", "out"),
        "--negative-prompt has no effect: it needs --prompts",
    ),
    "two kinds of inputs": (
        ("sample", "BUNDLE", "--prompts", "LINES", "--prompt-embeds", "x.npz", "--out", "out"),
        "--prompts and --prompt-embeds exclude each other; give one of them",
    ),
    "plans without TensorRT": (
        ("run", "BUNDLE", *ONE, "--backend", "torch", "--engines", "plans"),
        "--engines has no effect: no TensorRT plans are loaded with --backend torch",
    ),
    "plans of bench": (
        ("bench", "BUNDLE", "--backends", "torch", "--engines", "plans"),
        "--engines has no effect: no TensorRT plans are loaded with these --backends",
    ),
    "plans of demo": (("demo", "--backend", "torch", "--engines", "plans"), "--engines has no effect"),
    "a measurement against itself": (
        ("export", "digits", "--measure-trajectory"),
        "--measure-trajectory has no effect: trajectories are compared with those in fp32",
    ),
    "force of bench": (("bench", "BUNDLE", "--force"), "--force has no effect: without --out no report is written"),
    "force of demo": (("demo", "--force"), "--force has no effect: without -o, a new file is written"),
}


@pytest.mark.parametrize("case", WITHOUT_EFFECT)
def test_an_option_without_effect_is_refused(
    case: str, pixels: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lines.txt").write_text("a cat\n")
    arguments, message = WITHOUT_EFFECT[case]
    known = {"BUNDLE": pixels.folder, "LINES": "lines.txt"}
    shown = fora(*(known.get(str(one), one) for one in arguments))
    assert shown.exit_code == 2
    assert message in " ".join(shown.stderr.split())
    assert [one.name for one in tmp_path.iterdir()] == ["lines.txt"]


@pytest.mark.parametrize("steps", [1, 2])
def test_the_default_interval_fits_few_steps(
    steps: int, pixels: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shown = fora("run", pixels.folder, "--class-labels", "1", "--steps", steps, "-o", "one.png", "--json")
    assert shown.exit_code == 0, shown.output
    assert json.loads(shown.stdout)["schedule"] == {1: "none", 2: "fora:2"}[steps]


@pytest.mark.parametrize(
    ("steps", "schedules"),
    [(1, ["none"]), (2, ["fora:2", "fora:2,forecast=2"]), (4, ["fora:2", "fora:3", "fora:3,forecast=2"])],
)
def test_verify_leaves_out_default_intervals_that_do_not_fit(steps: int, schedules: list[str], pixels: Bundle) -> None:
    shown = fora("verify", pixels.folder, "--steps", steps, "--json")
    assert shown.exit_code == 0, shown.output
    compared = [row["what"] for row in json.loads(shown.stdout)["comparisons"]]
    assert compared == ["full graph", "reuse graph", *(f"{steps} steps, {one}" for one in schedules)]


def test_quality_leaves_out_default_intervals_that_do_not_fit(
    pixels: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shown = fora("quality", pixels.folder, "--steps", 2, "--num-images", 2, "--out", "quality", "--json")
    assert shown.exit_code == 0, shown.output
    assert {row["setting"]["schedule"] for row in json.loads(shown.stdout)["rows"]} >= {"none", "fora:2"}


def test_a_schedule_of_the_bundle_that_does_not_fit_is_replaced_aloud(
    pixels: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "export" / "pixels"
    shutil.copytree(pixels.folder, folder)
    Schedule.fora(20, 4).to_file(folder / "schedule.json")
    files = {**pixels.manifest.files, "schedule.json": record_of(folder / "schedule.json")}
    write_manifest(folder, pixels.manifest.model_copy(update={"schedule": "schedule.json", "files": files}))

    fits = fora("run", folder, "--class-labels", "1", "--steps", 20, "-o", "a.png", "--json")
    assert json.loads(fits.stdout)["full_steps"] == Schedule.fora(20, 4).full_steps
    by_default = json.loads(fora("run", folder, "--class-labels", "1", "-o", "c.png", "--json").stdout)
    assert (by_default["steps"], by_default["schedule"]) == (20, str(folder / "schedule.json"))
    other = fora("run", folder, "--class-labels", "1", "--steps", 6, "-o", "b.png")
    assert other.exit_code == 0, other.output
    assert "fora:3 is used instead of the bundle's schedule" in " ".join(other.output.split())
    given = fora("run", folder, "--class-labels", "1", "--steps", 6, "--schedule", folder / "schedule.json")
    assert given.exit_code == 1
    assert "is for 20 model evaluations, but this trajectory has 6" in given.output


@pytest.mark.parametrize("given", ["pixels", "export/pixels/full.onnx", "export/pixels/manifest.json"])
def test_the_bundle_that_was_meant_is_named(
    given: str, pixels: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pixels.folder, tmp_path / "export" / "pixels")
    shown = fora("inspect", given)
    assert shown.exit_code == 1
    assert "did you mean export/pixels?" in shown.output


@pytest.mark.parametrize("command", ["run", "sample", "quality", "calibrate"])
def test_the_default_batch_fits_the_memory(
    command: str, pixels: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch of 4 images needs more than is free here, one of 1 does not."""
    monkeypatch.chdir(tmp_path)
    needed: list[int] = []

    def check(batch: int, device: torch.device, need_of: Callable[[int], int]) -> None:
        needed.append(batch)
        monkeypatch.setattr(memory, "free_bytes", lambda device: need_of(3))  # with guidance 1 image, and a half
        checked(batch, device, need_of)

    checked = memory.check_room
    monkeypatch.setattr(buffers, "check_room", check)
    images: list[object] = ["--class-labels", "1,2,3,4"] if command == "run" else ["--num-images", 4]
    options: dict[str, list[object]] = {
        "run": ["-o", "a.png"], "sample": ["--out", "set"], "quality": ["--out", "report", "--cache-intervals", 2],
        "calibrate": ["-o", "a.json", "--full-steps", 3],
    }  # fmt: skip
    line = [command, pixels.folder, *images, *options[command], "--steps", 4, "--backend", "torch"]
    refused = fora(*line, "--batch-size", 4)
    assert (refused.exit_code, refused.stderr.count("see --batch-size")) == (1, 1)
    shown = fora(*line)
    assert shown.exit_code == 0, shown.output
    assert "images at once do not fit the memory; 1 are made at once" in shown.stderr
    assert max(needed) >= 4
    if command in ("sample", "quality"):
        again = fora(*line, "--resume")
        assert again.exit_code == 0, again.output
