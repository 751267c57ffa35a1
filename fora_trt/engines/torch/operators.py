"""ONNX operators in PyTorch: a table of PyTorch functions, and small functions for operators without an equivalent.

A function takes the inputs of a node as tensors and its attributes by name, and implements the specification of the
operator (https://onnx.ai/onnx/operators, opset 20 to 24). Inputs such as sizes, axes and bounds must be known before
the node runs, so that no step waits for the device; an operator lists them in `numbers` and takes them as Python
numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional

from fora_trt.contract import DTYPES

Numbers = Sequence[int]


@dataclass(frozen=True)
class Operator:
    """An operator; `compute` is its function.

    `numbers` are the positions of inputs that must be known, and are passed as Python numbers. Inputs in `scalars` are
    passed as a Python number if they are a known scalar, otherwise as a tensor. With `of_sizes`, the operator reads
    only the shapes of its inputs.
    """

    compute: Callable[..., Any]
    numbers: tuple[int, ...] = ()
    scalars: tuple[int, ...] = ()
    of_sizes: bool = False

    def takes_plain(self, position: int, rank: int) -> bool:
        """Whether a known input of this rank is passed as a Python number or list."""
        return position in self.numbers or (position in self.scalars and rank == 0)


_NAMED: dict[str, Callable[..., Any]] = {
    "Abs": torch.abs,
    "Add": torch.add,
    "And": torch.logical_and,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Equal": torch.eq,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "IsNaN": torch.isnan,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Log": torch.log,
    "MatMul": torch.matmul,
    "Mul": torch.mul,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Or": torch.logical_or,
    "Reciprocal": torch.reciprocal,
    "Relu": torch.relu,
    "Round": torch.round,
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Softplus": functional.softplus,
    "Sqrt": torch.sqrt,
    "Sub": torch.sub,
    "Tanh": torch.tanh,
    "Where": torch.where,
    "Xor": torch.logical_xor,
}
OPERATORS = {name: Operator(compute) for name, compute in _NAMED.items()}


def operator(
    name: str, *, numbers: tuple[int, ...] = (), scalars: tuple[int, ...] = (), of_sizes: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function in `OPERATORS` under the operator's name."""

    def enter(compute: Callable[..., Any]) -> Callable[..., Any]:
        OPERATORS[name] = Operator(compute, numbers, scalars, of_sizes)
        return compute

    return enter


def torch_dtype(onnx_type: int) -> torch.dtype:
    """The PyTorch dtype for the number of an ONNX data type. Raises `ValueError` if PyTorch has none."""
    name = ir.DataType(onnx_type).name
    named = {in_onnx: in_torch for in_torch, in_onnx in DTYPES.items()}
    dtype = getattr(torch, named.get(name, name.lower()), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"PyTorch has no dtype {name.lower()}")
    return dtype


# Elementwise


@operator("Identity")
def identity(x: Tensor) -> Tensor:
    """Returns the tensor."""
    return x


@operator("Cast")
def cast(x: Tensor, *, to: torch.dtype, saturate: int = 1, round_mode: str = "up") -> Tensor:
    """Casts; `saturate` and `round_mode` are ignored, because they concern 8-bit floats, which no bundle contains."""
    return x.to(to)


@operator("CastLike")
def cast_like(x: Tensor, like: Tensor, *, saturate: int = 1, round_mode: str = "up") -> Tensor:
    """Casts to the dtype of another tensor."""
    return x.to(like.dtype)


@operator("Div")
def div(x: Tensor, y: Tensor) -> Tensor:
    """Integer division truncates toward zero."""
    return torch.div(x, y) if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")


@operator("Mod")
def mod(x: Tensor, y: Tensor, *, fmod: int = 0) -> Tensor:
    """The result has the sign of the divisor; with `fmod`, that of the dividend."""
    return torch.fmod(x, y) if fmod else torch.remainder(x, y)


@operator("Pow", scalars=(1,))
def power(x: Tensor, exponent: Tensor | float) -> Tensor:
    """The result has the dtype of the base."""
    return torch.pow(x, exponent).to(x.dtype)


@operator("Max")
def maximum(*tensors: Tensor) -> Tensor:
    """The elementwise maximum of any number of tensors."""
    return reduce(torch.maximum, tensors)


@operator("Min")
def minimum(*tensors: Tensor) -> Tensor:
    """The elementwise minimum of any number of tensors."""
    return reduce(torch.minimum, tensors)


@operator("Sum")
def total(*tensors: Tensor) -> Tensor:
    """The elementwise sum of any number of tensors."""
    return reduce(torch.add, tensors)


