"""Graph passes: patches go in and out of a graph as rows, and large tensors are not transposed on the way.

A patch embedding is traced as a convolution whose steps are as long as its kernel, and the tokens that it makes as the
transpose of its output; in half precision its input and its output are cast. The same products are those of a matrix
and the patches, laid out as rows first: what is transposed are the latents, a small fraction of the tokens.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from fora_trt.export.nodes import before_cast, constant, int64_constant, new_value


class PatchRowsPass(InPlacePass):
    """Replaces Conv, Reshape (B, C, h * w), Transpose (B, h * w, C) by a product of patches with a matrix.

    The product has the dtype of the convolution. Where its input is cast, patches are laid out before the cast; where
    its output is cast, tokens are cast behind the product. Only where patches are square and neither overlap nor leave
    anything out: strides as long as the kernel, which divides the image, no padding, dilation or groups; and where no
    value between these nodes has another reader.
    """

    def call(self, model: ir.Model) -> PassResult:
        changed = [_as_product(model.graph, node) for node in tuple(model.graph) if node.op_type == "Conv"]
        return PassResult(model, modified=any(changed))


class PlainTransposesPass(InPlacePass):
    """Replaces an Einsum that only changes the order of dimensions, as in an unpatchify, by a Transpose."""

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
    """A value in another dtype; the value itself where it has that."""
    if dtype is None or value.dtype == dtype:
        return value
    cast = new_value(nodes, "Cast", [value], value.shape, ir.AttrInt64("to", dtype))
    cast.type = ir.TensorType(dtype)
    return cast


def _joined(graph: ir.Graph, tokens: ir.Value, bias: ir.Value) -> bool:
    """Add a bias to the constant that is added to all tokens next, their positions; False where there is none."""
    readers = tokens.consumers()
    if len(readers) != 1 or readers[0].op_type != "Add" or bias.const_value is None:
        return False
    place = 1 if readers[0].inputs[0] is tokens else 0
    positions = readers[0].inputs[place]
    if positions is None or positions.const_value is None:
        return False
    both = positions.const_value.numpy() + bias.const_value.numpy()
    readers[0].replace_input_with(place, constant(graph, f"{positions.name}.biased", both))
    return True


def _tokens_of(conv: ir.Node) -> ir.Value | None:
    """(B, h * w, C), if the output of a convolution is read as that and as nothing else, cast or not."""
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
    value.name, moved.name = moved.name, f"{moved.name}.einsum"  # it may be the graph's output
    graph.insert_before(einsum, nodes)
    ir.convenience.replace_all_uses_with(moved, value, replace_graph_outputs=True)
    return True
