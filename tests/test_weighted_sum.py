"""The kernel for weighted sums: the same results as ONNX Runtime's own operators, and no need of it."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

import fora_trt
from fora_trt import Schedule
from fora_trt.bundle import Bundle
from fora_trt.doctor import findings
from fora_trt.engines.onnxruntime import weighted_sum
from fora_trt.engines.onnxruntime.weighted_sum import AccumulateSumsPass, FuseWeightedSumsPass, kernel_library
from tests.small_graphs import model_of


def sums(
    window: list[int], tokens: int, channels: int, terms: int, begun: list[int] | None, dtype: int = 1
) -> ir.Model:
    """What `fold` writes: features side by side, gates side by side, their product, its sum, and what that is added to.

    The batch is 2.
    """
    gates, features = [f"g{k}" for k in range(terms)], [f"f{k}" for k in range(terms)]
    nodes = [helper.make_node("Unsqueeze", [name, "axis"], [f"{name}_"]) for name in gates + features]
    for side, names in (("gates", gates), ("features", features)):
        nodes.append(helper.make_node("Concat", [f"{name}_" for name in names], [side], axis=-4))
    nodes.append(helper.make_node("Mul", ["gates", "features"], ["product"]))
    nodes.append(helper.make_node("ReduceSum", ["product", "axis"], ["y" if begun is None else "sum"], keepdims=0))
    shapes = {name: [*window, 2, 1, channels] for name in gates}
    shapes |= {name: [2, tokens, channels] for name in features}
    if begun is not None:
        nodes.append(helper.make_node("Add", ["begun", "sum"], ["y"]))
        shapes["begun"] = begun
    graph = helper.make_graph(
        nodes,
        "sums",
        [helper.make_tensor_value_info(name, dtype, shape) for name, shape in shapes.items()],
        [helper.make_tensor_value_info("y", dtype, [*window, 2, tokens, channels])],
        [helper.make_tensor("axis", TensorProto.INT64, [1], [-4])],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    model = ir.serde.deserialize_model(proto)
    ir.passes.common.ShapeInferencePass()(model)
    return model


def run(model: ir.Model, inputs: dict[str, np.ndarray]) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(kernel_library()))
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    result: np.ndarray = session.run(None, inputs)[0]
    return result


def kinds(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize("window", [[], [0], [1], [3], [8], [10]])
@pytest.mark.parametrize(("tokens", "channels", "terms"), [(4, 64, 2), (37, 80, 5), (16, 7, 8)])
@pytest.mark.parametrize("begun", [None, "all", "sample", "shared"])
def test_the_kernel_adds_up_what_the_operators_add_up(
    window: list[int], tokens: int, channels: int, terms: int, begun: str | None
) -> None:
    shape = {"all": [*window, 2, tokens, channels], "sample": [2, tokens, channels], "shared": [1, tokens, channels]}
    model = sums(window, tokens, channels, terms, shape[begun] if begun else None)
    generator = np.random.default_rng(0)
    inputs = {
        str(value.name): generator.normal(size=tuple(value.shape.numpy())).astype(np.float32)
        for value in model.graph.inputs
        if value.shape is not None
    }
    # ONNX Runtime before 1.32 does not remove the summed dimension of an empty tensor.
    expected = np.empty((0, 2, tokens, channels), np.float32) if 0 in window else run(model, inputs)
    assert FuseWeightedSumsPass()(model).modified
    assert kinds(model) == ["WeightedSum"]
    found = run(model, inputs)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max(initial=0) < 1e-5


def test_other_sums_stay_as_they_are() -> None:
    half = sums([3], 4, 64, 2, None, TensorProto.FLOAT16)
    assert not FuseWeightedSumsPass()(half).modified
    read_twice = sums([3], 4, 64, 2, None)
    product = next(node for node in read_twice.graph if node.op_type == "Mul").outputs[0]
    read_twice.graph.outputs.append(product)
    assert not FuseWeightedSumsPass()(read_twice).modified
    beside = sums([3], 5, 64, 2, [3, 2, 1, 64])  # added to what has another shape: that addition stays
    assert FuseWeightedSumsPass()(beside).modified
    assert kinds(beside) == ["WeightedSum", "Add"]


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CC", "a-compiler-that-is-not-there")
    kernel_library.cache_clear()
    yield
    kernel_library.cache_clear()


def latents_of(bundle: Bundle) -> torch.Tensor:
    denoiser = fora_trt.load(bundle, schedule=Schedule.fora(8, 3), backend="onnxruntime", device="cpu")
    latents, labels = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 7])
    times = torch.arange(700, 0, -100)[:8].float()
    times = torch.cat([times, torch.zeros(8 - len(times))])
    denoiser.reset(timesteps=times)
    for time in times:
        latents = latents - 0.1 * denoiser(latents, time, class_labels=labels)[:, :4]
    return latents


@pytest.fixture
def with_kernel(optimized: dict[str, Bundle]) -> torch.Tensor:
    """Latents that were computed before `no_compiler` takes the compiler away."""
    assert kernel_library() is not None
    return latents_of(optimized["fold"])


@pytest.mark.usefixtures("with_kernel", "no_compiler")
def test_without_a_compiler_the_graphs_run_as_they_are(optimized: dict[str, Bundle], with_kernel: torch.Tensor) -> None:
    assert kernel_library() is None
    with pytest.warns(UserWarning, match="the C compiler .* makes no kernel that works here"):
        fora_trt.load(optimized["fold"], cache_interval=3, backend="onnxruntime", device="cpu")
    assert (latents_of(optimized["fold"]) - with_kernel).abs().max() < 1e-5 * with_kernel.abs().max()
    (found,) = (one.found for one in findings() if one.what == "backend onnxruntime")
    assert "no C compiler" in found


COMPILERS = {
    "hangs": "exec sleep 60",
    "hangs in a child": "sleep 60; true",
    "waits for input": "cat; false",
    "says much": "yes | head -c 5000000; yes | head -c 5000000 >&2; false",
    "makes something else": 'while [ "$1" != -o ]; do shift; done; echo text > "$2"',
    "makes nothing": "true",
    "no program": None,
    "'no closing quote": None,
}


@pytest.mark.parametrize("kind", COMPILERS)
def test_no_compiler_stops_a_run(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, path = COMPILERS[kind], tmp_path / "odd cc"
    if script is not None:
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    monkeypatch.setenv("CC", kind if script is None else str(path))
    monkeypatch.setattr(weighted_sum, "COMPILING", 0.5)
    began = perf_counter()
    assert kernel_library.__wrapped__() is None
    assert perf_counter() - began < 20  # those that hang take a minute


def test_a_compiler_that_is_ended_removes_its_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left, path = tmp_path / "cc.s", tmp_path / "slow cc"
    path.write_text(f"#!/bin/sh\ntrap 'rm {left}; exit 1' TERM\ntouch {left} {left}.made\nsleep 60 &\nwait\n")
    path.chmod(0o755)
    monkeypatch.setenv("CC", str(path))
    monkeypatch.setattr(weighted_sum, "COMPILING", 1.0)
    assert kernel_library.__wrapped__() is None
    assert sorted(one.name for one in tmp_path.iterdir()) == ["cc.s.made", "slow cc"]


def test_a_compiler_has_options_or_a_space_in_its_path_and_needs_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def run(command: list[str]) -> None:
        asked.append(command)
        raise OSError

    program = tmp_path / "my tools cc"
    program.touch(0o755)
    monkeypatch.setattr(weighted_sum, "_run", run)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))
    for given in ("gcc -m64", str(program), "", " "):
        monkeypatch.setenv("CC", given)
        assert kernel_library.__wrapped__() is None
    named = [command[: command.index("-std=gnu17")] for command in asked]
    assert named == [["gcc", "-m64"], [str(program)], ["cc"], ["cc"]]


FORKED = """
import atexit, os
import onnxruntime
from fora_trt.engines.onnxruntime.weighted_sum import kernel_library
library = kernel_library()
child = os.fork()
if not child:
    atexit._run_exitfuncs()  # of Python; those of ONNX Runtime wait for threads that a forked process does not have
    os._exit(0)
