"""The gated sum of the features moves into the full graph: equal sums on small graphs, and what is refused."""

import numpy as np
import onnx_ir as ir
import pytest

from fora_trt.contract import Role
from fora_trt.export.fold import GROUP, fold
from fora_trt.export.hoist import drop_unread
from fora_trt.export.nodes import role_of
from fora_trt.export.read_parts import ReadPartsPass
from tests.small_graphs import kinds, model_of, names, run

STEPS, BATCH, TOKENS, WIDTH = 3, 2, 4, 8


def graphs(count: int, body: str, kind: str = "float", constants: str = "") -> tuple[ir.Model, ir.Model]:
    """A full graph with features f0 = latents, f1 = 2 latents, ... and the reuse graph that reads them.

    `body` is what both do: it makes `y` of the `latents`, of the features, of a gate g0, g1, ... for each of them,
    and of `text`, which is the same at all steps.
    """
    gates = [f"g{k}" for k in range(count)]
    features = [f"f{k}" for k in range(count)]
    roles: dict[str, Role] = {"latents": "latents", "text": "conditioning", "y": "prediction"}
    roles |= dict.fromkeys(gates, "hoisted")
    roles |= dict.fromkeys(features, "feature")
    inputs = ", ".join(
        [f"float[batch, {TOKENS}, {WIDTH}] latents", f"float[batch, 1, {WIDTH}] text"]
        + [f"float[batch, 1, {WIDTH}] {gate}" for gate in gates]
    )
    kept = ", ".join(f"{kind}[batch, {TOKENS}, {WIDTH}] {feature}" for feature in features)
    factors = ", ".join(f"float[1] by{k} = {{{k + 1}}}" for k in range(count))
    narrow = {"float": 1, "float16": 10}[kind]
    made = " ".join(f"p{k} = Mul(latents, by{k}) f{k} = Cast <to: int = {narrow}> (p{k})" for k in range(count))
    y = f"float[batch, {TOKENS}, {WIDTH}] y"
    more = f", {constants}" if constants else ""
    full = model_of(f"full ({inputs}) => ({y}, {kept}) <{factors}{more}> {{ {made} {body} }}", roles)
    reuse = model_of(f"reuse ({inputs}, {kept}) => ({y}) {f'<{constants}>' if constants else ''} {{ {body} }}", roles)
    return full, reuse


def chain(count: int) -> str:
    """(((h + g0 f0) + g1 f1) + ...)."""
    sums = " ".join(f"u{k} = Mul(g{k}, f{k}) h{k + 1} = Add(h{k}, u{k})" for k in range(count))
    return f"h0 = Relu(latents) {sums} y = Neg(h{count})"


