"""What is early in a graph, and the graph that is made of it; rules as in the docstring of `export/hoist.py`."""

import numpy as np
import onnx_ir as ir
import pytest

from fora_trt.contract import Role
from fora_trt.export.hoist import GraphWriter, Numbering, batch_from, drop_unread, early_part, replace_reads
from fora_trt.export.nodes import edge, role_of
from tests.small_graphs import kinds, model_of, names, run, values_of


def early(model: ir.Model) -> tuple[list[str], list[str]]:
    """Names of the values that early nodes make, and of those among them that others read; `late` arrives late."""
    part = early_part(model.graph, {"late"})
    return [str(node.outputs[0].name) for node in part.nodes], names(part.boundary)


def test_rule_1_a_node_that_reads_early_values_and_constants_alone_is_early() -> None:
    model = model_of("""
        small (float[batch, 4] late, float[batch, 4] given) => (float[batch, 4] result)
        <float[1, 4] weights = {1, 2, 3, 4}>
        {
            scaled = Mul(given, weights)
            constant = Mul(weights, weights)
            summed = Add(scaled, given)
            mixed = Add(summed, constant)
            both = Mul(summed, late)
            after = Mul(both, given)
            result = Add(after, mixed)
        }
    """)
    assert early(model) == (["scaled", "summed"], ["summed"]), "neither of constants alone, nor of anything late"


def test_rule_2_a_row_for_every_sample_and_sizes_that_are_known() -> None:
    model = model_of("""
        small (float[batch, 4] late, float[batch, 4] given) => (float[batch, 4] result)
        <int64[1] first = {0}, int64[2] halves = {-1, 2}, int64[2] whole = {-1, 4}>
        {
            sizes = Shape(given)
            over_samples = ReduceSum <keepdims: int = 0> (given, first)
            unknown = Relu(given)
            rows = Reshape(given, halves)
            turned = Neg(rows)
            again = Reshape(turned, whole)
            a = Add(late, again)
            b = Add(a, over_samples)
            c = Add(b, unknown)
            result = Reshape(c, sizes)
        }
    """)
    values = values_of(model)
    values["unknown"].shape = None
    for name in ("rows", "turned"):
        values[name].shape = ir.Shape(["2*batch", 2])
    values["again"].shape = ir.Shape(["batch", 4])
    assert early(model) == (["rows", "turned", "again"], ["again"]), "two rows a sample are early too"
    values["turned"].shape = ir.Shape(["n", 2])
    assert early(model) == ([], []), "`n` is no number of samples; what is before it ends in two rows: rule 4"


def test_rule_3_no_graph_inside_and_no_output() -> None:
    model = model_of("""
        small (float[batch, 4] late, float[batch, 4] given, bool flag) => (float[batch, 4] result, float[batch, 4] told)
        {
            told = Neg(given)
            chosen = If (flag) <
                then_branch = yes () => (float[batch, 4] a) { a = Identity(given) },
                else_branch = no () => (float[batch, 4] b) { b = Neg(given) }
            >
            plain = Relu(given)
            both = Add(chosen, plain)
            result = Add(late, both)
        }
    """)
    chosen = values_of(model)["chosen"]
    chosen.shape, chosen.type = ir.Shape(["batch", 4]), ir.TensorType(ir.DataType.FLOAT)
    assert early(model) == (["plain"], ["plain"])


def test_rule_4_what_only_widens_is_left_to_the_remainder_at_the_end() -> None:
    model = model_of("""
        small (float[batch, 8, 4] late, float16[batch, 1, 4] given) => (float[batch, 8, 4] result)
        <int64[3] eight = {1, 8, 1}>
        {
            within = Cast <to: int = 1> (given)
            turned = Neg(within)
            narrow = Cast <to: int = 10> (turned)
            wide = Cast <to: int = 1> (narrow)
            repeated = Expand(wide, eight)
            result = Add(late, repeated)
        }
    """)
    made, boundary = early(model)
    assert made == ["within", "turned", "narrow"], "a cast in the middle stays, both at the end go"
    assert boundary == ["narrow"], "the small tensor passes between the graphs"


