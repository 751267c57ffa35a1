"""ONNX Runtime on a GPU, against stand-ins that record what it is told; and which of its distributions is used."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

import pytest
import torch

from fora_trt.bundle import Bundle
from fora_trt.doctor import findings
from fora_trt.engines.backends import BACKENDS
from fora_trt.engines.base import Engine
from fora_trt.engines.cuda_graphs import Replay
from fora_trt.engines.onnxruntime import onnxruntime_too_old
from fora_trt.engines.onnxruntime.engine import engines_from_bundle
from fora_trt.errors import BackendError
from fora_trt.models.examples import example_inputs
from tests.onnxruntime_standin import NO_FALLBACK, OnGpu, Sessions
from tests.tensorrt_standin import Cuda, Recorder

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
CALLER, OWN = 1000, 1001
"""Handles of the caller's stream and of the first one that is made beside it."""


class Rig:
    """ONNX Runtime with a GPU, and every call in order."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.recorder = Recorder(rtx=False)
        self.sessions = Sessions(self.recorder, patch)
        self.cuda = Cuda(self.recorder, patch)

    def since(self, mark: int) -> list[tuple[Any, ...]]:
        return [(call.owner, call.name, *call.arguments) for call in self.recorder.since(mark)]


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Rig:
    return Rig(monkeypatch)


def tensors_for(engine: Engine, bundle: Bundle) -> dict[str, torch.Tensor]:
    inputs = example_inputs(engine.inputs.values(), bundle.manifest.conditioning, batch=2)
    return inputs | {name: torch.full(spec.sized(2), torch.nan) for name, spec in engine.outputs.items()}


def launch_of(engine: Engine, bundle: Bundle) -> Callable[[], None]:
    """A launch that keeps the tensors that it reads and writes."""
    tensors = tensors_for(engine, bundle)
    on_gpu: Any = {name: OnGpu(tensor) for name, tensor in tensors.items()}
    launch = engine.bind(on_gpu)
    return lambda: launch() if tensors else None


def test_sessions_refuse_the_cpu_and_tf32_and_share_one_stream(rig: Rig, exported: Bundle) -> None:
    engines_from_bundle(exported, GPU)
    assert rig.sessions.options == [{"device_id": "0", "user_compute_stream": str(OWN), "use_tf32": "0"}] * 2
    assert [config[NO_FALLBACK] for config in rig.sessions.config] == ["1", "1"]


def test_launches_are_ordered_by_events_and_nothing_waits(exported: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    (on_cpu,) = [engine for name, engine in engines_from_bundle(exported, CPU).items() if name == "full"]
    expected = tensors_for(on_cpu, exported)
    on_cpu.bind(expected)()

    rig = Rig(monkeypatch)
    engine = engines_from_bundle(exported, GPU)["full"]
    tensors = tensors_for(engine, exported)
    on_gpu: Any = {name: OnGpu(tensor) for name, tensor in tensors.items()}
    launch, mark = engine.bind(on_gpu), len(rig.recorder.calls)
    launch()
    wait = "Stream.wait_stream"  # of two streams on the GPU; a wait of the host has no stand-in and would raise
    assert rig.since(mark) == [
        (f"Stream {OWN}", wait, CALLER), ("Session", "run", "1"), (f"Stream {CALLER}", wait, OWN),
    ]  # fmt: skip
    for name in engine.outputs:
        torch.testing.assert_close(tensors[name], expected[name], atol=1e-5, rtol=1e-5)


def test_a_launch_on_the_sessions_own_stream_needs_no_order(rig: Rig, exported: Bundle) -> None:
    launch = launch_of(engines_from_bundle(exported, GPU)["reuse"], exported)
    rig.cuda.current.cuda_stream, mark = OWN, len(rig.recorder.calls)
    launch()
    assert rig.since(mark) == [("Session", "run", "1")]


def test_the_caller_waits_for_what_a_failed_run_launched(
    rig: Rig, exported: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = launch_of(engines_from_bundle(exported, GPU)["full"], exported)

    def failing(*_: Any) -> None:
        raise RuntimeError("CUDA failure 2: out of memory")

    monkeypatch.setattr("tests.onnxruntime_standin.Session.run_with_iobinding", failing)
    with pytest.raises(BackendError, match="onnxruntime could not run a step: CUDA failure 2: out of memory"):
        launch()
    assert rig.since(0)[-1] == (f"Stream {CALLER}", "Stream.wait_stream", OWN)


def test_a_launch_is_never_captured(rig: Rig, exported: Bundle) -> None:
    engine = engines_from_bundle(exported, GPU)["full"]
    launch = launch_of(engine, exported)
    assert not engine.is_capturable()
    replay = Replay(launch, GPU, engine.is_capturable)
    for _ in range(3):
        replay()
    assert len(rig.recorder.named("run")) == 3
    assert not rig.recorder.named("torch.cuda.graph")
    rig.cuda.capturing = True
    with pytest.raises(BackendError, match="onnxruntime cannot be captured in a CUDA graph; run the step outside"):
        launch()
    assert len(rig.recorder.named("run")) == 3


def test_nodes_that_would_run_on_the_cpu_are_named(rig: Rig, exported: Bundle) -> None:
    rig.sessions.on_cpu = True
    message = r"onnxruntime 1\.31\.1 would run .*Attention, .*MatMul, .* of .*full\.onnx on the CPU and copy tensors"
    with pytest.raises(BackendError, match=message):
        engines_from_bundle(exported, GPU)


def test_a_provider_that_does_not_start_is_told_from_nodes_on_the_cpu(rig: Rig, exported: Bundle) -> None:
    rig.sessions.starts = False
    with pytest.raises(BackendError, match=r"could not start its CUDA provider .* or give --device cpu"):
        engines_from_bundle(exported, GPU)


def test_a_graph_that_cannot_be_read_keeps_its_reason(rig: Rig, bundle_copy: Path) -> None:
    bundle = Bundle.open(bundle_copy)
    bundle.graph_path("full").write_bytes(b"")
    with pytest.raises(BackendError, match=r"onnxruntime cannot load .*full\.onnx: INVALID_PROTOBUF"):
        engines_from_bundle(bundle, GPU)


@pytest.mark.parametrize(("version", "oldest"), [("1.30.2", "cuda"), ("1.22.1", "cpu")])
def test_an_old_release_is_refused_where_it_is_too_old(
    rig: Rig, exported: Bundle, monkeypatch: pytest.MonkeyPatch, version: str, oldest: str
) -> None:
    monkeypatch.setattr("onnxruntime.__version__", version)
    assert (onnxruntime_too_old("cpu") is None) == (oldest == "cuda")
    remedy = "onnxruntime-gpu>=1.31', or give --device cpu" if oldest == "cuda" else "onnxruntime>=1.23'"
    with pytest.raises(BackendError, match=f"onnxruntime {version} is too old.*; pip install -U '{remedy}"):
        BACKENDS["onnxruntime"].engines(exported, torch.device(oldest))


def install(folder: Path, *distributions: str, version: str = "1.31.1") -> Path:
    """A folder as pip leaves it, on an import path."""
    (folder / "onnxruntime").mkdir(parents=True)
    (folder / "onnxruntime" / "__init__.py").touch()
    for name in distributions:
        record = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        record.mkdir()
        (record / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\n")
    return folder


@pytest.fixture
def use_path(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Look for `onnxruntime` and for distributions in these folders alone."""

    def use(*folders: Path) -> None:
        path = [str(folder) for folder in folders]

        def found(name: str) -> ModuleSpec | None:
            return PathFinder.find_spec(name, path)

        monkeypatch.setattr("fora_trt.engines.onnxruntime.find_spec", found)
        monkeypatch.setattr(sys, "path", path)

    return use


