"""How a diffusers pipeline calls its transformer: which arguments are inputs of the graphs, and which are constants.

`models/watch.py` derives a `CallSpec` from recorded calls. The exporter builds the arguments of the module from it; the
drop-in takes the arguments of a call apart with it. Shapes: B is the batch of one call.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

from fora_trt.contract import LATENTS, TIMESTEP, Part
from fora_trt.errors import InputError, ShapeError
from fora_trt.memo import Memo

if TYPE_CHECKING:  # `inspect` reads manifests without torch
    from torch import Tensor

RETURN_DICT = "return_dict"
"""The argument that decides between a tuple and an output object; not a part of the call that is compared."""

Scalar = bool | int | float | str | None

Kind = Literal["input", "constant", "value", "each", "list", "tuple", "dict"]

MOST_SAMPLES = 64
"""Largest batch of a call for one prompt in a manifest."""

SCALARS = (bool, int, float, str, type(None))

ROUNDING = {"torch.float16": 2e-3, "torch.bfloat16": 2e-2}
"""Relative difference that rounding to a dtype causes in a constant; 1e-4 for others."""


@dataclass(frozen=True)
class Argument:
    """A node in the tree of a call's arguments.

    - `input`: the tensor (B, ...) that the graph input `name` takes.
    - `constant`: the tensor `name` of the bundle, the same in every call; with `for_each`, its row for every sample.
    - `value`: a number, a text, a truth value or None, the same in every call.
    - `each`: a list with one equal part for each sample.
    - `list`, `tuple`, `dict`: a container of `parts`; `keys` are those of a dictionary.
    """

    kind: Kind
    name: str = ""
    value: Scalar = None
    for_each: bool = False
    keys: tuple[str, ...] = ()
    parts: tuple[Argument, ...] = ()

    def leaves(self) -> Iterator[Argument]:
        """The inputs, constants and values in the tree."""
        if self.kind in ("input", "constant", "value"):
            yield self
        for part in self.parts:
            yield from part.leaves()


@dataclass(frozen=True)
class TimeMap:
    """Model time = `scale` * scheduler time + `shift`: 1/1000 and 0 for FLUX, -1/1000 and 1 for Lumina 2."""

    scale: float = 1.0
    shift: float = 0.0

    def of_model(self, scheduler: Tensor) -> Tensor:
        """The time that the module is called with, for the time of the scheduler."""
        scaled = scheduler if self.scale == 1 else scheduler * self.scale
        return scaled if self.shift == 0 else scaled + self.shift

    def of_scheduler(self, model: Tensor) -> Tensor:
        """The inverse, in fp64."""
        return (model.double() - self.shift) / self.scale


@dataclass(frozen=True)
class CallSpec:
    """The call of one transformer of a pipeline.

    - `component`: its name in the pipeline, such as `transformer`.
    - `parameters`: the names of its arguments in the order of its signature.
    - `arguments`: the tree of each argument; `latents` and `timestep` are inputs with these names.
    - `defaults`: values of arguments that a call may leave out.
    - `time`: from the time of the scheduler to that of the module.
    - `slots`: the calls of one step, as `cache_context` names them, else `0`, `1`, ...
    - `attributes`: numbers, texts and truth values that are attributes of the module; some pipelines read them.
    - `bare`: whether a call without `return_dict` returns the tensor itself, not a tuple.
    - `padded`: texts (B, tokens, width) that a call may give with fewer tokens, and their number in the graphs. The
      input `mask_of` such a text is 1 for a token and 0 for padding; a call may leave it out.
    """

    component: str
    parameters: tuple[str, ...]
    arguments: dict[str, Argument]
    defaults: dict[str, Scalar] = field(default_factory=dict)
    time: TimeMap = TimeMap()
    slots: tuple[str, ...] = ("0",)
    attributes: dict[str, Scalar] = field(default_factory=dict)
    bare: bool = False
    padded: dict[str, int] = field(default_factory=dict)

    def arguments_of(self, inputs: Mapping[str, Tensor], constants: Mapping[str, Tensor]) -> dict[str, Any]:
        """The arguments of the module by name, for graph inputs (B, ...), whose timestep is that of the scheduler."""
        given = {**inputs, TIMESTEP: self.time.of_model(inputs[TIMESTEP])}
        return {name: _built(one, given, constants) for name, one in self.arguments.items()}

    def bound(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call by name, without `return_dict`. Raises `InputError` for too many or repeated ones."""
        if len(args) > len(self.parameters):
            raise InputError(f"the transformer was called with {len(args)} arguments; it takes {len(self.parameters)}")
        named = dict(zip(self.parameters, args, strict=False))
        if twice := named.keys() & kwargs.keys():
            raise InputError(f"the argument {min(twice)!r} of the transformer was given twice")
        return {name: value for name, value in {**named, **kwargs}.items() if name != RETURN_DICT}

    def returns_dict(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether a call asks for an output object, not for a tuple."""
        return bool({**dict(zip(self.parameters, args, strict=False)), **kwargs}.get(RETURN_DICT, True))

    def constants(self) -> set[str]:
        """The names of all constants."""
        return {leaf.name for one in self.arguments.values() for leaf in one.leaves() if leaf.kind == "constant"}


class CallReader:
    """Takes calls of a transformer apart: finds the inputs of the graphs, and compares everything else.

    A pipeline gives the same tensors at every step; each is compared and padded once.
    """

    def __init__(self, spec: CallSpec, constants: Mapping[str, Tensor]) -> None:
        self.spec, self._constants = spec, constants
        self._equal = {name: Memo(partial(_is_close, one)) for name, one in constants.items()}
        self._texts = {name: Memo(partial(padded_text, length)) for name, length in spec.padded.items()}
        self._masks = {name: Memo(partial(padded_mask, length)) for name, length in spec.padded.items()}

    def inputs(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The graph inputs by name in a call of the module; the timestep is that of the module, in any form.

        Raises `ShapeError` for an argument that differs from the recorded one, or that was not recorded.
        """
        spec, given = self.spec, self.spec.bound(args, kwargs)
        values = {name: given.pop(name, spec.defaults.get(name)) for name in spec.arguments}
        if other := next((name for name, value in given.items() if value is not None), None):
            raise ShapeError(f"the argument {other!r} was not given when the bundle was exported")
        for name in spec.padded:
            self._pad(name, values)
        found: dict[str, Any] = {}
        latents = next(name for name, one in spec.arguments.items() if one.name == LATENTS)
        self._take(spec.arguments[latents], values.pop(latents), latents, found)
        for name, value in values.items():
            self._take(spec.arguments[name], value, name, found)
        return found

    def _pad(self, name: str, values: dict[str, Any]) -> None:
        """Pad a text and its mask to the exported number of tokens."""
        text, mask, length = values[name], values[mask_of(name)], self.spec.padded[name]
        if not _is_tensor(text) or text.dim() != 3:
            return  # the check of inputs says so
        if text.shape[1] > length:
            raise ShapeError(
                f"the argument {name!r} has {text.shape[1]} tokens; the bundle was exported for at most {length}"
            )
        if mask is not None and (not _is_tensor(mask) or mask.shape != text.shape[:2]):
            raise ShapeError(
                f"the argument {mask_of(name)!r} is {_shown(mask)}; the text {name!r} has the shape {[*text.shape]}"
            )
        values[name], of_all = self._texts[name](text)
        values[mask_of(name)] = of_all if mask is None else self._masks[name](mask)

    def _take(self, argument: Argument, value: Any, path: str, found: dict[str, Any]) -> None:
        """Add the inputs in the value of an argument to `found`. Raises `ShapeError` if anything else differs."""
        if argument.kind == "input":
            if value is None:
                raise ShapeError(f"the argument {path!r} is missing; it was given when the bundle was exported")
            found[argument.name] = value
        elif argument.kind == "constant":
            self._check_constant(argument.name, value, path, len(found[LATENTS]) if argument.for_each else None)
        elif argument.kind == "value":
            absent = argument.value is None and isinstance(value, Mapping | list | tuple) and not value
            if not absent and not _same_scalar(argument.value, value):
                raise ShapeError(
                    f"the argument {path!r} is {_shown(value)}; the bundle was exported with {argument.value!r}"
                )
        else:
            batch = len(found[LATENTS]) if argument.kind == "each" else 0
            for part, one, inner in _parts(argument, value, path, batch):
                self._take(part, one, inner, found)

    def _check_constant(self, name: str, value: Any, path: str, batch: int | None) -> None:
        """Raise `ShapeError` unless the value is the recorded tensor, or in half precision close to it."""
        expected = self._constants[name]
        shape = [*expected.shape] if batch is None else [batch, *expected.shape[1:]]
        if not _is_tensor(value) or [*value.shape] != shape:
            raise ShapeError(
                f"the argument {path!r} is {_shown(value)}; the bundle was exported with the shape {shape}"
            )
        if not self._equal[name](value):
            raise ShapeError(f"the argument {path!r} has other values than those that the bundle was exported with")


def mask_of(text: str) -> str:
    """The name of the argument that masks the padding of a text."""
    return f"{text}_mask"


def padded_text(length: int, text: Tensor) -> tuple[Tensor, Tensor]:
    """A text (B, tokens, width) with zeros up to `length` tokens, and the mask of its tokens (B, length)."""
    import torch
    from torch.nn.functional import pad

    missing = length - text.shape[1]
    every = torch.ones(text.shape[:2], dtype=torch.int64, device=text.device)
    return pad(text, (0, 0, 0, missing)) if missing else text, pad(every, (0, missing))


def padded_mask(length: int, mask: Tensor) -> Tensor:
    """A mask (B, tokens) with zeros up to `length` tokens."""
    from torch.nn.functional import pad

    return pad(mask.long(), (0, length - mask.shape[1]))


@dataclass(frozen=True)
class PipelineSpec:
    """The pipeline that a bundle was exported from: its class, where its other parts are, and how it was called.

    `where` is None for a pipeline that was only in memory. `arguments` are those of the call that the sizes in the
    graphs follow from, such as height and width. `components` are all transformers of the pipeline, in its order; the
    bundle of another one than the first has its name at the end. `samples` is the batch of a call for one prompt.
    """

    name: str
    where: Part | None
    arguments: dict[str, Scalar]
    components: tuple[str, ...]
    samples: int
    call: CallSpec

    def bundles(self, first: str) -> dict[str, str]:
        """The names of the bundles of all transformers by component; `first` is that of the first one."""
        return {one: first if one == self.components[0] else f"{first}-{one}" for one in self.components}

    def siblings(self, own: str) -> dict[str, str]:
        """The names of the bundles of all transformers by component; `own` is that of this one.

        A bundle of another transformer than the first without the name of its component at the end is alone.
        """
        component = self.call.component
        suffix = "" if component == self.components[0] else f"-{component}"
        if not own.endswith(suffix):
            return {component: own}
        return self.bundles(own.removesuffix(suffix)) | {component: own}


def problems_of(spec: PipelineSpec) -> Iterator[str]:
    """What is wrong with a pipeline in a manifest, as sentences without names from it."""
    call = spec.call
    names = [spec.name, call.component, *spec.components, *spec.arguments, *call.parameters, *call.arguments]
    names += [*call.defaults, *call.attributes]
    if not all(name.isidentifier() for name in names):
        yield "the pipeline has a part or an argument whose name is none"
    if call.component not in spec.components or not 1 <= spec.samples <= MOST_SAMPLES:
        yield f"the pipeline does not have its own transformer, or has {spec.samples} samples for one prompt"
    if not math.isfinite(call.time.scale) or not math.isfinite(call.time.shift) or call.time.scale == 0:
        yield "the times of the pipeline's scheduler are not mapped to those of the transformer"
    leaves = [leaf for one in call.arguments.values() for leaf in one.leaves()]
    inputs = [leaf.name for leaf in leaves if leaf.kind == "input"]
    if not {LATENTS, TIMESTEP} <= {*inputs} or len({*inputs}) < len(inputs):
        yield "the pipeline's call lacks latents or a timestep, or has an input twice"
    if not {name for name, one in call.arguments.items() if one.name == LATENTS and one.kind == "input"}:
        yield "the latents of the pipeline's call are not an argument of their own"


def _built(argument: Argument, inputs: Mapping[str, Tensor], constants: Mapping[str, Tensor]) -> Any:
    """The value of an argument for graph inputs and constants."""
    latents = inputs[LATENTS]
    if argument.kind == "input":
        return inputs[argument.name]
    if argument.kind == "constant":
        value = constants[argument.name].to(latents.device)
        return value.expand(latents.shape[0], *value.shape[1:]) if argument.for_each else value
    if argument.kind == "value":
        return argument.value
    parts = [_built(part, inputs, constants) for part in argument.parts]
    if argument.kind == "each":
        # a symbolic batch is traced with the smallest number of equal parts
        return parts * (latents.shape[0] if isinstance(latents.shape[0], int) else 1)
    if argument.kind == "dict":
        return dict(zip(argument.keys, parts, strict=True))
    return tuple(parts) if argument.kind == "tuple" else parts


def _parts(argument: Argument, value: Any, path: str, batch: int) -> Iterator[tuple[Argument, Any, str]]:
    """The parts of a container with their values and paths. Raises `ShapeError` if the container has other parts."""
    if argument.kind == "dict":
        value = {} if value is None else value
        keys = {key for key, one in value.items() if one is not None} if isinstance(value, Mapping) else None
        if keys is None:
            raise ShapeError(
                f"the argument {path!r} is {_shown(value)}; a dictionary of {list(argument.keys)} is needed"
            )
        if other := keys - {*argument.keys}:
            raise ShapeError(
                f"the argument {path!r} has {min(map(str, other))!r}, which was not given when the bundle was exported"
            )
        for key, part in zip(argument.keys, argument.parts, strict=True):
            yield part, value.get(key), f"{path}.{key}"
        return
    count = batch if argument.kind == "each" else len(argument.parts)
    if argument.kind == "each" and isinstance(value, list | tuple) and value and batch % len(value) == 0:
        count = len(value)  # one for each prompt, which has several samples
    if not isinstance(value, list | tuple) or len(value) != count:
        raise ShapeError(f"the argument {path!r} is {_shown(value)}; a list of {count} is needed")
    for number, one in enumerate(value):
        yield argument.parts[0 if argument.kind == "each" else number], one, f"{path}.{number}"


def _is_tensor(value: Any) -> TypeGuard[Tensor]:
    from torch import Tensor

    return isinstance(value, Tensor)


def _is_close(expected: Tensor, value: Tensor) -> bool:
    import torch

    there = expected.to(value.device)
    if not value.is_floating_point() or not there.is_floating_point():
        return bool((value == there).all())
    tolerance = ROUNDING.get(str(value.dtype), 1e-4)
    return bool(torch.isclose(value.float(), there.float(), rtol=tolerance, atol=1e-5).all())


def _same_scalar(expected: Scalar, value: Any) -> bool:
    if isinstance(expected, float) and isinstance(value, float | int):
        return math.isclose(expected, value, rel_tol=1e-6)
    return bool(isinstance(value, SCALARS) and value == expected)


def _shown(value: Any) -> str:
    """A value in a message: the shape of a tensor, the type of an object, a scalar itself."""
    if _is_tensor(value):
        return f"a tensor of the shape {list(value.shape)}"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    return repr(value) if isinstance(value, SCALARS) else f"an object of type {type(value).__name__}"
