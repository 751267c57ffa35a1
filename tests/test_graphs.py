import site
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

from fora_trt.bundle import Bundle
from fora_trt.contract import TensorSpec
from fora_trt.errors import BundleError, ExportError
from fora_trt.export.graphs import Writer
from fora_trt.export.statistics import graph_statistics
from fora_trt.models.dit import share_embedders
from fora_trt.models.examples import example_inputs
from fora_trt.models.options import SourceOptions
from fora_trt.models.precision import dtypes_of_parameters
from fora_trt.models.random_weights import draw_weights
from fora_trt.models.sources import model_from_source
from fora_trt.models.spec import Model, ModelSpec
from tests.conftest import TINY, BundleAt
from tests.shared import traced_once


def test_edges_have_stable_names_and_one_symbolic_dimension(exported: Bundle) -> None:
    features = [f"feature.transformer_blocks.{i}.{part}" for i in range(3) for part in ("attn1", "ff")]
    inputs, outputs = ["latents", "timestep", "class_labels"], ["noise_prediction"]
    for name, wanted in (("full", (inputs, outputs + features)), ("reuse", (inputs + features, outputs))):
        graph = onnx.load(exported.graph_path(name)).graph
        for edges, expected in zip((graph.input, graph.output), wanted, strict=True):
            assert [edge.name for edge in edges] == expected
            for edge in edges:
                first, *rest = edge.type.tensor_type.shape.dim
                assert first.dim_param == "batch", edge.name
                assert all(size.dim_value > 0 for size in rest), edge.name


def test_graphs_are_opset_23_with_one_attention_node_a_block_in_full_and_none_in_reuse(exported: Bundle) -> None:
    for name, count in (("full", TINY["num_layers"]), ("reuse", 0)):
        model = onnx.load(exported.graph_path(name))
        assert {entry.domain: entry.version for entry in model.opset_import}[""] == 23
        operators = [node.op_type for node in model.graph.node]
        assert operators.count("Attention") == count
        assert operators.count("LayerNormalization") == (2 * count + 1)


@pytest.mark.parametrize(
    ("precision", "opset"), [("fp32", 20), ("fp16", 23), pytest.param("bf16", 20, marks=pytest.mark.slow)]
)
def test_no_graph_convolves_and_an_attention_has_one_projection(
    pipeline_folder: Path, bundle_at: BundleAt, precision: str, opset: int
) -> None:
    if opset == 23:  # the usual one, of which a bundle is there
        bundle = bundle_at("fold", precision)
        graphs = {name: ir.load(bundle.graph_path(name)).graph for name in bundle.manifest.graphs}
    else:
        made = traced_once(model_from_source(str(pipeline_folder), precision), opset).graphs("fold")
        graphs = {name: one.onnx.graph for name, one in made.graphs.items()}
    kinds = {name: Counter(node.op_type for node in graph) for name, graph in graphs.items()}
    assert not any(counted["Conv"] for counted in kinds.values())
    blocks, full = TINY["num_layers"], kinds["full"]
    assert full["Gather"] == 3 * blocks
    assert (full["Transpose"] - 2) == (2 if opset >= 23 else 3) * blocks, "of the heads, there and back; of the keys"
    products = 4 if opset >= 23 else 6
    assert full["MatMul"] == products * blocks + 2


def test_no_path_of_this_machine_is_in_any_file(exported: Bundle) -> None:
    machine = [str(Path.home()), *site.getsitepackages(), str(Path(__file__).parents[1])]
    for path in exported.folder.glob("*.onnx"):
        content = path.read_bytes()
        assert not [place for place in machine if place.encode() in content]
        assert not onnx.load(path, load_external_data=False).metadata_props


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_graphs_equal_the_module_at_any_batch(exported: Bundle, module: nn.Module, batch: int) -> None:
    import onnxruntime

    manifest = exported.manifest
    inputs = example_inputs(manifest.graphs["full"].inputs, manifest.conditioning, batch, seed=3)
    session = onnxruntime.InferenceSession(exported.graph_path("full"))
    prediction, *features = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    expected = module(inputs["latents"], inputs["timestep"], inputs["class_labels"], return_dict=False)[0].numpy()
    np.testing.assert_allclose(prediction, expected, atol=1e-5)

    names = [feature.name for feature in manifest.features()]
    feeds = {name: value.numpy() for name, value in inputs.items()} | dict(zip(names, features, strict=True))
    (reused,) = onnxruntime.InferenceSession(exported.graph_path("reuse")).run(None, feeds)
    np.testing.assert_allclose(reused, expected, atol=1e-5)