@operator("Clip", scalars=(1, 2))
def clip(x: Tensor, low: Tensor | float | None = None, high: Tensor | float | None = None) -> Tensor:
    """Bounds are scalars, and either may be missing. If the lower bound exceeds the upper, the upper applies."""
    return x if low is None and high is None else torch.clamp(x, low, high)  # type: ignore[arg-type] # the stubs declare only tensors


@operator("Gelu")
def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """GELU, exact or with the tanh approximation."""
    return functional.gelu(x, approximate=approximate)


@operator("Elu")
def elu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """ELU: `alpha * (exp(x) - 1)` for negative values."""
    return functional.elu(x, alpha)


@operator("LeakyRelu")
def leaky_relu(x: Tensor, *, alpha: float = 0.01) -> Tensor:
    """Leaky ReLU: `alpha * x` for negative values."""
    return functional.leaky_relu(x, alpha)


@operator("HardSigmoid")
def hard_sigmoid(x: Tensor, *, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    """Hard sigmoid: `alpha * x + beta`, clipped to 0 and 1."""
    return torch.clamp(alpha * x + beta, 0, 1)


@operator("HardSwish")
def hard_swish(x: Tensor) -> Tensor:
    """`x` times its hard sigmoid."""
    return functional.hardswish(x)


@operator("Mish")
def mish(x: Tensor) -> Tensor:
    """`x * tanh(softplus(x))`."""
    return functional.mish(x)


@operator("Swish")
def swish(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """`x * sigmoid(alpha * x)`."""
    return x * torch.sigmoid(alpha * x)


@operator("Softmax")
def softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """Along one axis."""
    return torch.softmax(x, axis)


@operator("LogSoftmax")
def log_softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """Along one axis."""
    return torch.log_softmax(x, axis)


# Sizes and layout


@operator("Shape", of_sizes=True)
def shape(x: Tensor, *, start: int = 0, end: int | None = None) -> Tensor:
    """The sizes of the dimensions from `start` to `end`, which is excluded."""
    return torch.tensor(list(x.shape)[slice(start, end)], dtype=torch.int64)


@operator("Size", of_sizes=True)
def size(x: Tensor) -> Tensor:
    """The number of elements."""
    return torch.tensor(x.numel())


@operator("Reshape", numbers=(1,))
def reshape(x: Tensor, sizes: Numbers, *, allowzero: int = 0) -> Tensor:
    """A size of 0 keeps the size of this dimension, unless `allowzero`; -1 is inferred."""
    return x.reshape([x.shape[k] if one == 0 and not allowzero else one for k, one in enumerate(sizes)])


@operator("Transpose")
def transpose(x: Tensor, *, perm: Numbers | None = None) -> Tensor:
    """Permutes the dimensions; without `perm`, reverses them."""
    return x.permute(*(perm if perm is not None else reversed(range(x.dim()))))


@operator("Unsqueeze", numbers=(1,))
def unsqueeze(x: Tensor, axes: Numbers) -> Tensor:
    """Inserts dimensions of size 1; `axes` are positions in the result."""
    rank = x.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


@operator("Squeeze", numbers=(1,))
def squeeze(x: Tensor, axes: Numbers | None = None) -> Tensor:
    """Removes the dimensions `axes` of size 1; without `axes`, all dimensions of size 1."""
    return x.squeeze() if axes is None else x.squeeze(tuple(axes))


@operator("Flatten")
def flatten(x: Tensor, *, axis: int = 1) -> Tensor:
    """Flattens to two dimensions: those before the axis, and the rest."""
    before = axis + x.dim() if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:before]), math.prod(x.shape[before:]))


@operator("Expand", numbers=(1,))
def expand(x: Tensor, sizes: Numbers) -> Tensor:
    """Broadcasts the tensor with the shape `sizes`."""
    return x.expand(torch.broadcast_shapes(x.shape, tuple(sizes)))  # type: ignore[no-untyped-call] # untyped in torch


@operator("Tile", numbers=(1,))
def tile(x: Tensor, repeats: Numbers) -> Tensor:
    """Repeats the tensor along each dimension."""
    return x.repeat(*repeats)


@operator("Concat")
def concat(*tensors: Tensor, axis: int) -> Tensor:
    """Concatenates tensors along an axis."""
    return torch.cat(tensors, axis)


