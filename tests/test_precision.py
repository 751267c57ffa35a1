"""Half precision in the cache sites and fp32 between them; and what is said when it is not enough."""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 # the usual name
from click.testing import CliRunner
from diffusers import DiTPipeline, DiTTransformer2DModel
from torch import Tensor, nn

import fora_trt
from fora_trt import Schedule, load
from fora_trt.bundle import Bundle, GraphError, TrajectoryError
from fora_trt.cli import main
from fora_trt.contract import BATCH, WINDOW
from fora_trt.errors import BackendError, ExportError, InputError
from fora_trt.evaluate.export_check import GraphCheck
from fora_trt.evaluate.verify import compare_with_pytorch, measured_trajectories
from fora_trt.export.check import Measured
from fora_trt.export.nodes import nodes_behind
from fora_trt.export.write import bundle_from_model
from fora_trt.exporting import _models_of_pipeline
from fora_trt.models.block_sites import paths_in_half
from fora_trt.models.precision import HalfPrecision, dtypes_of_parameters
from fora_trt.models.sources import model_from_source
from fora_trt.models.spec import Model
from fora_trt.pipeline import Pipeline
from tests.conftest import TINY, BundleAt
from tests.shared import made_once, traced_once
from tests.tiny_pipelines import PIPELINES

CPU = torch.device("cpu")


