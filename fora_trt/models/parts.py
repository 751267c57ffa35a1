"""The parts of a pipeline besides the transformer, VAE and text encoder: where they are, and whether they are complete.

A part is in a local folder or in a repository on the hub. Export records where a part was found, so that it is found
again from any working directory, and what it contained, so that another part at the same place is not used instead.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fora_trt.contract import Part
from fora_trt.downloads import problem_of, text_of
from fora_trt.errors import ModelError, first_line
from fora_trt.files import sha256_of
from fora_trt.models.checkpoint import TRANSFORMER, files_of_index, preferred, variants_in
from fora_trt.quiet import quiet

VAE = "vae"
VAE_FILES = ("config.json", "diffusion_pytorch_model*", "vae/*")
ENCODER_FILES = ("model_index.json", "text_encoder*/*", "tokenizer*/*", "scheduler/*")


def local(where: str | Path) -> str:
    """A path as it is recorded: absolute, links unchanged."""
    return str(Path(where).expanduser().absolute())


def downloaded(hub_id: str, files: Sequence[str], revision: str | None = None) -> Path:
    """The folder with these files of a repository, from the cache or the hub; its name is the revision.

    Raises `ModelError`.
    """
    from huggingface_hub import snapshot_download

    try:
        with quiet("huggingface_hub"):  # hides a warning per retry; the final error is enough
            return Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(files)))
    except Exception as error:  # several libraries raise: no network, no such repository, no permission
        name = hub_id.rpartition("/")[2]
        pinned = f" --revision {revision}" if revision else ""
        raise ModelError(
            f"{hub_id!r} is not a local folder and cannot be downloaded ({type(error).__name__}); download it on a "
            f"machine with network (hf download {hub_id}{pinned} --local-dir {name}), copy that folder here and give "
            "its path"
        ) from error


def folder_of(part: Part, files: Sequence[str]) -> Path:
    """The local folder of a part, which is downloaded if it is on the hub. Raises `ModelError`."""
    path = Path(part.where).expanduser()
    return path if path.exists() or path.is_absolute() else downloaded(part.where, files, part.revision)


def vae_at(where: str, with_weights: bool = True) -> tuple[Part, dict[str, Any]]:
    """The VAE at a folder or hub id, which may be a whole pipeline, with its configuration.

    `with_weights` also checks its weights and records what they are. Raises `ModelError`.
    """
    part = Part(local(where)) if Path(where).expanduser().exists() else Part(where)
    folder = folder_of(part, VAE_FILES if with_weights else ("config.json", "vae/config.json"))
    if not Path(part.where).is_absolute():
        part = Part(part.where, revision=folder.name)
    config = read_config(_vae_folder(folder, where) / "config.json", "VAE", where)
    check_autoencoder(config, where)
    return (Part(part.where, part.revision, digest_of_vae(folder, where)) if with_weights else part), config


def _vae_folder(folder: Path, where: str) -> Path:
    if folder.is_file():
        raise ModelError(f"the VAE {where!r} is a file; give the folder of a VAE in diffusers format")
    for own in (folder / VAE, folder):
        if (own / "config.json").is_file():
            return own
    raise ModelError(
        f"no VAE was found at {where!r}: a folder with config.json and its weights is needed; give --vae the folder or "
        "hub id of a VAE in diffusers format, such as stabilityai/sd-vae-ft-ema"
    )


def weights_of_vae(part: Part) -> tuple[Path, str | None]:
    """The folder of a VAE and the variant of its weights, after a check that they are those recorded at export.

    Raises `ModelError` for a VAE that is missing, incomplete or another one.
    """
    folder = folder_of(part, VAE_FILES)
    own, variant, _ = _weights_of_vae(folder, part.where)
    if part.sha256 is not None and digest_of_vae(folder, part.where) != part.sha256:
        raise ModelError(
            f"the VAE at {part.where!r} is another one than at export; put the old one there, or give --vae FOLDER to "
            "decode with this one"
        )
    return own, variant


def digest_of_vae(folder: Path, where: str) -> str:
    """SHA-256 over configuration and weights of a VAE. Raises `ModelError` if its weights are missing or damaged."""
    own, _, weights = _weights_of_vae(folder, where)
    digest = hashlib.sha256()
    for path in (own / "config.json", *weights):
        digest.update(f"{path.name} {sha256_of(path)}\n".encode())
    return digest.hexdigest()


def _weights_of_vae(folder: Path, where: str) -> tuple[Path, str | None, list[Path]]:
    """The folder, the variant and the weight files of a VAE. Raises `ModelError` if one is missing or damaged."""
    own = _vae_folder(folder, where)
    variants = variants_in(own)
    if not variants:
        raise ModelError(
            f"the VAE at {where!r} has no weights: {TRANSFORMER}.safetensors was expected in {own}; download or copy "
            "the folder again"
        )
    variant = preferred(variants)
    file = variants[variant]
    shards = files_of_index(file) if file.suffix == ".json" else [file]
    for shard in shards:
        if problem := problem_of(shard):
            raise ModelError(f"{shard} {problem}")
    return own, variant, shards


def check_autoencoder(config: dict[str, Any], where: str) -> None:
    """Raise `ModelError` if the keys of a VAE's configuration that define the latents are invalid."""
    numbers = [config.get(key) for key in ("scaling_factor", "shift_factor")]
    blocks, kind = config.get("block_out_channels"), config.get("_class_name", "AutoencoderKL")
    valid = isinstance(blocks, list) and blocks and all(isinstance(one, float | int | None) for one in numbers)
    if not valid or kind != "AutoencoderKL":
        raise ModelError(
            f"the VAE of {where!r} has no valid AutoencoderKL configuration: its class is {kind!r}, block_out_channels "
            f"is {blocks!r}, scaling_factor is {numbers[0]!r}, shift_factor is {numbers[1]!r}; a list and two numbers "
            "are needed"
        )


def read_config(path: Path, what: str, source: str, hint: str = "") -> dict[str, Any]:
    """Read a JSON configuration; `hint` ends the message about a missing one. Raises `ModelError`."""
    if not path.is_file():
        raise ModelError(f"{source!r} has no {what} configuration: {path} is missing{hint}")
    try:
        if problem := problem_of(path, text=True):
            raise ModelError(f"the {what} configuration {path} {problem}")
        config = json.loads(text_of(path))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"the {what} configuration of {source!r} is not JSON ({first_line(error)}); download or copy {path} again"
        ) from error
    if not isinstance(config, dict):
        raise ModelError(f"the {what} configuration {path} of {source!r} is not a JSON object; download it again")
    return config


def pinned(hub_id: str) -> Part:
    """A repository on the hub with its newest revision; without network the revision stays open."""
    from huggingface_hub import model_info

    try:
        with quiet("huggingface_hub"):
            return Part(hub_id, revision=model_info(hub_id, timeout=5).sha)
    except Exception:  # no network, or no such repository: `run` says so when it loads the part
        return Part(hub_id)
