"""One trace, from which the graphs at every level are made as often as they are wanted."""

from pathlib import Path

import onnx_ir as ir
import pytest
import torch

from fora_trt.contract import OPTIMIZATIONS
from fora_trt.export.graphs import Graphs
from fora_trt.export.traced import TracedModel, traced_from_model
from fora_trt.models.sources import model_from_source


@pytest.fixture(scope="module")
def traced(pipeline_folder: Path) -> TracedModel:
    return traced_from_model(model_from_source(str(pipeline_folder)), 23, report=lambda stage: None)


def in_bytes(graphs: Graphs) -> dict[str, bytes]:
    return {
        name: ir.to_proto(graph.onnx).SerializeToString(deterministic=True) for name, graph in graphs.graphs.items()
    }


def tensors_of(model: ir.Model) -> dict[int, ir.TensorProtocol]:
    tensors = [value.const_value for value in model.graph.initializers.values()]
    return {id(tensor): tensor for tensor in tensors if tensor is not None}


def test_graphs_are_the_same_in_any_order_and_leave_the_trace_as_it_was(traced: TracedModel) -> None:
    before = [ir.to_proto(one).SerializeToString(deterministic=True) for one in (traced.full, traced.reuse)]
    made = {level: in_bytes(traced.graphs(level)) for level in OPTIMIZATIONS}
    assert len({*map(str, made.values())}) == len(OPTIMIZATIONS)
    for level in reversed(OPTIMIZATIONS):
        assert in_bytes(traced.graphs(level)) == made[level]
    assert [ir.to_proto(one).SerializeToString(deterministic=True) for one in (traced.full, traced.reuse)] == before


def test_graphs_share_their_weights_with_the_trace_and_the_trace_with_the_module(traced: TracedModel) -> None:
    there = tensors_of(traced.full) | tensors_of(traced.reuse)
    assert tensors_of(traced.graphs("none").graphs["full"].onnx).keys() <= there.keys()
    shared = [tensor for tensor in there.values() if isinstance(tensor.raw, torch.Tensor)]
    parameters = {one.data_ptr() for one in traced.model.module.parameters()}
    assert {tensor.raw.data_ptr() for tensor in shared} <= parameters
    for level in ("conditioning", "fold"):
        graphs = traced.graphs(level).graphs.values()
        own = {key: one for graph in graphs for key, one in tensors_of(graph.onnx).items() if key not in there}
        split = sum(one.nbytes for one in own.values())
        whole = sum(one.nbytes for one in there.values())
        assert split < whole / 3, "of weights, only the parts of projections that are split between graphs are copied"
