"""Watch a diffusers pipeline: call it briefly, record the calls of its transformers, and derive what they take.

The pipeline is called with one prompt and then with two, for a few steps. What grows with the prompts is an input of
the graphs; everything else is a constant. The transformers compute no values: only the shapes of their outputs are
found, and noise of this shape goes back to the pipeline.
"""

from __future__ import annotations

import copy
import inspect
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._pytree import tree_leaves, tree_map_only

from fora_trt.call import (
    RETURN_DICT,
    SCALARS,
    Argument,
    CallReader,
    CallSpec,
    Scalar,
    TimeMap,
    mask_of,
    padded_mask,
    padded_text,
)
from fora_trt.contract import LATENTS, TIMESTEP
from fora_trt.errors import ForaError, ModelError, first_line
from fora_trt.models.sharing import sharing_copy
from fora_trt.quiet import quiet

STEPS = (3, 12, 50)
"""Numbers of steps to try, until every transformer of the pipeline has been called in a step."""

PER_PROMPT = ("prompt", "embeds", "mask", "label", "image")
"""Words in the names of a pipeline's arguments that have one value for each prompt."""

TEXT_LENGTH = "max_sequence_length"
"""The argument of pipelines for the largest number of prompt tokens."""

PROMPT = "a photograph of a red fox in the snow"


@dataclass(frozen=True)
class Watched:
    """What was found about a transformer: its call, the constants, an example of each input, and the output's shape.

    Examples and output are those of a call with one prompt, (B, ...); all are in fp32 or integers, on the CPU.
    `scheduler` is the configuration of the scheduler, with the shift of its timesteps at this size.
    """

    call: CallSpec
    constants: dict[str, Tensor]
    examples: dict[str, Tensor]
    output: tuple[int, ...]
    scheduler: dict[str, Any]

    @property
    def samples(self) -> int:
        """The batch of a call for one prompt: 2 for guidance in one call."""
        return len(self.examples[LATENTS])


@dataclass(frozen=True)
class _Call:
    """A recorded call: its arguments by name, its slot, and the number and the scheduler's time of its step."""

    arguments: dict[str, Any]
    slot: str
    step: int
    time: float | None
    output: tuple[int, ...]