@operator("Split", numbers=(1,))
def split(
    x: Tensor, sizes: Numbers | None = None, *, axis: int = 0, num_outputs: int | None = None
) -> Sequence[Tensor]:
    """Splits into parts of the given sizes, or into equal parts; the last equal part may be smaller."""
    if sizes is None:
        assert num_outputs is not None
        return torch.split(x, -(-x.shape[axis] // num_outputs), axis)
    return torch.split(x, list(sizes), axis)


@operator("Slice", numbers=(1, 2, 3, 4))
def cut(x: Tensor, starts: Numbers, ends: Numbers, axes: Numbers | None = None, steps: Numbers | None = None) -> Tensor:
    """Slices from `starts` to `ends` along `axes`, by default the first axes; a negative step goes backwards."""
    for start, end, axis, step in zip(
        starts, ends, axes or range(len(starts)), steps or [1] * len(starts), strict=True
    ):
        length = x.shape[axis]
        if step > 0:
            chosen = slice(*slice(start, end, step).indices(length))
            x = x[(slice(None),) * (axis % x.dim()) + (chosen,)]
        else:  # end -1 means the last element; an end below -length includes the first element, as None in Python
            indices = range(*slice(start, None if end < -length else end, step).indices(length))
            x = x.flip(axis)[(slice(None),) * (axis % x.dim()) + (_mirrored(indices, length),)]
    return x


def _mirrored(indices: range, length: int) -> slice:
    """The slice of the flipped dimension that selects decreasing `indices` of the original one."""
    first, last = length - 1 - indices.start, length - 1 - indices[-1] if indices else -1
    return slice(first, last + 1, -indices.step) if indices else slice(0, 0)


@operator("Gather", scalars=(1,))
def gather(x: Tensor, index: Tensor | int, *, axis: int = 0) -> Tensor:
    """Selects entries along an axis by index; negative indices count from the end."""
    if not isinstance(index, Tensor):
        return x.select(axis, int(index))
    axis %= x.dim()
    found = x.index_select(axis, torch.where(index < 0, index + x.shape[axis], index).flatten())
    return found.reshape(*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])


@operator("GatherElements")
def gather_elements(x: Tensor, index: Tensor, *, axis: int = 0) -> Tensor:
    """Selects one element along the axis for each element of `index`."""
    return torch.gather(x, axis, torch.where(index < 0, index + x.shape[axis], index))


SCATTER_REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}
"""How ONNX and PyTorch name what becomes of several updates of one element."""


@operator("ScatterElements")
def scatter_elements(x: Tensor, index: Tensor, updates: Tensor, *, axis: int = 0, reduction: str = "none") -> Tensor:
    """Replaces one element along the axis for each element of `index`, or combines it with the update."""
    index = torch.where(index < 0, index + x.shape[axis], index)
    if reduction == "none":
        return x.scatter(axis, index, updates)
    return x.scatter_reduce(axis, index, updates, SCATTER_REDUCTIONS[reduction])


@operator("ScatterND")
def scatter_nd(x: Tensor, index: Tensor, updates: Tensor, *, reduction: str = "none") -> Tensor:
    """Replaces the slices of x at the positions in `index` (..., k), where k is the number of leading dimensions."""
    leading = index.shape[-1]
    sizes = torch.tensor(x.shape[:leading], device=index.device)
    steps = torch.tensor([math.prod(x.shape[one + 1 : leading]) for one in range(leading)], device=index.device)
    rows = (torch.where(index < 0, index + sizes, index) * steps).sum(-1).flatten()
    table = x.reshape(-1, *x.shape[leading:])
    values = updates.reshape(len(rows), *x.shape[leading:])
    if reduction == "none":
        return table.index_copy(0, rows, values).reshape(x.shape)
    wide = rows.reshape(-1, *[1] * (values.dim() - 1)).expand_as(values)
    return table.scatter_reduce(0, wide, values, SCATTER_REDUCTIONS[reduction]).reshape(x.shape)


