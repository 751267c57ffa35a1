"""Only the tokens that are read are computed: rules as in the docstring of `export/read_parts.py`."""

import numpy as np
import onnx_ir as ir
import pytest

from fora_trt.export.hoist import drop_unread
from fora_trt.export.read_parts import ReadPartsPass
from tests.small_graphs import kinds, model_of, names, run

BATCH, TEXT, IMAGE, WIDTH = 2, 3, 5, 4
ALL = TEXT + IMAGE

CONSTANTS = f"""
    int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] two = {{2}}, int64[1] end = {{9223372036854775807}},
    int64[1] text_end = {{{TEXT}}}, int64[1] minus_image = {{-{IMAGE}}}, int64[1] last_but_one = {{-2}},
    int64[1] first_image = {{{TEXT + 1}}}, int64[2] lengths = {{{TEXT}, {IMAGE}}},
    float[{WIDTH}, 2] weight = {{1, 2, 3, 4, 5, 6, 7, 8}}, float[{WIDTH}] scale = {{1, 2, 3, 4}},
    float[1, {ALL}, 1] positions = {{1, 2, 3, 4, 5, 6, 7, 8}}
"""


def model(body: str, width: int = WIDTH, length: int = IMAGE) -> ir.Model:
    """A graph that makes `y` (B, length, width) of tokens (B, N, 4): text, image, a feature of both, a gate for all."""
    sizes = {"text": TEXT, "image": IMAGE, "feature": ALL, "gate": 1}
    inputs = ", ".join(f"float[batch, {count}, {WIDTH}] {name}" for name, count in sizes.items())
    return model_of(f"small ({inputs}) => (float[batch, {length}, {width}] y) <{CONSTANTS}> {{ {body} }}")


def check(one: ir.Model, modified: bool = True) -> None:
    """Run the pass; the output stays bit for bit."""
    generator, before = np.random.default_rng(0), one.clone()
    given = {
        str(value.name): generator.normal(size=[BATCH, *[int(str(size)) for size in [*(value.shape or ())][1:]]])
        for value in one.graph.inputs
    }
    inputs = {name: value.astype(np.float32) for name, value in given.items()}
    assert ReadPartsPass()(one).modified == modified
    np.testing.assert_array_equal(run(one, inputs)["y"], run(before, inputs)["y"])
    drop_unread(one)


FOUR = ", ".join(map(str, range(16)))

STREAM = "all = Concat <axis: int = 1> (text, image) gated = Mul(gate, feature) sum = Add(all, gated)"
CUTS = {
    "from a number": "y = Slice(sum, text_end, end, one, one)",
    "from a number, without a step": "y = Slice(sum, text_end, end, one)",
    "counted from the end": "y = Slice(sum, minus_image, end, last_but_one)",
    "by a split": "left, y = Split <axis: int = 1> (sum, lengths)",
    "by a split along an axis counted from the last": "left, y = Split <axis: int = -2> (sum, lengths)",
}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_a_slice_of_a_stream_reads_its_own_tokens_alone(cut: str) -> None:
    one = model(f"{STREAM} {cut}")
    check(one)
    assert kinds(one) == ["Slice", "Mul", "Add"]
    assert names(one.graph.inputs) == ["image", "feature", "gate"], "nobody reads the text"
    assert names(one.graph.outputs) == ["y"]
    assert one.graph.outputs[0].shape == ir.Shape(["batch", IMAGE, WIDTH])


