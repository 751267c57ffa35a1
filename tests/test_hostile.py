"""Bundles as an attacker would seal them, their digests fit: each is refused for what it is, or is harmless."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import onnx
import pytest
from click.testing import CliRunner
from onnx import helper, numpy_helper

from fora_trt.cli import main
from fora_trt.files import record_of
from tests.damage import rewrite

Nodes = list[onnx.NodeProto]


def reseal(folder: Path, change: Callable[[dict[str, Any]], object] = lambda manifest: None) -> None:
    """Change a manifest, and make the digests of all files fit."""

    def apply(manifest: dict[str, Any]) -> None:
        change(manifest)
        for name in manifest["files"]:
            if (folder / name).is_file():
                manifest["files"][name] = record_of(folder / name).model_dump()

    rewrite(folder, apply)


def add_nodes(folder: Path, nodes: Nodes, values: dict[str, Any], extra: str) -> None:
    """Add nodes, whose scalar output `extra` is added to the prediction of the full graph."""
    path = folder / "full.onnx"
    model = onnx.load(path, load_external_data=False)
    prediction = model.graph.output[0].name
    for node in model.graph.node:
        node.output[:] = ["before" if name == prediction else name for name in node.output]
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in values.items())
    model.graph.node.extend([*nodes, helper.make_node("Add", ["before", extra], [prediction])])
    model.opset_import.append(helper.make_opsetid("fora_trt", 1))
    path.write_bytes(model.SerializeToString())
    reseal(folder)


def many_terms(folder: Path) -> None:
    values = {"g": numpy.ones((1, 1, 16), "float32"), "f": numpy.ones((1, 4, 16), "float32")}
    nodes = [
        helper.make_node("WeightedSum", ["g"] * 3000 + ["f"] * 3000, ["w"], domain="fora_trt"),
        helper.make_node("ReduceSum", ["w"], ["s"], keepdims=0),
    ]
    add_nodes(folder, nodes, values, "s")


def endless_loop(folder: Path) -> None:
    info = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["go_on"]), helper.make_node("Add", ["v", "v"], ["more"])],
        "body", [info("k", 7, []), info("go", 9, []), info("v", 1, [None])],
        [info("go_on", 9, []), info("more", 1, [None])],
    )  # fmt: skip
    values = {"trips": numpy.array(2**62), "yes": numpy.array(True), "start": numpy.zeros(4, "float32")}
    nodes = [
        helper.make_node("Loop", ["trips", "yes", "start"], ["l"], body=body),
        helper.make_node("ReduceSum", ["l"], ["s"], keepdims=0),
    ]
    add_nodes(folder, nodes, values, "s")


def one_node(operator: str, **attributes: Any) -> Callable[[Path], None]:
    def add(folder: Path) -> None:
        node = helper.make_node(operator, ["one"], ["made"], **attributes)
        add_nodes(folder, [node, helper.make_node("ReduceSum", ["made"], ["s"], keepdims=0)],
                  {"one": numpy.ones(1, "float32")}, "s")  # fmt: skip

    return add


def graph_in_an_attribute(folder: Path) -> None:
    """An operator that is allowed, with a graph that it does not have: nothing looks into it, and nothing should."""
    inner = helper.make_graph([helper.make_node("Loop", [], [])], "inner", [], [])
    one_node("Identity", body=inner)(folder)


def own_function(folder: Path) -> None:
    """A function of the model under the name of an operator."""
    path = folder / "full.onnx"
    model = onnx.load(path, load_external_data=False)
    body = [helper.make_node("Relu", ["x"], ["y"])]
    model.functions.append(helper.make_function("", "Add", ["x"], ["y"], body, [helper.make_opsetid("", 23)]))
    path.write_bytes(model.SerializeToString())
    reseal(folder)


def weights_from(file: str, offset: int = 0) -> Callable[[Path], None]:
    """A constant of a node, not an initializer, that takes its numbers from a file."""

    def add(folder: Path) -> None:
        if Path(file).name == file and not (folder / file).exists():
            (folder / file).write_bytes(bytes(16))
        node = helper.make_node("Constant", [], ["c"])
        value = node.attribute.add(name="value", type=onnx.AttributeProto.TENSOR)
        value.t.name, value.t.data_type, value.t.data_location = "c.value", 1, onnx.TensorProto.EXTERNAL
        value.t.dims.append(4)
        for key, text in {"location": file, "offset": str(offset), "length": "16"}.items():
            value.t.external_data.add(key=key, value=text)
        add_nodes(folder, [node, helper.make_node("ReduceSum", ["c"], ["s"], keepdims=0)], {}, "s")

    return add


def huge_tensor(folder: Path) -> None:
    nodes = [
        helper.make_node("ConstantOfShape", ["sizes"], ["many"]),
        helper.make_node("ReduceSum", ["many"], ["s"], keepdims=0),
    ]
    add_nodes(folder, nodes, {"sizes": numpy.array([2**20] * 3)}, "s")


def cycle(folder: Path) -> None:
    nodes = [helper.make_node("Neg", ["b"], ["a"]), helper.make_node("Neg", ["a"], ["b"])]
    add_nodes(folder, [*nodes, helper.make_node("ReduceSum", ["a"], ["s"], keepdims=0)], {}, "s")


def edge_without(field: str) -> Callable[[Path], None]:
    def remove(folder: Path) -> None:
        path = folder / "full.onnx"
        model = onnx.load(path, load_external_data=False)
        edge = model.graph.input[0]
        (edge if field in ("type", "name") else edge.type.tensor_type).ClearField(field)
        path.write_bytes(model.SerializeToString())
        reseal(folder)

    return remove


def manifest_with(*place: Any, value: Any) -> Callable[[Path], None]:
    """The value at a place of the manifest is another."""

    def put(manifest: dict[str, Any]) -> None:
        inside: Any = manifest
        for key in place[:-1]:
            inside = inside[key]
        inside[place[-1]] = value

    return lambda folder: reseal(folder, put)


def written(name: str, content: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_bytes(content)
        if name != "manifest.json":
            reseal(folder)

    return write


def scheduler_with(**settings: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "scheduler_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
        reseal(folder)

    return change


def linked(folder: Path) -> None:
    (folder / "manifest.json").rename(folder.parent / "elsewhere.json")
    (folder / "manifest.json").symlink_to(folder.parent / "elsewhere.json")


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "more terms than the kernel takes": (many_terms, "full.onnx contains the operator fora_trt::WeightedSum, which no"),
    "an endless loop": (endless_loop, "full.onnx contains the operator Loop, which no export writes"),
    "an operator of text": (one_node("StringNormalizer"), "contains the operator StringNormalizer"),
    "an operator of a library": (one_node("Gelu", domain="com.microsoft"), "contains the operator com.microsoft::Gelu"),
    "a graph in an attribute": (graph_in_an_attribute, "full.onnx contains "),
    "a function of its own": (own_function, "full.onnx has functions or training steps, which no export writes"),
    "unlisted weights": (weights_from("unlisted.bin"), "loads weights from 'unlisted.bin', which the manifest"),
    "weights from elsewhere": (weights_from("/etc/hostname"), "loads weights from '/etc/hostname'"),
    "weights from memory": (weights_from("*/_ORT_MEM_ADDR_/*"), "loads weights from '*/_ORT_MEM_ADDR_/*'"),
    "weights beyond the end": (weights_from("full.onnx.data", 2**40), "16 bytes that are not in this file"),
    "a tensor of 2^60 elements": (huge_tensor, "elements; the limit is 4294967296"),
    "a cycle": (cycle, "full.onnx is not a valid ONNX graph"),
    "an input without a shape": (edge_without("shape"), "full.onnx "),
    "an input without a type": (edge_without("type"), "full.onnx "),
    "an input without a name": (edge_without("name"), "full.onnx "),
    "a name that leaves": (manifest_with("name", value="../../elsewhere"), "'../../elsewhere' is a path"),
    "a long name": (manifest_with("name", value="x" * 300), "has more than 200 bytes"),
    "a name with a NUL": (manifest_with("name", value="a\0b"), "holds a control character in 'a\\x00b' at name"),
    "a graph of another name": (
        manifest_with("graphs", "../../x", value={"file": "full.onnx", "inputs": [], "outputs": []}),
        "there is a graph '../../x'; the graphs are",
    ),
    "a file with a long name": (
        lambda f: rewrite(f, lambda m: m["files"].update({"x" * 5000: {"sha256": "", "size": 1}})),
        "a path outside the folder or no name of",
    ),
    "text that moves the cursor": (
        manifest_with("model", "options", "source", value="digits --force; #\n\x1b[2Jall is fine"),
        "holds a control character in 'digits --force; # \\x1b[2Jall is fine' at model.options.source",
    ),
    "a source that is an option": (manifest_with("model", "options", "source", value="--help"), "begins with a dash"),
    "a schedule of another file": (manifest_with("schedule", value="../other.json"), "'../other.json' is a file; only"),
    "a schedule of no kind": (manifest_with("schedule", value="x:1"), "there is no schedule 'x:1'"),
    "other latents": (manifest_with("latents", "shape", value=[7, 3, 5]), "the latents have the shape [7, 3, 5]"),
    "huge latents": (manifest_with("inputs", 0, "shape", value=["batch", 2**31, 2**31]), "the limit is 4294967296"),
    "a scale that is no number": (manifest_with("latents", "scale", value=float("nan")), "have the scale nan"),
    "a huge integer": (manifest_with("opset", value=10**30), "holds the integer 1000000000000000000000000000000"),
    "a deep manifest": (
        written("manifest.json", b'{"a":' * 100_000 + b"1" + b"}" * 100_000), "nests lists or objects deeper than 32"
    ),
    "a list": (written("manifest.json", b"[1]"), "it has no format_version"),
    "other bytes": (written("manifest.json", b"\xff\xfe\x00"), "it is not UTF-8 text"),
    "a link": (linked, "manifest.json is not the manifest of a bundle: it is a link or not a regular file"),
    "a scheduler of lists": (written("scheduler_config.json", b"[1, 2, 3]"), "not the configuration of a scheduler"),
    "a deep scheduler": (written("scheduler_config.json", b"[" * 10_000), "nests lists or objects deeper than 32"),
    "a scheduler without numbers": (scheduler_with(beta_end=float("nan")), "holds the number nan; finite numbers"),
    "a scheduler of 10^9 timesteps": (scheduler_with(num_train_timesteps=10**9), "holds the number 1000000000; finite"),
    "a scheduler of no class": (scheduler_with(_class_name=["DDIMScheduler"]), "not the configuration of a scheduler"),
    "a scheduler of another class": (scheduler_with(_class_name="os.abort"), "there is no scheduler 'os.abort'"),
}  # fmt: skip


def fora(*arguments: str | Path | int) -> tuple[int, str]:
    result = CliRunner().invoke(main, [str(one) for one in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stderr


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_bundle_is_refused_in_one_sentence(
    case: str, bundle_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harm, message = HOSTILE[case]
    harm(bundle_copy)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    code, said = fora("run", bundle_copy, "--class-labels", 1, "--steps", 2, "--latents-out", "latents.npy")
    assert code == 1
    assert message in said
    assert said.count("\n") == 1
    assert "\x1b" not in said
    assert [*(tmp_path / "here").iterdir()] == []


def test_what_a_manifest_says_is_one_word_of_the_command_in_a_message(bundle_copy: Path) -> None:
    manifest_with("model", "options", "source", value="digits; touch owned")(bundle_copy)
    (bundle_copy / "reuse.onnx").unlink()
    code, said = fora("inspect", bundle_copy)
    assert code == 1
    assert "export it again: fora-trt export 'digits; touch owned' --name tiny --force" in said


@pytest.mark.parametrize("command", [("verify", "--steps", 2), ("bench", "--steps", 2, "--repeats", 1)])
def test_a_factory_that_a_manifest_names_is_not_called_unasked(
    command: tuple[str | int, ...], bundle_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, *options = command
    (tmp_path / f"{name}_made.py").write_text(
        "from pathlib import Path\nPath('called').touch()\ndef make(): raise OSError('!')"
    )
    monkeypatch.chdir(tmp_path)
    manifest_with("model", "options", "source", value=f"{name}_made:make")(bundle_copy)
    digest = json.loads((bundle_copy / "manifest.json").read_text())["model"]["weights_sha256"]
    if name == "bench":  # the rows of PyTorch are absent, and say why
        from fora_trt.engines.options import EngineOptions
        from fora_trt.evaluate.targets import device_of, targets_of
        from fora_trt.pipeline import Pipeline

        _, absent = targets_of(Pipeline(bundle_copy), [], [], lambda one: device_of(one, "cpu"), EngineOptions())
        said = absent[0].why
    else:
        code, said = fora(name, bundle_copy, *options)
        assert code == 1
    assert f"names the factory '{name}_made:make' as its source" in said
    assert digest in said
    assert "--trust-source" in said
    assert not (tmp_path / "called").exists()
    code, said = fora("verify", bundle_copy, "--steps", 2, "--trust-source")
    assert (tmp_path / "called").exists()


def test_trust_without_a_factory_is_refused(bundle_copy: Path) -> None:
    code, said = fora("verify", bundle_copy, "--trust-source")
    assert code == 1
    assert "is no factory, so no code of it runs; leave --trust-source out" in said


def test_steps_and_images_have_limits(bundle_copy: Path) -> None:
    code, said = fora("run", bundle_copy, "--class-labels", 1, "--steps", 10**9, "--latents-out", "latents.npy")
    assert (code, "the number of steps is 1000000000; the limit is 10000" in said) == (1, True)