def test_rule_4_several_rows_for_a_sample_do_not_pass_between_graphs() -> None:
    model = model_of("""
        small (float[batch, 4] late, float[batch, 4] given) => (float[n, 2] result)
        <int64[2] halves = {-1, 2}>
        {
            turned = Neg(given)
            rows = Reshape(turned, halves)
            also = Reshape(late, halves)
            result = Add(rows, also)
        }
    """)
    values_of(model)["rows"].shape = ir.Shape(["2*batch", 2])
    assert early(model) == (["turned"], ["turned"])


ROLES: dict[str, Role] = {"late": "latents", "given": "timestep", "result": "prediction"}

SCALED = """
    small (float[batch, 4] late, float[batch, 4] given) => (float[batch, 4] result)
    <float[1] scale = {3.5}, int64[1] width = {4},
     float[4, 4] weight = {1, 2, 3, 4, 5, 6, 7, 8, 9, 8, 7, 6, 5, 4, 3, 2}>
    {
        size = Shape <start: int = 0, end: int = 1> (late)
        sizes = Concat <axis: int = 0> (size, width)
        expanded = Expand(scale, sizes)
        embedded = MatMul(expanded, weight)
        turned = Neg(given)
        added = Add(turned, embedded)
        all = Add(late, %s)
        result = Relu(all)
    }
"""


def scaled(read: str) -> ir.Model:
    model = model_of(SCALED % read, ROLES)
    for name in ("expanded", "embedded", "added"):
        values_of(model)[name].shape = ir.Shape(["batch", 4])
    return model


def test_rule_5_what_depends_on_the_batch_size_alone_is_copied_where_it_is_read() -> None:
    model = scaled("added")
    assert early(model) == (["turned"], ["turned"]), "the size is that of a late input"
    batch_from(model.graph, ["given"])
    part = early_part(model.graph, {"late"})
    assert names(part.boundary) == ["added"]
    writer = GraphWriter(Numbering())
    writer.add(part.nodes)
    graph = writer.graph("ahead", [writer.value(value) for value in part.boundary], like=model.graph)
    assert names(graph.inputs) == ["given"]
    given = np.arange(12, dtype=np.float32).reshape(3, 4)
    outputs = run(ir.Model(graph, ir_version=10), {"given": given})
    weight = np.array([*range(1, 10), *range(8, 1, -1)], np.float32).reshape(4, 4)
    assert np.array_equal(outputs["added"], 3.5 * weight.sum(0) - given)


def test_rule_5_what_depends_on_the_batch_size_alone_stays_where_it_is_read_late() -> None:
    model = scaled("embedded")
    drop_unread(model)
    batch_from(model.graph, ["given"])
    assert early(model) == ([], [])
    assert names(model.graph.inputs) == ["late"], "without another input, the size is that of the late one"


def test_equal_values_have_equal_numbers_whatever_graph_they_are_in() -> None:
    first, second = (
        model_of("""
            small (float[batch, 4] x, float[batch, 4] y) => (float[batch, 4] s)
            <float[1] two = {2}, float[1] pair = {2}, float[1] three = {3}>
            {
                a = Mul(x, two)
                b = Mul(x, pair)
                c = Mul(x, three)
                d = Mul(y, two)
                e = Add(x, two)
                f = LeakyRelu <alpha: float = 0.1> (x)
                g = LeakyRelu <alpha: float = 0.2> (x)
                h, i = Split <axis: int = 1, num_outputs: int = 2> (x)
                s = Sum(a, b, c, d, e, f, g)
            }
        """)
        for _ in range(2)
    )
    numbering = Numbering()
    numbers = {name: numbering.of(value) for name, value in values_of(first).items()}
    assert numbers["two"] == numbers["pair"], "constants are told apart by their content"
    assert numbers["a"] == numbers["b"]
    others = ["x", "y", "two", "three", *"acdefghi"]
    assert len({numbers[name] for name in others}) == len(others)
    assert {name: numbering.of(value) for name, value in values_of(second).items()} == numbers


HALF = """
    small (float[batch, 4] late, float[batch, 4] given) => (float[batch, 4] result)
    <float[1] scale = {%s}>
    {
        turned = Neg(given)
        scaled = Mul(turned, scale)
        result = Add(late, scaled)
    }
"""