os.waitpid(child, 0)
onnxruntime.SessionOptions().register_custom_ops_library(str(library))
"""


def test_the_kernel_outlives_a_fork_that_ends_first() -> None:
    subprocess.run([sys.executable, "-c", FORKED], check=True, timeout=60)


def test_a_folded_full_graph_uses_it_and_its_bundle_does_not_change(optimized: dict[str, Bundle]) -> None:
    path = optimized["fold"].graph_path("full")
    before, model = Path(path).read_bytes(), ir.load(path)
    assert FuseWeightedSumsPass()(model).modified
    assert kinds(model).count("WeightedSum") == 1
    assert not {"ReduceSum", "Concat"} & {*kinds(model)}
    latents_of(optimized["fold"])
    assert path.read_bytes() == before
    (found,) = (one.found for one in findings() if one.what == "backend onnxruntime")
    assert "no C compiler" not in found


def chained(output: str = "y", one_tensor: bool = True) -> ir.Model:
    """Two sums of three terms, one on top of the other, with gates of one tensor or of their own."""
    gates = " ".join(f"g{k}_ = Unsqueeze(g{k}, axis)" for k in range(6))
    features = " ".join(f"f{k}_ = Unsqueeze(f{k}, axis)" for k in range(6))
    sides = " ".join(
        f"{side}{half} = Concat <axis: int = -4> ({', '.join(f'{letter}{k}_' for k in range(3 * half, 3 * half + 3))})"
        for half in (0, 1)
        for side, letter in (("gates", "g"), ("features", "f"))
    )
    added = " ".join(
        f"p{half} = Mul(gates{half}, features{half}) s{half} = ReduceSum <keepdims: int = 0> (p{half}, axis)"
        for half in (0, 1)
    )
    given = ["float[4, 2, 8, 80] all"] if one_tensor else [f"float[4, 2, 1, 80] g{k}" for k in range(6)]
    inputs = ", ".join([*given, *(f"float[2, 37, 80] f{k}" for k in range(6))])
    split = "g, g0, g1, g2, g3, g4, g5, rest = Split <axis: int = 2> (all, ones)" if one_tensor else ""
    text = (
        f"sums ({inputs}) => (float[4, 2, 37, 80] {output}) "
        "<int64[1] axis = {-4}, int64[8] ones = {1, 1, 1, 1, 1, 1, 1, 1}> "
        f"{{ {split} {gates} {features} {sides} {added} {output} = Add(s0, s1) }}"
    )
    return model_of(text)


def given_to(model: ir.Model) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    shapes = {str(value.name): value.shape.numpy() for value in model.graph.inputs if value.shape is not None}
    return {name: generator.normal(size=tuple(shape)).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("one_tensor", [True, False])
@pytest.mark.parametrize("most", [5, 6])
def test_sums_on_top_of_each_other_are_joined(one_tensor: bool, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless too many features were in memory at once. There is no copy of the gates."""
    monkeypatch.setattr(weighted_sum, "MOST_JOINED", most)
    model = chained(one_tensor=one_tensor)
    given = given_to(model)
    expected = run(model, given)
    assert FuseWeightedSumsPass()(model).modified
    read = [[str(value.name) for value in node.inputs if value is not None] for node in model.graph]
    first = [node.attributes.get_int("first") for node in model.graph]
    lower, upper = [[f"f{k}" for k in part] for part in ((0, 1, 2), (3, 4, 5))]
    gates = [["all"], ["all"]] if one_tensor else [["g0", "g1", "g2"], ["g3", "g4", "g5"]]
    if most == 5:
        assert kinds(model) == ["WeightedSum", "WeightedSum"]
        assert [read[0], read[1][1:]] == [[*gates[1], *upper], [*gates[0], *lower]], "one begins with the other"
        assert first == ([4, 1] if one_tensor else [-1, -1])
    else:
        assert kinds(model) == ["WeightedSum"]
        assert read == [["all", *lower, *upper] if one_tensor else [*gates[1], *gates[0], *upper, *lower]]
        assert first == [1 if one_tensor else -1]
    assert np.abs(run(model, given) - expected).max() < 1e-5


