"""Every operator of the table on the cases that ONNX itself states for it, with results computed by numpy."""

from __future__ import annotations

import pickle
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy
import onnx
import pytest
import torch
from onnx import numpy_helper

from fora_trt.engines.torch.graph import TorchGraph
from fora_trt.engines.torch.operators import OPERATORS
from tests.shared import made_once

DTYPES = (numpy.float64, numpy.float32, numpy.float16, numpy.int64, numpy.int32, numpy.bool_)
OLDEST_OPSET = 12  # before it many sizes and axes were attributes

ELSEWHERE = {"LayerNormalization", "WeightedSum"}
"""Compared in `test_torch_graph`: the cases of the first have outputs for training, the other is not of ONNX."""

NOT_MEANT = (
    "test_conv_with_autopad_same",  # the exporter writes explicit padding
    "test_split_equal_parts",  # at opset 13: sizes were always told, or as many as there are outputs
    "test_mod_float_edge_cases",  # remainders of infinity
    "empty_set",  # the largest of no numbers
    "training",
    "softcap",  # refused by name, as are key lengths
    "nonpad",
    "padded_kv",
    "ext_cache",
    "_window",
)


def array_of(data: Any) -> Any:
    """What a case holds: an array, a number, or what onnx makes of a dtype that numpy lacks."""
    return numpy_helper.to_array(data) if isinstance(data, onnx.TensorProto) else numpy.array(data)


@pytest.fixture(scope="session")
def cases(run_folder: Path) -> dict[str, list[Any]]:
    """By operator: cases of one node whose tensors are of the dtypes that bundles have. onnx needs seconds for them."""
    made = made_once(run_folder / "onnx-cases", lambda file: file.write_bytes(pickle.dumps(collected_cases())))
    found: dict[str, list[Any]] = pickle.loads(made.read_bytes())
    return found


def collected_cases() -> dict[str, list[Any]]:
    from onnx.backend.test.case import node

    try:
        with numpy.errstate(all="ignore"):
            found = node.collect_testcases()
    except Exception as error:  # a case that needs a package which is not here
        pytest.skip(f"the cases of onnx cannot be made here: {error}")
    by_operator = defaultdict(list)
    for case in found:
        (first, *others), opset = case.model.graph.node, case.model.opset_import[0].version
        old = opset < OLDEST_OPSET and first.op_type not in ("And", "Not", "Or", "Xor")
        several = len(first.output) > 1 and first.op_type != "Split"
        if others or first.op_type not in OPERATORS or old or several or any(name in case.name for name in NOT_MEANT):
            continue
        inputs, outputs = ([array_of(one) for one in data] for data in case.data_sets[0])
        if all(one.dtype in DTYPES for one in (*inputs, *outputs)):
            case.data_sets[0] = inputs, outputs
            by_operator[first.op_type].append(case)
    return by_operator


def known_inputs(model: onnx.ModelProto) -> set[int]:
    """Which inputs of a case are numbers that a node must know, and so are constants in graphs that run here."""
    node, operator = model.graph.node[0], OPERATORS[model.graph.node[0].op_type]
    told = {*operator.numbers, *(operator.scalars if node.op_type != "Pow" else ())}
    told |= {0, 1, 2} if node.op_type == "Range" else set()
    names = [one.name for one in model.graph.input]
    return {names.index(node.input[k]) for k in told if k < len(node.input) and node.input[k]}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", sorted(OPERATORS.keys() - ELSEWHERE))
def test_an_operator_computes_what_onnx_states(name: str, cases: dict[str, list[Any]], tmp_path: Path) -> None:
    assert cases[name], "onnx states no case for it that could be tried"
    for k, case in enumerate(cases[name]):
        model, (arrays, expected) = onnx.ModelProto.FromString(case.model.SerializeToString()), case.data_sets[0]
        constants = known_inputs(model)
        for place in sorted(constants, reverse=True):
            edge = model.graph.input[place]
            model.graph.initializer.append(numpy_helper.from_array(arrays[place], edge.name))
            del model.graph.input[place]
        path = tmp_path / f"{k}.onnx"
        onnx.save(model, path)
        given = [torch.from_numpy(one.copy()) for place, one in enumerate(arrays) if place not in constants]
        shapes = {edge.name: tuple(one.shape) for edge, one in zip(model.graph.input, given, strict=True)}
        graph = TorchGraph(path, torch.device("cpu"))
        results = graph.module(shapes, [edge.name for edge in model.graph.output])(*given)
        for result, wanted in zip(results, expected, strict=True):
            close = 2e-3 if result.dtype == torch.float16 else 1e-5
            told = f"{case.name}: {{}}".format  # with what torch says
            stated = torch.from_numpy(wanted.copy())
            torch.testing.assert_close(result, stated, rtol=1e-3, atol=close, equal_nan=True, msg=told)


def test_enough_cases_are_tried(cases: dict[str, list[Any]]) -> None:
    """That none is left out in silence where onnx changes how it makes them."""
    assert sum(len(cases[name]) for name in OPERATORS.keys() & cases.keys()) > 300
