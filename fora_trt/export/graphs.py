"""Finished ONNX graphs with the specs of their inputs and outputs; a `Writer` writes them to files."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.passes import Sequential
from onnx_ir.passes.common import NameFixPass, RemoveUnusedNodesPass

from fora_trt.bundle import tensor_spec
from fora_trt.contract import DTYPES, Optimization, TensorSpec
from fora_trt.errors import ExportError
from fora_trt.export.fold import gather_sums
from fora_trt.export.hoist import replace_reads
from fora_trt.export.nodes import edge, role_of, with_role
from fora_trt.export.slice_projections import SliceProjectionsPass

INLINE_BYTES = 2**14  # smaller constants, such as shapes and lengths, must be stored in the .onnx file itself


@dataclass(frozen=True)
class Graph:
    """An ONNX graph and the specs of its inputs and outputs."""

    onnx: ir.Model
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class Graphs:
    """The graphs of a model by name, and the optimization level that was reached."""

    graphs: dict[str, Graph]
    optimization: Optimization


def graph_from_onnx(model: ir.Model) -> Graph:
    """Finish a graph: remove unread parts of projections and unused nodes, and make names unique.

    `model` is changed in place; its inputs and outputs must have roles.
    """
    SliceProjectionsPass()(model)
    return _finished(model)


def partial_from_full(full: Graph, name: str, features: Collection[str]) -> Graph:
    """The graph `name`: the finished full graph without what computes the features with these names, which it reads.

    Of the other outputs of the full graph it has all. It keeps whole projections where the full graph has them, because
    the graphs of a bundle share their weights.
    """
    model = full.onnx.clone()
    model.graph.name = name
    roles = {spec.name: spec.role for spec in (*full.inputs, *full.outputs)}
    for value in (*model.graph.inputs, *model.graph.outputs):
        with_role(value, roles[str(value.name)])
    read = [value for value in model.graph.outputs if value.name in features]
    model.graph.outputs[:] = [value for value in model.graph.outputs if value.name not in features]
    replace_reads(model, {value: edge(str(value.name), value, "feature") for value in read})
    gather_sums(model)
    return _finished(model)


def _finished(model: ir.Model) -> Graph:
    Sequential(RemoveUnusedNodesPass(), NameFixPass())(model)
    return Graph(model, _specs(model.graph.inputs), _specs(model.graph.outputs))


def _specs(edges: Iterable[ir.Value]) -> tuple[TensorSpec, ...]:
    specs = tuple(tensor_spec(value, role_of(value)) for value in edges)
    for one in specs:
        if one.dtype not in DTYPES:
            raise ExportError(
                f"{one.name!r} passes between graphs with the dtype {one.dtype}, which no backend runs; cast it in the "
                f"model to one of {', '.join(DTYPES)}, or give --cache other sites"
            )
    return specs


class Writer:
    """Writes graphs into a folder. A weight that several graphs share is stored once, by the first of them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stored: dict[int, tuple[ir.TensorProtocol, ir.ExternalTensor]] = {}  # by the identity of the tensor

    def save(self, graph: Graph, file: str) -> list[Path]:
        """Write a graph to `file`, and its large weights to `file`.data unless they are stored; return the new files.

        The weights of `graph` are then those in the files.
        """
        path, data = self._folder / file, self._folder / f"{file}.data"
        large = {
            value: value.const_value
            for value in graph.onnx.graph.initializers.values()
            if value.const_value is not None and value.const_value.nbytes > INLINE_BYTES
        }
        new = {id(tensor): tensor for tensor in large.values() if id(tensor) not in self._stored}
        if new:
            tensors = [*new.values()]
            stored = ir.external_data.convert_tensors_to_external(tensors, self._folder, data.name)
            self._stored.update(zip(new, zip(tensors, stored, strict=True), strict=True))
        for value, tensor in large.items():
            _, there = self._stored[id(tensor)]
            value.const_value = ir.ExternalTensor(
                there.location,
                there.offset,
                there.length,
                there.dtype,
                shape=there.shape,
                name=str(value.name),
                base_dir=self._folder,
            )
        ir.save(graph.onnx, path)
        onnx.checker.check_model(path)
        return [path, data] if new else [path]
