"""Folders of diffusers pipelines that no architecture here describes: the pipeline is put together and watched.

Text encoders and transformers are made without weights, because watching needs only shapes. Only classes of diffusers
and transformers are made; code in the folder does not run.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fora_trt.call import PipelineSpec
from fora_trt.contract import Part
from fora_trt.errors import ForaError, ModelError, first_line
from fora_trt.models.architectures import Architecture, Config, PipelineParts
from fora_trt.models.options import SourceOptions
from fora_trt.models.pipelines import scalars_of, spec_of_watched
from fora_trt.models.spec import ModelSpec
from fora_trt.models.watch import TEXT_LENGTH, imagined, transformers_of, usual_tokens, watch
from fora_trt.quiet import quiet

WIDTHS = (
    "joint_attention_dim",
    "caption_channels",
    "text_embed_dim",
    "text_dim",
    "cap_feat_dim",
    "in_text_dim",
    "caption_dim",
    "cross_attention_dim",
)
"""Keys of a transformer's configuration that hold the width of prompt embeddings, the first that is there counts."""

POOLED = ("pooled_projection_dim", "in_text_dim2")
"""Keys that hold the width of a pooled prompt embedding."""

ARGUMENTS = {
    "image_size": ("height", "width"),
    "frames": ("num_frames", "video_length"),
    "text_length": (TEXT_LENGTH,),
}
"""The arguments of pipelines that an option stands for."""

USUAL_LENGTH = 77
"""Number of prompt tokens where neither an option nor the pipeline says it."""


def is_transformer(config: Config) -> bool:
    """Whether a configuration is that of a transformer of the installed diffusers, of a class for one model.

    `Transformer2DModel` is the older class of many, which are told apart by the registered architectures.
    """
    made = _class_of("diffusers", config.get("_class_name"))
    return made is not None and issubclass(made, nn.Module) and made.__name__ != "Transformer2DModel"


def watched_architecture(
    config: Config, index: Mapping[str, Any], folder: Path, component: str, where: Part
) -> Architecture:
    """An architecture for one transformer of the pipeline in a folder.

    `index` is the content of `model_index.json`, `where` the place from which the pipeline is loaded later. The
    configuration must be one that `is_transformer`. Raises `ModelError` if the index names another class.
    """
    name, listed = config["_class_name"], index.get(component)
    if not isinstance(listed, list) or listed[-1:] != [name]:
        raise ModelError(
            f"{folder / component / 'config.json'} is of a {name}, and model_index.json lists {listed!r} as the "
            f"{component}; use files of one pipeline"
        )
    made = _class_of("diffusers", name)
    assert made is not None

    def spec(config: Config, options: SourceOptions, parts: PipelineParts) -> ModelSpec:
        if options.vae is not None:
            raise ModelError(f"{options.source!r} is a pipeline with a VAE of its own; leave vae out")
        pipe = hollow_pipeline(folder, index, options.source)
        arguments = arguments_of(pipe, options, config)
        modules = transformers_of(pipe)
        watched = watch(pipe, arguments)[component]
        recorded = {**scalars_of(arguments), **_sizes(options)}
        pipeline = PipelineSpec(type(pipe).__name__, where, recorded, tuple(modules), watched.samples, watched.call)
        return spec_of_watched(watched, modules[component], pipeline)

    return Architecture(
        name=str(name),
        class_names=(str(name),),
        make=lambda config: made.from_config(dict(config)),  # type: ignore[attr-defined]
        spec=spec,
        takes=("image_size", "text_length", "frames", "call", "component"),
        prepare=_place_buffers,
        guidance_scale=1.0,
        sizes=("num_layers", "num_attention_heads", "attention_head_dim", "in_channels"),
    )


def hollow_pipeline(folder: Path, index: Mapping[str, Any], source: str) -> Any:
    """The pipeline in a folder, with text encoders and transformers that have no weights.

    Raises `ModelError` for a part that cannot be made.
    """
    kind = _class_of("diffusers", index.get("_class_name"))
    if kind is None:
        raise ModelError(
            f"{source!r} is a pipeline of the class {index.get('_class_name')!r}, which the installed diffusers does "
            "not have; update it, or load the pipeline in Python and give it to fora_trt.export()"
        )
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    parts: dict[str, Any] = {}
    for name, value in index.items():
        if name.startswith("_"):
            continue
        if not isinstance(value, list):
            parts[name] = value
        elif not any(value) or not (folder / name).is_dir():
            parts[name] = None
        else:
            library, made = value
            parts[name] = _part(folder / name, name, library, made, mode)
    taken = inspect.signature(kind).parameters
    try:
        with quiet("diffusers"):
            return kind(**{name: part for name, part in parts.items() if name in taken})
    except Exception as error:  # a pipeline can raise anything
        raise ModelError(
            f"the pipeline of {source!r} cannot be put together ({type(error).__name__}: {first_line(error)}); "
            "download or copy its folder again"
        ) from error


