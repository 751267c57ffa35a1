"""A custom network: import and call `package.module:factory`, and complete its `ModelSpec` by one trial call."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn

from fora_trt.contract import (
    BATCH,
    CLASS_LABELS,
    DTYPES,
    FEATURE,
    LATENTS,
    NOISE_PREDICTION,
    TIMESTEP,
    GuidanceSpec,
    InputSpec,
    LatentSpec,
    Role,
    TensorSpec,
    has_fewer_channels,
)
from fora_trt.errors import ModelError, first_line
from fora_trt.models.architectures import Config, PipelineParts, factors_of
from fora_trt.models.assembly import EmptyModel
from fora_trt.models.branches import unmerged_branches
from fora_trt.models.examples import TRAINED_TIMESTEPS, example_inputs
from fora_trt.models.options import SourceOptions
from fora_trt.models.parts import vae_at
from fora_trt.models.spec import CLASS_GUIDANCE_SCALE, TEXT_GUIDANCE_SCALE, ModelSpec

INPUT_ROLES: tuple[Role, ...] = ("latents", "timestep", "noise", "conditioning")

Call: TypeAlias = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]

HOW = (
    "a factory returns a torch.nn.Module, or a module and a fora_trt.ModelSpec; without a ModelSpec, list the inputs "
    "in the table [inputs] of a recipe, see export/README.md"
)


def empty_from_factory(options: SourceOptions) -> EmptyModel:
    """The module that the factory returns; `fill` casts the weights that it already has. Raises `ModelError`."""
    options.refuse_all_but({"inputs", "folder"})
    vae, autoencoder = vae_at(options.vae) if options.vae else (None, None)
    module, spec = module_from_factory(options, autoencoder)
    parts = PipelineParts(vae=vae, autoencoder=autoencoder) if vae else None

    def cast(dtypes: Mapping[str, torch.dtype]) -> None:
        for name, parameter in module.named_parameters():
            parameter.data = parameter.data.to(dtypes[name])

    note = unmerged_branches(module, spec)
    notes = () if note is None else (note,)
    return EmptyModel(options.source.replace(":", "-"), module, spec, cast, parts=parts, notes=notes)


def module_from_factory(options: SourceOptions, autoencoder: Config | None = None) -> tuple[nn.Module, ModelSpec]:
    """Import and call the factory that `options.source` names; it may be in the folder of the options.

    Missing parts of the spec are found by calling the module once; scale and shift of its latents are those of the
    VAE's configuration. Raises `ModelError`.
    """
    source = options.source
    made = _called(source, options.folder)
    module, spec = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(module, nn.Module) or not isinstance(spec, ModelSpec | None):
        raise ModelError(f"{source!r} returned {_kind(made)}; {HOW}")
    if options.inputs is not None:
        base = spec or ModelSpec(inputs=())
        spec = dataclasses.replace(base, inputs=options.tensors(), conditioning=options.conditioning())
    if spec is None:
        raise ModelError(f"the inputs of {source!r} are unknown; {HOW}")
    module = module.eval().requires_grad_(False).cpu().float()
    return module, completed(module, spec, source, autoencoder)


def completed(module: nn.Module, spec: ModelSpec, source: str, autoencoder: Config | None = None) -> ModelSpec:
    """Complete a spec: shapes of prediction and latents by a trial call, number of classes from the labels' bound."""
    given = [tensor.name for tensor in spec.inputs]
    for tensor in spec.inputs:
        if not tensor.shape or tensor.shape[0] != BATCH:
            raise ModelError(
                f"the input {tensor.name!r} of {source!r} has the shape {list(tensor.shape)}; make {BATCH!r} the first "
                "dimension, or create it in `call` if it is constant"
            )
        if tensor.name == NOISE_PREDICTION or tensor.name.startswith(FEATURE) or given.count(tensor.name) > 1:
            raise ModelError(
                f"the input name {tensor.name!r} of {source!r} is reserved or used twice; rename the input"
            )
        if tensor.role not in INPUT_ROLES:
            raise ModelError(
                f"the input {tensor.name!r} of {source!r} has the role {tensor.role!r}; give it one of the roles "
                f"{', '.join(INPUT_ROLES)}"
            )
    if {LATENTS, TIMESTEP} - {*given}:
        raise ModelError(f"the inputs of {source!r} are {', '.join(given)}; {LATENTS!r} and {TIMESTEP!r} are needed")
    latents = next(tensor for tensor in spec.inputs if tensor.name == LATENTS)
    conditioning = dict(spec.conditioning)
    for tensor in spec.inputs:
        _check_dtype(tensor, conditioning, source)
    if not isinstance(spec.scheduler, Mapping | None):
        raise ModelError(f"the scheduler of {source!r} is {_kind(spec.scheduler)}; a diffusers configuration is needed")
    default = CLASS_GUIDANCE_SCALE if spec.text is None else TEXT_GUIDANCE_SCALE
    scale = default if spec.guidance_scale is None else spec.guidance_scale
    if not isinstance(scale, int | float) or not 0 <= scale < float("inf"):
        raise ModelError(f"the guidance_scale of {source!r} is {scale!r}; a finite number of at least 0 is needed")
    if (time := conditioning.pop(TIMESTEP, None)) is not None and time.values is not None:
        spec = dataclasses.replace(spec, call=_with_time_up_to(time.values[1], spec.call))
    spec = dataclasses.replace(
        spec,
        call=_not_compiled(spec.call),
        conditioning=conditioning,
        architecture=spec.architecture or type(module).__name__,
    )
    shape = _prediction_shape(module, spec, source)
    size = tuple(int(one) for one in latents.shape[1:])
    usual = size, (2 * size[0], *size[1:])
    if shape[1:] not in usual and not has_fewer_channels(shape[1:], size):
        raise ModelError(
            f"{source!r} predicts the shape {list(shape[1:])} for latents of {list(size)}; the same shape is needed, "
            "twice the channels for a learned variance, or fewer channels if some of the input are no noise"
        )
    labels = conditioning.get(CLASS_LABELS)
    guidance = spec.guidance
    if guidance is None and labels is not None and labels.values is not None:
        guidance = GuidanceSpec(num_classes=int(labels.values[1]), null_class=None)
    return dataclasses.replace(
        spec,
        output=spec.output or TensorSpec(NOISE_PREDICTION, "float32", (BATCH, *shape[1:])),
        latents=spec.latents
        or LatentSpec(
            size,
            *factors_of(autoencoder),
            pixels=autoencoder is None and len(size) == 3 and size[0] in (1, 3),
            learned_sigma=shape[1] == 2 * size[0] != size[0],
        ),
        guidance=guidance,
        guidance_scale=float(scale),
    )


