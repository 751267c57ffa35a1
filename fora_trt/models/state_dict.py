"""State dicts in the format of a model's authors: choose the weights, recognize the format, rename the tensors.

The formats are part of the entries of the architecture registry.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from fora_trt.errors import ModelError
from fora_trt.models.architectures import Architecture, PipelineParts, StateDictFormat, state_dict_formats
from fora_trt.models.assembly import EmptyModel, placing
from fora_trt.models.checkpoint import content_of_file
from fora_trt.models.diffusers_folder import empty_from_folder, is_transformer_folder
from fora_trt.models.options import SourceOptions
from fora_trt.models.parts import pinned, vae_at
from fora_trt.models.weight_sets import chosen, sets_in

OTHERS = {
    "transformer_blocks.": "has the tensor names of diffusers; give its folder, with config.json beside the weights",
    "lora_": "contains LoRA weights, not a model; merge them into the transformer and give that",
    "model.diffusion_model.input_blocks.": "is a Stable Diffusion checkpoint, whose U-Net has no repeated transformer "
    "blocks to cache; give a DiT",
    "double_blocks.": "is a FLUX checkpoint, which is not supported yet",
    "joint_blocks.": "is a Stable Diffusion 3 checkpoint, which is not supported yet",
    "decoder.": "is a VAE; give it with --vae, and a transformer as SOURCE",
}
"""Parts of tensor names that tell what a file of another kind is."""


def empty_from_state_dict(options: SourceOptions, path: Path, name: str) -> EmptyModel:
    """The model of a file that contains weights, alone or with what a training script stores. Raises `ModelError`."""
    takes = {name for _, form in state_dict_formats() for name in form.takes}
    content, what = content_of_file(path), str(path)
    sets, unreadable = sets_in(content, _accepted)
    if not sets:
        if is_transformer_folder(path.parent):
            return empty_from_folder(options, name, path.parent, file=path)
        raise ModelError(f"{path} {_other(content)}")
    options.refuse_all_but({*takes, "weights"})
    choice = chosen(sets, unreadable, options.weights, what)
    tensors = next(one.tensors for one in sets if one.key == choice.key)
    architecture, form = _format(tensors, options, path)
    options.refuse_all_but({*form.takes, "weights"})
    config, parts = form.config(tensors, options, what), _parts(form, tensors, options)
    spec = form.adapted(architecture.described(config, options, parts), options)
    module = architecture.empty_module(config)
    architecture.prepare(module, None)
    form.set_up(module, tensors, spec, what)
    fill = placing(module, form.renamed(tensors, config), config, what)
    guesses = architecture.guesses(spec, options, parts) + form.guesses(spec, options)
    notes = (*filter(None, [choice.note]), *guesses)
    return EmptyModel(name, module, spec, fill, config, parts=parts, notes=notes)


def _accepted(tensors: Mapping[str, Tensor]) -> bool:
    return any(form.recognises(tensors) for _, form in state_dict_formats())


def _parts(form: StateDictFormat, tensors: Mapping[str, Tensor], options: SourceOptions) -> PipelineParts:
    """The parts of the authors' pipeline, with the VAE that the option `vae` names, else with that of the authors."""
    parts = form.parts(tensors, options)
    if options.vae is not None:
        vae, autoencoder = vae_at(options.vae)
        return dataclasses.replace(parts, vae=vae, autoencoder=autoencoder)
    return dataclasses.replace(parts, vae=pinned(parts.vae.where)) if parts.vae else parts


def _format(tensors: Mapping[str, Tensor], options: SourceOptions, path: Path) -> tuple[Architecture, StateDictFormat]:
    """The format of the tensors. If several match: the one in the option `architecture`, else by the file name."""
    fitting = {form.name: (entry, form) for entry, form in state_dict_formats() if form.recognises(tensors)}
    names = {kind: found for found in fitting.values() for kind in (found[1].name, *found[1].kinds)}
    if (wanted := options.architecture) is None:
        by_file = [one for name, one in fitting.items() if path.name.lower().startswith(name.lower())]
        return [*by_file, *fitting.values()][0]
    named = [one for name, one in names.items() if name.lower() == wanted.lower()]
    if not named:
        raise ModelError(f"the architecture is {wanted!r}; for this state dict choose {' or '.join(names)}")
    return named[0]


def _other(content: object) -> str:
    """What a file contains in place of the weights of a supported model, and what to give instead."""
    names = [name for name in content if isinstance(name, str)] if isinstance(content, Mapping) else []
    inner = [one for one in content.values() if isinstance(one, Mapping)] if isinstance(content, Mapping) else []
    all_names = [*names, *(name for one in inner for name in one if isinstance(name, str))]
    for part, kind in OTHERS.items():
        if any(part in name for name in all_names):
            return kind
    authors = " or ".join(form.name for _, form in state_dict_formats())
    shown = f"it contains {', '.join(map(repr, names[:4]))}" if names else f"it is a {type(content).__name__}"
    shown = "it is empty" if content == {} else shown
    return (
        f"is not a state dict of the {authors} authors: {shown}{', ...' if len(names) > 4 else ''}; give a folder in "
        "diffusers format, or package.module:factory for a network of your own"
    )
