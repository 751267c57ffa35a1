"""A backend, a metric and a kind of schedule that this file alone knows: one registration each, used by the commands.

An architecture from outside is in `test_architectures.py`.
"""

import json
import re
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fora_trt import ForaError, Schedule, registry
from fora_trt.bundle import Bundle, Manifest
from fora_trt.engines.backends import BACKENDS, Backend, best_first
from fora_trt.engines.base import Engine
from fora_trt.engines.options import EngineOptions
from fora_trt.engines.torch.engine import engines_from_bundle
from fora_trt.errors import BackendError, ScheduleError
from fora_trt.metrics import METRICS, Metric
from fora_trt.registry import Registry
from fora_trt.report.page import read_report
from fora_trt.schedule import KINDS, ScheduleKind
from tests.test_cli import fora


class Mine(Backend):
    """PyTorch under another name, for the CPU alone."""

    name = "mine"
    distributions = ("torch",)
    preference = 100

    def problem(self) -> str | None:
        return None

    def refusal(self, manifest: Manifest, device_type: str) -> str | None:
        return None if device_type == "cpu" and manifest.precision == "fp32" else "mine is for fp32 on the CPU"

    def engines_of(self, bundle: Bundle, device: torch.device, options: EngineOptions) -> dict[str, Engine]:
        return engines_from_bundle(bundle, device, compiled=False)


def largest(pictures: Tensor, reference: Tensor) -> Tensor:
    return (pictures.double() - reference.double()).abs().flatten(1).amax(1)


LARGEST = Metric(
    "largest_difference",
    "largest",
    "The largest difference of a pixel, mean over the images.",
    unit="levels",
    each=lambda device: largest,
    shown=lambda value: "" if value is None else f"{value:.1f} levels",
)


def ends(steps: int, arguments: str) -> Schedule:
    """The first and the last steps are full: `ends:2`."""
    count = int(arguments)
    return Schedule.from_flags((k < count or k >= steps - count for k in range(steps)), f"ends:{arguments}")


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    BACKENDS.register(Mine())
    METRICS.register(LARGEST)
    KINDS.register(ScheduleKind("ends", "ends:N", ends))
    yield
    BACKENDS.unregister("mine")
    METRICS.unregister("largest_difference")
    KINDS.unregister("ends")


def test_a_backend_is_used_by_name_and_by_auto_and_doctor_lists_it(exported: Bundle, tmp_path: Path) -> None:
    common = ["run", exported.folder, "--class-labels", "1,2", "--steps", 6, "--device", "cpu", "--json"]
    used = {}
    for backend in ("mine", "auto", "torch"):
        done = fora(*common, "--backend", backend, "--latents-out", tmp_path / f"{backend}.npy")
        assert done.exit_code == 0, done.output
        used[backend] = json.loads(done.stdout)["backend"]
    assert used == {"mine": "mine", "auto": "mine", "torch": "torch"}
    latents = [np.load(tmp_path / f"{backend}.npy") for backend in used]
    assert np.array_equal(latents[0], latents[2])
    assert "backend mine" in fora("doctor").stdout
    assert best_first()[0].name == "mine"


def test_a_backend_that_refuses_a_bundle_is_passed_over(exported: Bundle) -> None:
    half = exported.manifest.model_copy(update={"precision": "bf16"})
    with pytest.raises(BackendError, match="the backend mine cannot be used: mine is for fp32 on the CPU"):
        BACKENDS["mine"].engines(Bundle(exported.folder, half), torch.device("cpu"), EngineOptions())


