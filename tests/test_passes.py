"""The graph passes on small graphs, before and after on ONNX's own reference or ONNX Runtime."""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper
from onnx_ir.passes import InPlacePass
from onnx_ir.passes.common import RemoveUnusedNodesPass

from fora_trt.export.crop_constants import CropConstantsPass
from fora_trt.export.drop_squeezes import DropSqueezesPass
from fora_trt.export.expand_masks import ExpandMasksPass
from fora_trt.export.join_projections import JoinProjectionsPass, SeparateProjectionsPass
from fora_trt.export.logical_wheres import LogicalWheresPass
from fora_trt.export.nodes import constant
from fora_trt.export.patches import PatchRowsPass, PlainTransposesPass
from fora_trt.export.slice_projections import SliceProjectionsPass, take_projection


def model(
    nodes: Sequence[object],
    inputs: dict[str, list[int]],
    outputs: Mapping[str, list[int] | None],
    weights: dict[str, np.ndarray],
) -> ir.Model:
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
    )
    made = ir.serde.deserialize_model(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    )
    for name, value in weights.items():
        tensor = ir.tensor(value, name=name)
        known = {one.name: one for node in made.graph for one in node.inputs if one is not None}
        known[name].const_value, known[name].shape = tensor, ir.Shape(value.shape)
        known[name].type = ir.TensorType(tensor.dtype)
        made.graph.register_initializer(known[name])
    ir.passes.common.ShapeInferencePass()(made)
    return made


def run(made: ir.Model, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(ir.to_proto(made).SerializeToString(), providers=["CPUExecutionProvider"])
    outputs: list[np.ndarray] = session.run(None, inputs)
    return outputs


def kinds(made: ir.Model) -> list[str]:
    return [node.op_type for node in made.graph]


def test_a_squeeze_of_another_size_goes_and_one_of_one_stays() -> None:
    axes = {"axes": np.array([1])}
    bad = ir.serde.deserialize_model(
        helper.make_model(
            helper.make_graph(
                [helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Squeeze", ["y", "axes"], ["z"])],
                "small",
                [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3])],
                [helper.make_tensor_value_info("z", TensorProto.FLOAT, [2, 3])],
                [helper.make_tensor("axes", TensorProto.INT64, [1], [1])],
            ),
            opset_imports=[helper.make_opsetid("", 23)],
            ir_version=10,
        )
    )
    bad.graph[0].outputs[0].shape = ir.Shape([2, 3])
    assert DropSqueezesPass()(bad).modified
    assert kinds(bad) == ["Relu"]
    assert [value.name for value in bad.graph.outputs] == ["z"]
    x = np.array([[-1, 2, 3], [4, -5, 6]], dtype=np.float32)
    assert np.array_equal(run(bad, {"x": x})[0], np.maximum(x, 0))

    good = model([helper.make_node("Squeeze", ["x", "axes"], ["z"])], {"x": [2, 1, 3]}, {"z": [2, 3]}, axes)
    assert not DropSqueezesPass()(good).modified
    assert kinds(good) == ["Squeeze"]


CROPS: dict[str, tuple[list[object], dict[str, list[int]]]] = {
    "a slice of a reshaped table": (
        [
            helper.make_node("Reshape", ["table", "grid"], ["a"]),
            helper.make_node("Slice", ["a", "two", "four", "one"], ["b"]),
            helper.make_node("Slice", ["b", "last", "first", "two", "back"], ["part"]),
        ],
        {"grid": [1, 6, 8, 4], "one": [1], "two": [2], "four": [4], "last": [-1], "first": [-99], "back": [-2]},
    ),
    "rows of a transposed table": (
        [
            helper.make_node("Squeeze", ["table", "zero"], ["a"]),
            helper.make_node("Transpose", ["a"], ["b"], perm=[1, 0]),
            helper.make_node("Gather", ["b", "rows"], ["c"], axis=1),
            helper.make_node("Unsqueeze", ["c", "zero"], ["part"]),
        ],
        {"zero": [0], "rows": [5, -1, 5]},
    ),
}


