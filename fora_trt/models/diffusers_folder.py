"""Models in diffusers format: a pipeline folder, a transformer folder, or a repository on the hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fora_trt.errors import ModelError, first_line
from fora_trt.models.architectures import ARCHITECTURES, Architecture, PipelineParts, architecture_of, known_sources
from fora_trt.models.assembly import EmptyModel, placing
from fora_trt.models.checkpoint import tensors_from_folder
from fora_trt.models.options import SourceOptions
from fora_trt.quiet import quiet

FILES = ("model_index.json", "config.json", "diffusion_pytorch_model*", "transformer/*", "scheduler/*", "vae/*")
"""Files to download from a hub repository. The text encoder is not needed here; `run` loads it for prompts."""


def empty_from_hub(options: SourceOptions) -> EmptyModel:
    """The model of the repository that `options.source` names, from the cache or the hub. Raises `ModelError`."""
    return empty_from_folder(options, options.source.split("/")[1], _downloaded(options.source), options.source)


def empty_from_folder(options: SourceOptions, name: str, folder: Path, found_again: str | None = None) -> EmptyModel:
    """The model in a pipeline folder or a transformer folder. Raises `ModelError`.

    `found_again` is the folder or hub id from which VAE and text encoder are loaded later; by default `folder`.
    """
    source = options.source
    bare = (folder / "config.json").is_file()
    part = folder if bare else folder / "transformer"
    config = _config(part / "config.json", "transformer", source)
    architecture = _architecture(config, source)
    index = {} if bare else _config(folder / "model_index.json", "pipeline", source)
    parts = _parts(index, folder, found_again or str(folder), source)
    scheduler = None if bare else _config(folder / "scheduler/scheduler_config.json", "scheduler", source)
    tensors = tensors_from_folder(part)
    module = architecture.empty_module(config)
    config = {**config, **dict(getattr(module, "config", {}))}  # adds the defaults of missing keys
    options.refuse_all_but(architecture.takes)
    spec = architecture.described(config, options, parts)
    architecture.prepare(module, tensors)
    return EmptyModel(name, module, spec, placing(module, tensors, config, source), config, scheduler, parts)


def _architecture(config: Mapping[str, Any], source: str) -> Architecture:
    if (found := architecture_of(config)) is not None:
        return found
    known = ", ".join(entry.class_names[0] for entry in ARCHITECTURES.values())
    raise ModelError(
        f"the transformer class of {source!r} is {config.get('_class_name', 'unknown')}; supported are {known}; for "
        "another network give package.module:factory and --cache patterns, see docs/python.md"
    )


def _parts(index: Mapping[str, Any], folder: Path, where: str, source: str) -> PipelineParts:
    """The parts of a pipeline besides the transformer, according to its index."""
    autoencoder = _autoencoder(folder, source) if _has(index, "vae") else None
    return PipelineParts(
        pipeline=str(index.get("_class_name")),
        vae=where if autoencoder else None,
        autoencoder=autoencoder,
        encoder=where if _has(index, "text_encoder") else None,
    )


def _config(path: Path, what: str, source: str) -> dict[str, Any]:
    """Read a JSON configuration. Raises `ModelError` if it is missing or invalid."""
    if not path.is_file():
        raise ModelError(
            f"{source!r} has no {what} configuration: a diffusers folder contains transformer/config.json, "
            f"scheduler/scheduler_config.json and model_index.json; {known_sources()}"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"the {what} configuration of {source!r} is not JSON ({first_line(error)}); download or copy {path} again"
        ) from error
    if not isinstance(config, dict):
        raise ModelError(f"the {what} configuration {path} of {source!r} is not a JSON object; download it again")
    return config


def _downloaded(hub_id: str) -> Path:
    """The folder with those files of a repository that an export needs, from the cache or the hub."""
    from huggingface_hub import snapshot_download

    try:
        with quiet("huggingface_hub"):  # hides a warning per retry; the final error is enough
            return Path(snapshot_download(hub_id, allow_patterns=list(FILES)))
    except Exception as error:  # several libraries raise: no network, no such repository, no permission
        raise ModelError(
            f"{hub_id!r} is not a local folder and cannot be downloaded ({type(error).__name__}); download it on a "
            f"machine with network (hf download {hub_id} --local-dir {hub_id.split('/')[1]}), copy that folder here "
            "and give its path"
        ) from error


def _has(index: Mapping[str, Any], part: str) -> bool:
    """Whether a pipeline has this part: its index holds [library, class], or [null, null] for a missing part."""
    named = index.get(part)
    return isinstance(named, list) and any(named)


def _autoencoder(folder: Path, source: str) -> dict[str, Any]:
    """The configuration of a pipeline's VAE. Raises `ModelError` if the keys that define the latents are invalid."""
    config = _config(folder / "vae" / "config.json", "VAE", source)
    numbers = [config.get(key) for key in ("scaling_factor", "shift_factor")]
    blocks = config.get("block_out_channels")
    if not isinstance(blocks, list) or not blocks or not all(isinstance(one, float | int | None) for one in numbers):
        raise ModelError(
            f"the VAE of {source!r} has no valid AutoencoderKL configuration: block_out_channels is {blocks!r}, "
            f"scaling_factor is {numbers[0]!r}, shift_factor is {numbers[1]!r}; a list and two numbers are needed"
        )
    return config
