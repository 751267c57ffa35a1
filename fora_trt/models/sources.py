"""From the SOURCE that a user names to a `Model`; the only place that knows where models come from."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel
from torch import nn

from fora_trt.errors import ModelError
from fora_trt.models import dit
from fora_trt.models.spec import PRECISIONS, Model
from fora_trt.quiet import quiet

KNOWN = (
    "known sources: digits; a diffusers folder or hub id of a DiT, such as facebook/DiT-XL-2-256; "
    "random:DiT-S/2 and its sisters; a recipe file such as export/digits.toml"
)
RANDOM = "random:"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def model_from_source(source: str, precision: str = "fp32", image_size: int | None = None) -> Model:
    """Load what `source` names, cast to `precision` (fp32, fp16 or bf16), for square images of `image_size` pixels.

    Raises `ModelError` for a source that is unknown or that does not hold a whole model.
    """
    if precision not in PRECISIONS:
        raise ModelError(f"the precision is {precision!r}; known are {', '.join(PRECISIONS)}")
    if source == "digits":
        folder = files("fora_trt") / "models" / "digits"
        return _from_diffusers(source, "digits", str(folder), precision, image_size)
    if source.startswith(RANDOM):
        return _random(source, precision, image_size or 256)
    path = Path(source).expanduser()
    if path.is_dir():
        return _from_diffusers(source, path.resolve().name, str(path), precision, image_size)
    if HUB_ID.fullmatch(source) and not path.exists():
        return _from_diffusers(source, source.split("/")[1], source, precision, image_size)
    raise ModelError(f"the source {source!r} is neither a folder nor a name that fora-trt knows; {KNOWN}")


def _random(source: str, precision: str, image_size: int) -> Model:
    name = source.removeprefix(RANDOM)
    config = dit.config_from_name(name, image_size)
    return Model(
        source=source,
        name=f"random-{name.replace('/', '-')}",
        module=dit.random_module(config, getattr(torch, PRECISIONS[precision])),
        spec=dit.spec_from_config(
            config, precision, sample_size=config["sample_size"], scale=dit.VAE_SCALE, pixels=False
        ),
        config=config,
        precision=precision,
        scheduler=dict(dit.SCHEDULER),
        image_size=image_size,
    )


def _from_diffusers(source: str, name: str, location: str, precision: str, image_size: int | None) -> Model:
    """A DiT pipeline, or its transformer alone, from a folder or from the hub."""
    bare = (Path(location) / "config.json").is_file()
    part = None if bare else "transformer"
    config = _config(DiTTransformer2DModel.load_config, source, location, part)
    found = config.get("_class_name", "nothing that names its class")
    if found != dit.ARCHITECTURE:
        raise ModelError(f"{source!r} holds {found}; fora-trt can split {dit.ARCHITECTURE}")
    autoencoder = None if bare else _optional_config(source, location, "vae")
    pixels = autoencoder is None and config["in_channels"] in (1, 3)
    factor = 1 if pixels else _vae_factor(autoencoder)
    if image_size is not None and image_size % factor:
        raise ModelError(f"an image size of {image_size} does not fit {source!r}: give a multiple of {factor}")
    sample_size = image_size // factor if image_size else config["sample_size"]
    spec = dit.spec_from_config(
        config,
        precision,
        sample_size=sample_size,
        scale=1.0 if pixels else (autoencoder or {}).get("scaling_factor", dit.VAE_SCALE),
        pixels=pixels,
    )
    return Model(
        source=source,
        name=name,
        module=_diffusers_module(source, location, part, getattr(torch, PRECISIONS[precision])),
        spec=spec,
        config={key: value for key, value in config.items() if not key.startswith("_")},
        precision=precision,
        scheduler=dict(dit.SCHEDULER) if bare else _config(_load_scheduler, source, location, "scheduler"),
        vae=location if autoencoder else None,
        image_size=sample_size * factor,
    )


def _diffusers_module(source: str, location: str, part: str | None, dtype: torch.dtype) -> nn.Module:
    try:
        module, info = DiTTransformer2DModel.from_pretrained(
            location, subfolder=part, torch_dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"the weights of {source!r} cannot be read: {_first_line(error)}") from error
    wrong = [f"{len(info[key])} {key.replace('_', ' ')} ({info[key][0]}, ...)" for key in _LOADING if info.get(key)]
    if wrong:
        raise ModelError(f"the weights of {source!r} do not fit their configuration: {'; '.join(wrong)}")
    dit.share_embedders(module)
    loaded: nn.Module = module.eval().requires_grad_(False)
    return loaded


_LOADING = ("missing_keys", "unexpected_keys", "mismatched_keys")


def _load_scheduler(location: str, subfolder: str) -> dict[str, Any]:
    from diffusers import DDIMScheduler

    return dict(DDIMScheduler.load_config(location, subfolder=subfolder))


def _config(load: Callable[..., Any], source: str, location: str, part: str | None) -> dict[str, Any]:
    try:
        with quiet("huggingface_hub"):  # it speaks of every retry; the error at the end says enough
            return dict(load(location, subfolder=part))
    except json.JSONDecodeError as error:
        raise ModelError(f"the {part or 'model'} configuration of {source!r} is not JSON: {error}") from error
    except (OSError, ValueError) as error:
        mend = (
            f"a diffusers folder has transformer/config.json and scheduler/scheduler_config.json; {KNOWN}"
            if Path(location).is_dir()
            else "download the repository where there is a network, copy it here and give the path of its folder"
        )
        raise ModelError(f"no {part or 'model'} configuration was found for {source!r}: {mend}") from error


def _optional_config(source: str, location: str, part: str) -> dict[str, Any] | None:
    """The configuration of a part that a pipeline may lack, read only if the pipeline's index names it."""
    index = _config(_load_index, source, location, None)
    return _config(AutoencoderKL.load_config, source, location, part) if index.get(part, [None])[0] else None


def _load_index(location: str, subfolder: None) -> Mapping[str, Any]:
    from diffusers import DiffusionPipeline

    return dict(DiffusionPipeline.load_config(location))


def _vae_factor(autoencoder: Mapping[str, Any] | None) -> int:
    """How many pixels one latent pixel covers along a side."""
    return 2 ** (len(autoencoder["block_out_channels"]) - 1) if autoencoder else dit.VAE_FACTOR


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