def _check_dtype(tensor: TensorSpec, conditioning: Mapping[str, InputSpec], source: str) -> None:
    """Raise `ModelError` for a dtype that graphs cannot have, and for integers without a range that fits theirs."""
    named = f"the input {tensor.name!r} of {source!r}"
    if tensor.dtype not in DTYPES:
        raise ModelError(f"{named} has the dtype {tensor.dtype!r}; give one of {', '.join(DTYPES)}")
    if tensor.name == LATENTS and not tensor.is_floating:
        raise ModelError(f"{named} has the dtype {tensor.dtype}; latents are noise, so give float32")
    if tensor.role == "noise" and not tensor.is_floating:
        raise ModelError(
            f"{named} is drawn at every step and has the dtype {tensor.dtype}; it is noise, so give float32"
        )
    if not tensor.is_integer and tensor.name != TIMESTEP:
        return
    given = None if tensor.name == TIMESTEP else conditioning.get(tensor.name, InputSpec()).values
    if given is None and tensor.name != TIMESTEP:
        raise ModelError(
            f"the integer input {tensor.name!r} of {source!r} has no upper bound; give `below` in the recipe, or "
            f"conditioning={{{tensor.name!r}: InputSpec(values=(0, N))}} in the ModelSpec"
        )
    low, high = given or (0, TRAINED_TIMESTEPS)
    dtype = getattr(torch, tensor.dtype)
    held = torch.finfo(dtype) if tensor.is_floating else torch.iinfo(dtype) if tensor.is_integer else None
    if held is None or not held.min <= low < high <= held.max + 1:
        raise ModelError(f"{named} has values from {low:g} to {high - 1:g}, which {tensor.dtype} does not hold")