def test_a_sum_that_is_the_same_in_all_steps_is_not_joined() -> None:
    """Its gates have no dimension for the steps."""
    text = """
        sums (float[4, 2, 1, 80] g0, float[4, 2, 1, 80] g1, float[2, 1, 80] g2, float[2, 1, 80] g3, float[2, 37, 80] f0,
              float[2, 37, 80] f1) => (float[4, 2, 37, 80] y) <int64[1] a = {-4}>
        { g0_ = Unsqueeze(g0, a) g1_ = Unsqueeze(g1, a) g2_ = Unsqueeze(g2, a) g3_ = Unsqueeze(g3, a)
          f0_ = Unsqueeze(f0, a) f1_ = Unsqueeze(f1, a)
          features = Concat <axis: int = -4> (f0_, f1_) same = Concat <axis: int = -4> (f0_, f1_)
          many = Concat <axis: int = -4> (g0_, g1_) one = Concat <axis: int = -4> (g2_, g3_)
          p0 = Mul(many, features) s0 = ReduceSum <keepdims: int = 0> (p0, a)
          p1 = Mul(one, same) s1 = ReduceSum <keepdims: int = 0> (p1, a) y = Add(s1, s0) }
    """
    model = model_of(text)
    given = given_to(model)
    expected = run(model, given)
    assert FuseWeightedSumsPass()(model).modified
    assert kinds(model) == ["WeightedSum", "WeightedSum"]
    assert np.abs(run(model, given) - expected).max() < 1e-5


@pytest.mark.parametrize("channels", [64, 72])
def test_sums_that_are_larger_than_a_cache_are_the_same(channels: int) -> None:
    """They are stored past the cache, where 72 channels are not aligned for it."""
    model = sums([7], 1200, channels, 3, None)
    given = given_to(model)
    expected = run(model, given)
    assert expected.size > 2**20
    FuseWeightedSumsPass()(model)
    assert np.abs(run(model, given) - expected).max() < 1e-5


