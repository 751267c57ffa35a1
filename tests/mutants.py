"""Seeded mutants of bundles and sets of plans, with digests that fit, and what becomes of them in another process."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

from fora_trt.files import record_of, sealed

PATIENCE = 10.0
"""Seconds after which a command hangs."""

ODD: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 7, 1000, 2**31, 2**40, 2**63 - 1, 10**30, -(2**63), 0.5, 1e308, -1e-308,
    float("nan"), float("inf"), "", "x", "batch", "window", "float32", "int64", "float16", "latents",
    "noise_prediction", "full.onnx", "..", "../../elsewhere", "/etc/hostname", "a\nb", "\x1b[2J", "$(touch owned)",
    "--force", "\u202egnp", "\ud800", "x" * 5000, "os:abort", "schedule.json", "other.json", [], {}, [[]], [1, 2, 3],
    [10**9] * 3, {"a": {"b": 1}}, ["batch"] * 9,
)  # fmt: skip
"""Values that stand in for those of a manifest or a configuration."""

OPERATORS = """
    Loop If Scan SequenceMap WeightedSum StringConcat RandomNormal Identity Add MatMul Reshape Gather Concat Slice Split
    Transpose Softmax Cast ConstantOfShape Expand Range Tile TopK NonZero ScatterND Attention LayerNormalization Gemm
""".split()  # noqa: SIM905 # a list of strings would be a line each


def places(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The keys that lead to each value inside a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inside:
        yield (*above, key)
        yield from places(one, (*above, key))


def change_json(value: Any, draw: random.Random) -> None:
    """Change one value inside a JSON object: remove it, replace it, rename its key, or change a number."""
    *above, key = draw.choice([*places(value)])
    inside = value
    for one in above:
        inside = inside[one]
    how, old = draw.randrange(6), inside[key]
    if how == 0:
        del inside[key]
    elif how == 1 and isinstance(inside, dict):
        inside[str(draw.choice(ODD))] = inside.pop(key)
    elif how == 2:
        *other, last = draw.choice([*places(value)])
        there = value
        for one in other:
            there = there[one]
        inside[key] = json.loads(json.dumps(there[last]))
    elif how == 3 and isinstance(old, int | float) and not isinstance(old, bool):
        inside[key] = draw.choice([old + 1, old - 1, -old, old * 1000, float(old)])
    else:
        inside[key] = draw.choice(ODD)


def change_graph(path: Path, draw: random.Random) -> None:
    """Change one part of a graph: a node, an edge, an attribute, a constant, an input or output, or the header."""
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    if not graph.node:
        graph.node.append(helper.make_node("Identity", ["a"], ["b"]))  # a first change has removed all
    node = draw.choice(graph.node)
    names = [name for one in graph.node for name in (*one.input, *one.output)]
    tensor = draw.choice(graph.initializer) if graph.initializer else TensorProto()
    edge = draw.choice([*graph.input, *graph.output])
    number = draw.choice([-(2**40), -2, -1, 0, 1, 2, 3, 5, 64, 2**20, 2**40, 2**62])

    def attribute() -> None:
        if not node.attribute:
            node.attribute.append(helper.make_attribute(draw.choice(["axis", "to", "perm", "alpha"]), number))
        one = draw.choice(node.attribute)
        one.i, one.f, one.type = number, float(number), draw.choice([one.type, one.type, 1, 2, 7, 6])
        if one.ints:
            one.ints[draw.randrange(len(one.ints))] = number

    def edge_of_node() -> None:
        ends = draw.choice([end for end in (node.input, node.output) if end])
        ends[draw.randrange(len(ends))] = draw.choice([*names, "", "nowhere"])

    def constant() -> None:
        how = draw.randrange(5)
        if how == 0:
            tensor.dims.append(abs(number))
        elif how == 1 and tensor.dims:
            tensor.dims[draw.randrange(len(tensor.dims))] = number
        elif how == 2:
            tensor.data_type = draw.randrange(25)
        elif how == 3:
            tensor.raw_data = tensor.raw_data[: draw.randrange(9)]
        else:
            key = draw.choice(["location", "offset", "length", "checksum"])
            tensor.data_location = TensorProto.EXTERNAL
            tensor.external_data.add(
                key=key, value=str(draw.choice([number, "../x", "reuse.onnx.data", "/etc/passwd"]))
            )

    def shape() -> None:
        sizes = edge.type.tensor_type.shape.dim
        how = draw.randrange(4)
        if how == 0:
            edge.type.tensor_type.ClearField("shape")
        elif how == 1:
            edge.ClearField("type")
        elif how == 2 and sizes:
            sizes[draw.randrange(len(sizes))].dim_value = number
        else:
            edge.type.tensor_type.elem_type = draw.randrange(25)

    def body() -> None:
        loop = helper.make_node("If", [names[0]], ["made"], then_branch=graph, else_branch=graph)
        graph.node.insert(0, loop)

    def kind() -> None:
        node.op_type = draw.choice(OPERATORS)

    def domain() -> None:
        node.domain = draw.choice(["fora_trt", "com.microsoft", "ai.onnx.ml", "ai.onnx", "x" * 3000, "\n"])

    def swapped() -> None:
        node.CopyFrom(draw.choice(graph.node))

    def added() -> None:
        made = helper.make_node(draw.choice(OPERATORS), draw.sample(names, draw.randrange(4)), ["made"])
        graph.node.insert(draw.randrange(len(graph.node)), made)

    def huge() -> None:
        value = helper.make_tensor("sizes", TensorProto.INT64, [3], [draw.choice([100, 10_000, 2**31, 2**62])] * 3)
        graph.initializer.append(value)
        graph.node.insert(0, helper.make_node("ConstantOfShape", ["sizes"], ["many"]))
        graph.node.insert(1, helper.make_node("ReduceSum", ["many"], ["total"], keepdims=0))
        last = graph.node[-1]
        graph.node.append(helper.make_node("Add", ["before", "total"], [last.output[0]]))
        last.output[0] = "before"

    def header() -> None:
        model.opset_import[0].version = draw.choice([0, 1, 13, 24, 99, 2**40])

    def nodes() -> None:
        del graph.node[draw.randrange(len(graph.node)) :: draw.choice([1, 2, 1000])]

    draw.choice([attribute, attribute, edge_of_node, edge_of_node, constant, constant, shape, body, kind, kind, domain,
                 swapped, added, huge, header, nodes])()  # fmt: skip
    path.write_bytes(model.SerializeToString())


def change_bytes(path: Path, draw: random.Random) -> None:
    """Change a file whatever it holds: bytes of it, its length, or its kind."""
    content, how = bytearray(path.read_bytes()), draw.randrange(8)
    if how < 4:
        for _ in range(draw.choice([1, 3, 50])):
            content[draw.randrange(len(content))] = draw.randrange(256)
    elif how == 4:
        content = content[: draw.randrange(len(content))]
    elif how == 5:
        content = bytearray(b"\xef\xbb\xbf") + content
    else:
        path.rename(path.parent.parent / "moved")
        (Path.mkdir, os.mkfifo, lambda one: one.symlink_to("/etc/hostname"))[draw.randrange(3)](path)
        return
    path.write_bytes(content)


def mutate(folder: Path, seed: int) -> str:
    """Change a bundle or a set of plans, so that all digests fit mostly, and say what was changed."""
    draw, path = random.Random(seed), folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest.pop("sha256")
    kinds: list[tuple[str, Callable[[], None]]] = [("the manifest", lambda: change_json(manifest, draw))] * 5
    graphs = sorted(folder.glob("*.onnx"))
    kinds += [("a graph", lambda: change_graph(draw.choice(graphs), draw))] * (7 if graphs else 0)
    if (scheduler := folder / "scheduler_config.json").exists():

        def configuration() -> None:
            config = json.loads(scheduler.read_text())
            change_json(config, draw)
            scheduler.write_text(json.dumps(config))

        kinds += [("the scheduler", configuration)] * 3
    files = sorted(one for one in folder.iterdir() if one != path)
    kinds += [("bytes", lambda: change_bytes(draw.choice([one for one in files if one.is_file()]), draw))] * 3
    what, change = draw.choice(kinds)
    for _ in range(draw.choice([1, 1, 1, 2])):
        change()
    listed = manifest.get("files")
    for name in sorted(listed) if isinstance(listed, dict) else ():
        if (
            isinstance(listed[name], dict)
            and (folder / name).is_file()
            and name.endswith((".onnx", ".data", ".json", ".plan"))
        ):
            listed[name] |= record_of(folder / name).model_dump() if what != "the manifest" else {}
    path.write_bytes(sealed(manifest).encode("utf-8", "surrogatepass"))
    if draw.random() < 0.04:
        change_bytes(path, draw)
        what = "bytes of the manifest"
    return what


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant: `ran`, `refused`, or a fault: `traceback`, `lines`, `crash`, `hang`, `wrote`."""

    seed: int
    what: str
    kind: str
    said: str

    @property
    def is_fault(self) -> bool:
        return self.kind not in ("ran", "refused")