@operator("Pad", numbers=(1, 3), scalars=(2,))
def pad(
    x: Tensor,
    pads: Numbers,
    value: Tensor | float | None = None,
    axes: Numbers | None = None,
    *,
    mode: str = "constant",
) -> Tensor:
    """Pads the start and the end of each axis."""
    if mode == "wrap":
        mode = "circular"
    around = [(0, 0)] * x.dim()
    for k, axis in enumerate(axes if axes is not None else range(x.dim())):
        around[axis] = pads[k], pads[k + len(pads) // 2]
    if mode == "constant":
        return functional.pad(x, [one for pair in reversed(around) for one in pair], value=float(value or 0))
    modes = {"edge": "replicate", "reflect": "reflect", "circular": "circular"}
    padded = [axis for axis, pair in enumerate(around) if pair != (0, 0)]
    first = min(padded, default=x.dim() - 1)
    flat = x.reshape(
        1, -1, *x.shape[first:]
    )  # in these modes PyTorch pads only the dimensions after batch and channels
    inner = [one for pair in reversed(around[first:]) for one in pair]
    result = functional.pad(flat, inner, mode=modes[mode])
    return result.reshape(*x.shape[:first], *result.shape[2:])


@operator("ConstantOfShape", numbers=(0,))
def constant_of_shape(sizes: Numbers, *, value: Tensor | None = None) -> Tensor:
    """A tensor filled with `value`, by default 0."""
    return torch.zeros(*sizes) if value is None else value.reshape(()).expand(*sizes).clone()


@operator("Range")
def arange(start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    """Evenly spaced numbers from `start` to `limit`, which is excluded."""
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


@operator("Trilu", scalars=(1,))
def trilu(x: Tensor, diagonal: int = 0, *, upper: int = 1) -> Tensor:
    """The upper or the lower triangle of matrices."""
    return torch.triu(x, diagonal) if upper else torch.tril(x, diagonal)


@operator("DepthToSpace")
def depth_to_space(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    """(B, C * b * b, H, W) -> (B, C, H * b, W * b)."""
    b, c, h, w = x.shape
    n = blocksize
    if mode == "CRD":
        return functional.pixel_shuffle(x, n)
    return x.reshape(b, n, n, c // n**2, h, w).permute(0, 3, 4, 1, 5, 2).reshape(b, c // n**2, h * n, w * n)


@operator("SpaceToDepth")
def space_to_depth(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    """(B, C, H * b, W * b) -> (B, b * b * C, H, W)."""
    b, c, h, w = x.shape
    n = blocksize
    if mode == "CRD":
        return functional.pixel_unshuffle(x, n)
    return x.reshape(b, c, h // n, n, w // n, n).permute(0, 3, 5, 1, 2, 4).reshape(b, c * n**2, h // n, w // n)


@operator("Einsum")
def einsum(*tensors: Tensor, equation: str) -> Tensor:
    """Einstein summation."""
    return torch.einsum(equation, *tensors)


@operator("CumSum", numbers=(1,))
def cumulative_sum(x: Tensor, axis: int, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    """Cumulative sums, from the end with `reverse`, without the element itself with `exclusive`."""
    along = x.flip(axis) if reverse else x
    sums = along.cumsum(axis, dtype=x.dtype)
    sums = sums - along if exclusive else sums
    return sums.flip(axis) if reverse else sums


# Reductions


def _reduction(compute: Callable[[Tensor, list[int], bool], Tensor]) -> Callable[..., Tensor]:
    def reduced(x: Tensor, axes: Numbers | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
        if not axes and noop_with_empty_axes:
            return x
        return compute(x, list(axes or range(x.dim())), bool(keepdims))

    return reduced


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted((axis % x.dim() for axis in axes), reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x


REDUCTIONS: dict[str, Callable[[Tensor, list[int], bool], Tensor]] = {
    "ReduceSum": lambda x, axes, keep: x.sum(axes, keepdim=keep, dtype=x.dtype),
    "ReduceMean": lambda x, axes, keep: x.mean(axes, keepdim=keep),
    "ReduceMax": lambda x, axes, keep: x.amax(axes, keepdim=keep),
    "ReduceMin": lambda x, axes, keep: x.amin(axes, keepdim=keep),
    "ReduceProd": _product,
    "ReduceL2": lambda x, axes, keep: x.square().sum(axes, keepdim=keep).sqrt(),
    "ReduceSumSquare": lambda x, axes, keep: x.square().sum(axes, keepdim=keep),
}
OPERATORS |= {name: Operator(_reduction(compute), numbers=(1,)) for name, compute in REDUCTIONS.items()}


# Products, normalization, attention


@operator("Gemm")
def gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,  # noqa: N803 # the name in ONNX
    transB: int = 0,  # noqa: N803
) -> Tensor:
    """`alpha * a @ b + beta * c`."""
    a, b = a.t() if transA else a, b.t() if transB else b
    if c is None:
        return a @ b if alpha == 1 else alpha * (a @ b)
    return torch.addmm(c, a, b, beta=beta, alpha=alpha)


@operator("Conv")
def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Numbers | None = None,
    group: int = 1,
    kernel_shape: Numbers | None = None,
    pads: Numbers | None = None,
    strides: Numbers | None = None,
) -> Tensor:
    """Convolution in one to three dimensions; padding may differ at the two ends of an axis."""
    if auto_pad not in ("NOTSET", "VALID"):
        raise ValueError(f"auto_pad {auto_pad} is not supported; export with explicit padding")
    rank = x.dim() - 2
    around = list(pads or [0] * 2 * rank)
    if any(around):
        x = functional.pad(x, [one for k in reversed(range(rank)) for one in (around[k], around[k + rank])])
    convolution = (functional.conv1d, functional.conv2d, functional.conv3d)[rank - 1]
    found: Tensor = convolution(
        x, weight, bias, stride=list(strides or [1] * rank), dilation=list(dilations or [1] * rank), groups=group
    )
    return found


@operator("LayerNormalization")
def layer_normalization(
    x: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
) -> Tensor:
    """Normalizes over the axis and all later ones; mean and variance are computed in fp32."""
    return functional.layer_norm(x, x.shape[axis:], scale, bias, epsilon)


@operator("RMSNormalization")
def rms_normalization(
    x: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    """Normalizes over the axis and all later ones; computed in the dtype `stash_type`, by default fp32."""
    axes = list(range(axis % x.dim(), x.dim()))
    wide = x.to(torch_dtype(stash_type))
    return (wide * torch.rsqrt(wide.square().mean(axes, keepdim=True) + epsilon)).to(x.dtype) * scale


@operator("GroupNormalization")
def group_normalization(
    x: Tensor, scale: Tensor, bias: Tensor, *, num_groups: int, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    """Normalizes over groups of channels; scale and bias are per channel."""
    return functional.group_norm(x, num_groups, scale, bias, epsilon)


@operator("InstanceNormalization")
def instance_normalization(x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float = 1e-5) -> Tensor:
    """Normalizes each channel of each sample."""
    return functional.instance_norm(x, weight=scale, bias=bias, eps=epsilon)


@operator("Attention")
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    is_causal: int = 0,
    kv_num_heads: int | None = None,
    q_num_heads: int | None = None,
    qk_matmul_output_mode: int = 0,
    scale: float | None = None,
    softcap: float = 0.0,
    softmax_precision: int | None = None,
) -> Tensor:
    """Attention on (B, H, N, D), or on (B, N, H * D) with given numbers of heads; masks are boolean or additive."""
    if softcap:
        raise ValueError(f"softcap {softcap} is not supported; only 0 is")
    joined = q.dim() == 3
    if joined:
        assert q_num_heads is not None and kv_num_heads is not None
        q, k, v = (
            one.reshape(*one.shape[:2], heads, -1).transpose(1, 2)
            for one, heads in ((q, q_num_heads), (k, kv_num_heads), (v, kv_num_heads))
        )
    if is_causal and mask is not None:
        causal = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        mask = mask & causal if mask.dtype == torch.bool else mask.masked_fill(~causal, -math.inf)
    result = functional.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=bool(is_causal) and mask is None,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return result.transpose(1, 2).flatten(2) if joined else result


@operator("WeightedSum")
def weighted_sum(*tensors: Tensor, first: int, begins: int) -> Tensor:
    """The folded sum of `engines.onnxruntime.weighted_sum`: sum over k of gate_k * feature_k.

    Gates are (W, B, 1, C) or (B, 1, C), features (B, N, C), the result (W, B, N, C) or (B, N, C). If `begins` is 1, an
    initial value of the sum precedes the gates. If `first` is not -1, the gates are one tensor (W, B, G, C) or
    (B, G, C), and that of the first feature is its row `first`. The sums of all W steps are independent, so a compiler
    can fuse them into one pass over the features.
    """
    begun, terms = tensors[:begins], tensors[begins:]
    if first < 0:
        gates, features = terms[: len(terms) // 2], terms[len(terms) // 2 :]
    else:
        features = terms[1:]
        gates = tuple(terms[0][..., first + k : first + k + 1, :] for k in range(len(features)))
    if gates[0].dim() == features[0].dim():
        return _sum_of_step(begun, gates, features)
    if not len(gates[0]):
        return gates[0].new_empty(0, *features[0].shape)
    sums = []
    for step in range(len(gates[0])):
        of_step = [one[step] if one.dim() == gates[0].dim() else one for one in (*begun, *gates)]
        sums.append(_sum_of_step(of_step[: len(begun)], of_step[len(begun) :], features))
    return torch.stack(sums)


def _sum_of_step(begun: Sequence[Tensor], gates: Sequence[Tensor], features: Sequence[Tensor]) -> Tensor:
    result = begun[0] if begun else torch.zeros_like(gates[0])
    for gate, feature in zip(gates, features, strict=True):
        result = torch.addcmul(result, gate, feature)
    return result
