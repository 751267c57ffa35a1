"""Graphs of bundles as PyTorch modules: equal to ONNX Runtime, without a checkpoint, over weights mapped once."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from fora_trt import Schedule, load
from fora_trt.bundle import Bundle, GraphError
from fora_trt.contract import OPTIMIZATIONS, Optimization
from fora_trt.engines.backends import backend_from_name
from fora_trt.engines.torch import engine as torch_engine
from fora_trt.engines.torch.graph import TorchGraph
from fora_trt.engines.torch.operators import weighted_sum
from fora_trt.errors import BackendError
from fora_trt.evaluate.unfolded import UnfoldedFora
from fora_trt.export.graphs import INLINE_BYTES
from fora_trt.models.examples import example_inputs
from fora_trt.pipeline import Pipeline
from fora_trt.runtime.interface import Predictor
from fora_trt.sampling.conditioning import conditioning_of_classes
from tests.conftest import BundleAt
from tests.damage import rewrite

CPU = torch.device("cpu")
ADMITTED = {"fp32": 1e-5, "fp16": 1e-2, "bf16": 1e-1}


@pytest.fixture(scope="module")
def without_source(bundle_at: BundleAt, tmp_path_factory: pytest.TempPathFactory) -> BundleAt:
    """The same bundles with no way back to their checkpoint."""
    folder = tmp_path_factory.mktemp("without-source")

    @cache
    def bundle(level: Optimization, precision: str) -> Bundle:
        at = Path(shutil.copytree(bundle_at(level, precision).folder, folder / f"{level}-{precision}"))
        rewrite(at, lambda m: m["model"]["options"].update(source="moved/away"))
        return Bundle.open(at)

    return bundle


def latents_of(predictor: Predictor, bundle: Bundle, steps: int = 50) -> Tensor:
    """Of a guided trajectory at interval 3."""
    pipeline = Pipeline(bundle, predictor=predictor, schedule="fora:3", steps=steps)
    given = conditioning_of_classes(bundle.manifest, [1, 2])
    return pipeline.sampler(pipeline.sampling())(given, [0, 1], 1.5).latents


@pytest.mark.parametrize("level", OPTIMIZATIONS)
@pytest.mark.parametrize("precision", ADMITTED)
def test_fifty_steps_equal_onnx_runtime(without_source: BundleAt, precision: str, level: Optimization) -> None:
    """ONNX Runtime has no bf16 on a CPU: there the unfolded graph in fp32 is compared with."""
    bundle, schedule = without_source(level, precision), Schedule.fora(50, 3)
    measured = latents_of(load(bundle, schedule=schedule, backend="torch", device="cpu"), bundle)
    reference: Predictor = UnfoldedFora(bundle, CPU)
    if precision != "bf16":
        reference = load(bundle, schedule=schedule, backend="onnxruntime", device="cpu")
    assert GraphError.between(measured, latents_of(reference, bundle)).relative < ADMITTED[precision]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "level"), [*(("fp32", level) for level in OPTIMIZATIONS), ("fp16", "fold"), ("bf16", "fold")]
)
def test_compiled_graphs_compute_the_same(without_source: BundleAt, precision: str, level: Optimization) -> None:
    bundle, schedule = without_source(level, precision), Schedule.fora(50, 3)
    one, other = (
        latents_of(load(bundle, schedule=schedule, backend=backend, device="cpu"), bundle)
        for backend in ("torch", "torch-compile")
    )
    assert GraphError.between(one, other).relative < ADMITTED[precision]


@pytest.mark.slow
def test_more_compiled_denoisers_than_the_limit_live_and_die_in_one_process(
    optimized: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit of torch.compile, usually eight, counts what is compiled of a code object: no two graphs share one."""
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 2)
    bundle = optimized["fold"]
    for round_ in range(3):
        denoiser = load(bundle, schedule=Schedule.from_flags((True, False)), backend="torch-compile", device="cpu")
        plain = load(bundle, schedule=Schedule.from_flags((True, False)), backend="torch", device="cpu")
        for batch in (2, 3):
            for one in (denoiser, plain):
                one.reset(timesteps=torch.tensor([500.0, 480.0]))
            inputs = example_inputs(bundle.manifest.inputs, bundle.manifest.conditioning, batch, seed=round_)
            for timestep in (500.0, 480.0):
                inputs["timestep"] = torch.full((batch,), timestep)
                torch.testing.assert_close(denoiser(**inputs), plain(**inputs), atol=1e-4, rtol=1e-4)
        del denoiser, plain
        gc.collect()


