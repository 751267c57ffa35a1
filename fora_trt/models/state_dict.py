"""State dicts in the format of a model's authors: recognize the format and rename the weights for the module.

The formats are part of the entries of the architecture registry.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from fora_trt.errors import ModelError
from fora_trt.models.architectures import Architecture, PipelineParts, StateDictFormat, state_dict_formats
from fora_trt.models.assembly import EmptyModel, placing, sized
from fora_trt.models.checkpoint import tensors_from_file
from fora_trt.models.options import SourceOptions


def empty_from_state_dict(options: SourceOptions, path: Path) -> EmptyModel:
    """The model of a .pt or .safetensors file that contains only weights. Raises `ModelError`."""
    options.refuse_all_but({name for _, form in state_dict_formats() for name in form.takes})
    tensors, what = tensors_from_file(path), str(path)
    architecture, form = _format(tensors, options, path)
    options.refuse_all_but(form.takes)
    config, parts = form.config(tensors, options, what), PipelineParts(vae=form.vae)
    spec = form.adapted(architecture.described(config, options, parts))
    config = sized(config, spec)
    module = architecture.empty_module(config)
    architecture.prepare(module, None)
    form.set_up(module, tensors, what)
    fill = placing(module, form.renamed(tensors, config), config, options.source)
    return EmptyModel(path.stem, module, spec, fill, config, parts=parts)


def _format(tensors: Mapping[str, Tensor], options: SourceOptions, path: Path) -> tuple[Architecture, StateDictFormat]:
    """The format of the tensors. If several match: the one in the option `architecture`, else by the file name."""
    fitting = {form.name: (entry, form) for entry, form in state_dict_formats() if form.recognises(tensors)}
    if not fitting:
        authors = " or ".join(form.name for _, form in state_dict_formats())
        raise ModelError(
            f"{path} is not a state dict of the {authors} authors: it contains {', '.join(list(tensors)[:4])}, ...; "
            "give a folder in diffusers format, or package.module:factory for a network of your own"
        )
    wanted, file = options.architecture, path.name.lower()
    if wanted is not None and wanted.lower() not in map(str.lower, fitting):
        raise ModelError(f"the architecture is {wanted!r}; for this state dict choose {' or '.join(fitting)}")
    chosen = [name for name in fitting if (wanted.lower() == name.lower() if wanted else file.startswith(name.lower()))]
    return fitting[[*chosen, *fitting][0]]