def test_embedders_are_stored_once(exported: Bundle) -> None:
    """The checkpoint has other weights in each block's embedder, but blocks that do agree share theirs."""
    same = DiTTransformer2DModel(**TINY)
    share_embedders(same, None)
    draw_weights(same, dtypes_of_parameters(same, "fp32", [], []))
    embedders = {id(block.norm1.emb) for block in same.transformer_blocks}
    assert len(embedders) == 1
    graph = onnx.load(exported.graph_path("full"), load_external_data=False).graph
    tables = [tensor for tensor in graph.initializer if "class_embedder" in tensor.name]
    assert len(tables) == TINY["num_layers"]


def test_statistics_count_the_arithmetic_by_hand(exported: Bundle) -> None:
    tokens, width, blocks = 16, 16, 3
    a_block = tokens * (3 + 1 + 4 + 4) * width**2 + 2 * tokens**2 * width  # qkv, projection, feed-forward; attention
    embedders = 256 * width + width**2
    edges = tokens * 16 * width + 2 * width**2 + tokens * width * 32
    counted = graph_statistics(exported.graph_path("full")).flops
    assert counted == 2 * (blocks * (a_block + embedders + 6 * width**2) + edges)
    gates = 2 * width**2  # the two parts of six that a reuse step reads
    assert graph_statistics(exported.graph_path("reuse")).flops == 2 * (blocks * (embedders + gates) + edges)


def test_a_graph_without_shapes_has_no_statistics(exported: Bundle, tmp_path: Path) -> None:
    model = onnx.load(exported.graph_path("full"), load_external_data=False)
    del model.graph.value_info[:]
    onnx.save(model, tmp_path / "full.onnx")
    with pytest.raises(BundleError, match=r"full\.onnx lacks shapes of tensors that it computes with"):
        graph_statistics(tmp_path / "full.onnx")


class Halves(nn.Module):
    """Mixes guidance inside, as some published code does: its batch must be even."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.layer(x).chunk(2, dim=0)
        return torch.cat([first + second, first - second])


class Fixed(nn.Module):
    """Makes its batch a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x) + torch.ones(2, 4) if x.shape[0] == 2 else self.layer(x)
        return result


class Shared(nn.Module):
    """Sites that put out what others read too: an input passed on, and a site within a site."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.passed_on = nn.Linear(4, 4), nn.Dropout()
        self.around = nn.Sequential(nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        result: Tensor = 2 * hidden + self.passed_on(hidden) + self.around(hidden)
        return result


def _model_of(module: nn.Module, sites: list[str]) -> Model:
    edge = ("batch", 4)
    spec = ModelSpec(
        architecture=type(module).__name__,
        inputs=(TensorSpec("latents", "float32", edge),),
        output=TensorSpec("noise_prediction", "float32", edge),
        cache_sites={"layer": tuple(sites)},
    )
    return Model(
        options=SourceOptions(source="here"),
        name="odd",
        module=module.eval(),
        spec=spec,
        sites=[(site, "layer") for site in sites],
        config={},
        precision="fp32",
        half=None,
        scheduler={},
    )


@pytest.mark.parametrize("module_class", [Halves, Fixed])
def test_a_model_that_specialises_its_batch_is_refused(module_class: type[nn.Module]) -> None:
    with pytest.raises(ExportError, match="batch"):
        traced_once(_model_of(module_class(), ["layer"]))


@torch.no_grad()
def test_the_reuse_graph_computes_anew_what_only_looks_like_a_feature(tmp_path: Path) -> None:
    """The dropout passes on its input, which is read elsewhere too; the outer of two sites stands for the inner."""
    import onnxruntime

    module = Shared()
    shared = traced_once(_model_of(module, ["passed_on", "around", "around.0"]))
    graphs = shared.graphs("none").graphs
    kept = ["feature.passed_on", "feature.around"]
    assert [one.name for one in graphs["full"].outputs] == ["noise_prediction", *kept]
    assert [site.module for site in shared.sites] == ["passed_on", "around"]
    Writer(tmp_path).save(graphs["reuse"], "reuse.onnx")
    latents, passed_on, around = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(4))
    feeds = dict(zip(["latents", *kept], (latents.numpy(), passed_on.numpy(), around.numpy()), strict=True))
    (reused,) = onnxruntime.InferenceSession(tmp_path / "reuse.onnx").run(None, feeds)
    np.testing.assert_allclose(reused, (2 * module.first(latents) + passed_on + around).numpy(), atol=1e-6)


def test_an_opset_out_of_range_is_refused(pipeline_folder: Path) -> None:
    with pytest.raises(ExportError, match="the opset is 17; give --opset a value from 20 to 24"):
        traced_once(model_from_source(str(pipeline_folder)), 17)