@pytest.mark.parametrize("failure", [RuntimeError("no such kernel\nand more"), "limit"])
def test_what_cannot_be_compiled_is_a_sentence(
    optimized: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch, failure: Any
) -> None:
    error = torch._dynamo.exc.FailOnRecompileLimitHit("no such kernel") if failure == "limit" else failure

    def fails(*_: Tensor) -> None:
        raise error

    monkeypatch.setattr(torch_engine, "compiled", lambda step: fails)
    denoiser = load(optimized["fold"], schedule=Schedule.from_flags((True,)), backend="torch-compile", device="cpu")
    inputs = example_inputs(optimized["fold"].manifest.inputs, optimized["fold"].manifest.conditioning, 2)
    with pytest.raises(BackendError, match=r"cannot compile or run this model: no such kernel; use --backend torch$"):
        denoiser(**inputs)


def test_a_row_that_a_tensor_does_not_have_is_a_sentence() -> None:
    """Numbers of rows are data, which no check of shapes can see."""
    table, rows = torch.zeros(2, 3), torch.tensor([5])
    with pytest.raises(BackendError, match=r"a graph cannot be run: index out of range.*; export the bundle again"):
        torch_engine.TorchEngine._run(lambda x, index: x.index_select(0, index), [table, rows], torch.device("cpu"))


def test_an_engine_can_be_bound_to_several_sets_of_tensors(exported: Bundle) -> None:
    engine = backend_from_name("torch").engines(exported, CPU)["full"]
    launches, results = [], []
    for batch in (2, 3):
        tensors = example_inputs(engine.inputs.values(), exported.manifest.conditioning, batch, seed=batch)
        outputs = {name: torch.full(one.sized(batch), torch.nan) for name, one in engine.outputs.items()}
        launches.append(engine.bind({**tensors, **outputs, "of another engine": torch.zeros(1)}))
        results.append(outputs["noise_prediction"])
    for launch in (*launches, *launches):
        launch()
    assert all(result.isfinite().all() for result in results)


def test_weights_are_mapped_and_every_module_has_the_same(exported: Bundle) -> None:
    graph = TorchGraph(exported.graph_path("full"), CPU)
    modules = []
    for batch in (1, 4):
        shapes = {one.name: one.sized(batch) for one in exported.manifest.graphs["full"].inputs}
        modules.append(graph.module(shapes, ["noise_prediction"]))
        assert graph.module(shapes, ["noise_prediction"]) is modules[-1]
    one, other = ({buffer.data_ptr() for buffer in module.buffers() if buffer.numel() > 64} for module in modules)
    assert one == other
    ranges = list(mapped_ranges("full.onnx.data"))
    large = [buffer for buffer in modules[0].buffers() if buffer.nbytes > INLINE_BYTES]
    assert large
    assert all(any(begin <= buffer.data_ptr() < end for begin, end in ranges) for buffer in large)
    assert modules[0].forward.__code__ is not modules[1].forward.__code__


