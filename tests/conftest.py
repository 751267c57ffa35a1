"""A small DiT as a diffusers folder with random weights, and the bundle that is exported from it, once per session."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTTransformer2DModel

from fora_trt.bundle import Bundle
from fora_trt.export.write import bundle_from_model
from fora_trt.models.sources import model_from_source

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
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DiT pipeline with a VAE, in the layout of the hub; every block has an embedder of its own."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny-dit"
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(**TINY)
    for block in transformer.transformer_blocks:  # as trained ones: gates that are not tiny
        torch.nn.init.normal_(block.norm1.linear.bias, std=0.5)
    transformer.save_pretrained(folder / "transformer")
    DDIMScheduler(clip_sample=False).save_pretrained(folder / "scheduler")
    vae = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    vae.save_pretrained(folder / "vae")
    index = {"_class_name": "DiTPipeline"} | {
        part: ["diffusers", type(module).__name__]
        for part, module in (("transformer", transformer), ("vae", vae), ("scheduler", DDIMScheduler()))
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="session")
def exported(pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The bundle of the small DiT, its graphs as they are traced; tests that alter one take `bundle_copy`."""
    model = model_from_source(str(pipeline_folder))
    return bundle_from_model(model, tmp_path_factory.mktemp("export") / "tiny", optimization="none")


@pytest.fixture(scope="session")
def optimized(pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """Bundles of the small DiT by how far they are optimized."""
    model, folder = model_from_source(str(pipeline_folder)), tmp_path_factory.mktemp("optimized")
    return {level: bundle_from_model(model, folder / level, optimization=level) for level in ("conditioning", "fold")}


BundleAt = Callable[[str, str], Bundle]
"""The bundle of the small DiT at a level of optimization and in a precision."""


@pytest.fixture(scope="session")
def bundle_at(
    pipeline_folder: Path, exported: Bundle, optimized: dict[str, Bundle], tmp_path_factory: pytest.TempPathFactory
) -> BundleAt:
    """Those in half precision are made when asked for."""
    fp32, folder = {"none": exported, **optimized}, tmp_path_factory.mktemp("half")

    @cache
    def bundle(level: str, precision: str) -> Bundle:
        if precision == "fp32":
            return fp32[level]
        model = model_from_source(str(pipeline_folder), precision)
        return bundle_from_model(model, folder / f"{level}-{precision}", optimization=level)

    return bundle


@pytest.fixture
def bundle_copy(exported: Bundle, tmp_path: Path) -> Path:
    """A folder with the same bundle, to be damaged."""
    return Path(shutil.copytree(exported.folder, tmp_path / "export" / "tiny"))


@pytest.fixture
def module(pipeline_folder: Path) -> torch.nn.Module:
    """The checkpoint, loaded by diffusers alone."""
    loaded: torch.nn.Module = DiTTransformer2DModel.from_pretrained(pipeline_folder, subfolder="transformer")
    return loaded.eval().requires_grad_(False)
