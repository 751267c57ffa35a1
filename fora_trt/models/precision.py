"""Mixed precision: cache sites compute in fp16 or bf16, the operations between them in fp32.

The attention of a parallel block, whose output only its site reads, computes like a site.

Between the sites are residual additions, normalization, modulation, gates, timestep embedding and positions. They
need little arithmetic, and they are where fp16 is known to overflow and bf16 to be too coarse. Layers outside the sites
that multiply by matrices (patch embedding, adaLN, last projection) also use half-precision weights and arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 # the usual name
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fora_trt.contract import PRECISIONS
from fora_trt.models.sites import matches

MULTIPLYING = (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding, nn.Bilinear)
"""Layers that use half-precision weights also outside cache sites, because their weights are large."""

ONE_DTYPE = {
    *(F.linear, F.conv1d, F.conv2d, F.conv3d, F.scaled_dot_product_attention, F.layer_norm, F.group_norm, F.rms_norm),
    *(F.multi_head_attention_forward, torch._native_multi_head_attention),
    *(torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, torch.einsum),
    *(Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, Tensor.mm, Tensor.bmm),
}
"""Functions that need tensors of one dtype. In a cache site, tables kept in fp32 may have promoted other tensors."""

CONVERSIONS = {Tensor.float, Tensor.to, Tensor.type}
"""Functions with which a cache site itself converts tensors to fp32."""

WIDENED = "_widened_by_site"
"""Attribute of fp32 tensors that a cache site converted from half precision, and of fp32 results from them."""


def half_modules(
    module: nn.Module, sites: Iterable[str], keep_fp32: Sequence[str]
) -> tuple[list[nn.Module], list[nn.Module]]:
    """The modules that compute in half precision: the cache sites, and the `MULTIPLYING` layers outside them.

    Layers outside the sites are excluded if they or a parent match a pattern of `keep_fp32`.
    """
    within = [module.get_submodule(path) for path in sites]
    inner = {id(part) for site in within for part in site.modules()}
    kept = {
        id(part)
        for path, owner in module.named_modules(remove_duplicate=False)
        if any(matches(path, pattern) for pattern in keep_fp32)
        for part in owner.modules()
    }
    layers: list[nn.Module] = [
        layer
        for layer in module.modules()
        if isinstance(layer, MULTIPLYING) and id(layer) not in inner and id(layer) not in kept
    ]
    return within, layers


def dtypes_of_parameters(
    module: nn.Module, precision: str, sites: Iterable[str], keep_fp32: Sequence[str]
) -> dict[str, torch.dtype]:
    """The dtype of each parameter by name, including all names of shared parameters. The module may be empty."""
    half = getattr(torch, PRECISIONS[precision])
    parts = chain(*half_modules(module, sites, keep_fp32))
    halved = {id(one) for part in parts for one in part.parameters()}
    named = module.named_parameters(remove_duplicate=False)
    return {name: half if id(parameter) in halved else torch.float32 for name, parameter in named}


class HalfPrecision:
    """Hooks that cast inputs of half-precision modules to half precision, and their outputs to fp32.

    The hooks belong to the module, so it computes the same when run eagerly, traced, or with replaced features.
    """

    def __init__(self, module: nn.Module, precision: str, sites: Iterable[str], keep_fp32: Sequence[str]) -> None:
        self._module = module
        self._half: torch.dtype = getattr(torch, PRECISIONS[precision])
        self.dtype = self._half
        within, layers = half_modules(module, sites, keep_fp32)
        for part in (*within, *layers):
            part.register_forward_pre_hook(self._narrow, with_kwargs=True)
            part.register_forward_hook(self._widen)
        for site in within:
            site.forward = self._of_one_dtype(site.forward)
        module.forward = _promoting(module.forward)

    def widen(self) -> None:
        """Convert weights and arithmetic to fp32 permanently."""
        self._module.float()
        self.dtype = torch.float32

    @contextmanager
    def off(self) -> Iterator[None]:
        """Let the module compute in fp32 within the block.

        The weights of a layer are widened only during its call, so that they are not in memory twice.
        """
        narrow: dict[nn.Parameter, Tensor] = {}

        def widen(layer: nn.Module, _: object) -> None:
            for parameter in layer.parameters(recurse=False):
                narrow[parameter] = parameter.data
                parameter.data = parameter.data.float()

        def restore(layer: nn.Module, *_: object) -> None:
            for parameter in layer.parameters(recurse=False):
                parameter.data = narrow.pop(parameter)

        layers = [layer for layer in self._module.modules() if any(True for _ in layer.parameters(recurse=False))]
        hooks = [layer.register_forward_pre_hook(widen) for layer in layers]
        hooks += [layer.register_forward_hook(restore) for layer in layers]
        self.dtype = torch.float32
        try:
            yield
        finally:
            self.dtype = self._half
            for hook in hooks:
                hook.remove()
            for parameter, data in narrow.items():  # of layers that raised
                parameter.data = data

    def _narrow(self, _: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        narrowed: tuple[Any, Any] = cast_all((args, kwargs), self.dtype)
        return narrowed

    def _widen(self, _: nn.Module, __: Any, output: Any) -> Any:
        return cast_all(output, torch.float32)

    def _of_one_dtype(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def within_site(*args: Any, **kwargs: Any) -> Any:
            with _OneDtype(self):
                return cast_all(forward(*args, **kwargs), self.dtype)

        return within_site


class _OneDtype(TorchFunctionMode):
    """Casts all tensors passed to functions of `ONE_DTYPE` to the precision of the site, like autocast.

    Where the site itself converts to fp32, the functions compute in fp32: the linear attention of Sana sums over all
    tokens and divides with a guard of 1e-15, which fp16 rounds to zero.
    """

    def __init__(self, precision: HalfPrecision) -> None:
        super().__init__()
        self._precision = precision

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = _floats((args, kwargs))
        converts = func in CONVERSIONS and bool(given) and given[0].dtype == self._precision.dtype
        widened = self._precision.dtype != torch.float32 and (converts or any(hasattr(one, WIDENED) for one in given))
        if func in ONE_DTYPE and not (widened and all(one.dtype == torch.float32 for one in given)):
            args, kwargs = cast_all((args, kwargs), self._precision.dtype)
        result = func(*args, **kwargs)
        for one in tree_leaves(result) if widened else ():
            if isinstance(one, Tensor) and one.dtype == torch.float32:
                setattr(one, WIDENED, True)
        return result


class _Promoted(TorchFunctionMode):
    """Casts tensors passed to functions of `ONE_DTYPE` to fp32 if they have several dtypes.

    A module outside the sites may read the weights of its layers without calling these (the pooling of HunyuanDiT), so
    that no hook casts what it multiplies them by.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in ONE_DTYPE and len({one.dtype for one in _floats((args, kwargs))}) > 1:
            args, kwargs = cast_all((args, kwargs), torch.float32)
        return func(*args, **kwargs)


def _promoting(forward: Callable[..., Any]) -> Callable[..., Any]:
    def promoted(*args: Any, **kwargs: Any) -> Any:
        with _Promoted():
            return forward(*args, **kwargs)

    return promoted


def _floats(tensors: Any) -> list[Tensor]:
    return [one for one in tree_leaves(tensors) if isinstance(one, Tensor) and one.is_floating_point()]


def cast_all(tensors: Any, dtype: torch.dtype) -> Any:
    """Cast every floating-point tensor of a pytree to `dtype`; other leaves do not change."""
    return tree_map_only(Tensor, lambda one: one.to(dtype) if one.is_floating_point() else one, tensors)
