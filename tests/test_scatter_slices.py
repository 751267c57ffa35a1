"""An assignment to a slice is a concatenation: rules as in the docstring of `export/scatter_slices.py`."""

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes.common import RemoveUnusedNodesPass

from fora_trt.export.scatter_slices import ScatterSlicesPass
from tests.small_graphs import kinds, model_of, run, values_of

LENGTH = 5
CONSTANTS = """
    int64 none = {0}, int64 by = {1}, int64 index = {1}, int64 five = {5}, int64[1] first = {0}, int64[1] one = {1},
    int64[1] two = {2}, int64[1] four = {4}, int64[1] end = {99}, int64[1] minus_two = {-2}, int64[1] back = {-1},
    int64[1] three = {3}
"""
ALL = "sizes = Shape <start: int = 0> (x) length = Gather <axis: int = 0> (sizes, index) all = Range(none, length, by)"
FORTH = "turned = Transpose <perm: ints = [1, 0, 2]> (x) new = Transpose <perm: ints = [1, 0, 2]> (u)"
BACK = "whole = Transpose <perm: ints = [1, 0, 2]> (mixed) y = Neg(whole)"


def model(rows: str, count: int, scatter: str = "", back: str = BACK) -> ir.Model:
    scatter = scatter or "mixed = ScatterND(turned, indices, new)"
    body = f"{ALL} {rows} indices = Unsqueeze(rows, back) {FORTH} {scatter} {back}"
    inputs = f"float[batch, {LENGTH}, 3] x, float[batch, {count}, 3] u"
    made = model_of(f"small ({inputs}) => (float[batch, {LENGTH}, 3] y) <{CONSTANTS}> {{ {body} }}")
    values_of(made)["new"].shape = ir.Shape([count, "batch", 3])
    return made


def check(one: ir.Model, count: int, modified: bool = True) -> None:
    generator, before = np.random.default_rng(0), one.clone()
    lengths = {"x": LENGTH, "u": count}
    given = {name: generator.normal(size=(2, size, 3)).astype(np.float32) for name, size in lengths.items()}
    assert ScatterSlicesPass()(one).modified == modified
    RemoveUnusedNodesPass()(one)
    np.testing.assert_array_equal(run(one, given)["y"], run(before, given)["y"])
    assert ("ScatterND" in kinds(one)) != modified


@pytest.mark.parametrize(
    ("rows", "count", "left"),
    [
        ("rows = Slice(all, two, end, first, one)", 3, ["Slice", "Concat", "Neg"]),
        ("rows = Slice(all, two, end, first)", 3, ["Slice", "Concat", "Neg"]),
        ("rows = Slice(all, first, two, first, one)", 2, ["Slice", "Concat", "Neg"]),
        ("rows = Slice(all, two, four, first, one)", 2, ["Slice", "Slice", "Concat", "Neg"]),
        ("rows = Slice(all, minus_two, end, first, one)", 2, ["Slice", "Concat", "Neg"]),
        ("rows = Slice(all, first, end, first, one)", 5, ["Neg"]),
        ("known = Range(none, five, by) rows = Slice(known, four, end, first, one)", 1, ["Slice", "Concat", "Neg"]),
    ],
)
def test_an_assignment_to_a_slice_is_a_concatenation(rows: str, count: int, left: list[str]) -> None:
    one = model(rows, count)
    check(one, count)
    assert kinds(one) == left


def test_an_assignment_to_all_is_what_is_assigned() -> None:
    one = model("rows = Slice(all, first, end, first, one)", LENGTH)
    values = values_of(one)
    ir.convenience.replace_all_uses_with(values["rows"], values["all"])
    check(one, LENGTH)
    assert kinds(one) == ["Neg"]


ADDED = 'mixed = ScatterND <reduction = "add"> (turned, indices, new)'
READ_TWICE = "whole = Transpose <perm: ints = [1, 0, 2]> (mixed) sum = ReduceMax(mixed) y = Add(whole, sum)"


@pytest.mark.parametrize(
    ("rows", "count", "scatter", "back"),
    [
        ("rows = Slice(all, first, end, first, two)", 3, "", BACK),
        ("rows = Slice(all, two, four, first, one)", 2, ADDED, BACK),
        ("rows = Slice(all, two, four, first, one)", 2, "", READ_TWICE),
        ("shifted = Add(all, by) rows = Slice(shifted, first, two, first, one)", 2, "", BACK),
    ],
)
def test_another_scatter_stays(rows: str, count: int, scatter: str, back: str) -> None:
    check(model(rows, count, scatter, back), count, modified=False)