def arguments_of(pipe: Any, options: SourceOptions, config: Config) -> dict[str, Any]:
    """The arguments of a call with one prompt, from the options; embeddings stand in for missing text encoders."""
    known = inspect.signature(type(pipe).__call__).parameters
    given = {name: value for name, value in _sizes(options).items() if name in known}
    for option, names in ARGUMENTS.items():
        if getattr(options, option) is not None and not given.keys() & {*names}:
            raise ModelError(
                f"{type(pipe).__name__} has no argument {' or '.join(map(repr, names))}; leave {option} out"
            )
    extra = dict(options.call or {})
    if "use_resolution_binning" in known:
        given["use_resolution_binning"] = False
    if "prompt_embeds" in known and getattr(pipe, "text_encoder", None) is None:
        given |= _embeddings(known, options.text_length, config)
    return {**given, **extra}


def _sizes(options: SourceOptions) -> dict[str, Any]:
    """The values of the options under each name that pipelines have for them."""
    height, width = options.image_size or (None, None)
    values = {"frames": options.frames, "text_length": options.text_length}
    found = {name: value for option, value in values.items() for name in ARGUMENTS[option] if value is not None}
    return found if height is None else {"height": height, "width": width, **found}


def _embeddings(known: Mapping[str, inspect.Parameter], length: int | None, config: Config) -> dict[str, Tensor]:
    """Noise in place of prompt embeddings, and full masks."""
    tokens = length or config.get("max_text_seq_length") or usual_tokens(known) or USUAL_LENGTH
    width = next((config[key] for key in WIDTHS if isinstance(config.get(key), int)), None)
    pooled = next((config[key] for key in POOLED if isinstance(config.get(key), int)), None)
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Tensor] = {}
    for name in known:
        if "prompt" not in name or ("mask" not in name and "embeds" not in name):
            continue
        if "mask" in name:
            found[name] = torch.ones(1, tokens, dtype=torch.int64)
        elif (size := pooled if "pooled" in name or "clip" in name else width) is not None:
            shape: tuple[int, ...] = (1, size) if "pooled" in name or "clip" in name else (1, tokens, size)
            found[name] = torch.randn(shape, generator=generator)
    return found


def _part(folder: Path, name: str, library: str, kind: str, mode: FakeTensorMode) -> Any:
    """A part of a pipeline; a model without weights if it is a text encoder or a transformer."""
    made = _class_of(library, kind)
    if made is None:
        raise ModelError(f"{folder} is a {library}.{kind}, which is not installed; install or update {library}")
    try:
        with quiet("diffusers"), quiet("transformers"):
            if not issubclass(made, nn.Module):
                return made.from_pretrained(folder)  # type: ignore[attr-defined]
            if hasattr(made, "config_class") and made.config_class is not None:  # a model of transformers
                config = made.config_class.from_pretrained(folder)
                with mode:
                    return _hollow(made._from_config(config))  # type: ignore[attr-defined]
            if name.startswith("transformer"):
                with mode:
                    return made.from_config(made.load_config(folder)).eval()  # type: ignore[attr-defined]
            return made.from_config(made.load_config(folder)).eval()  # type: ignore[attr-defined]
    except ForaError:
        raise
    except Exception as error:  # the files of a part can be wrong in any way
        raise ModelError(
            f"the part {folder} of the pipeline cannot be made ({type(error).__name__}: {first_line(error)}); download "
            "or copy it again"
        ) from error


def _hollow(module: nn.Module) -> nn.Module:
    """A module without weights whose calls return noise of the right shapes."""
    module.eval()
    module.forward = lambda *args, **kwargs: imagined(module, type(module).forward, args, kwargs)
    return module


def _class_of(library: str, kind: object) -> type | None:
    """A public class of diffusers or transformers, or of a pipeline module of diffusers; None for anything else."""
    if not isinstance(kind, str) or not kind.isidentifier() or not str(library).isidentifier():
        return None
    home = library if library in ("diffusers", "transformers") else f"diffusers.pipelines.{library}"
    try:
        with quiet("transformers"):  # it names optional packages when a pipeline is imported
            found = getattr(importlib.import_module(home), kind, None)
    except ImportError:
        return None
    return found if isinstance(found, type) else None


def _place_buffers(module: nn.Module, tensors: Mapping[str, Tensor] | None) -> None:
    """Copy the buffers that a checkpoint holds, such as positions, where they have the shape of the module's."""
    for name, buffer in module.named_buffers():
        if tensors is not None and name in tensors and (stored := tensors[name]).shape == buffer.shape:
            buffer.copy_(stored)
