"""Models in diffusers format: a pipeline folder, a transformer folder, or a repository on the hub."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fora_trt.contract import Part
from fora_trt.downloads import text_of
from fora_trt.errors import ModelError
from fora_trt.models.architectures import ARCHITECTURES, Architecture, PipelineParts, architecture_of, known_sources
from fora_trt.models.assembly import EmptyModel, placing
from fora_trt.models.checkpoint import TRANSFORMER, Renamed, preferred, tensors_of, variants_in
from fora_trt.models.options import SourceOptions
from fora_trt.models.parts import VAE, check_autoencoder, digest_of_vae, downloaded, local, read_config, vae_at
from fora_trt.models.pipeline_folder import is_transformer, watched_architecture
from fora_trt.models.weight_sets import WeightSet, chosen, is_averaged

FILES = (
    "model_index.json",
    "config.json",
    f"{TRANSFORMER}*",
    "transformer*/*",
    "scheduler/*",
    "vae/*",
    "tokenizer*/*",
    "*/*.json",
)
"""Files to download from a hub repository. The text encoder's weights are not needed here; `run` loads them."""

HINT = (
    "; a diffusers folder contains transformer/config.json, and a pipeline also scheduler/scheduler_config.json and "
    "model_index.json"
)

STRANGERS = {
    "manifest.json": "is a bundle that was exported already; give it to 'fora-trt run'",
    "zero_to_fp32.py": "is a DeepSpeed checkpoint; run its zero_to_fp32.py and give the file that it writes",
    ".metadata": "is a distributed checkpoint in parts; join them: python -m torch.distributed.checkpoint.format_utils "
    "dcp_to_torch FOLDER FILE.pt",
    "latest": "is a DeepSpeed checkpoint; join its parts with zero_to_fp32.py and give the file that it writes",
    "unet/config.json": "is a pipeline with a U-Net, which has no repeated transformer blocks to cache; give a "
    "pipeline with a transformer",
}
"""Files that tell what a folder without a transformer is, and what to do with it."""


def empty_from_hub(options: SourceOptions) -> EmptyModel:
    """The model of the repository that `options.source` names, from the cache or the hub. Raises `ModelError`."""
    folder = downloaded(options.source, FILES)
    return empty_from_folder(options, options.source.split("/")[1], folder, Part(options.source, folder.name))


def empty_from_folder(
    options: SourceOptions, name: str, folder: Path, found_again: Part | None = None, file: Path | None = None
) -> EmptyModel:
    """The model in a pipeline folder or a transformer folder. Raises `ModelError`.

    `found_again` is the place from which VAE and text encoder are loaded later; by default `folder`. `file` is the
    weight file to use; by default the one that is chosen among those of the folder.
    """
    source, notes = options.source, list[str]()
    bare = (folder / "config.json").is_file()
    part, wanted = (folder, options.weights) if bare else _part(folder, options, notes)
    config = read_config(part / "config.json", "transformer", source, f"{HINT}; {known_sources()}")
    index = read_config(path, "pipeline", source) if (path := folder / "model_index.json").is_file() else {}
    where = found_again or Part(local(folder))
    known = architecture_of(config)
    if known is None and index and not bare and is_transformer(config):
        architecture = watched_architecture(config, index, folder, options.component or "transformer", where)
        parts = PipelineParts(str(index.get("_class_name")))
    else:
        architecture = _architecture(config, source)
        parts = _parts(index, folder, where, options)
    scheduler = _scheduler(folder, index, source)
    tensors = tensors_of(file or _variant(part, wanted, source, notes))
    module = architecture.empty_module(config)
    tensors = _without_ignored(module, architecture, tensors, notes)
    config = {**config, **dict(getattr(module, "config", {}))}  # adds the defaults of missing keys
    options.refuse_all_but({*architecture.takes, *({"weights"} if file is None else ())})
    spec = architecture.described(config, options, parts)
    architecture.prepare(module, tensors)
    notes += architecture.guesses(spec, options, parts)
    fill = placing(module, tensors, config, source)
    return EmptyModel(name, module, spec, fill, config, scheduler, parts, tuple(notes))


def _architecture(config: Mapping[str, Any], source: str) -> Architecture:
    if (found := architecture_of(config)) is not None:
        return found
    if is_transformer(config):
        raise ModelError(
            f"the source {source!r} is a {config['_class_name']} without its pipeline, which tells how it is called; "
            "give the folder or hub id of the whole pipeline, with its model_index.json"
        )
    known = ", ".join(entry.class_names[0] for entry in ARCHITECTURES.values())
    old = config.get("_class_name") == "Transformer2DModel"
    norm = f" with norm_type {config.get('norm_type')!r}" if old else ""
    raise ModelError(
        f"the transformer class of {source!r} is {config.get('_class_name', 'unknown')}{norm}; supported are {known}, "
        "and with their pipeline all transformers of the installed diffusers; for another network give "
        "package.module:factory and --cache patterns, see docs/python.md"
    )