@pytest.mark.parametrize("crop", CROPS)
def test_only_the_part_of_a_table_that_is_read_is_stored(crop: str) -> None:
    nodes, numbers = CROPS[crop]
    table = np.random.default_rng(0).normal(size=(1, 48, 4)).astype(np.float32)
    weights = {"table": table, **{name: np.array(value) for name, value in numbers.items()}}
    made = model([*nodes, helper.make_node("Add", ["x", "part"], ["y"])], {"x": [1]}, {"y": None}, weights)
    expected = run(made, {"x": np.ones(1, dtype=np.float32)})[0]
    assert CropConstantsPass()(made).modified
    assert kinds(made) == ["Add"]
    assert [value.shape for value in made.graph.initializers.values()] == [expected.shape]
    assert (run(made, {"x": np.ones(1, dtype=np.float32)})[0] == expected).all()


def test_a_table_that_is_read_as_a_whole_stays() -> None:
    nodes = [
        helper.make_node("Reshape", ["table", "grid"], ["a"]),
        helper.make_node("Gather", ["a", "rows"], ["b"]),
        helper.make_node("MatMul", ["x", "b"], ["y"]),
    ]
    weights = {"table": np.ones((4, 6), np.float32), "grid": np.array([3, 8]), "rows": np.array([0, 1, 2, 0])}
    made = model(nodes, {"x": [2, 4]}, {"y": [2, 8]}, weights)
    assert not CropConstantsPass()(made).modified
    assert kinds(made) == ["Reshape", "Gather", "MatMul"]


@pytest.mark.parametrize("rows", [1, 5])
def test_a_mask_of_one_row_is_given_to_every_query(rows: int) -> None:
    shapes = {"q": [2, 3, 5, 4], "k": [2, 3, 7, 4], "v": [2, 3, 7, 4], "m": [2, 1, rows, 7]}
    node = helper.make_node("Attention", ["q", "k", "v", "m"], ["y"])
    made = model([node], shapes, {"y": [2, 3, 5, 4]}, {})
    assert ExpandMasksPass()(made).modified == (rows == 1)
    assert kinds(made) == (["Expand", "Attention"] if rows == 1 else ["Attention"])
    values = {name: np.random.default_rng(0).normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    scores = values["q"] @ values["k"].swapaxes(-1, -2) / 2 + values["m"]
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = weights / weights.sum(-1, keepdims=True) @ values["v"]
    assert np.abs(run(made, values)[0] - expected).max() < 1e-5


def test_a_where_on_bool_becomes_logical_operators_that_onnx_runtime_has() -> None:
    shapes = {"c": [2, 1, 3], "x": [4, 1], "y": []}
    inputs = [helper.make_tensor_value_info(name, TensorProto.BOOL, shape) for name, shape in shapes.items()]
    outputs = [helper.make_tensor_value_info("w", TensorProto.BOOL, [2, 4, 3])]
    graph = helper.make_graph([helper.make_node("Where", [*shapes], ["w"])], "small", inputs, outputs)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    made = ir.serde.deserialize_model(proto)
    assert LogicalWheresPass()(made).modified
    assert kinds(made) == ["Not", "And", "And", "Or"]
    generator = np.random.default_rng(0)
    for _ in range(4):
        values = {name: generator.integers(2, size=shape).astype(bool) for name, shape in shapes.items()}
        assert (run(made, values)[0] == np.where(values["c"], values["x"], values["y"])).all()
    assert not LogicalWheresPass()(made).modified


@pytest.mark.parametrize("cast", [False, True])
def test_a_projection_keeps_the_parts_that_are_read_also_through_a_cast(cast: bool) -> None:
    generator = np.random.default_rng(0)
    weights = {
        "w": generator.normal(size=(12, 6)).astype(np.float32),
        "b": generator.normal(size=12).astype(np.float32),
    }
    nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["p"], transB=1)]
    if cast:
        nodes.append(helper.make_node("Cast", ["p"], ["p32"], to=TensorProto.FLOAT))
    nodes.append(helper.make_node("Split", ["p32" if cast else "p"], ["a", "c", "d"], axis=1, num_outputs=3))
    nodes.append(helper.make_node("Mul", ["a", "d"], ["y"]))
    made = model(nodes, {"x": [2, 6]}, {"y": [2, 4]}, weights)
    x = generator.normal(size=(2, 6)).astype(np.float32)
    before = run(made, {"x": x})
    passes: list[InPlacePass] = [SliceProjectionsPass(), RemoveUnusedNodesPass()]
    for one in passes:
        one(made)
    assert sum(value.const_value.size for value in made.graph.initializers.values() if value.const_value) <= 8 * 7 + 2
    assert kinds(made) == ["Gemm", *(["Cast"] if cast else []), "Split", "Mul"]
    assert np.abs(run(made, {"x": x})[0] - before[0]).max() < 1e-6


