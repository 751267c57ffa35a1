"""Graph passes: compute the patch embedding as a matrix product, and unpatchify without an Einsum.

A patch embedding is traced as a convolution whose stride equals its kernel size, followed by a transpose of its output
to tokens; in half precision, its input and output are cast. An equal result comes from laying out the patches as rows
and multiplying them by a matrix. Then the latents are transposed instead of the much larger tokens.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from fora_trt.export.nodes import before_cast, constant, int64_constant, new_value


class PatchRowsPass(InPlacePass):
    """Replaces Conv, Reshape (B, C, h * w), Transpose (B, h * w, C) by a MatMul of patches and a weight matrix.

    The MatMul has the dtype of the convolution. If the input is cast, patches are laid out before the cast; if the
    output is cast, tokens are cast after the MatMul. Conditions: square patches that tile the image (stride equal to
    the kernel size, which divides the image size; no padding, dilation or groups), and no other reader of the values
    between these nodes.
    """

    def call(self, model: ir.Model) -> PassResult:
        changed = [_as_product(model.graph, node) for node in tuple(model.graph) if node.op_type == "Conv"]
        return PassResult(model, modified=any(changed))


class PlainTransposesPass(InPlacePass):
    """Replaces each Einsum that only permutes dimensions, as in unpatchify, by a Transpose."""

    def call(self, model: ir.Model) -> PassResult:
        changed = [_as_transpose(model.graph, node) for node in tuple(model.graph) if node.op_type == "Einsum"]
        return PassResult(model, modified=any(changed))


def _as_product(graph: ir.Graph, conv: ir.Node) -> bool:
    image, weight, bias = (*conv.inputs, None)[:3]
    tokens = _tokens_of(conv)
    if image is None or image.shape is None or weight is None or weight.const_value is None or tokens is None:
        return False
    narrow = before_cast(image)
    source = narrow if narrow is not None and narrow.shape == image.shape else image
    batch, _, *sides = image.shape
    width, _, *kernel = weight.const_value.shape.numpy()
    plain = (
        len(kernel) == 2
        and kernel[0] == kernel[1]
        and list(conv.attributes.get_ints("strides", [1, 1])) == kernel
        and not any(conv.attributes.get_ints("pads", [0]))
        and set(conv.attributes.get_ints("dilations", [1])) == {1}
        and conv.attributes.get_int("group", 1) == 1
        and conv.attributes.get_string("auto_pad", "NOTSET") in ("NOTSET", "VALID")
    )
    if not plain or not all(isinstance(side, int) and side % kernel[0] == 0 for side in sides):
        return False
    side, length = kernel[0], weight.const_value.size // width
    rows, columns = (size // side for size in sides if isinstance(size, int))
    laid_out = weight.const_value.numpy().transpose(2, 3, 1, 0).reshape(length, width)  # in SpaceToDepth's order
    matrix = constant(graph, f"{weight.name}.rows", laid_out)
    lengths = int64_constant(graph, f"{weight.name}.patches", [0, rows * columns, length])

    nodes: list[ir.Node] = []
    value = source
    if side > 1:
        value = new_value(
            nodes, "SpaceToDepth", [source], ir.Shape([batch, length, rows, columns]), ir.AttrInt64("blocksize", side)
        )
    value = new_value(
        nodes, "Transpose", [value], ir.Shape([batch, rows, columns, length]), ir.AttrInt64s("perm", (0, 2, 3, 1))
    )
    value = new_value(nodes, "Reshape", [value, lengths], ir.Shape([batch, rows * columns, length]))
    value = _cast(nodes, value, image.dtype)
    value = new_value(nodes, "MatMul", [value, matrix], ir.Shape([batch, rows * columns, width]))
    if bias is not None and not _joined(graph, tokens, bias):
        value = new_value(nodes, "Add", [value, bias], ir.Shape([batch, rows * columns, width]))
    value = _cast(nodes, value, tokens.dtype)
    graph.insert_before(conv, nodes)
    ir.convenience.replace_all_uses_with(tokens, value)
    return True


def _cast(nodes: list[ir.Node], value: ir.Value, dtype: ir.DataType | None) -> ir.Value:
    """Cast a value to `dtype`; the value itself if it already has this dtype."""
    if dtype is None or value.dtype == dtype:
        return value
    cast = new_value(nodes, "Cast", [value], value.shape, ir.AttrInt64("to", dtype))
    cast.type = ir.TensorType(dtype)
    return cast


def _joined(graph: ir.Graph, tokens: ir.Value, bias: ir.Value) -> bool:
    """Add the bias to the constant positions that are added to the tokens next; False if there are none."""
    readers = tokens.consumers()
    if len(readers) != 1 or readers[0].op_type != "Add" or bias.const_value is None:
        return False
    index = 1 if readers[0].inputs[0] is tokens else 0
    positions = readers[0].inputs[index]
    if positions is None or positions.const_value is None:
        return False
    both = positions.const_value.numpy() + bias.const_value.numpy()
    readers[0].replace_input_with(index, constant(graph, f"{positions.name}.biased", both))
    return True


def _tokens_of(conv: ir.Node) -> ir.Value | None:
    """The tokens (B, h * w, C) that are the only use of a convolution's output, with or without a Cast; else None."""
    value = conv.outputs[0]
    readers = value.consumers()
    if len(readers) == 1 and readers[0].op_type == "Cast" and not value.is_graph_output():
        value = readers[0].outputs[0]
    for kind, rank in (("Reshape", 3), ("Transpose", 3)):
        readers = value.consumers()
        if len(readers) != 1 or readers[0].op_type != kind or value.is_graph_output():
            return None
        before, value = value, readers[0].outputs[0]
        if value.shape is None or before.shape is None or len(value.shape) != rank:
            return None
        if kind == "Reshape" and list(value.shape)[:2] != list(before.shape)[:2]:
            return None
    producer = value.producer()
    assert producer is not None
    moved = list(producer.attributes.get_ints("perm", ())) == [0, 2, 1]
    return value if moved and not value.is_graph_output() else None


def _as_transpose(graph: ir.Graph, einsum: ir.Node) -> bool:
    before, _, after = einsum.attributes.get_string("equation", "").replace(" ", "").partition("->")
    letters_alone = before.isalpha() and len({*before}) == len(before)
    image = einsum.inputs[0]
    if image is None or len(einsum.inputs) != 1 or not letters_alone or sorted(before) != sorted(after):
        return False
    order = ir.AttrInt64s("perm", [before.index(letter) for letter in after])
    nodes, moved = list[ir.Node](), einsum.outputs[0]
    value = new_value(nodes, "Transpose", [image], moved.shape, order)
    value.name, moved.name = moved.name, f"{moved.name}.einsum"  # keep the name: it may be a graph output
    graph.insert_before(einsum, nodes)
    ir.convenience.replace_all_uses_with(moved, value, replace_graph_outputs=True)
    return True