def test_the_early_parts_of_several_graphs_become_one_graph_with_equal_values_once() -> None:
    models = [
        model_of(HALF % scale, {"late": "latents", "given": "timestep", "result": "prediction"}) for scale in "223"
    ]
    numbering = Numbering()
    writer = GraphWriter(numbering)
    ends = []
    for model in models:
        part = early_part(model.graph, {"late"})
        writer.add(part.nodes)
        ends += [writer.value(value) for value in part.boundary]
    assert [node.op_type for node in writer.nodes] == ["Neg", "Mul", "Mul"]
    assert ends[0] is ends[1]
    assert names(ends) == ["scaled", "scaled", "scaled.0"], "a name that is taken gets a number"
    graph = writer.graph("ahead", [ends[0], ends[2]], like=models[0].graph)
    assert names(graph.inputs) == ["given"]
    assert role_of(graph.inputs[0]) == "timestep"
    assert sorted(graph.initializers) == ["scale", "scale.0"]
    given = np.arange(8, dtype=np.float32).reshape(2, 4)
    outputs = run(ir.Model(graph, ir_version=10), {"given": given})
    assert np.array_equal(outputs["scaled"], -2 * given)
    assert np.array_equal(outputs["scaled.0"], -3 * given)
    assert kinds(models[0]) == ["Neg", "Mul", "Add"], "the graphs are left as they are"


def test_what_was_taken_out_is_read_from_an_input_and_what_nobody_reads_is_gone() -> None:
    model = model_of(HALF % 2, ROLES)
    (end,) = early_part(model.graph, {"late"}).boundary
    replace_reads(model, {end: edge("hoisted.0", end, "hoisted")})
    assert kinds(model) == ["Add"]
    assert names(model.graph.inputs) == ["late", "hoisted.0"]
    assert not model.graph.initializers
    late, ahead = np.ones((2, 4), np.float32), np.full((2, 4), 5, np.float32)
    assert np.array_equal(run(model, {"late": late, "hoisted.0": ahead})["result"], late + ahead)


def test_an_output_may_be_taken_out_too() -> None:
    model = model_of(HALF % 2)
    (result,) = model.graph.outputs
    replace_reads(model, {result: edge("given.result", result, "hoisted")})
    assert (kinds(model), names(model.graph.inputs), names(model.graph.outputs)) == (
        [],
        ["given.result"],
        ["given.result"],
    )


@pytest.mark.parametrize("read", [False, True])
def test_inputs_that_nobody_reads_are_dropped(read: bool) -> None:
    used = "spare" if read else "late"
    model = model_of(f"""
        small (float[batch, 4] late, float[batch, 4] spare) => (float[batch, 4] result)
        {{
            unread = Neg(spare)
            result = Add(late, {used})
        }}
    """)
    drop_unread(model)
    assert names(model.graph.inputs) == (["late", "spare"] if read else ["late"])
    assert kinds(model) == ["Add"]


SMALL = """
small (float[batch, 4] late, float[batch, 4] early) => (float[batch, 4] result)
<int64[1] one = {1}, int64[3] fifty = {1, 50, 1}, float[1] two = {2.0}>
{
    doubled = Mul(early, two)
    again = Mul(early, two)
    standing = Unsqueeze(doubled, one)
    wide = Expand(standing, fifty)
    sum = Add(late, wide)
    mean = ReduceMean <keepdims: int = 0> (sum, one)
    added = Add(mean, again)
    sizes = Shape(early)
    result = Reshape(added, sizes)
}
"""


def test_what_is_small_and_has_a_row_for_every_sample_is_early() -> None:
    part = early_part(model_of(SMALL).graph, {"late"})
    assert [node.op_type for node in part.nodes] == ["Mul", "Mul", "Unsqueeze"], "neither Expand nor Shape"
    assert sorted(len(value.shape or ()) for value in part.boundary) == [2, 3]


def test_equal_values_of_several_graphs_are_computed_once() -> None:
    writer = GraphWriter(Numbering())
    for model in (model_of(SMALL), model_of(SMALL)):
        writer.add(early_part(model.graph, {"late"}).nodes)
    assert [node.op_type for node in writer.nodes] == ["Mul", "Unsqueeze"]