def mapped_ranges(name: str) -> Iterator[tuple[int, int]]:
    """Where this process has a file in memory."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(name):
            begin, _, end = line.split()[0].partition("-")
            yield int(begin, 16), int(end, 16)


def saved(path: Path, nodes: list[Any], inputs: dict[str, list[Any]], output: list[Any], **constants: Any) -> Path:
    """An ONNX file of a graph that computes `y`."""
    edges = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, output)
    held = [numpy_helper.from_array(numpy.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "graph", edges, [result], held)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), path)
    return path


def test_an_unknown_operator_is_refused_by_name_and_node(tmp_path: Path) -> None:
    node = helper.make_node("Hardmax", ["x"], ["y"], name="odd_one")
    path = saved(tmp_path / "odd.onnx", [node], {"x": ["batch", 4]}, ["batch", 4])
    with pytest.raises(BackendError, match=r"odd.onnx: its node 'odd_one' has the unsupported operator Hardmax"):
        TorchGraph(path, CPU)


def test_an_attribute_or_size_that_cannot_be_is_refused_by_node(tmp_path: Path) -> None:
    node = helper.make_node("Attention", ["x", "x", "x"], ["y"], name="capped", softcap=2.0)
    path = saved(tmp_path / "capped.onnx", [node], {"x": ["batch", 2, 4, 8]}, ["batch", 2, 4, 8])
    with pytest.raises(BackendError, match=r"the node 'capped' \(Attention\) fails: softcap 2.0"):
        TorchGraph(path, CPU).module({"x": (1, 2, 4, 8)}, ["y"])
    nodes = [helper.make_node("Cast", ["x"], ["size"], to=TensorProto.INT64)]
    nodes.append(helper.make_node("Expand", ["x", "size"], ["y"], name="grown"))
    path = saved(tmp_path / "grown.onnx", nodes, {"x": [1]}, ["n"])
    with pytest.raises(
        BackendError,
        match=r"the node 'grown' \(Expand\) fails: its input 1 depends on the values of the model's inputs",
    ):
        TorchGraph(path, CPU).module({"x": (1,)}, ["y"])


def test_sizes_that_the_graph_computes_are_computed_beforehand(tmp_path: Path) -> None:
    """What an exporter writes for `x.reshape(x.shape[0] * 2, -1)` and `x.new_ones(x.shape[0], 1)`."""
    nodes = [
        helper.make_node("Shape", ["x"], ["batch"], start=0, end=1),
        helper.make_node("Mul", ["batch", "two"], ["twice"]),
        helper.make_node("Concat", ["twice", "rest"], ["sizes"], axis=0),
        helper.make_node("Reshape", ["x", "sizes"], ["halves"]),
        helper.make_node("Concat", ["twice", "two"], ["mask_sizes"], axis=0),
        helper.make_node(
            "ConstantOfShape", ["mask_sizes"], ["ones"], value=numpy_helper.from_array(numpy.ones(1, numpy.float32))
        ),
        helper.make_node("Add", ["halves", "ones"], ["y"]),
    ]
    constants = {"two": numpy.array([2]), "rest": numpy.array([-1])}
    graph = TorchGraph(saved(tmp_path / "sizes.onnx", nodes, {"x": ["batch", 4]}, ["n", 2], **constants), CPU)
    for batch in (1, 3):
        x = torch.randn(batch, 4)
        module = graph.module({"x": (batch, 4)}, ["y"])
        torch.testing.assert_close(module(x)[0], x.reshape(batch * 2, -1) + 1)
        assert sum(node.op == "call_function" for node in module.graph.nodes) == 2


def test_layer_normalization_is_that_of_pytorch(tmp_path: Path) -> None:
    scale, bias = numpy.random.default_rng(0).normal(size=(2, 8)).astype(numpy.float32)
    node = helper.make_node("LayerNormalization", ["x", "scale", "bias"], ["y"], axis=-1, epsilon=1e-6)
    path = saved(tmp_path / "norm.onnx", [node], {"x": ["batch", 8]}, ["batch", 8], scale=scale, bias=bias)
    x = torch.randn(5, 8)
    (result,) = TorchGraph(path, CPU).module({"x": (5, 8)}, ["y"])(x)
    expected = torch.nn.functional.layer_norm(x, (8,), torch.from_numpy(scale), torch.from_numpy(bias), 1e-6)
    assert torch.equal(result, expected)


@pytest.mark.parametrize("window", [None, 0, 1, 3])
@pytest.mark.parametrize("begins", [False, True])
def test_the_folded_sum_is_the_sum_of_gates_and_features(window: int | None, begins: bool) -> None:
    steps = () if window is None else (window,)
    gates = [torch.randn(*steps, 2, 1, 4) for _ in range(3)]
    features = [torch.randn(2, 5, 4) for _ in range(3)]
    begun = [torch.randn(2, 5, 4)] if begins else []
    expected = sum(gate * feature for gate, feature in zip(gates, features, strict=True)) + sum(begun)
    torch.testing.assert_close(weighted_sum(*begun, *gates, *features, first=-1, begins=len(begun)), expected)
    around = torch.randn_like(gates[0])  # gates as rows 1, 2, ... of one tensor
    joined = torch.cat([around, *gates, around], dim=-2)
    torch.testing.assert_close(weighted_sum(*begun, joined, *features, first=1, begins=len(begun)), expected)


def test_missing_weights_are_a_sentence(without_source: BundleAt, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(without_source("none", "fp32").folder, tmp_path / "cut"))
    (folder / "full.onnx.data").write_bytes(b"")
    with pytest.raises(BackendError, match=r"the weights of .*full.onnx cannot be read \(mmap length is greater"):
        TorchGraph(folder / "full.onnx", CPU)