def _part(folder: Path, options: SourceOptions, notes: list[str]) -> tuple[Path, str | None]:
    """The folder of the transformer in a pipeline, and the option `weights` if it does not name this folder.

    A training script may have saved averaged weights in a folder of their own, such as `transformer_ema`.
    """
    found = [path.parent.name for path in sorted(folder.glob("*transformer*/config.json"))]
    if options.component is not None:
        if options.component not in found:
            known = ", ".join(found) or "none"
            raise ModelError(f"{options.source!r} has no transformer {options.component!r}; its transformers: {known}")
        return folder / options.component, options.weights
    sets = [WeightSet(name, is_averaged(name), {}) for name in found if name == "transformer" or is_averaged(name)]
    if any(one.averaged for one in sets):
        choice = chosen(sets, [], options.weights, options.source)
        notes += filter(None, [choice.note])
        return folder / choice.key, None
    for file, kind in STRANGERS.items():
        if not sets and (folder / file).exists():
            raise ModelError(f"{options.source!r} {kind}")
    return folder / "transformer", options.weights


def _variant(part: Path, wanted: str | None, source: str, notes: list[str]) -> Path:
    """The weight file of a folder, or the index of several; of several variants, averaged weights are preferred."""
    variants = variants_in(part)
    if not variants:
        raise ModelError(
            f"{part} contains no weights: {TRANSFORMER}.safetensors or {TRANSFORMER}.bin was expected; download or "
            "copy the folder again"
        )
    raw = any(variant and "non" in variant for variant in variants)  # then those without variant are averaged
    sets = [WeightSet(one or TRANSFORMER, is_averaged(one or "") or (raw and one is None), {}) for one in variants]
    if wanted is None and not any(one.averaged for one in sets):
        variant = preferred(variants)
        if variant is not None:
            others = f"; --weights takes another of {', '.join(map(str, variants))}" if len(variants) > 1 else ""
            notes.append(f"weights of {source}: the variant {variant}{others}")
        return variants[variant]
    choice = chosen(sets, [], wanted, source)
    notes += filter(None, [choice.note])
    return variants[None if choice.key == TRANSFORMER else choice.key]


def _without_ignored(
    module: nn.Module, architecture: Architecture, tensors: Mapping[str, Tensor], notes: list[str]
) -> Mapping[str, Tensor]:
    """The tensors without those that the published class ignores, which are noted."""
    patterns = getattr(type(module), "_keys_to_ignore_on_load_unexpected", None) or ()
    own = {*dict(module.named_parameters()), *dict(module.named_buffers())}
    ignored = [
        name
        for name in tensors
        if name not in own
        and (
            any(fnmatchcase(name, pattern) for pattern in architecture.ignores)
            or any(re.search(pattern, name) for pattern in patterns)
        )
    ]
    if ignored:
        notes.append(f"ignored, as in diffusers: {', '.join(ignored)}")
    return Renamed({name: name for name in tensors if name not in ignored}, tensors)


def _scheduler(folder: Path, index: Mapping[str, Any], source: str) -> dict[str, Any] | None:
    path = folder / "scheduler/scheduler_config.json"
    return read_config(path, "scheduler", source, HINT) if index or path.is_file() else None


def _parts(index: Mapping[str, Any], folder: Path, where: Part, options: SourceOptions) -> PipelineParts:
    """The parts of a pipeline besides the transformer, according to its index; the option `vae` replaces the VAE."""
    vae, autoencoder = None, None
    if options.vae is not None:
        vae, autoencoder = vae_at(options.vae)
    elif _has(index, VAE):
        autoencoder = read_config(folder / VAE / "config.json", "VAE", options.source)
        check_autoencoder(autoencoder, options.source)
        vae = Part(where.where, where.revision, digest_of_vae(folder, options.source))
    encoder = where if _has(index, "text_encoder") else None
    pipeline = index.get("_class_name")
    return PipelineParts(None if pipeline is None else str(pipeline), vae, autoencoder, encoder)


def is_transformer_folder(folder: Path) -> bool:
    """Whether a folder has the configuration of a diffusers model beside its weights."""
    try:
        config = json.loads(text_of(folder / "config.json"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and "_class_name" in config


def _has(index: Mapping[str, Any], part: str) -> bool:
    """Whether a pipeline has this part: its index holds [library, class], or [null, null] for a missing part."""
    named = index.get(part)
    return isinstance(named, list) and any(named)
