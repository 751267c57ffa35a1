"""A small DiT as a diffusers folder with random weights, and the bundles that are exported from it, once per run."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTTransformer2DModel

from fora_trt.bundle import Bundle
from fora_trt.contract import OPTIMIZATIONS, Optimization
from fora_trt.evaluate import bench, peak_memory, peaks
from fora_trt.evaluate.export_check import GraphCheck
from fora_trt.export.write import bundle_from_model
from fora_trt.models.sources import model_from_source
from tests.routers import ddim20_routers, router_file
from tests.shared import bundle_once, bundles_once, made_once, measured_pilot, one_trace_for_all

ON_CPU = ("onnxruntime", "torch")
"""The backends that start at once on a machine without a GPU."""

TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 3,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
}


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of a run share; with the variable SHARED_TEST_FOLDER, several runs of one tree."""
    if given := os.environ.get("SHARED_TEST_FOLDER"):
        return Path(given)
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def pipeline_folder(run_folder: Path) -> Path:
    """A DiT pipeline with a VAE, in the layout of the hub; every block has an embedder of its own."""
    return made_once(run_folder / "checkpoints" / "tiny-dit", _save_pipeline)


def _save_pipeline(folder: Path) -> None:
    save_transformer(folder, TINY)
    vae = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    vae.save_pretrained(folder / "vae")
    parts = {"vae": ["diffusers", "AutoencoderKL"], "scheduler": ["diffusers", "DDIMScheduler"]}
    _save_index(folder, parts)


def save_transformer(folder: Path, sizes: Mapping[str, Any]) -> None:
    """A DiT with random weights, and its scheduler."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(**sizes)
    for block in transformer.transformer_blocks:  # as trained ones: gates that are not tiny
        torch.nn.init.normal_(block.norm1.linear.bias, std=0.5)
    transformer.save_pretrained(folder / "transformer")
    DDIMScheduler(clip_sample=False).save_pretrained(folder / "scheduler")


def _save_index(folder: Path, parts: Mapping[str, Any]) -> None:
    index = {"_class_name": "DiTPipeline", "transformer": ["diffusers", "DiTTransformer2DModel"], **parts}
    (folder / "model_index.json").write_text(json.dumps(index))


@pytest.fixture(scope="session", autouse=True)
def peaks_once() -> Iterator[None]:
    """Benchmarks take over the peak rates that one before them measured: on a CPU that takes a second."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(bench, "measure_peaks", cache(peaks.measure_peaks))
        yield


@pytest.fixture
def one_trace() -> Iterator[None]:
    """Exports within a test take over traces of equal models: for tests of what comes after the trace."""
    with one_trace_for_all():
        yield


BundleAt = Callable[[Optimization, str], Bundle]
"""The bundle of the small DiT at a level of optimization and in a precision."""


@pytest.fixture(scope="session")
def bundle_at(pipeline_folder: Path, run_folder: Path) -> BundleAt:
    """Those of one precision are made together, from one trace, when the first of them is asked for."""

    @cache
    def bundles(precision: str) -> dict[Optimization, Bundle]:
        folder = run_folder / "export" / precision
        return bundles_once(folder, "tiny", lambda: model_from_source(str(pipeline_folder), precision))

    return lambda level, precision: bundles(precision)[level]


@pytest.fixture(scope="session")
def exported(bundle_at: BundleAt) -> Bundle:
    """The bundle of the small DiT, its graphs as they are traced; tests that alter one take `bundle_copy`."""
    return bundle_at("none", "fp32")


@pytest.fixture(scope="session")
def optimized(bundle_at: BundleAt) -> dict[str, Bundle]:
    """Bundles of the small DiT by how far they are optimized."""
    return {level: bundle_at(level, "fp32") for level in OPTIMIZATIONS if level != "none"}


@pytest.fixture(scope="session")
def pixels(run_folder: Path) -> Bundle:
    """A small DiT of 8 x 8 grey pixels and ten classes, so that the reader of digits takes it for one of digits."""
    folder = made_once(run_folder / "checkpoints" / "pixels", save_pixels)
    return bundle_once(run_folder / "export" / "pixels", lambda: model_from_source(str(folder)))


def save_pixels(folder: Path) -> None:
    save_transformer(folder, {**TINY, "in_channels": 1, "out_channels": 1, "num_embeds_ada_norm": 10})
    _save_index(folder, {"vae": [None, None]})


@pytest.fixture(scope="session")
def digits_by_level(run_folder: Path) -> dict[Optimization, Bundle]:
    """Bundles of the digits that come with the package, by level of optimization."""
    return bundles_once(run_folder / "export" / "digits", "digits", lambda: model_from_source("digits"))


@pytest.fixture(scope="session")
def digits(digits_by_level: dict[Optimization, Bundle]) -> Bundle:
    """The bundle of the digits, fully optimized."""
    return digits_by_level["fold"]


@pytest.fixture(scope="session")
def half_digits(run_folder: Path) -> Bundle:
    """The bundle of the digits in fp16."""
    return bundle_once(run_folder / "export" / "half-digits", lambda: model_from_source("digits", "fp16"))


@pytest.fixture(scope="session")
def dit_s(run_folder: Path) -> Bundle:
    """The bundle of DiT-S/2 with random weights."""
    return bundle_once(run_folder / "export" / "dit-s-2", lambda: model_from_source("random:DiT-S/2"))


@pytest.fixture(scope="session")
def dit_s_router(run_folder: Path) -> Bundle:
    """The bundle of DiT-S/2 with random weights and a random router of Learning-to-Cache for 20 steps."""

    def make(unfinished: Path) -> None:
        file = router_file(run_folder / "dit-s-2-router.pt", ddim20_routers(24))
        with one_trace_for_all():
            bundle_from_model(
                model_from_source("random:DiT-S/2"), unfinished, schedule=f"l2c:{file}", check=GraphCheck()
            )

    return Bundle.read(made_once(run_folder / "export" / "dit-s-2-router", make))


@pytest.fixture
def bundle_copy(exported: Bundle, tmp_path: Path) -> Path:
    """A folder with the same bundle, to be damaged."""
    return Path(shutil.copytree(exported.folder, tmp_path / "export" / "tiny"))


@pytest.fixture
def module(pipeline_folder: Path) -> torch.nn.Module:
    """The checkpoint, loaded by diffusers alone."""
    loaded: torch.nn.Module = DiTTransformer2DModel.from_pretrained(pipeline_folder, subfolder="transformer")
    return loaded.eval().requires_grad_(False)


@pytest.fixture
def memory_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peak memory is measured here and not in a process of its own, which takes seconds to start."""

    def run(command: list[str], *, input: bytes, **more: Any) -> subprocess.CompletedProcess[bytes]:
        printed = io.StringIO()
        with monkeypatch.context() as inside, redirect_stdout(printed):
            inside.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(input)))
            try:
                peak_memory.main()
            except SystemExit as ended:
                return subprocess.CompletedProcess(command, 1, b"", str(ended).encode())
        return subprocess.CompletedProcess(command, 0, printed.getvalue().encode(), b"")

    monkeypatch.setattr(peak_memory, "subprocess", SimpleNamespace(run=run))


@pytest.fixture
def pilot() -> Iterator[None]:
    """A machine whose reuse steps take a tenth of full ones, always."""
    with measured_pilot():
        yield
