"""What the graph of a bundle may contain, so that a backend can load it: a list of operators, files and sizes.

It is checked at export, and whenever a bundle is opened. The graph is read as protobuf, as the backends read it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from fora_trt.contract import BATCH, DTYPES, WINDOW, TensorSpec
from fora_trt.untrusted import UNSAFE, shown

OPERATORS = frozenset(
    """
    Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh Attention AveragePool BatchNormalization BitShift
    BitwiseAnd BitwiseNot BitwiseOr BitwiseXor BlackmanWindow Cast CastLike Ceil Celu Clip Col2Im Compress Concat
    Constant ConstantOfShape Conv ConvInteger ConvTranspose Cos Cosh CumSum DFT DepthToSpace DequantizeLinear Det
    Div Dropout Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor GRU Gather GatherElements GatherND Gelu Gemm
    Greater GreaterOrEqual GridSample GroupNormalization HammingWindow HannWindow HardSigmoid HardSwish Identity
    InstanceNormalization IsInf IsNaN LSTM LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax MatMul Max
    MaxPool Min Mish Mod Mul Neg NonZero Not Or PRelu Pad Pow QLinearConv QuantizeLinear RMSNormalization Range
    Reciprocal ReduceL1 ReduceL2 ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare
    Relu Reshape Resize RotaryEmbedding Round STFT ScatterElements ScatterND Selu Shape Sigmoid Sign Sin Sinh Size
    Slice Softmax Softplus SpaceToDepth Split Sqrt Squeeze Sub Sum Swish Tan Tanh Tile TopK Transpose Trilu Unique
    Unsqueeze Where Xor
    """.split()  # noqa: SIM905 # a list of strings would be a line each
)
"""Operators of ONNX that an export writes: those that PyTorch's exporter maps functions of tensors to, and those of the
graph passes. Control flow, sequences, text, random numbers, detection and losses are not among them."""

DOMAINS = ("", "ai.onnx")
"""The standard domain of ONNX, under both of its names."""

MOST_BYTES = 2**28
"""Largest graph file in bytes; weights lie in other files."""

MOST_NODES = 100_000
"""Most nodes of a graph."""

MOST_ELEMENTS = 2**32
"""Most elements of one tensor, for a batch of 1."""

BITS = {
    name: bits
    for bits, names in {
        4: "UINT4 INT4 FLOAT4E2M1",
        8: "UINT8 INT8 BOOL FLOAT8E4M3FN FLOAT8E4M3FNUZ FLOAT8E5M2 FLOAT8E5M2FNUZ FLOAT8E8M0",
        16: "UINT16 INT16 FLOAT16 BFLOAT16",
        32: "FLOAT INT32 UINT32",
        64: "DOUBLE INT64 UINT64 COMPLEX64",
    }.items()
    for name in names.split()
}
"""Bits of an element, by ONNX's name of its dtype. Text has no such size, and no graph of a bundle contains any."""


def check_graph(
    path: Path, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], sizes: Mapping[str, int]
) -> None:
    """Check a graph before a backend loads it; `inputs` and `outputs` are those of the manifest.

    `sizes` has the size in bytes of each file that may hold weights. Raises `ValueError` with the problem as the end of
    a sentence that begins with the path.
    """
    if (size := path.stat().st_size) > MOST_BYTES:
        raise ValueError(f"has {size} bytes; the limit of a graph is {MOST_BYTES}")
    try:
        model = onnx.ModelProto.FromString(path.read_bytes())
    except Exception:  # protobuf's decoding error has no public class
        raise ValueError("is not an ONNX file") from None
    for part in _parts(model):
        _check_part(part, sizes)
    if model.functions or model.training_info or not model.HasField("graph"):
        raise ValueError("has functions or training steps, which no export writes, or no graph")
    if len(model.graph.node) > MOST_NODES:
        raise ValueError(f"has {len(model.graph.node)} nodes; the limit is {MOST_NODES}")
    try:
        onnx.checker.check_model(path)
        ir.serde.deserialize_model(model)  # as the backends do
    except Exception as error:  # of several classes, some of the standard library
        raise ValueError(f"is not a valid ONNX graph ({_reason(error)})") from None
    for edges, promised in ((model.graph.input, inputs), (model.graph.output, outputs)):
        found, wanted = [_in_onnx(edge) for edge in edges], [spec.in_onnx for spec in promised]
        if found != wanted:
            wrong = sorted({str(name) for name, *_ in {*found} ^ {*wanted}})
            raise ValueError(
                f"and the manifest disagree on {shown(', '.join(wrong) or 'the order of inputs or outputs')}"
            )
    _check_sizes(model)


def _parts(message: Any) -> Iterator[Any]:
    """All messages in a protobuf message, however deep, and the message itself."""
    todo = [message]
    while todo:
        one = todo.pop()
        for field, value in one.ListFields():
            values = value if hasattr(value, "append") else [value]
            if field.type == field.TYPE_MESSAGE:
                todo += values
            elif field.type == field.TYPE_STRING and not all(isinstance(text, str) for text in values):
                raise ValueError(f"holds a text in the field {field.name} that is not UTF-8")
        yield one