@dataclass
class _Recorder:
    """Records the calls of one transformer in place of its `forward`."""

    component: str
    module: nn.Module
    calls: list[_Call] = field(default_factory=list)
    context: str | None = None
    bare: bool = False
    scheduler: dict[str, Any] = field(default_factory=dict)
    outputs: dict[str, Any] = field(default_factory=dict)

    @property
    def sees_time(self) -> bool:
        """Whether the transformer was called at more than one time of the scheduler."""
        return len({one.time for one in self.calls}) > 1

    @property
    def signature(self) -> inspect.Signature:
        return inspect.signature(type(self.module).forward)

    def called(self, clock: _Clock, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        bound = self.signature.bind(self.module, *args, **kwargs)
        bound.apply_defaults()
        arguments = dict(list(bound.arguments.items())[1:])  # without the module
        arguments = tree_map_only(Tensor, lambda one: one.detach().cpu().clone(), arguments)
        output = self._output(args, kwargs)
        first = first_tensor(output)
        earlier = sum(one.step == clock.step for one in self.calls)
        slot = str(earlier) if self.context is None else self.context
        arguments.pop(RETURN_DICT, None)
        self.bare = self.bare or isinstance(output, Tensor)
        self.calls.append(_Call(arguments, slot, clock.step, clock.time, tuple(first.shape)))
        return output

    def _output(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Noise of the shape of the output; it is found once for all calls of the same form."""
        form = str(tree_map_only(Tensor, lambda one: (one.shape, one.dtype), (tuple(args), dict(kwargs))))
        if form not in self.outputs:  # a copy, because some modules keep what they have computed
            copied = sharing_copy(self.module)
            vars(copied).pop("forward", None)
            self.outputs[form] = imagined(copied, type(copied).forward, args, kwargs)
        return tree_map_only(Tensor, torch.clone, self.outputs[form])


@dataclass
class _Clock:
    """Counts the steps of the scheduler; `mu` is the shift of its timesteps that the pipeline gave for its size."""

    scheduler: Any
    step: int = 0
    mu: float | None = None

    @property
    def time(self) -> float | None:
        """The scheduler's time of this step; None if it has none."""
        times = torch.as_tensor(getattr(self.scheduler, "timesteps", ())).flatten()
        return float(times[self.step]) if self.step < len(times) else None


def imagined(module: nn.Module, forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What a function of a module returns, with noise in place of the values: only shapes are computed.

    Where shapes depend on values, the module itself computes them. Integers are ones.
    """

    def noise(one: Tensor) -> Tensor:
        if one.is_floating_point():
            return torch.randn(one.shape, generator=generator).to(one.dtype).to(one.device)
        return torch.ones(one.shape, dtype=one.dtype, device=one.device)

    generator = torch.Generator().manual_seed(0)
    mode = next((one.fake_mode for one in module.parameters() if isinstance(one, FakeTensor)), None)
    try:
        with torch.no_grad(), mode or FakeTensorMode(allow_non_fake_inputs=True) as fake:
            fakes = tree_map_only(Tensor, fake.from_tensor, (tuple(args), dict(kwargs)))
            output = forward(module, *fakes[0], **fakes[1])
    except ForaError:
        raise
    except Exception as error:
        if mode is None:
            with torch.no_grad():
                output = forward(module, *args, **kwargs)
        elif isinstance(error, DataDependentOutputException | DynamicOutputShapeException):
            raise ModelError(
                f"{type(module).__name__} reads values of its inputs while it runs ({error.func}), such as the lengths "
                "of prompts; neither a graph nor a part without weights can do that"
            ) from error
        else:
            raise
    return tree_map_only(Tensor, noise, output)


def first_tensor(output: Any) -> Tensor:
    """The prediction in what a transformer returned. Raises `ModelError` for a list of samples."""
    found = output[0] if isinstance(output, tuple | list) else getattr(output, "sample", output)
    if not isinstance(found, Tensor):
        raise ModelError(f"the transformer returns a {type(found).__name__} of samples; a tensor is needed")
    return found


def transformers_of(pipe: Any) -> dict[str, nn.Module]:
    """The transformers of a pipeline by the names of their components. Raises `ModelError` if there is none."""
    found = {
        name: one
        for name, one in pipe.components.items()
        if isinstance(one, nn.Module) and name.startswith("transformer")
    }
    if not found:
        raise ModelError(
            f"{type(pipe).__name__} has no transformer to cache; its parts are {', '.join(pipe.components)}"
        )
    return found


def watch(pipe: Any, given: Mapping[str, Any], prompt: str = PROMPT) -> dict[str, Watched]:
    """Call a pipeline briefly; return what was found about each of its transformers, by component.

    `given` are arguments of the pipeline for one prompt, such as `height` or `prompt_embeds`. The pipeline is as before
    afterwards. Raises `ModelError` if it cannot be called, or for a transformer whose calls no bundle can serve.
    """
    modules = transformers_of(pipe)
    arguments = _arguments(pipe, given, prompt)
    for steps in STEPS:
        runs = [_recorded(pipe, modules, arguments, prompts, steps) for prompts in (1, 2)]
        if all(one.sees_time for recorders in runs for one in recorders.values()):
            break
    else:
        idle = next((name for name, one in runs[0].items() if not one.calls), None)
        if idle is not None:
            raise ModelError(f"{type(pipe).__name__} did not call its {idle} in {STEPS[-1]} steps")
    most = arguments.get(TEXT_LENGTH) or usual_tokens(inspect.signature(type(pipe).__call__).parameters) or 0
    return {name: _derived(runs[0][name], runs[1][name], most) for name in modules}


def usual_tokens(known: Mapping[str, inspect.Parameter]) -> int | None:
    """The largest number of prompt tokens that a pipeline with these parameters takes unless told; None if unknown."""
    usual = known[TEXT_LENGTH].default if TEXT_LENGTH in known else None
    return usual if isinstance(usual, int) else None


def _arguments(pipe: Any, given: Mapping[str, Any], prompt: str) -> dict[str, Any]:
    """The arguments of the pipeline for one prompt."""
    known = inspect.signature(type(pipe).__call__).parameters
    if unknown := given.keys() - known.keys():
        raise ModelError(
            f"{type(pipe).__name__} has no argument {min(unknown)!r}; its arguments are "
            f"{', '.join(name for name in known if name != 'self')}"
        )
    usual: dict[str, Any] = {"output_type": "latent", "generator": None}
    if "negative_prompt_embeds" in given:
        usual["negative_prompt"] = None  # some pipelines have a text as the default and refuse both
    if "prompt" in known and not any(name == "prompt" or name.startswith("prompt_embeds") for name in given):
        usual["prompt"] = prompt
    if "class_labels" in known:
        usual["class_labels"] = [0]
    return {name: value for name, value in {**usual, **given}.items() if name in known}


def _for_prompts(arguments: Mapping[str, Any], prompts: int) -> dict[str, Any]:
    """The arguments for several prompts: texts, lists and tensors of one sample are repeated."""

    def repeated(name: str, value: Any) -> Any:
        if not any(word in name for word in PER_PROMPT):
            return value
        if isinstance(value, str):
            return value if prompts == 1 else [value] * prompts
        if isinstance(value, list):
            return value * prompts
        if isinstance(value, Tensor) and value.dim() and len(value) == 1:
            return torch.cat([value] * prompts)
        return value

    return {name: repeated(name, value) for name, value in arguments.items()}


def _recorded(
    pipe: Any, modules: Mapping[str, nn.Module], arguments: Mapping[str, Any], prompts: int, steps: int
) -> dict[str, _Recorder]:
    """Call the pipeline; return the recorder of each transformer."""
    recorders = {name: _Recorder(name, module) for name, module in modules.items()}
    generator = torch.Generator().manual_seed(0)
    given = {**_for_prompts(arguments, prompts), "num_inference_steps": steps}
    if "generator" in arguments:
        given["generator"] = generator
    try:
        with _watching(pipe, recorders), torch.no_grad(), quiet("diffusers"):
            pipe(**given)
    except ForaError:
        raise
    except Exception as error:  # a pipeline can raise anything
        raise ModelError(
            f"{type(pipe).__name__} cannot be called with {', '.join(sorted(given))} "
            f"({type(error).__name__}: {first_line(error)}); give further arguments of the pipeline with --call"
        ) from error
    return recorders


@contextmanager
def _watching(pipe: Any, recorders: Mapping[str, _Recorder]) -> Iterator[None]:
    """Replace `forward` and `cache_context` of the transformers, and the scheduler by a copy, within the block."""
    before, bar = pipe.scheduler, getattr(pipe, "_progress_bar_config", {})
    clock = _Clock(copy.deepcopy(before))
    advance, announce = clock.scheduler.step, clock.scheduler.set_timesteps

    @wraps(advance)
    def step(*args: Any, **kwargs: Any) -> Any:
        made = advance(*args, **kwargs)
        clock.step += 1
        return made

    def set_timesteps(*args: Any, **kwargs: Any) -> None:
        clock.mu = kwargs.get("mu", clock.mu)
        announce(*args, **kwargs)

    # `wraps` keeps the signature, which pipelines read
    clock.scheduler.step, clock.scheduler.set_timesteps = step, wraps(announce)(set_timesteps)
    pipe.scheduler = clock.scheduler
    pipe.set_progress_bar_config(disable=True)
    try:
        with ExitStack() as stack:
            for recorder in recorders.values():
                stack.enter_context(_replaced(recorder, clock))
            yield
        for recorder in recorders.values():
            recorder.scheduler = _static(clock)
    finally:
        pipe.scheduler, pipe._progress_bar_config = before, bar


def _static(clock: _Clock) -> dict[str, Any]:
    """The configuration of the scheduler, with a shift that does not depend on the size: that of the watched call."""
    config: dict[str, Any] = json.loads(clock.scheduler.to_json_string())
    if config.get("use_dynamic_shifting") and clock.mu is not None:
        shift = clock.mu if config.get("time_shift_type") == "linear" else math.exp(clock.mu)
        config |= {"use_dynamic_shifting": False, "shift": shift}
    return config


@contextmanager
def _replaced(recorder: _Recorder, clock: _Clock) -> Iterator[None]:
    @contextmanager
    def cache_context(name: str, **_: Any) -> Iterator[None]:
        recorder.context = name
        try:
            yield
        finally:
            recorder.context = None

    module: Any = recorder.module
    own = {name: vars(module).get(name) for name in ("forward", "cache_context")}
    module.forward = lambda *args, **kwargs: recorder.called(clock, args, kwargs)
    module.cache_context = cache_context
    try:
        yield
    finally:
        for name, value in own.items():
            if value is None:
                delattr(module, name)
            else:
                setattr(module, name, value)


def _with_padded_texts(calls: Sequence[_Call], most: int) -> dict[str, int]:
    """Pad the texts in calls whose padding a mask excludes; return the number of tokens of each, at least `most`.

    So bundles serve shorter prompts of pipelines that give as many tokens as the longest prompt has (Qwen-Image).
    """
    padded = {}
    for name in [*calls[0].arguments]:
        texts = [call.arguments[name] for call in calls]
        are_texts = all(isinstance(one, Tensor) and one.dim() == 3 for one in texts)
        if not are_texts or mask_of(name) not in calls[0].arguments:
            continue
        padded[name] = max(most, *(one.shape[1] for one in texts))
        for call, text in zip(calls, texts, strict=True):
            mask = call.arguments[mask_of(name)]
            call.arguments[name], every = padded_text(padded[name], text)
            call.arguments[mask_of(name)] = every if mask is None else padded_mask(padded[name], mask)
    return padded


def _derived(one: _Recorder, two: _Recorder, most: int) -> Watched:
    """What the calls with one prompt and with two say about the transformer, for texts of at most `most` tokens."""
    padded = _with_padded_texts([*one.calls, *two.calls], most)
    first, second = one.calls[0], two.calls[0]
    parameters = [name for name in one.signature.parameters if name not in ("self", RETURN_DICT)]
    parameters = [name for name in parameters if name in first.arguments]
    latents = next((name for name in parameters if isinstance(first.arguments[name], Tensor)), None)
    timestep = next((name for name in parameters if "timestep" in name or name == "t"), None)
    what = f"the {one.component} of the pipeline, a {type(one.module).__name__},"
    if latents is None or timestep is None or latents != parameters[0]:
        raise ModelError(
            f"{what} is called with {', '.join(parameters)}; a tensor of latents and a timestep are needed: "
            "lists with one tensor for each sample have no symbolic batch"
        )
    names = {latents: LATENTS, timestep: TIMESTEP}
    sizes = len(first.arguments[latents]), len(second.arguments[latents])
    if sizes[1] != 2 * sizes[0]:
        raise ModelError(f"{what} is called with {sizes[0]} samples for one prompt, {sizes[1]} for two")
    found = _Found(sizes, {}, {})
    arguments = {
        name: found.argument(names.get(name, name), first.arguments[name], second.arguments[name])
        for name in parameters
        if name != timestep
    }
    arguments[timestep] = Argument("input", TIMESTEP)
    found.examples[TIMESTEP] = torch.as_tensor(first.arguments[timestep]).float().flatten()[:1].expand(sizes[0])
    defaults: dict[str, Scalar] = {
        name: parameter.default
        for name, parameter in one.signature.parameters.items()
        if name in arguments and isinstance(parameter.default, SCALARS)
    }
    calls = [*one.calls, *two.calls]
    slots = tuple(dict.fromkeys(call.slot for call in calls))
    order = tuple(name for name in one.signature.parameters if name != "self")
    attributes: dict[str, Scalar] = {
        name: value
        for name, value in vars(one.module).items()
        if isinstance(value, SCALARS) and value is not None and not name.startswith("_") and name != "training"
    }
    spec = CallSpec(
        one.component, order, arguments, defaults, _time_map(calls, timestep, what), slots, attributes, one.bare, padded
    )
    reader = CallReader(spec, found.constants)
    for call in calls:  # the other slots and steps must be calls of the same form
        given = reader.inputs((), call.arguments)
        batch = len(given[LATENTS])
        for name, value in given.items():
            expected = [batch, *found.examples[name].shape[1:]]
            if name != TIMESTEP and [*value.shape] != expected:
                raise ModelError(
                    f"{what} is called with {name} of the shape {list(value.shape)} in the slot {call.slot!r} and "
                    f"{expected} in {slots[0]!r}; one size is needed, so give all prompts the same length"
                )
    return Watched(spec, found.constants, found.examples, first.output, one.scheduler)


@dataclass
class _Found:
    """Inputs and constants that were found in two calls, with `sizes` samples."""

    sizes: tuple[int, int]
    constants: dict[str, Tensor]
    examples: dict[str, Tensor]

    def argument(self, path: str, one: Any, two: Any) -> Argument:
        """The tree of an argument, from its values in both calls."""
        if isinstance(one, Tensor) and isinstance(two, Tensor):
            return self._tensor(path, one, two)
        if isinstance(one, Mapping) and isinstance(two, Mapping):
            keys = tuple(key for key, value in one.items() if value is not None)
            if all(isinstance(key, str) for key in keys) and {*keys} <= two.keys():
                return Argument(
                    "dict", keys=keys, parts=tuple(self.argument(f"{path}.{key}", one[key], two[key]) for key in keys)
                )
        if isinstance(one, list | tuple) and isinstance(two, list | tuple):
            return self._sequence(path, one, two)
        if isinstance(one, SCALARS) and type(one) is type(two) and one == two:
            return Argument("value", value=one)
        raise ModelError(
            f"the argument {path!r} of the transformer is {one!r:.80} for one prompt and {two!r:.80} for two; only "
            "tensors that grow with the prompts, and values that stay the same, can be exported"
        )

    def _tensor(self, path: str, one: Tensor, two: Tensor) -> Argument:
        grows = one.shape[:1] == self.sizes[:1] and two.shape[:1] == self.sizes[1:] and one.shape[1:] == two.shape[1:]
        if grows and not _is_fixed(path, one, two):
            self.examples[path] = one.float() if one.is_floating_point() else one
            return Argument("input", path)
        if not grows and (one.shape != two.shape or not torch.equal(one, two)):
            raise ModelError(
                f"the argument {path!r} of the transformer has the shape {list(one.shape)} for one prompt and "
                f"{list(two.shape)} for two; its first size must be the number of samples, {self.sizes[0]} and "
                f"{self.sizes[1]}, or its values must stay the same"
            )
        self.constants[path] = one[:1] if grows else one
        return Argument("constant", path, for_each=grows)

    def _sequence(self, path: str, one: Sequence[Any], two: Sequence[Any]) -> Argument:
        alike = all(_leaves(value) == _leaves(two[0]) for value in (*one, *two)) if two else True
        if (len(one), len(two)) == self.sizes and alike:
            return Argument("each", parts=(self.argument(f"{path}.0", one[0], two[0]),))
        if len(one) != len(two):
            raise ModelError(
                f"the argument {path!r} of the transformer is a list of {len(one)} for one prompt and of {len(two)} "
                "for two; lists with something else for each sample cannot be exported"
            )
        parts = tuple(self.argument(f"{path}.{k}", *both) for k, both in enumerate(zip(one, two, strict=True)))
        return Argument("tuple" if isinstance(one, tuple) else "list", parts=parts)


def _leaves(value: Any) -> list[Any]:
    """The values in nested lists; an identity for tensors, which are never equal to each other."""
    return [id(one) if isinstance(one, Tensor) else one for one in tree_leaves(value)]


def _is_fixed(path: str, one: Tensor, two: Tensor) -> bool:
    """Whether an integer tensor is the same for every sample, such as positions; masks are inputs in any case."""
    integers = not one.is_floating_point() and one.dtype != torch.bool and "mask" not in path
    return integers and all(torch.equal(row, one[0]) for row in (*one, *two))


def _time_map(calls: Sequence[_Call], timestep: str, what: str) -> TimeMap:
    """The affine map from the scheduler's time to the module's. Raises `ModelError` if there is none."""
    pairs, coarse = [], 1e-5
    for call in calls:
        value = torch.as_tensor(call.arguments[timestep])
        if value.dtype in (torch.float16, torch.bfloat16):
            coarse = 1e-2
        times = value.flatten().double()
        if call.time is None or not bool((times == times[0]).all()):
            raise ModelError(
                f"{what} is called with a timestep of the shape {list(value.shape)} that differs within a sample, or "
                "that no timestep of the scheduler explains"
            )
        pairs.append((call.time, float(times[0])))
    (low, first), (high, last) = min(pairs), max(pairs)
    if low == high or first == last:
        raise ModelError(f"{what} is called with the same timestep in every step, {first:g}")
    scale = (last - first) / (high - low)
    for nice in (1.0, -1.0, 1e-3, -1e-3):
        scale = nice if abs(scale / nice - 1) < max(coarse, 1e-4) else scale
    shift = first - scale * low
    shift = round(shift) if abs(shift - round(shift)) < coarse * max(1.0, abs(first), abs(last)) else shift
    if any(abs(scale * time + shift - model) > coarse * max(1e-3, abs(last), abs(first)) for time, model in pairs):
        raise ModelError(f"{what} is called with timesteps that are no affine function of the scheduler's: {pairs[:3]}")
    return TimeMap(scale, float(shift))
