"""Every transformer of `tiny_transformers.py`, exported as a module of one's own, or refused in a sentence."""

from collections import Counter
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from torch import nn

from fora_trt.bundle import Bundle
from fora_trt.contract import FULL, REUSE
from fora_trt.errors import ExportError, InputError
from fora_trt.evaluate.export_check import GraphCheck
from fora_trt.evaluate.verify import compare_with_pytorch
from fora_trt.export.check import Measured
from fora_trt.export.split import steps_of_module
from fora_trt.export.statistics import graph_statistics
from fora_trt.export.write import bundle_from_model
from fora_trt.models.block_sites import sites_of_blocks
from fora_trt.models.examples import example_inputs
from fora_trt.models.sources import model_from_source
from fora_trt.models.spec import Model
from fora_trt.pipeline import Pipeline
from tests.conftest import ON_CPU

REFUSED = {
    "z_image": "makes the size of the batch a constant at .*tiny_transformers.py",
    "lumina2": "makes the size of the batch a constant at .*transformer_lumina2.py",
    "mochi": "makes the size of the batch a constant at .*attention_processor.py",
}
"""Transformers that take samples one by one."""

AT_MOST_CONDITIONING = {"latte"}
"""Transformers whose sums are not folded: their blocks transpose tokens between additions."""

QUICK = {"sd3", "qwen_image", "flux_fill", "latte"}
"""One of each kind: an output that nothing reads, complex numbers, fewer channels and parallel blocks, k * B rows."""

ALONE = {"wan_image", "wan22"}
"""Further transformers of which no pipeline is in `tests/test_drop_in.py`."""

NAMES = [*sorted(QUICK), *(pytest.param(name, marks=pytest.mark.slow) for name in sorted(ALONE))]

HEAVY = {"Attention", "Softmax", "Gelu", "Erf", "ConvTranspose"}
"""Operators of attention and MLP, which no reuse graph has."""


class Kept(GraphCheck):
    """The check of an export, with what it measured."""

    measured: Measured

    def measure(self, model: Model, bundle: Bundle) -> Measured:
        self.measured = super().measure(model, bundle)
        return self.measured


@pytest.mark.parametrize("name", NAMES)
def test_the_graphs_of_a_transformer_are_its_steps(name: str, tmp_path: Path) -> None:
    model, check = model_from_source(f"tests.tiny_transformers:{name}"), Kept()
    bundle = bundle_from_model(model, tmp_path / name, check=check)
    assert max(error.relative for error in check.measured.errors.values()) < 1e-5
    assert bundle.manifest.optimization == ("conditioning" if name in AT_MOST_CONDITIONING else "fold")
    operators = Counter(node.op_type for node in ir.load(bundle.graph_path(REUSE)).graph)
    full, reuse = (graph_statistics(bundle.graph_path(graph)).flops for graph in (FULL, REUSE))
    if name != "hunyuan_dit":  # pools the tokens of its text by attention, and joins blocks that lie far apart
        assert not operators.keys() & HEAVY
        assert reuse < 0.1 * full

    inputs = list(example_inputs(model.spec.inputs, model.spec.conditioning, 2).values())
    names = [feature.name for feature in bundle.manifest.features()]
    steps = steps_of_module(model.module, model.spec, [site.module for site in bundle.manifest.cache_sites], names)
    with torch.no_grad():
        prediction, *features = steps[0](*inputs)
        (again,) = steps[1](*inputs, *features)
    assert torch.equal(again, prediction), "an eager reuse step needs no features but those of the graph"

    for backend in ON_CPU:
        pipeline = Pipeline(bundle, steps=4, backend=backend, device="cpu")
        assert all(one.error.relative < 1e-5 for one in compare_with_pytorch(pipeline, ["fora:2"]))


@pytest.mark.parametrize("name", REFUSED)
def test_a_transformer_of_single_samples_is_refused_before_the_trace(name: str, tmp_path: Path) -> None:
    stages: list[str] = []
    model = model_from_source(f"tests.tiny_transformers:{name}")
    with pytest.raises(ExportError, match=REFUSED[name]):
        bundle_from_model(model, tmp_path / name, check=GraphCheck(), report=stages.append)
    assert "tracing the full graph" not in stages


def test_a_bundle_with_fewer_channels_out_needs_the_loop_of_its_pipeline(tmp_path: Path) -> None:
    model = model_from_source("tests.tiny_transformers:flux_fill")
    bundle = bundle_from_model(model, tmp_path / "fill", check=GraphCheck(), optimization="none")
    pipeline = Pipeline(bundle, steps=4, backend="torch", device="cpu")
    assert [one.what for one in compare_with_pytorch(pipeline, ["none"])] == ["full graph", "reuse graph"]
    with pytest.raises(InputError, match="fill predicts fewer channels than its latents have"):
        pipeline(num_images=1)


class Layer(nn.Module):
    """A block of a network that diffusers does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.norm = nn.MultiheadAttention(8, 2), nn.LayerNorm(8)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(8, 48))
        self.mlp = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))


class Parallel(nn.Module):
    """A block that joins attention and MLP in one projection."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.up, self.modulation = nn.MultiheadAttention(8, 2), nn.Linear(8, 32), nn.Linear(8, 24)
        self.down = nn.Linear(8 + 32, 8)


def test_sites_are_found_by_structure() -> None:
    network = nn.ModuleDict(
        {
            "body": nn.ModuleDict({"layers": nn.ModuleList([Layer(), Layer()])}),
            "tail": nn.ModuleList([Parallel(), Layer()]),
            "heads": nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]),
            "pooling": nn.MultiheadAttention(8, 2),
        }
    )
    assert sites_of_blocks(network) == {
        "attention": ("body.layers.*.self_attn", "tail.*.self_attn"),
        "feed-forward": ("body.layers.*.mlp", "tail.*.mlp"),
        "parallel": ("tail.*.down",),
    }