def test_a_projection_of_which_two_read_other_parts_becomes_two() -> None:
    generator = np.random.default_rng(0)
    weights = {
        "w": generator.normal(size=(12, 6)).astype(np.float32),
        "b": generator.normal(size=12).astype(np.float32),
    }
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["p"], transB=1),
        helper.make_node("Split", ["p"], ["a", "c", "d"], axis=1, num_outputs=3),
        helper.make_node("Relu", ["c"], ["e"]),
    ]
    made = model(nodes, {"x": [2, 6]}, {"a": [2, 4], "d": [2, 4], "e": [2, 4]}, weights)
    x = generator.normal(size=(2, 6)).astype(np.float32)
    before = run(made, {"x": x})
    split = made.graph[1]
    assert not take_projection(made.graph, split, [True, True, True])
    assert take_projection(made.graph, split, [True, False, False])
    passes: list[InPlacePass] = [SliceProjectionsPass(), RemoveUnusedNodesPass()]
    for one in passes:
        one(made)
    assert kinds(made).count("Gemm") == 2
    constants = [value.const_value for value in made.graph.initializers.values() if value.const_value is not None]
    assert sorted(tuple(one.shape.numpy()) for one in constants if len(one.shape) == 2) == [(4, 6), (8, 6)]
    assert [value.name for value in made.graph.outputs] == ["a", "d", "e"]
    for got, expected in zip(run(made, {"x": x}), before, strict=True):
        assert np.abs(got - expected).max() < 1e-6


def patchify(side: int, stride: int, pads: int = 0) -> tuple[ir.Model, int]:
    """A patch embedding as PyTorch's exporter writes it, of images (2, 3, 8, 4), and how many tokens it makes."""
    generator = np.random.default_rng(0)
    rows, columns = ((size + 2 * pads - side) // stride + 1 for size in (8, 4))
    weights = {
        "w": generator.normal(size=(5, 3, side, side)).astype(np.float32),
        "b": generator.normal(size=5).astype(np.float32),
        "s": np.array([0, 5, rows * columns]),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], strides=[stride] * 2, pads=[pads] * 4),
        helper.make_node("Reshape", ["c", "s"], ["r"]),
        helper.make_node("Transpose", ["r"], ["t"], perm=[0, 2, 1]),
        helper.make_node("Relu", ["t"], ["y"]),
    ]
    return model(nodes, {"x": [2, 3, 8, 4]}, {"y": [2, rows * columns, 5]}, weights), rows * columns


@pytest.mark.parametrize("side", [1, 2, 4])
def test_a_patch_embedding_becomes_a_product_of_rows(side: int) -> None:
    made, tokens = patchify(side, side)
    x = np.random.default_rng(1).normal(size=(2, 3, 8, 4)).astype(np.float32)
    before = run(made, {"x": x})[0]
    assert PatchRowsPass()(made).modified
    RemoveUnusedNodesPass()(made)
    wide = ["SpaceToDepth"] if side > 1 else []
    assert kinds(made) == [*wide, "Transpose", "Reshape", "MatMul", "Add", "Relu"]
    assert before.shape == (2, tokens, 5)
    assert np.abs(run(made, {"x": x})[0] - before).max() < 1e-5