def _serve(pipe: Any) -> None:
    """Run commands in this process until the pipe ends: each gives the kind of its outcome and its last words."""
    from click.testing import CliRunner

    from fora_trt.cli import main

    while True:
        try:
            arguments, where = pipe.recv()
        except EOFError:
            return
        os.chdir(where)
        result = CliRunner().invoke(main, arguments)
        said = result.stderr[result.stderr.rfind("Error: ") :].rstrip("\n")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            kind, said = "traceback", repr(result.exception)
        elif result.exit_code and ("Error: " not in result.stderr or "\n" in said or len(said) > 5000):
            kind = "lines"
        else:
            kind = "refused" if result.exit_code else "ran"
        pipe.send((kind, said if result.exit_code else ""))


class Workers:
    """One process that runs commands, and is started again when it ends or hangs.

    Its first command is `warm_up`, in the folder `where`.
    """

    def __init__(self, warm_up: Iterable[str | Path], where: Path) -> None:
        self._warm_up, self._where = [*warm_up], where
        self._context = get_context("spawn")
        self._process: Any = None

    def run(self, arguments: Iterable[str | Path], where: Path, patience: float = PATIENCE) -> tuple[str, str]:
        """The kind of the outcome of a command in the folder `where`, and its message."""
        if self._process is None:
            self._pipe, theirs = self._context.Pipe()
            self._process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
            self._process.start()
            theirs.close()
            self.run(self._warm_up, self._where, 180)  # imports take longer than a command
        try:
            self._pipe.send(([str(one) for one in arguments], str(where)))
            if self._pipe.poll(patience):
                found: tuple[str, str] = self._pipe.recv()
                return found
            kind = "hang"
        except (EOFError, OSError):  # the process has ended
            kind = "crash"
        self.end()
        return kind, ""

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None


def counted(outcomes: Iterable[Outcome]) -> str:
    """The numbers of outcomes by kind, for a report."""
    return ", ".join(f"{count} {kind}" for kind, count in Counter(one.kind for one in outcomes).most_common())