def _check_part(part: Any, sizes: Mapping[str, int]) -> None:
    if isinstance(part, onnx.NodeProto):
        if part.domain not in DOMAINS or part.op_type not in OPERATORS:
            domain = f"{part.domain}::" if part.domain not in DOMAINS else ""
            raise ValueError(f"contains the operator {shown(domain + part.op_type)}, which no export writes")
    elif isinstance(part, onnx.AttributeProto):
        if part.ref_attr_name or part.HasField("g") or part.graphs or part.HasField("sparse_tensor"):
            raise ValueError(f"contains a graph or a sparse tensor in the attribute '{shown(part.name)}' of a node")
    elif isinstance(part, onnx.SparseTensorProto):
        raise ValueError("contains a sparse tensor, which no export writes")
    elif isinstance(part, onnx.TensorProto):
        _check_tensor(part, sizes)


def _check_tensor(tensor: onnx.TensorProto, sizes: Mapping[str, int]) -> None:
    """Check that the numbers of a tensor are there: in the graph, or in a listed file, in the right number."""
    what = f"the tensor '{shown(tensor.name)}'"
    dtype = _dtype(tensor.data_type)
    elements = math.prod(tensor.dims)
    if dtype not in BITS or tensor.string_data or min(tensor.dims, default=0) < 0 or elements > MOST_ELEMENTS:
        raise ValueError(
            f"holds {what} of {dtype}, {shown(list(tensor.dims))}; numbers are needed, and at most {MOST_ELEMENTS}"
        )
    expected = (elements * BITS[dtype] + 7) // 8
    if tensor.data_location != onnx.TensorProto.EXTERNAL and not tensor.external_data:
        if tensor.HasField("raw_data") and len(tensor.raw_data) != expected:
            raise ValueError(f"holds {what} in {len(tensor.raw_data)} bytes; its shape needs {expected}")
        return
    entries = {entry.key: entry.value for entry in tensor.external_data}
    if (file := entries.get("location", "")) not in sizes:
        raise ValueError(
            f"loads weights from '{shown(file)}', which the manifest does not list; do not use this bundle"
        )
    offset, length = (_count(entries.get(key, usual)) for key, usual in (("offset", "0"), ("length", str(expected))))
    known = entries.keys() <= {"location", "offset", "length"} and len(entries) == len(tensor.external_data)
    if not known or offset is None or length != expected or offset + expected > sizes[file]:
        raise ValueError(
            f"loads {what} from '{shown(file)}', {expected} bytes that are not in this file or not described rightly"
        )


def _count(digits: str) -> int | None:
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 20 else None


def _dtype(number: int) -> str:
    """ONNX's name of a dtype."""
    known = onnx.TensorProto.DataType
    return str(known.Name(number)) if number in known.values() else f"type {number}"


def _in_onnx(edge: onnx.ValueInfoProto) -> tuple[str, str, tuple[int | str, ...]]:
    """Name, dtype and shape of a graph input or output, as `TensorSpec.in_onnx`."""
    kind = edge.type.tensor_type
    if not edge.type.HasField("tensor_type") or not kind.HasField("shape"):
        raise ValueError(
            f"has the input or output '{shown(edge.name)}' without a shape; a tensor with a shape is needed"
        )
    return (
        edge.name,
        dtype_of(_dtype(kind.elem_type)),
        tuple(size.dim_value if size.HasField("dim_value") else size.dim_param for size in kind.shape.dim),
    )


def dtype_of(name: str) -> str:
    """The dtype as torch spells it, for ONNX's name of a dtype."""
    return {in_onnx: in_torch for in_torch, in_onnx in DTYPES.items()}.get(name, name.lower())


def _check_sizes(model: onnx.ModelProto) -> None:
    """Check the sizes of all tensors that follow from the graph, for a batch of 1, before any of them is computed."""
    del model.graph.value_info[:]
    try:
        known = onnx.shape_inference.infer_shapes(model, data_prop=True).graph.value_info
    except Exception as error:
        raise ValueError(f"has shapes that do not fit together ({_reason(error)})") from None
    for value in known:
        elements = math.prod(size.dim_value or 1 for size in value.type.tensor_type.shape.dim)
        if not 0 <= elements <= MOST_ELEMENTS:
            raise ValueError(
                f"computes the tensor '{shown(value.name)}' of {elements} elements; the limit is {MOST_ELEMENTS}"
            )


def _reason(error: Exception) -> str:
    return shown(str(error).strip().partition("\n")[0])


def edge_problem(spec: TensorSpec) -> str | None:
    """Why a tensor of a manifest cannot be an input or output, as the end of a sentence; None if it can."""
    symbols = [size for size in spec.shape if isinstance(size, str)]
    fixed = [size for size in spec.shape if isinstance(size, int)]
    if not spec.name or len(spec.name) > 1000 or UNSAFE.search(spec.name):
        return "has no name, or one that is no text"
    if spec.dtype not in DTYPES:
        return f"has the dtype '{shown(spec.dtype)}'; the dtypes are {', '.join(sorted(DTYPES))}"
    if [*spec.shape] != [*symbols, *fixed] or symbols not in ([BATCH], [WINDOW, BATCH]) or len(fixed) > 8:
        return f"has the shape {shown(list(spec.shape))}; {BATCH!r} and then at most 8 numbers are needed"
    if min(fixed, default=1) < 1 or math.prod(fixed) > MOST_ELEMENTS:
        return f"has the shape {shown(list(spec.shape))}; the limit is {MOST_ELEMENTS} elements per sample"
    return None