def test_rule_1_only_whole_tokens_are_cut_by_constant_bounds() -> None:
    for body, width, length in (
        ("all = Concat <axis: int = 2> (gate, gate) some = Slice(all, zero, two, two) y = Add(some, some)", 2, 1),
        (f"{STREAM} y = Slice(sum, zero, end, one, two)", WIDTH, ALL // 2),
    ):
        check(model(body, width, length), modified=False)
    computed = "where = Add(text_end, zero) all = Concat <axis: int = 1> (text, image) y = Slice(all, where, end, one)"
    check(model(computed), modified=False)


def test_rule_2_a_slice_over_several_concatenated_values_concatenates_parts_of_them() -> None:
    one = model("all = Concat <axis: int = 1> (text, image, text) y = Slice(all, two, first_image, one)", length=2)
    check(one)
    assert kinds(one) == ["Slice", "Slice", "Concat"]
    assert [str(node.outputs[0].shape) for node in one.graph] == ["[batch,1,4]", "[batch,1,4]", "[batch,2,4]"]


def test_rule_3_a_stream_that_is_taken_apart_and_concatenated_again_is_one() -> None:
    apart = "left = Slice(sum, zero, text_end, one) right = Slice(sum, text_end, end, one)"
    one = model(f"{STREAM} {apart} again = Concat <axis: int = 1> (left, right) y = Neg(again)", length=ALL)
    check(one)
    assert kinds(one) == ["Concat", "Mul", "Add", "Neg"]
    for parts in ("right, left", "left, left", "left, right, image"):
        length = {"right, left": ALL, "left, left": 2 * TEXT}.get(parts, ALL + IMAGE)
        one = model(f"{STREAM} {apart} again = Concat <axis: int = 1> ({parts}) y = Neg(again)", length=length)
        check(one)
        assert kinds(one).count("Concat") == 1, "the parts are in another order, or not all"


def test_rule_4_what_is_read_as_a_whole_is_not_computed_in_parts() -> None:
    one = model(f"{STREAM} part = Slice(sum, text_end, end, one) mean = ReduceMean(sum, one) y = Add(part, mean)")
    check(one, modified=False)


def test_rule_4_a_slice_without_a_concat_stays() -> None:
    check(model("gated = Mul(gate, feature) y = Slice(gated, text_end, end, one)"), modified=False)


def test_rule_4_two_streams_that_are_read_apart_are_computed_apart() -> None:
    cut = "left, right = Split <axis: int = 1> (sum, lengths) turned = Neg(left)"
    one = model(f"{STREAM} {cut} y = Concat <axis: int = 1> (turned, right)", length=ALL)
    check(one)
    assert kinds(one).count("Add") == 2
    assert sorted(str(node.outputs[0].shape) for node in one.graph if node.op_type == "Add") == [
        "[batch,3,4]",
        "[batch,5,4]",
    ]


@pytest.mark.parametrize(
    ("layer", "width"),
    [("l = LayerNormalization <axis: int = -1> (sum, scale)", WIDTH), ("l = MatMul(sum, weight)", 2)],
)
def test_rule_4_a_projection_or_a_normalization_computes_the_tokens_that_are_read(layer: str, width: int) -> None:
    one = model(f"{STREAM} {layer} y = Slice(l, text_end, end, one)", width)
    check(one)
    assert names(one.graph.inputs) == ["image", "feature", "gate"]
    both = f"{STREAM} {layer} left, right = Split <axis: int = 1> (l, lengths) turned = Neg(left)"
    check(model(f"{both} y = Concat <axis: int = 1> (turned, right)", width, ALL), modified=False)


def test_constants_are_cut_too() -> None:
    one = model(f"{STREAM} placed = Add(positions, sum) y = Slice(placed, text_end, end, one)")
    check(one)
    assert kinds(one) == ["Slice", "Mul", "Add", "Add"]
    assert [tuple(value.shape or ()) for name, value in one.graph.initializers.items() if "pos" in name] == [(1, 5, 1)]


def test_a_matrix_that_is_as_long_as_the_stream_is_not_cut() -> None:
    inputs = "float[batch, 2, 4] text, float[batch, 2, 4] image"
    streams = "all = Concat <axis: int = 1> (text, image) mixed = MatMul(all, weight) y = Slice(mixed, two, four, one)"
    constants = f"int64[1] one = {{1}}, int64[1] two = {{2}}, int64[1] four = {{4}}, float[4, 4] weight = {{{FOUR}}}"
    one = model_of(f"small ({inputs}) => (float[batch, 2, 4] y) <{constants}> {{ {streams} }}")
    check(one)
    assert kinds(one) == ["MatMul"]
    assert [tuple(value.shape or ()) for value in one.graph.initializers.values()] == [(4, 4)]


def test_rule_4_tokens_are_cut_before_they_are_widened() -> None:
    one = model_of(f"""
        small (float16[batch, {ALL}, {WIDTH}] feature) => (float[batch, {IMAGE}, {WIDTH}] y) <{CONSTANTS}>
        {{ wide = Cast <to: int = 1> (feature) y = Slice(wide, text_end, end, one) }}
    """)
    assert ReadPartsPass()(one).modified
    assert kinds(one) == ["Slice", "Cast"]
    assert [node.outputs[0].dtype for node in one.graph] == [ir.DataType.FLOAT16, ir.DataType.FLOAT]
    assert names(one.graph.outputs) == ["y"]
    both = "left, right = Split <axis: int = 1> (wide, lengths) y = Concat <axis: int = 1> (right, left)"
    one = model_of(f"""
        small (float16[batch, {ALL}, {WIDTH}] feature) => (float[batch, {ALL}, {WIDTH}] y) <{CONSTANTS}>
        {{ wide = Cast <to: int = 1> (feature) {both} }}
    """)
    ReadPartsPass()(one)
    assert kinds(one) == ["Slice", "Cast", "Slice", "Cast", "Concat"]