def test_a_schedule_is_used_by_its_text(exported: Bundle, tmp_path: Path) -> None:
    common = ["run", exported.folder, "--class-labels", "1,2", "--steps", 6, "--backend", "torch", "--device", "cpu"]
    latents = {}
    for schedule in ("ends:2", "ends:3", "none"):
        file = tmp_path / f"{schedule}.npy"
        done = fora(*common, "--schedule", schedule, "--latents-out", file, "--json")
        assert done.exit_code == 0, done.output
        found = json.loads(done.stdout)
        assert (found["schedule"], found["full_steps"]) == (schedule, 4 if schedule == "ends:2" else 6)
        latents[schedule] = np.load(file)
    assert np.array_equal(latents["ends:3"], latents["none"])
    assert not np.array_equal(latents["ends:2"], latents["none"])
    Schedule.from_text("ends:2", 6).to_file(tmp_path / "mine.json")
    done = fora(*common, "--schedule", tmp_path / "mine.json", "--latents-out", tmp_path / "file.npy")
    assert done.exit_code == 0, done.output
    assert np.array_equal(np.load(tmp_path / "file.npy"), latents["ends:2"])
    refused = fora(*common, "--schedule", "middle:2", "--latents-out", tmp_path / "refused.npy")
    assert refused.exit_code == 1
    assert "there is no schedule 'middle:2'; give none, fora:N, " in refused.stderr
    assert "ends:N, KIND:N,KIND:N,... (KIND is attention or feed-forward), or a .json file" in refused.stderr


def test_a_metric_has_a_column_and_a_sentence(exported: Bundle, tmp_path: Path) -> None:
    small = ["--num-images", 2, "--steps", 6, "--cache-intervals", 1, "--schedule", "ends:2", "--batch-size", 2]
    done = fora("quality", exported.folder, *small, "--backend", "mine", "--device", "cpu", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert re.search(r"setting .* largest ", done.stdout)
    assert re.search(r"ends:2 .* \d+\.\d levels", done.stdout)
    report = read_report(tmp_path / "out")
    assert report is not None and report.quality is not None
    plain, cached, control = report.quality.rows
    assert (plain.setting.label, cached.setting.label, control.setting.control_of) == ("no cache", "ends:2", "ends:2")
    assert plain.metrics["largest_difference"] == 0
    pictures = [np.load(tmp_path / "out" / "quality" / f"{name}.npz")["arr_0"].astype(int) for name in NAMES]
    expected = np.abs(pictures[0] - pictures[1]).reshape(2, -1).max(1).mean()
    assert cached.metrics["largest_difference"] == pytest.approx(expected, abs=1), "the saved pixels are rounded"
    assert (cached.metrics["largest_difference"] or 0) > 0
    assert LARGEST.explanation in (tmp_path / "out" / "report.html").read_text()
    assert "largest_difference" in (tmp_path / "out" / "report.csv").read_text().splitlines()[0]


NAMES = ("ddim-6-steps-no-cache", "ddim-6-steps-ends-2")


def test_a_name_is_taken_once_and_an_unknown_one_is_a_sentence() -> None:
    kinds: Registry[ScheduleKind] = Registry("kind of schedule", ScheduleError)
    entry = kinds.register(ScheduleKind("ends", "ends:N", ends))
    assert (kinds["ends"], kinds.get("none"), [*kinds], len(kinds), "ends" in kinds) == (
        entry,
        None,
        ["ends"],
        1,
        True,
    )
    with pytest.raises(ValueError, match="a kind of schedule named 'ends' is already registered"):
        kinds.register(entry)
    with pytest.raises(ScheduleError, match="unknown kind of schedule 'none'; choose one of ends"):
        kinds["none"]


def test_an_installed_package_registers_by_an_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module that it names is imported at the first look-up in any registry, once."""
    found = [EntryPoint("mine", "tests.test_registries:LATE", registry.GROUP)]
    monkeypatch.setattr(registry, "entry_points", lambda group: found if group == registry.GROUP else [])
    monkeypatch.setattr(registry, "_loaded", False)
    loaded: list[str] = []
    monkeypatch.setattr(EntryPoint, "load", lambda self: loaded.append(self.name))
    assert "none" in KINDS
    assert "none" in KINDS
    assert loaded == ["mine"]


def test_errors_of_every_registry_are_of_this_package() -> None:
    for table in (BACKENDS, METRICS, KINDS):
        with pytest.raises(ForaError, match=r"unknown .* 'no such name'; choose one of "):
            table["no such name"]