@pytest.mark.parametrize("begun", [0, 3, 7])
@pytest.mark.parametrize("kind", ["wide", "narrow", "chained"])
def test_weighted_sums_are_added_to_what_is_there(kind: str, begun: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weighted_sum, "MOST_JOINED", 5)
    channels = 7 if kind == "narrow" else 80
    model = chained("out") if kind == "chained" else sums([7], 37, channels, 3, None)
    (output,) = model.graph.outputs
    output.name = "window.y"
    given = given_to(model)
    expected = run(model, given)
    assert not AccumulateSumsPass()(model).modified, "there is no WeightedSum yet"
    FuseWeightedSumsPass()(model)
    assert AccumulateSumsPass()(model).modified
    rows, begun, generator = len(expected), min(begun, len(expected)), np.random.default_rng(1)
    given["weights.window.y"] = generator.normal(size=rows).astype(np.float32)
    given["base.window.y"] = generator.normal(size=(begun, *expected.shape[1:])).astype(np.float32)
    expected *= given["weights.window.y"][:, None, None, None]
    expected[:begun] += given["base.window.y"]
    assert np.abs(run(model, given) - expected).max() < 1e-5


def test_sums_that_begin_with_another_value_are_not_added_up() -> None:
    model = sums([3], 5, 64, 2, [1, 5, 64])
    model.graph.outputs[0].name = "window.y"
    FuseWeightedSumsPass()(model)
    assert kinds(model) == ["WeightedSum"]
    assert not AccumulateSumsPass()(model).modified
    assert not AccumulateSumsPass()(sums([3], 5, 64, 2, None)).modified, "no window output"


REFUSED: dict[str, tuple[dict[str, list[int]], int, int, str]] = {
    "a term of another shape": (
        {"g": [2, 1, 16], "f": [2, 4, 16], "g1": [2, 1, 16], "f1": [2, 900_000, 16]}, -1, 0, "features of several"
    ),
    "a gate of another shape": (
        {"g": [2, 1, 16], "f": [2, 4, 16], "g1": [2, 1, 8], "f1": [2, 4, 16]}, -1, 0, "gates of several shapes"
    ),
    "one gate for two features": ({"g": [2, 1, 16], "f": [2, 4, 16], "f1": [2, 4, 16]}, -1, 0, "no gate for each"),
    "no feature": ({"g": [2, 1, 16]}, -1, 0, "no gate for each feature"),
    "rows that the gates do not have": ({"g": [2, 3, 16], "f": [2, 4, 16]}, 3, 0, "gates that do not fit"),
    "several rows without a first": ({"g": [2, 3, 16], "f": [2, 4, 16]}, -1, 0, "gates that do not fit"),
    "gates of fewer channels": ({"g": [2, 1, 8], "f": [2, 4, 16]}, -1, 0, "gates that do not fit"),
    "gates without dimensions": ({"g": [], "f": [2, 4, 16]}, -1, 0, "gates that do not fit"),
    "features of four dimensions": ({"g": [2, 1, 16], "f": [2, 4, 1, 16]}, -1, 0, "gates that do not fit"),
    "nine dimensions": ({"g": [2, 1, 16], "f": [1] * 9}, -1, 0, "too many dimensions"),
    "a short beginning": ({"b": [2, 1, 16], "g": [2, 1, 16], "f": [2, 4, 16]}, -1, 1, "begins with a value"),
    "a beginning of more steps": (
        {"b": [9, 2, 4, 16], "w": [3], "g": [3, 2, 1, 16], "f": [2, 4, 16]}, -1, 2, "begins with a value"
    ),
    "too few weights": ({"b": [3, 2, 4, 16], "w": [1], "g": [3, 2, 1, 16], "f": [2, 4, 16]}, -1, 2, "begins with a"),
    "attributes out of range": ({"g": [2, 1, 16], "f": [2, 4, 16]}, -7, 0, "attributes out of range"),
    "65 terms": (
        {f"g{k}": [1, 1, 16] for k in range(65)} | {f"f{k}": [1, 4, 16] for k in range(65)}, -1, 0, "more than 64 terms"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_the_kernel_refuses_what_it_would_read_beyond_the_end_of(case: str) -> None:
    shapes, first, begins, message = REFUSED[case]
    names = sorted(shapes, key=lambda name: "bwgf".index(name[0]))
    node = helper.make_node("WeightedSum", names, ["y"], domain="fora_trt", first=first, begins=begins)
    graph = helper.make_graph(
        [node],
        "sums",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shapes[name]) for name in names],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("fora_trt", 1)]
    model = ir.serde.deserialize_model(helper.make_model(graph, opset_imports=opsets, ir_version=10))
    with pytest.raises(Exception, match=message):
        run(model, {name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
