"""The graph passes on small graphs, before and after on ONNX's own reference or ONNX Runtime."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper
from onnx_ir.passes import InPlacePass
from onnx_ir.passes.common import RemoveUnusedNodesPass

from fora_trt.export.drop_squeezes import DropSqueezesPass
from fora_trt.export.expand_masks import ExpandMasksPass
from fora_trt.export.slice_projections import SliceProjectionsPass


def model(
    nodes: Sequence[object], inputs: dict[str, list[int]], outputs: dict[str, list[int]], weights: dict[str, np.ndarray]
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
