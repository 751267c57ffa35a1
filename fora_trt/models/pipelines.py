"""Models of diffusers pipelines that no architecture here describes: what they need is found by watching a call.

A pipeline comes as an object with all its parts, or as a folder. From a folder, text encoders and transformers are made
without weights: watching needs only shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fora_trt.call import PipelineSpec, Scalar
from fora_trt.contract import BATCH, LATENTS, NOISE_PREDICTION, TIMESTEP, InputSpec, LatentSpec, TensorSpec
from fora_trt.errors import ModelError
from fora_trt.models.assembly import EmptyModel
from fora_trt.models.block_sites import sites_of_blocks
from fora_trt.models.sharing import sharing_copy
from fora_trt.models.spec import ModelSpec
from fora_trt.models.watch import Watched, first_tensor, transformers_of, watch


def spec_of_watched(watched: Watched, module: nn.Module, pipeline: PipelineSpec) -> ModelSpec:
    """Describe a transformer that was watched."""
    latents = tuple(watched.examples[LATENTS].shape[1:])
    tensors, conditioning = list[TensorSpec](), dict[str, InputSpec]()
    for name in (LATENTS, TIMESTEP, *(one for one in watched.examples if one not in (LATENTS, TIMESTEP))):
        example = watched.examples[name]
        dtype = str(example.dtype).removeprefix("torch.")
        tensors.append(TensorSpec(name, dtype, (BATCH, *example.shape[1:])))
        if not example.is_floating_point() and example.dtype != torch.bool:
            low, high = int(example.min()), int(example.max())
            conditioning[name] = InputSpec(values=(0, 2) if {low, high} <= {0, 1} else (low, high + 1))
    call, constants = watched.call, watched.constants

    def called(module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        return first_tensor(module(**call.arguments_of(inputs, constants), return_dict=False))

    output = watched.output[1:]
    return ModelSpec(
        inputs=tuple(tensors),
        call=called,
        architecture=type(module).__name__,
        cache_sites=sites_of_blocks(module),
        output=TensorSpec(NOISE_PREDICTION, "float32", (BATCH, *output)),
        latents=LatentSpec(latents, learned_sigma=output == (2 * latents[0], *latents[1:])),
        conditioning=conditioning,
        scheduler=watched.scheduler,
        guidance_scale=1.0,
        pipeline=pipeline,
        constants=constants,
    )


def empty_from_pipeline(pipe: Any, component: str | None, arguments: Mapping[str, Any]) -> EmptyModel:
    """The transformer of a pipeline in memory: its weights are those that are loaded, with all changes to them.

    `arguments` are those of a call with one prompt. The pipeline is not changed; parameters that have the right dtype
    are shared with it. Raises `ModelError`.
    """
    modules = transformers_of(pipe)
    name = _component(component, modules, type(pipe).__name__)
    if problem := _problem_of(modules[name]):
        raise ModelError(f"the {name} of the pipeline, a {type(modules[name]).__name__}, {problem}")
    watched = watch(pipe, arguments)[name]
    module = sharing_copy(modules[name])
    pipeline = PipelineSpec(
        type(pipe).__name__, None, scalars_of(arguments), tuple(modules), watched.samples, watched.call
    )
    spec = spec_of_watched(watched, module, pipeline)

    def cast(dtypes: Mapping[str, torch.dtype]) -> None:
        for owner_name, owner in module.named_modules():
            for key, parameter in list(owner.named_parameters(recurse=False)):
                dtype = dtypes[f"{owner_name}.{key}" if owner_name else key]
                setattr(owner, key, nn.Parameter(parameter.detach().to("cpu", dtype), requires_grad=False))
        for buffer in module.buffers():
            if buffer.is_floating_point():
                buffer.data = buffer.data.to("cpu").float()

    config = dict(getattr(modules[name], "config", {}))
    return EmptyModel(type(pipe).__name__, module, spec, cast, config, watched.scheduler)


def _problem_of(module: nn.Module) -> str | None:
    """Why the weights of a loaded module cannot be exported; None if they can."""
    parameters = [*module.parameters()]
    if not parameters:
        return "has no weights; put the original transformer back before the export"
    if any(one.device.type == "meta" for one in parameters):
        return "is offloaded, so its weights are not in memory; load the pipeline without offloading or a device map"
    odd = next((one for one in parameters if not one.is_floating_point()), None)
    if odd is not None:
        return f"is quantized: it has weights of {odd.dtype}; load it without quantization"
    return None


def scalars_of(arguments: Mapping[str, Any]) -> dict[str, Scalar]:
    """The arguments of a pipeline that a manifest records: numbers, texts and truth values."""
    return {name: value for name, value in arguments.items() if isinstance(value, bool | int | float | str)}


def _component(wanted: str | None, modules: Mapping[str, nn.Module], what: str) -> str:
    if wanted is None:
        return next(iter(modules))
    if wanted not in modules:
        raise ModelError(f"{what} has no transformer {wanted!r}; it has {', '.join(modules)}")
    return wanted