def numbers(count: int) -> dict[str, np.ndarray]:
    """Of a full step; `window.g0`, ... are the gates of the reuse steps that follow."""
    generator = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"latents": (BATCH, TOKENS, WIDTH), "text": (BATCH, 1, WIDTH)}
    shapes |= {f"g{k}": (BATCH, 1, WIDTH) for k in range(count)}
    shapes |= {f"window.g{k}": (STEPS, BATCH, 1, WIDTH) for k in range(count)}
    return {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def check_equal(count: int, full: ir.Model, reuse: ir.Model) -> None:
    """Fold; then every reuse step of a window gives what it gave from gates and features."""
    given, plain, before = numbers(count), reuse.clone(), full.clone()
    features = run(before, given)
    assert fold(full, reuse)
    after = run(full, given)
    assert np.array_equal(after["y"], features["y"]), "the full step itself is untouched"
    for k in range(STEPS):
        step = given | {"latents": np.random.default_rng(k + 1).normal(size=given["latents"].shape).astype(np.float32)}
        step |= {f"g{one}": given[f"window.g{one}"][k] for one in range(count)}
        sums = {
            name.removeprefix("window."): value[k] if name.startswith("window.") else value
            for name, value in after.items()
        }
        expected, got = run(plain, step | features)["y"], run(reuse, step | sums)["y"]
        assert np.abs(got - expected).max() < 1e-5


def test_a_reuse_step_reads_one_sum_and_the_full_step_makes_it_for_the_whole_window() -> None:
    full, reuse = graphs(2, chain(2))
    check_equal(2, full, reuse)
    assert names(reuse.graph.inputs) == ["latents", "folded.0"]
    assert kinds(reuse) == ["Relu", "Add", "Neg"]
    assert names(full.graph.outputs) == ["y", "window.folded.0"]
    assert names(full.graph.inputs) == ["latents", "g0", "g1", "window.g0", "window.g1"]
    assert [role_of(value) for value in full.graph.outputs] == ["prediction", "sum"]
    assert [role_of(value) for value in reuse.graph.inputs] == ["latents", "sum"]
    assert {role_of(value) for value in full.graph.inputs[1:]} == {"hoisted"}
    summed = full.graph.outputs[1]
    assert summed.shape == ir.Shape(["window", "batch", TOKENS, WIDTH])


@pytest.mark.parametrize(("count", "groups"), [(2, 1), (GROUP, 1), (GROUP + 1, 2), (2 * GROUP + 1, 3)])
def test_features_of_one_shape_are_added_up_in_groups(count: int, groups: int) -> None:
    full, reuse = graphs(count, chain(count))
    check_equal(count, full, reuse)
    assert kinds(full).count("ReduceSum") == groups
    assert kinds(full).count("Mul") == 2 * count + groups, "features and gated features of the step, groups"


def test_features_that_are_widened_stay_in_a_chain_and_are_widened_apart() -> None:
    widened = " ".join(f"w{k} = Cast <to: int = 1> (f{k}) u{k} = Mul(g{k}, w{k})" for k in range(2))
    full, reuse = graphs(2, f"h = Relu(latents) {widened} a = Add(h, u0) b = Add(a, u1) y = Neg(b)", kind="float16")
    check_equal(2, full, reuse)
    assert "ReduceSum" not in kinds(full)
    casts = [node for node in full.graph if node.op_type == "Cast" and node.outputs[0].dtype == ir.DataType.FLOAT]
    assert len(casts) == 4, "for the step and for the window, of each feature"


def test_what_is_the_same_at_all_steps_is_added_up_without_the_window() -> None:
    """A sum of features alone is no tensor of a window."""
    full, reuse = graphs(2, "h = Relu(latents) a = Add(h, f0) b = Add(a, f1) y = Neg(b)")
    check_equal(2, full, reuse)
    assert names(full.graph.outputs) == ["y", "folded.0"]
    assert names(full.graph.inputs) == ["latents"]


def test_a_sum_that_is_read_on_the_way_makes_two() -> None:
    body = "h = Relu(latents) u0 = Mul(g0, f0) a = Add(h, u0) n = Tanh(a) u1 = Mul(g1, f1) b = Add(n, u1) y = Sub(b, a)"
    full, reuse = graphs(2, body)
    check_equal(2, full, reuse)
    assert names(reuse.graph.inputs) == ["latents", "folded.0", "folded.1"]


def test_a_feature_that_the_remainder_reads_stays_an_output() -> None:
    full, reuse = graphs(2, "h = Relu(latents) u0 = Mul(g0, f0) a = Add(h, u0) m = Mul(a, f1) y = Neg(m)")
    check_equal(2, full, reuse)
    assert names(full.graph.outputs) == ["y", "f1", "window.folded.0"]
    assert names(reuse.graph.inputs) == ["latents", "f1", "folded.0"]


@pytest.mark.parametrize(
    "gated",
    [
        "t = Unsqueeze(g0, back) s = Unsqueeze(f0, back) m = Mul(t, s) u = ReduceSum <keepdims: int = 0> (m, back)",
        "t = Concat <axis: int = -1> (g0, g0) s = Concat <axis: int = -1> (f0, f0) m = Mul(t, s) "
        "p, u = Split <axis: int = -1, num_outputs: int = 2> (m)",
        "t = Sigmoid(g0) u = Mul(t, f0)",
    ],
)
def test_axes_that_are_counted_from_the_last_take_the_window(gated: str) -> None:
    full, reuse = graphs(1, f"h = Relu(latents) {gated} a = Add(h, u) y = Neg(a)", constants="int64[1] back = {-1}")
    if "Split" in gated:
        assert not fold(full, reuse), "of operators along an axis only those that are listed"
    else:
        check_equal(1, full, reuse)


@pytest.mark.parametrize(
    ("why", "gated"),
    [
        ("a product of matrices", "t = Transpose <perm: ints = [0, 2, 1]> (g0) s = MatMul(f0, t) u = Mul(s, f0)"),
        ("a softmax", "t = Softmax <axis: int = -1> (g0) u = Mul(t, f0)"),
        ("an axis counted from the first", "t = Concat <axis: int = 2> (g0, g0) s = Concat <axis: int = 2> (f0, f0) "
         "m = Mul(t, s) u = Slice(m, zero, width, two)"),
        ("axes of a tensor counted from the first", "t = Unsqueeze(g0, two) s = Squeeze(t, two) u = Mul(s, f0)"),
        ("fewer dimensions than it meets", "t = ReduceSum <keepdims: int = 0> (g0, back) s = Unsqueeze(f0, back) "
         "m = Mul(s, t) u = Squeeze(m, back)"),
        ("neither gate nor feature", "t = Mul(g0, text) u = Mul(t, f0)"),
    ],
)  # fmt: skip
def test_what_cannot_take_all_steps_of_a_window_at_once_is_refused(why: str, gated: str) -> None:
    constants = f"int64[1] zero = {{0}}, int64[1] two = {{2}}, int64[1] width = {{{WIDTH}}}, int64[1] back = {{-1}}"
    full, reuse = graphs(1, f"h = Relu(latents) {gated} a = Add(h, u) y = Neg(a)", constants=constants)
    before = kinds(full), names(full.graph.inputs), names(full.graph.outputs)
    inputs = names(reuse.graph.inputs)
    assert not fold(full, reuse), why
    assert (kinds(full), names(full.graph.inputs), names(full.graph.outputs)) == before
    assert {*names(reuse.graph.inputs)} <= {*inputs}, "only what nobody reads is gone"


def test_nothing_to_fold_is_refused() -> None:
    full, reuse = graphs(1, "h = Relu(latents) m = Mul(h, f0) y = Neg(m)")
    assert not fold(full, reuse)
    assert names(full.graph.outputs) == ["y", "f0"]
    assert names(reuse.graph.inputs) == ["latents", "f0"]


def test_sums_that_were_refused_are_equal_in_another_order() -> None:
    """(h + f0) + u1 became h + (f0 + u1) before it was clear that `text` is read."""
    body = "h = Relu(latents) a = Add(h, f0) t = Mul(g1, text) u = Mul(t, f1) b = Add(a, u) y = Neg(b)"
    full, reuse = graphs(2, body)
    plain = reuse.clone()
    assert not fold(full, reuse)
    given = numbers(2) | run(full, numbers(2))
    assert kinds(reuse).count("Add") == kinds(plain).count("Add") == 2
    assert np.abs(run(reuse, given)["y"] - run(plain, given)["y"]).max() < 1e-5


def test_what_depends_on_no_feature_is_added_to_the_latents() -> None:
    """So a sum is linear in the features: weights that do not add up to 1 leave `text` and constants alone."""
    chained = "a = Add(h, u0) b = Add(a, text) c = Add(b, u1) d = Add(c, one) y = Neg(d)"
    body = f"h = Relu(latents) u0 = Mul(g0, f0) u1 = Mul(g1, f1) {chained}"
    full, reuse = graphs(2, body, constants="float[1] one = {1}")
    check_equal(2, full, reuse)
    assert names(reuse.graph.inputs) == ["latents", "text", "folded.0"]
    assert [role_of(value) for value in full.graph.outputs] == ["prediction", "sum"]
    given = numbers(2)
    sums = run(full, given)["window.folded.0"]
    doubled = run(full, given | {"latents": 2 * given["latents"]})["window.folded.0"]
    assert np.abs(doubled - 2 * sums).max() < 1e-5, "features are proportional to the latents of the full step"


@pytest.mark.parametrize(
    ("folded", "role"),
    [
        ("n = Neg(f0) u = Mul(g0, n)", "sum"),
        ("n = Add(f0, f1) u = Mul(n, g0)", "sum"),
        ("n = Sub(f0, f1) m = Div(n, g0) u = Mul(m, g1)", "sum"),
        ("n = Tanh(f0) u = Mul(g0, n)", "function"),
        ("n = Add(f0, g0) u = Mul(g1, n)", "function"),
        ("n = Mul(f0, f1) u = Mul(g0, n)", "function"),
        ("n = Div(g0, f0) u = Mul(g0, n)", "function"),
    ],
)
def test_a_folded_value_says_whether_it_is_linear_in_the_features(folded: str, role: str) -> None:
    full, reuse = graphs(2, f"h = Relu(latents) {folded} a = Add(h, u) y = Neg(a)")
    check_equal(2, full, reuse)
    assert [role_of(value) for value in reuse.graph.inputs] == ["latents", role]
    assert [role_of(value) for value in full.graph.outputs] == ["prediction", role]


# -- streams of text and image tokens ----------------------------------------------------------------------------------

TWO = "int64[1] zero = {0}, int64[1] one = {1}, int64[1] cut = {1}, int64[1] end = {99}, int64[2] lengths = {1, 3}"
JOINT = "t = Relu(text) a = Slice(latents, cut, end, one) i = Relu(a) h0 = Concat <axis: int = 1> (t, i)"
"""A stream of one token of text and three of the image."""

STREAMS = {
    "sliced at the end": "u0 = Mul(g0, f0) h1 = Add(h0, u0) u1 = Mul(g1, f1) h2 = Add(h1, u1) "
    "y0 = Slice(h2, cut, end, one)",
    "split at the end": "u0 = Mul(g0, f0) h1 = Add(h0, u0) u1 = Mul(f1, g1) h2 = Add(h1, u1) "
    "x, y0 = Split <axis: int = 1> (h2, lengths)",
    "taken apart and put together in every block": "u0 = Mul(g0, f0) h1 = Add(h0, u0) t1 = Slice(h1, zero, cut, one) "
    "i1 = Slice(h1, cut, end, one) k1 = Concat <axis: int = 1> (t1, i1) u1 = Mul(g1, f1) h2 = Add(k1, u1) "
    "y0 = Slice(h2, cut, end, one)",
    "with parts of a feature that are added to each stream": "t0 = Slice(h0, zero, cut, one) "
    "i0 = Slice(h0, cut, end, one) u0 = Slice(f0, zero, cut, one) v0 = Slice(f0, cut, end, one) w0 = Mul(g0, u0) "
    "z0 = Mul(g1, v0) t1 = Add(t0, w0) i1 = Add(i0, z0) h1 = Concat <axis: int = 1> (t1, i1) h2 = Add(h1, f1) "
    "y0 = Slice(h2, cut, end, one)",
    "with another gate for the text": "l0, r0 = Split <axis: int = 1> (f0, lengths) u0 = Mul(g0, l0) v0 = Mul(g1, r0) "
    "s0 = Concat <axis: int = 1> (u0, v0) h1 = Add(h0, s0) h2 = Add(h1, f1) "
    "x, y0 = Split <axis: int = 1> (h2, lengths)",
}


@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS)
def test_a_stream_of_text_and_image_folds_and_the_text_is_not_read(stream: str) -> None:
    padded = "y1 = Neg(y0) y2 = Slice(y1, zero, one, one) y = Concat <axis: int = 1> (y2, y1)"  # a token more
    full, reuse = graphs(2, f"{JOINT} {stream} {padded}", constants=TWO)
    ReadPartsPass()(reuse)
    drop_unread(reuse)
    check_equal(2, full, reuse)
    assert names(reuse.graph.inputs) == ["latents", "folded.0"]
    assert [role_of(value) for value in reuse.graph.inputs] == ["latents", "sum"]
    assert reuse.graph.inputs[1].shape == ir.Shape(["batch", TOKENS - 1, WIDTH])
    assert len([node for node in reuse.graph if node.op_type == "Add"]) == 1