@pytest.mark.parametrize("half", [TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_a_patch_embedding_in_half_precision_stays_there(half: int) -> None:
    """Its input and its output are cast."""
    generator = np.random.default_rng(0)
    dtype = helper.tensor_dtype_to_np_dtype(half)
    weights = {
        "w": generator.normal(size=(5, 3, 2, 2)).astype(dtype),
        "b": generator.normal(size=5).astype(dtype),
        "s": np.array([0, 5, 8]),
        "p": generator.normal(size=(1, 8, 5)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], to=half),
        helper.make_node("Conv", ["h", "w", "b"], ["c"], strides=[2, 2]),
        helper.make_node("Cast", ["c"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["f", "s"], ["r"]),
        helper.make_node("Transpose", ["r"], ["t"], perm=[0, 2, 1]),
        helper.make_node("Add", ["t", "p"], ["y"]),
    ]
    made = model(nodes, {"x": [2, 3, 8, 4]}, {"y": [2, 8, 5]}, weights)
    x = generator.normal(size=(2, 3, 8, 4)).astype(np.float32)
    before = run(made, {"x": x})[0] if half == TensorProto.FLOAT16 else None  # ONNX Runtime has no bfloat16
    assert PatchRowsPass()(made).modified
    RemoveUnusedNodesPass()(made)
    assert kinds(made) == ["SpaceToDepth", "Transpose", "Reshape", "Cast", "MatMul", "Cast", "Add"]
    dtypes = {node.op_type: node.outputs[0].dtype for node in made.graph}
    assert (dtypes["Reshape"], dtypes["MatMul"], dtypes["Add"]) == (ir.DataType.FLOAT, half, ir.DataType.FLOAT)
    if before is not None:
        assert np.abs(run(made, {"x": x})[0] - before).max() < 2e-2


def test_a_convolution_that_is_read_before_its_cast_stays() -> None:
    weights = {"w": np.ones((5, 3, 2, 2), dtype=np.float16), "s": np.array([0, 5, 8])}
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16),
        helper.make_node("Conv", ["h", "w"], ["c"], strides=[2, 2]),
        helper.make_node("Cast", ["c"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["c"], ["z"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["f", "s"], ["r"]),
        helper.make_node("Transpose", ["r"], ["y"], perm=[0, 2, 1]),
    ]
    made = model(nodes, {"x": [2, 3, 8, 4]}, {"y": [2, 8, 5], "z": [2, 5, 4, 2]}, weights)
    assert not PatchRowsPass()(made).modified


HEADS, SIZE, TOKENS = 3, 4, 5


def attention(
    biases: str = "qkv", *, decomposed: bool = False, half: bool = False, sources: str = "xxx", prefix: str = ""
) -> tuple[list[object], dict[str, np.ndarray]]:
    """Nodes and weights of an attention as PyTorch's exporter writes it; `sources` are the inputs of Q, K and V."""
    generator, width = np.random.default_rng(0), HEADS * SIZE
    dtype = np.float16 if half else np.float32
    nodes, weights = list[object](), {f"{prefix}heads": np.array([-1, TOKENS, HEADS, SIZE])}
    for letter, source in zip("qkv", sources, strict=True):
        name = prefix + letter
        weights[f"{name}.w"] = generator.normal(size=(width, width)).astype(dtype)
        nodes.append(helper.make_node("MatMul", [source, f"{name}.w"], [f"{name}.p"]))
        if letter in biases:
            weights[f"{name}.b"] = generator.normal(size=width).astype(dtype)
            nodes.append(helper.make_node("Add", [f"{name}.p", f"{name}.b"], [f"{name}.s"]))
        summed = f"{name}.s" if letter in biases else f"{name}.p"
        nodes.append(helper.make_node("Reshape", [summed, f"{prefix}heads"], [f"{name}.r"], allowzero=1))
        nodes.append(helper.make_node("Transpose", [f"{name}.r"], [f"{name}.t"], perm=[0, 2, 1, 3]))
    q, k, v, y = (f"{prefix}{letter}" for letter in ("q.t", "k.t", "v.t", "y"))
    if not decomposed:
        return [*nodes, helper.make_node("Attention", [q, k, v], [y])], weights
    weights[f"{prefix}scale"] = np.array([SIZE**-0.25], dtype=dtype)
    nodes += [
        helper.make_node("Transpose", [k], [f"{prefix}k.m"], perm=[0, 1, 3, 2]),
        helper.make_node("Mul", [q, f"{prefix}scale"], [f"{prefix}q.scaled"]),
        helper.make_node("Mul", [f"{prefix}k.m", f"{prefix}scale"], [f"{prefix}k.scaled"]),
        helper.make_node("MatMul", [f"{prefix}q.scaled", f"{prefix}k.scaled"], [f"{prefix}scores"]),
        helper.make_node("Softmax", [f"{prefix}scores"], [f"{prefix}shares"]),
        helper.make_node("MatMul", [f"{prefix}shares", v], [y]),
    ]
    return nodes, weights


WIDE = [2, TOKENS, HEADS * SIZE]
DEEP = [2, HEADS, TOKENS, SIZE]


def tokens(*names: str) -> dict[str, np.ndarray]:
    return {name: np.random.default_rng(k).normal(size=WIDE).astype(np.float32) for k, name in enumerate(names)}


@pytest.mark.parametrize("biases", ["qkv", "", "qv"])
@pytest.mark.parametrize("decomposed", [False, True])
def test_projections_of_an_attention_become_one_product_with_one_transpose(biases: str, decomposed: bool) -> None:
    nodes, weights = attention(biases, decomposed=decomposed)
    made = model(nodes, {"x": WIDE}, {"y": DEEP}, weights)
    before = run(made, tokens("x"))[0]
    after = kinds(made)[-6 if decomposed else -1 :]
    assert JoinProjectionsPass()(made).modified
    RemoveUnusedNodesPass()(made)
    added = ["Add"] if biases else []
    assert kinds(made) == ["MatMul", *added, "Reshape", "Transpose", *["Gather"] * 3, *after]
    assert np.abs(run(made, tokens("x"))[0] - before).max() < 1e-5
    assert not JoinProjectionsPass()(made).modified
    assert SeparateProjectionsPass()(made).modified
    assert (kinds(made).count("Gather"), kinds(made).count("Transpose")) == (0, 4 if decomposed else 3)
    assert kinds(made).count("MatMul") == (5 if decomposed else 3)
    assert np.abs(run(made, tokens("x"))[0] - before).max() < 1e-5
    assert not SeparateProjectionsPass()(made).modified


def test_projections_in_half_precision_are_joined_there() -> None:
    nodes, weights = attention(half=True)
    nodes.insert(0, helper.make_node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16))
    nodes.append(helper.make_node("Cast", ["y"], ["z"], to=TensorProto.FLOAT))
    for node in nodes[1:]:
        node.input[:] = ["h" if name == "x" else name for name in node.input]  # type: ignore[attr-defined] # a proto
    made = model(nodes, {"x": WIDE}, {"z": DEEP}, weights)
    before = run(made, tokens("x"))[0]
    assert JoinProjectionsPass()(made).modified
    RemoveUnusedNodesPass()(made)
    assert kinds(made) == ["Cast", "MatMul", "Add", "Reshape", "Transpose", *["Gather"] * 3, "Attention", "Cast"]
    assert {node.outputs[0].dtype for node in made.graph} == {ir.DataType.FLOAT16, ir.DataType.FLOAT}
    assert np.abs(run(made, tokens("x"))[0] - before).max() < 1e-2


def test_of_a_cross_attention_keys_and_values_are_joined_and_each_attention_has_its_own() -> None:
    one, weights = attention(sources="xee", prefix="1")
    two, others = attention(sources="xee", prefix="2", decomposed=True)
    made = model([*one, *two], {"x": WIDE, "e": WIDE}, {"1y": DEEP, "2y": DEEP}, weights | others)
    before = run(made, tokens("x", "e"))
    assert JoinProjectionsPass()(made).modified
    RemoveUnusedNodesPass()(made)
    assert (kinds(made).count("Gather"), kinds(made).count("MatMul")) == (4, 2 * 2 + 2)
    for got, expected in zip(run(made, tokens("x", "e")), before, strict=True):
        assert np.abs(got - expected).max() < 1e-5


@pytest.mark.parametrize("read", ["q.p", "q.s", "q.r", "q.t"])
@pytest.mark.parametrize("as_output", [False, True])
def test_projections_that_others_read_before_they_are_heads_stay(read: str, as_output: bool) -> None:
    """Rule 2. Heads may be read by others, and be no output."""
    nodes, weights = attention()
    nodes.append(helper.make_node("Relu", [read], ["also"]))
    rank = len(WIDE) if read in ("q.p", "q.s") else len(DEEP)
    shapes = {3: WIDE, 4: [2, TOKENS, HEADS, SIZE] if read == "q.r" else DEEP}
    made = model(nodes, {"x": WIDE}, {"y": DEEP, read if as_output else "also": shapes[rank]}, weights)
    before = run(made, tokens("x"))
    JoinProjectionsPass()(made)
    RemoveUnusedNodesPass()(made)
    joined = 3 if read == "q.t" and not as_output else 2  # without Q: K and V
    assert kinds(made).count("Gather") == joined
    for got, expected in zip(run(made, tokens("x")), before, strict=True):
        assert np.abs(got - expected).max() < 1e-5


@pytest.mark.parametrize("case", ["other inputs", "another order of dimensions", "a product with a weight between"])
def test_projections_that_do_not_meet_or_are_not_alike_stay(case: str) -> None:
    nodes, weights = attention(sources="xed" if case == "other inputs" else "xxx")
    inputs = dict.fromkeys("xed" if case == "other inputs" else "x", WIDE)
    made = model(nodes, inputs, {"y": DEEP}, weights)
    for node in made.graph:
        if case == "another order of dimensions" and node.op_type == "Transpose":
            node.attributes["perm"] = ir.AttrInt64s("perm", [0, 2, 3, 1])
        if case == "a product with a weight between" and node.op_type == "Attention":
            matrix = constant(made.graph, "m", np.eye(SIZE, dtype=np.float32))
            for k, heads in enumerate(node.inputs):
                assert heads is not None
                turned = ir.Node("", "MatMul", [heads, matrix], num_outputs=1)
                made.graph.insert_before(node, turned)
                node.replace_input_with(k, turned.outputs[0])
    assert not JoinProjectionsPass()(made).modified


@pytest.mark.parametrize(("side", "stride", "pads"), [(2, 1, 0), (3, 3, 0), (2, 2, 1)])
def test_patches_that_overlap_or_do_not_fit_stay_a_convolution(side: int, stride: int, pads: int) -> None:
    made, _ = patchify(side, stride, pads)
    assert not PatchRowsPass()(made).modified
    assert kinds(made) == ["Conv", "Reshape", "Transpose", "Relu"]


def test_an_einsum_that_only_moves_dimensions_is_a_transpose() -> None:
    shapes = {"x": [2, 3, 5, 2, 2, 4]}
    moved = helper.make_node("Einsum", ["x"], ["y"], equation="nhwpqc->nchpwq")
    made = model([moved], shapes, {"y": [2, 4, 3, 2, 5, 2]}, {})
    x = np.random.default_rng(0).normal(size=shapes["x"]).astype(np.float32)
    before = run(made, {"x": x})[0]
    assert PlainTransposesPass()(made).modified
    RemoveUnusedNodesPass()(made)
    assert kinds(made) == ["Transpose"]
    assert [value.name for value in made.graph.outputs] == ["y"]
    assert np.array_equal(run(made, {"x": x})[0], before)
    summed = model([helper.make_node("Einsum", ["x"], ["y"], equation="ab->a")], {"x": [2, 3]}, {"y": [2]}, {})
    assert not PlainTransposesPass()(summed).modified


def test_constants_of_one_name_are_kept_apart_and_equal_ones_are_one() -> None:
    made = model([helper.make_node("Relu", ["x"], ["y"])], {"x": [2]}, {"y": [2]}, {})
    first, again, other = (constant(made.graph, "c", np.array(values)) for values in ([1.0, 2.0], [1.0, 2.0], [1.0]))
    assert again is first
    assert [first.name, other.name] == ["c", "c.1"]
    assert constant(made.graph, "c", np.array([1.0])) is other
    assert constant(made.graph, "c", np.array([1], dtype=np.int64)).name == "c.2"
    assert constant(made.graph, "scalar", np.array(1.0)).shape == ir.Shape([])
