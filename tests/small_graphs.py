"""Graphs written by hand, as text, for tests of what is done to graphs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import onnx.parser
import onnx_ir as ir
import onnxruntime
from onnx_ir.passes.common import ShapeInferencePass

from fora_trt.contract import Role
from fora_trt.export.nodes import with_role


def model_of(text: str, roles: Mapping[str, Role] | None = None) -> ir.Model:
    """The graph `name (inputs) => (outputs) <constants> { nodes }` of opset 20, shapes inferred, edges with roles."""
    model = ir.from_proto(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]>\n{text}'))
    assert isinstance(model, ir.Model)
    ShapeInferencePass()(model)
    for value in (*model.graph.inputs, *model.graph.outputs):
        if roles is not None:
            with_role(value, roles[str(value.name)])
    return model


def run(model: ir.Model, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Outputs by name; what of `given` the graph does not take is left out."""
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_outputs()]
    outputs = session.run(names, {one.name: given[one.name] for one in session.get_inputs()})
    return dict(zip(names, outputs, strict=True))


def kinds(model: ir.Model) -> list[str]:
    """Operators in the order of the nodes."""
    return [node.op_type for node in model.graph]


def names(values: Iterable[ir.Value]) -> list[str]:
    """Of inputs or outputs."""
    return [str(value.name) for value in values]


def values_of(model: ir.Model) -> dict[str, ir.Value]:
    """All values of a graph by name."""
    graph = model.graph
    inputs, constants = [*graph.inputs], [*graph.initializers.values()]
    return {str(one.name): one for one in (*inputs, *constants, *(out for node in graph for out in node.outputs))}