@pytest.fixture
def half(bundle_at: BundleAt) -> Bundle:
    return bundle_at("none", "fp16")


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_sites_compute_in_half_and_the_stream_between_them_in_fp32(
    precision: str, dtype: torch.dtype, pipeline_folder: Path
) -> None:
    model = model_from_source(str(pipeline_folder), precision)
    seen: dict[str, torch.dtype] = {}

    def look(name: str) -> None:
        owner = model.module.get_submodule(name)
        forward = owner.forward

        def looked(*args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
            seen[name] = (*args, *kwargs.values())[0].dtype
            output: torch.Tensor = forward(*args, **kwargs)
            return output

        owner.forward = looked

    inside = ["transformer_blocks.1.attn1", "transformer_blocks.1.attn1.to_q", "transformer_blocks.1.ff.net.2"]
    between = ["transformer_blocks.1.norm3", "norm_out", "transformer_blocks.0.norm1.emb"]
    embedder = "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1"
    layers = ["proj_out_2", "transformer_blocks.1.norm1.linear"]
    for name in (*inside, *between, *layers, embedder):
        look(name)
    x, labels = torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
    with torch.no_grad():
        out = model.spec.call(
            model.module, {"latents": x, "timestep": torch.tensor([5.0, 9.0]), "class_labels": labels}
        )
    assert out.dtype == torch.float32
    assert [seen[name] for name in inside] == [dtype] * 3
    assert [seen[name] for name in between] == [torch.float32] * 3
    assert [seen[name] for name in layers] == [dtype] * 2, "large matrices are halved wherever they are"
    assert seen[embedder] == (torch.float16 if precision == "fp16" else torch.float32), "bf16 has too few bits for it"


def test_the_attention_of_a_parallel_block_computes_in_half_like_its_site() -> None:
    pipe, given = PIPELINES["flux"]()
    (model,) = _models_of_pipeline(pipe, "fp16", None, given, {})
    assert ("single_transformer_blocks.0.proj_out", "parallel") in model.sites
    graph = traced_once(model).full.graph
    attentions = {str(node.name): str(node.outputs[0].dtype) for node in graph if node.op_type == "Attention"}
    assert len(attentions) == 4
    assert "single_transformer_blocks.1.attn" in attentions
    assert {*attentions.values()} == {"FLOAT16"}
    paths = [path for path, _ in model.sites]
    assert paths_in_half(model.module, paths)[len(paths) :] == [f"single_transformer_blocks.{k}.attn" for k in (0, 1)]


def test_a_model_in_half_precision_can_compute_in_fp32_and_keeps_its_weights(pipeline_folder: Path) -> None:
    model = model_from_source(str(pipeline_folder), "fp16")
    before = {name: one.data for name, one in model.module.named_parameters()}
    seen: list[torch.dtype] = []
    model.module.get_submodule("transformer_blocks.1.attn1.to_q").register_forward_hook(
        lambda layer, args, output: seen.extend([layer.weight.dtype, args[0].dtype, output.dtype])
    )
    given = {"latents": torch.randn(1, 4, 8, 8), "timestep": torch.tensor([5.0]), "class_labels": torch.tensor([1])}
    with torch.no_grad():
        with model.in_fp32():
            model.spec.call(model.module, given)
        with pytest.raises(RuntimeError), model.in_fp32():
            model.spec.call(model.module, {**given, "latents": torch.randn(1, 3, 8, 8)})
        assert seen == [torch.float32] * 3
        assert all(one.data_ptr() == before[name].data_ptr() for name, one in model.module.named_parameters())
        model.spec.call(model.module, given)
        assert seen[3:] == [torch.float16] * 3


def test_the_graph_adds_and_normalises_in_fp32(half: Bundle) -> None:
    graph = ir.load(half.graph_path("full")).graph
    dtypes = {
        kind: {str(node.outputs[0].dtype) for node in graph if node.op_type == kind}
        for kind in ("Attention", "LayerNormalization")
    }
    assert dtypes == {"Attention": {"FLOAT16"}, "LayerNormalization": {"FLOAT"}}
    features = {str(value.dtype) for value in graph.outputs[1:]}
    assert features == {"FLOAT16"}
    total = next(node for node in reversed(list(graph)) if node.op_type == "LayerNormalization").inputs[0]
    assert total is not None
    assert str(total.dtype) == "FLOAT", "the residual sum"


def test_fp16_is_close_to_fp32_and_the_manifest_says_how_close(half: Bundle) -> None:
    for comparison in compare_with_pytorch(Pipeline(half, steps=10, backend="torch", device="cpu"), ["fora:3"]):
        assert comparison.error.relative < 2e-3, comparison
    assert half.manifest.trajectory_error is None
    found = measured_trajectories(half, "torch", CPU, within_seconds=600)
    assert found is not None
    assert (found.steps, found.backend, list(found.errors)) == (50, "torch", ["none", "fora:3"])
    assert all(0 < error.relative < 1e-2 for error in found.errors.values())
    assert measured_trajectories(half, "torch", CPU, within_seconds=0) is None


@pytest.mark.usefixtures("one_trace")
def test_a_bundle_is_measured_before_it_is_sealed(pipeline_folder: Path, tmp_path: Path) -> None:
    """Whole, and in a folder of its own until then."""
    wanted = TrajectoryError(50, "torch", {"none": GraphError(1e-3, 1e-4)})
    seen: list[list[str]] = []

    def measure(staged: Bundle) -> TrajectoryError:
        assert staged.manifest.trajectory_error is None
        assert not (tmp_path / "half").exists()
        seen.append(sorted(path.name for path in staged.folder.iterdir()))
        return wanted

    made = bundle_from_model(
        model_from_source(str(pipeline_folder), "fp16"), tmp_path / "half", measure=measure, check=GraphCheck()
    )
    assert seen == [sorted([*made.manifest.files, "manifest.json"])]
    assert made.manifest.trajectory_error == wanted
    assert Bundle.open(tmp_path / "half").manifest == made.manifest


def bytes_kept_for_sums(graph: ir.Graph, batch: int, window: int = 1, *, postponed: bool = True) -> int:
    """Bytes that a full graph keeps for the sums of its window, beyond the last feature that they read.

    `postponed` counts an engine that takes all sums at the end, as TensorRT does: everything that they read from the
    step is kept. Else nodes run in their order, and what sums have begun and not ended is kept too. The first output
    of the graph is the prediction; what it needs is the step.
    """
    sizes = {BATCH: batch, WINDOW: window}
    order = {node: k for k, node in enumerate(graph)}
    step = nodes_behind([graph.outputs[0]])
    read = dict.fromkeys(
        value for node in graph if node not in step for value in node.inputs if value is not None and value.producer()
    )
    features = [value for value in read if value.producer() in step]
    if postponed or not features:
        return sum(_bytes(value, sizes) for value in features)
    last = max(order[node] for value in features if (node := value.producer()) is not None)
    sums = _nodes_from(features) - step
    kept = [
        value
        for value in read
        if (value in features or value.producer() in sums)
        and (node := value.producer()) is not None
        and order[node] < last <= max(order[reader] for reader in value.consumers() if reader not in step)
    ]
    return sum(_bytes(value, sizes) for value in kept)


def _nodes_from(values: Sequence[ir.Value]) -> set[ir.Node]:
    """All nodes that need one of some values."""
    found, todo = set[ir.Node](), [*values]
    while todo:
        for node in todo.pop().consumers():
            if node not in found:
                found.add(node)
                todo += node.outputs
    return found


def _bytes(value: ir.Value, named: Mapping[str, int]) -> int:
    assert value.dtype is not None and value.shape is not None
    sizes = [size if isinstance(size, int) else named[str(size.value)] for size in value.shape]
    return math.prod(sizes) * int(value.dtype.itemsize)


def test_folded_sums_read_features_in_the_precision_of_the_bundle(bundle_at: BundleAt) -> None:
    """Six features of 16 tokens and 16 channels, at a batch of 2 and with 3 steps in the window."""
    bundle = bundle_at("fold", "fp16")
    assert bundle.manifest.optimization == "fold"
    full, plain = (ir.load(one.graph_path("full")).graph for one in (bundle, bundle_at("fold", "fp32")))
    feature, summed = 2 * 16 * 16, 3 * 2 * 16 * 16 * 4
    assert bytes_kept_for_sums(plain, 2, 3) == 6 * feature * 4
    assert bytes_kept_for_sums(full, 2, 3) == 6 * feature * 2
    assert bytes_kept_for_sums(plain, 2, 3, postponed=False) == 5 * feature * 4, "in fp32 a group is added up at once"
    assert bytes_kept_for_sums(full, 2, 3, postponed=False) == summed, "what has been added up so far"
    for comparison in compare_with_pytorch(Pipeline(bundle, steps=10, backend="onnxruntime", device="cpu"), ["fora:3"]):
        assert comparison.error.relative < 2e-3, comparison


@pytest.mark.usefixtures("one_trace")
def test_a_manifest_that_cannot_be_written_leaves_the_old_bundle(
    half: Bundle, pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(path: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    old = Path(shutil.copytree(half.folder, tmp_path / "export" / "half"))
    before = {path.name: path.read_bytes() for path in old.iterdir()}
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", full_disk)
        with pytest.raises(ExportError, match=r"half failed \(No space left on device\); nothing was changed"):
            bundle_from_model(model_from_source(str(pipeline_folder), "fp16"), old, force=True, check=GraphCheck())
    assert {path.name: path.read_bytes() for path in old.iterdir()} == before
    assert [path.name for path in old.parent.iterdir()] == ["half"]


@pytest.mark.usefixtures("one_trace")
@pytest.mark.parametrize("failure", [BackendError, InputError, RuntimeError])
def test_a_measurement_that_fails_costs_a_bundle_only_where_it_was_asked_for(
    failure: type[Exception], pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(bundle: Bundle, *_: object) -> None:
        raise failure(f"{bundle.folder} does not fit the memory")

    monkeypatch.setattr("fora_trt.evaluate.verify.measured_trajectories", fail)
    command = ["export", str(pipeline_folder), "--precision", "fp16", "--out", str(tmp_path), "--name", "half"]
    failed = CliRunner().invoke(main, [*command, "--measure-trajectory"])
    assert failed.exit_code == 1
    assert [*tmp_path.iterdir()] == [], "nothing half-written"
    if failure is not RuntimeError:
        assert (
            f"the trajectory error could not be measured, so no bundle was written: "
            f"{tmp_path}/half does not fit the memory; --no-measure-trajectory exports without measuring"
        ) in failed.stderr
    kept = CliRunner().invoke(main, command)
    assert kept.exit_code == 0
    assert f"the trajectory error could not be measured: {tmp_path}/half does not fit the memory" in kept.stderr
    assert Bundle.open(tmp_path / "half").manifest.trajectory_error is None


@pytest.mark.usefixtures("one_trace")
def test_a_measurement_that_would_take_long_is_left_out_with_a_word(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fora_trt.evaluate.verify._seconds_of_trajectories", lambda *_: 121.0)
    command = ["export", str(pipeline_folder), "--precision", "fp16", "--out", str(tmp_path), "--name", "half"]
    told = CliRunner().invoke(main, command)
    assert "it would take over two minutes; --measure-trajectory measures it anyway" in told.stderr
    assert Bundle.open(tmp_path / "half").manifest.trajectory_error is None


@pytest.mark.usefixtures("one_trace")
def test_export_measures_trajectories_of_small_models(pipeline_folder: Path, tmp_path: Path) -> None:
    command = ["export", str(pipeline_folder), "--precision", "bf16", "--out", str(tmp_path), "--name"]
    made = CliRunner().invoke(main, [*command, "a"])
    assert "error of 50 steps relative to fp32, on torch: " in made.stdout
    errors = Bundle.open(tmp_path / "a").manifest.trajectory_error
    assert errors is not None
    assert f"{errors.errors['fora:3'].relative:.1e} (fora:3)" in made.stdout
    without = CliRunner().invoke(main, [*command, "b", "--no-measure-trajectory", "--json"])
    assert json.loads(without.stdout)["trajectory_error"] is None


@pytest.fixture(scope="module")
def two_blocks(run_folder: Path) -> Path:
    """The small DiT without its last block: a trace of it takes two thirds of the time."""

    def make(folder: Path) -> None:
        torch.manual_seed(0)
        network = DiTTransformer2DModel(**{**TINY, "num_layers": 2})
        network.save_pretrained(folder)

    return made_once(run_folder / "checkpoints" / "two-blocks", make)


def overflowing(folder: Path, precision: str) -> Model:
    """A model whose second block outputs more than fp16 holds."""
    model = model_from_source(str(folder), precision)
    with torch.no_grad():
        model.module.get_submodule("transformer_blocks.1.ff.net.2").bias.fill_(6e4)  # type: ignore[operator]
        model.module.get_submodule("transformer_blocks.1.ff.net.2").weight.mul_(3e4)  # type: ignore[operator]
    return model


class Unchecked(GraphCheck):
    """Passes any bundle."""

    def measure(self, model: Model, bundle: Bundle) -> Measured:
        return Measured({"full": GraphError(0.0, 0.0)}, "nothing")


@pytest.mark.usefixtures("one_trace")
def test_overflow_names_the_first_tensor_that_is_not_finite(
    two_blocks: Path, pipeline_folder: Path, tmp_path: Path
) -> None:
    bundle = bundle_from_model(
        overflowing(two_blocks, "fp16"), tmp_path / "export" / "over", optimization="none", check=Unchecked()
    )
    denoiser = load(bundle, schedule=Schedule.fora(6, 2), backend="onnxruntime", device="cpu")
    pipeline = Pipeline(bundle, predictor=denoiser, steps=6, schedule=denoiser.schedule, guidance_scale=1.5)
    with pytest.raises(BackendError) as raised:
        pipeline(class_labels=[1])
    assert "first tensor with such values is feature.transformer_blocks.1.ff, at step 0 of 6, a full step" in str(
        raised.value
    )
    assert "--precision bf16 or fp32" in str(raised.value)

    pipe = DiTPipeline.from_pretrained(pipeline_folder)
    pipe.transformer = denoiser.as_transformer()
    with pytest.raises(BackendError, match=r"not finite in fp16, first in tensor feature\.transformer_blocks\.1\.ff"):
        pipe(class_labels=[1], num_inference_steps=6)


@pytest.mark.usefixtures("one_trace")
def test_an_export_that_is_not_finite_is_not_written(
    two_blocks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = overflowing(two_blocks, "fp16")
    monkeypatch.setattr("fora_trt.exporting.model_from_source", lambda *_: model)
    command = ["export", str(two_blocks), "--precision", "fp16", "--no-measure-trajectory", "--out", str(tmp_path)]
    command += ["--optimize", "none"]
    shown = CliRunner().invoke(main, command)
    assert shown.exit_code == 1
    assert "is not written: its full graph differs from PyTorch by inf of the largest value" in shown.stderr
    assert "(Add) in transformer_blocks.1.ff; export it with --precision bf16 or fp32" in shown.stderr
    assert not [*tmp_path.iterdir()]


def test_the_sum_of_the_stream_does_not_overflow(two_blocks: Path, tmp_path: Path) -> None:
    """Each feature fits fp16 and their sum does not: 40000 from one layer and again from the next."""
    model = model_from_source(str(two_blocks), "fp16")
    with torch.no_grad():
        for name in ("transformer_blocks.0.ff.net.2", "transformer_blocks.1.ff.net.2"):
            model.module.get_submodule(name).bias.fill_(4e4)  # type: ignore[operator]
        for block in model.module.transformer_blocks:  # type: ignore[union-attr]
            block.norm1.linear.bias[-16:] = 1.0
    bundle = bundle_from_model(model, tmp_path / "export" / "large", check=GraphCheck())
    assert bundle.manifest.measured_error is not None
    assert bundle.manifest.measured_error["full"].relative < 1e-2
    denoiser = load(bundle, schedule=Schedule.fora(1, 1), backend="onnxruntime", device="cpu")
    out = denoiser(torch.randn(1, 4, 8, 8), 3, class_labels=torch.tensor([1]))
    assert out.isfinite().all()


def test_a_vae_that_overflows_is_no_black_picture(exported: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    from fora_trt.errors import InputError
    from fora_trt.images.decode import Decoder

    with pytest.raises(InputError, match=r"the decoded images of tiny are not finite, though the latents are: the VAE"):
        Decoder(exported.manifest).images(torch.full((1, 4, 8, 8), float(np.finfo(np.float32).max)), CPU)


class Widening(nn.Module):
    """A site that converts to fp32 as the linear attention of Sana does, beside products that it does not convert."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.table = torch.ones(4)
        self.products: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)  # (B, N, 4)
        wide = F.pad(y.float(), (0, 1), value=1.0)
        self.products = {
            "converted": torch.matmul(wide.mT, wide),
            "promoted": torch.matmul(y * self.table, y.mT),
            "mixed": torch.matmul(y, y.float().mT),
            "converted back": torch.matmul(wide.to(y.dtype).mT, wide.to(y.dtype)),
        }
        return self.products["converted"]


def test_a_site_that_converts_to_fp32_multiplies_in_fp32() -> None:
    site = Widening()
    HalfPrecision(nn.Sequential(site).half(), "fp16", ["0"], ())
    site(torch.randn(2, 3, 4))
    halves = dict.fromkeys(site.products, torch.float16)
    assert {name: one.dtype for name, one in site.products.items()} == halves | {"converted": torch.float32}


@pytest.mark.slow
def test_the_guard_of_a_linear_attention_stays_above_zero_in_fp16(tmp_path: Path) -> None:
    """With queries of zero, the attention of Sana is 0 / 1e-15; in fp16 the guard would be zero."""
    pipe, given = PIPELINES["sana"]()
    nn.init.zeros_(pipe.transformer.transformer_blocks[0].attn1.to_q.weight)
    bundle = fora_trt.export(pipe, tmp_path / "sana", precision="fp16", **given)
    assert bundle.manifest.optimization == "fold"
    errors = bundle.manifest.measured_error
    assert errors is not None
    assert max(one.relative for one in errors.values()) < 2e-3


def test_a_module_may_multiply_by_the_weights_of_a_layer_itself() -> None:
    """The pooling of HunyuanDiT reads the weights of layers outside the cache sites, and calls none of them."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.site, self.read = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.site(F.linear(x, self.read.weight, self.read.bias))
            return result

    torch.manual_seed(0)
    net, x = Net().eval(), torch.randn(2, 8)
    with torch.no_grad():
        want = net(x)
        dtypes = dtypes_of_parameters(net, "fp16", ["site"], ())
        for name, parameter in net.named_parameters():
            parameter.data = parameter.data.to(dtypes[name])
        half = HalfPrecision(net, "fp16", ["site"], ())
        assert net.read.weight.dtype == torch.float16
        torch.testing.assert_close(net(x), want, rtol=1e-2, atol=1e-2)
        with half.off():
            torch.testing.assert_close(net(x), want, rtol=1e-3, atol=1e-3)