def _with_time_up_to(most: float, call: Call) -> Call:
    """The call of a module whose time runs to `most`; it scales the graph's timesteps, which run to 1000."""
    scale = most / TRAINED_TIMESTEPS
    return lambda module, inputs: call(module, {**inputs, TIMESTEP: inputs[TIMESTEP] * scale})


def _not_compiled(call: Call) -> Call:
    """The same call with torch.compile disabled for functions that the module has compiled.

    The export traces these functions anyway. Compiling them would need a C++ compiler and would be repeated for every
    site whose `forward` is replaced.
    """

    def called(module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        with torch.compiler.set_stance("force_eager"):
            return call(module, inputs)

    return called


def folder_of_module(source: str) -> str | None:
    """The current folder, if the module of an imported factory is in it; None for an installed package."""
    file, here = _file_of_module(source), Path.cwd()
    return str(here) if file is not None and here in Path(file).parents and "site-packages" not in file else None


def _file_of_module(source: str) -> str | None:
    """The file of the imported module of a factory; None if it has none."""
    return getattr(sys.modules.get(source.partition(":")[0]), "__file__", None)


def _called(source: str, folder: str | None) -> object:
    """The result of the factory, which may import from a folder, by default the current one.

    Its standard output goes to stderr.
    """
    here = folder or str(Path.cwd())
    if not Path(here).is_dir():
        raise ModelError(f"the folder {here!r}, from which {source!r} was imported, is missing; put it there again")
    sys.path.insert(0, here)
    try:
        with redirect_stdout(sys.stderr):
            factory = _imported(source)
            if folder is not None and (other := _other_file(source, folder)):
                raise ModelError(
                    f"the module of {source!r} was imported from {other}, not from {folder}; start a new process"
                )
            try:
                return factory()
            except (Exception, SystemExit) as error:  # the user's own code can raise anything
                raise ModelError(f"the factory {source!r} failed: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(here)


def _other_file(source: str, folder: str) -> str | None:
    """The file of an imported module that is not in the folder; None if it is there."""
    file = _file_of_module(source)
    return None if file is None or Path(folder) in Path(file).absolute().parents else str(file)


def _imported(source: str) -> Callable[[], object]:
    name, _, attribute = source.partition(":")
    try:
        factory: object = getattr(importlib.import_module(name), attribute)
    except ModuleNotFoundError as error:
        raise ModelError(
            f"the source {source!r} cannot be imported: there is no module {error.name!r} in the current folder or "
            "among the installed packages; change to its folder or install it"
        ) from error
    except AttributeError as error:
        raise ModelError(f"the source {source!r} does not exist: {error}; name a function of this module") from error
    except (Exception, SystemExit) as error:  # the user's own code can raise anything
        raise ModelError(f"importing {name!r} failed: {type(error).__name__}: {error}") from error
    if not callable(factory):
        raise ModelError(f"{source!r} is {_kind(factory)}, which is not callable; {HOW}")
    return factory


@torch.no_grad()
def _prediction_shape(module: nn.Module, spec: ModelSpec, source: str) -> tuple[int, ...]:
    """The shape of the prediction for a batch of 2, computed in fp32."""
    try:
        prediction = spec.call(module, example_inputs(spec.inputs, spec.conditioning, batch=2))
    except Exception as error:
        shapes = ", ".join(f"{tensor.name} {list(tensor.sized(2))} {tensor.dtype}" for tensor in spec.inputs)
        raise ModelError(
            f"{source!r} cannot be called with the inputs {shapes} ({type(error).__name__}: {first_line(error)}); "
            "correct the inputs in its ModelSpec or recipe"
        ) from error
    if not isinstance(prediction, Tensor) or prediction.dim() < 2 or prediction.shape[0] != 2:
        raise ModelError(f"{source!r} returned {_kind(prediction)} for a batch of 2; a tensor (2, ...) is needed")
    return tuple(prediction.shape)


def _kind(made: object) -> str:
    return f"an object of type {type(made).__name__}"