def test_both_distributions_in_one_folder_are_refused(tmp_path: Path, use_path: Callable[..., None]) -> None:
    use_path(install(tmp_path / "site", "onnxruntime", "onnxruntime-gpu"))
    problem = BACKENDS["onnxruntime"].problem()
    assert problem is not None
    assert "onnxruntime and onnxruntime-gpu are both installed in" in problem
    assert str(tmp_path / "site") in problem


def test_of_distributions_in_two_folders_the_first_is_used(tmp_path: Path, use_path: Callable[..., None]) -> None:
    wheels = install(tmp_path / "wheels", "onnxruntime-gpu")
    site = install(tmp_path / "site", "onnxruntime", version="1.30.0")
    use_path(wheels, site)
    assert BACKENDS["onnxruntime"].problem() is None
    assert BACKENDS["onnxruntime"].versions() == {"onnxruntime-gpu": "1.31.1"}, "the other is shadowed"
    use_path(site, wheels)
    assert BACKENDS["onnxruntime"].versions() == {"onnxruntime": "1.30.0"}


def test_a_folder_that_an_uninstallation_left_is_no_installation(tmp_path: Path, use_path: Callable[..., None]) -> None:
    (tmp_path / "onnxruntime" / "capi").mkdir(parents=True)
    use_path(tmp_path)
    problem = BACKENDS["onnxruntime"].problem()
    assert problem is not None
    assert problem.startswith("onnxruntime is not installed; pip install")


def doctor_on_onnxruntime() -> tuple[str, str]:
    (found,) = [one for one in findings() if one.what == "backend onnxruntime"]
    return found.found, found.remedy


def test_doctor_names_the_distribution_that_is_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gpu = install(tmp_path / "wheels", "onnxruntime-gpu")
    monkeypatch.setattr("fora_trt.engines.onnxruntime._folder_of_onnxruntime", lambda: gpu)
    monkeypatch.setattr(
        "onnxruntime.get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    monkeypatch.setattr("onnxruntime.__version__", "1.31.1")
    found, remedy = doctor_on_onnxruntime()
    assert found.startswith("onnxruntime-gpu 1.31.1 on CUDA, CPU")
    assert not remedy
    monkeypatch.setattr("onnxruntime.__version__", "1.30.0")
    assert "pip install -U 'onnxruntime-gpu>=1.31'" in doctor_on_onnxruntime()[1]
    monkeypatch.setattr("fora_trt.engines.onnxruntime._folder_of_onnxruntime", lambda: tmp_path)
    assert doctor_on_onnxruntime()[0].startswith("installed under another name on CUDA, CPU")
