"""Finished ONNX graphs with the specs of their inputs and outputs; `save_graph` writes them to files."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.passes import Sequential
from onnx_ir.passes.common import NameFixPass, RemoveUnusedNodesPass

from fora_trt.bundle import tensor_spec
from fora_trt.contract import DTYPES, Optimization, TensorSpec
from fora_trt.errors import ExportError
from fora_trt.export.nodes import role_of
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
    Sequential(SliceProjectionsPass(), RemoveUnusedNodesPass(), NameFixPass())(model)
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


def save_graph(graph: Graph, path: Path) -> list[Path]:
    """Write a graph to `path` and its large weights to `path`.data next to it; return the files written."""
    data = path.with_name(path.name + ".data")
    ir.save(graph.onnx, path, external_data=data.name, size_threshold_bytes=INLINE_BYTES)
    if data.exists() and not data.stat().st_size:  # all constants are stored in the .onnx file
        data.unlink()
    onnx.checker.check_model(path)
    return [path, data] if data.exists() else [path]
