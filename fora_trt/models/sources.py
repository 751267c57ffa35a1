"""From the SOURCE that a user names to a `Model`; the only place that knows where models come from.

Every source ends as a module, a `ModelSpec` and weights that are placed one tensor at a time, cast for the cache sites.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel
from torch import Tensor, nn

from fora_trt.errors import ModelError, first_line
from fora_trt.models import dit, pixart
from fora_trt.models.checkpoint import (
    SUFFIXES,
    place_weights,
    tensors_from_file,
    tensors_from_folder,
)
from fora_trt.models.custom import module_from_factory
from fora_trt.models.dit_checkpoint import (
    DIT,
    SIT,
    as_diffusers,
    config_from_checkpoint,
    guided_as_authors,
    is_dit_checkpoint,
    set_up_as_authors,
    sit_spec,
)
from fora_trt.models.options import SourceOptions
from fora_trt.models.precision import HalfPrecision, dtypes_of_parameters
from fora_trt.models.random_weights import draw_weights
from fora_trt.models.sites import find_sites
from fora_trt.models.spec import PRECISIONS, Model, ModelSpec, TextSpec
from fora_trt.quiet import quiet

KNOWN = (
    "known sources: digits; a diffusers folder or hub id of a DiT or PixArt, such as facebook/DiT-XL-2-256; a state "
    "dict of the DiT or SiT authors (.pt, .safetensors); package.module:factory for a network of your own; "
    "random:DiT-S/2 and its sisters; a recipe file such as export/digits.toml"
)
RANDOM = "random:"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
DEFAULT_IMAGE_SIZE = {"DiT": 256, "PixArt": 512}
TAKEN_BY = {
    "architecture": "state dicts of the DiT and SiT authors",
    "num_heads": "state dicts of the DiT and SiT authors",
    "image_size": "models of images",
    "text_length": "models that take a prompt",
    "inputs": "a network of your own (package.module:factory)",
}
"""What each option of a source is for; one that would have no effect is refused."""

SIZES = ("num_layers", "num_attention_heads", "attention_head_dim", "in_channels", "sample_size", "patch_size")
"""Of a configuration; where one is left out, diffusers has a default."""

CLASSES: dict[str, Any] = {dit.ARCHITECTURE: DiTTransformer2DModel, pixart.ARCHITECTURE: PixArtTransformer2DModel}

FILES = ("model_index.json", "config.json", "diffusion_pytorch_model*", "transformer/*", "scheduler/*", "vae/*")
"""What is downloaded of a hub repository: not the text encoder, which `run` loads where a prompt is given."""


def model_from_source(
    source: str | SourceOptions,
    precision: str = "fp32",
    cache: Sequence[str] | None = None,
) -> Model:
    """Load what `source` names with its cache sites in `precision` (fp32, fp16 or bf16), what is between them in fp32.

    `cache` names kinds of sites or patterns over module paths; all kinds of the architecture when it is None.
    Raises `ModelError` for a source that is unknown or that does not hold a whole model, `ExportError` for sites that
    are not there.
    """
    options = source if isinstance(source, SourceOptions) else SourceOptions(source=source)
    name = options.source
    if precision not in PRECISIONS:
        raise ModelError(f"the precision is {precision!r}; known are {', '.join(PRECISIONS)}")
    if not name.strip():
        raise ModelError(f"no source is named; {KNOWN}")
    path = Path(name).expanduser()
    if name == "digits":
        folder = Path(str(files("fora_trt"))) / "models" / "digits"
        return _Loading(options, precision, cache).from_folder("digits", folder)
    if name.startswith(RANDOM):
        return _Loading(options, precision, cache).random(name.removeprefix(RANDOM))
    if path.is_file() and path.suffix in SUFFIXES:
        return _Loading(options, precision, cache).from_state_dict(path)
    if path.is_dir():
        return _Loading(options, precision, cache).from_folder(path.resolve().name, path)
    if FACTORY.fullmatch(name):
        return _Loading(options, precision, cache).from_factory()
    if HUB_ID.fullmatch(name) and not path.exists() and path.suffix not in SUFFIXES:
        return _Loading(options, precision, cache).from_folder(name.split("/")[1], _downloaded(name), vae=name)
    found = "no such file" if path.suffix in SUFFIXES else "neither a file, a folder nor a name that fora-trt knows"
    raise ModelError(f"the source {name!r} is {found}; {KNOWN}")


class _Loading:
    """One call of `model_from_source`: its options, and a way for each kind of source."""

    def __init__(self, options: SourceOptions, precision: str, cache: Sequence[str] | None) -> None:
        self.options, self.precision, self.cache = options, precision, cache

    def random(self, name: str) -> Model:
        """A published size with random weights."""
        known = {**dict.fromkeys(dit.published_names(), "DiT"), **dict.fromkeys(pixart.PUBLISHED, "PixArt")}
        if name not in known:
            raise ModelError(f"there is no model 'random:{name}'; known are {', '.join(known)}")
        height, width = self.options.image_size or (DEFAULT_IMAGE_SIZE[known[name]],) * 2
        self._takes("image_size", *(["text_length"] if known[name] == "PixArt" else []))
        if known[name] == "DiT":
            config = dit.config_from_name(name, self._square(height, width))
            spec = dit.spec_from_config(config, sample_size=config["sample_size"], scale=dit.VAE_SCALE, pixels=False)
            scheduler: Mapping[str, Any] = dit.SCHEDULER
        else:
            side = DEFAULT_IMAGE_SIZE["PixArt"] // dit.VAE_FACTOR
            size = self._latent_size((side, side), dit.VAE_FACTOR, 2)
            config = pixart.config_from_name(name, max(size))
            spec = self._pixart_spec(config, size, pixart.PUBLISHED[name], {}, None)
            scheduler = pixart.SCHEDULER
        module = _empty(pixart.ARCHITECTURE if known[name] == "PixArt" else dit.ARCHITECTURE, config)
        if known[name] == "DiT":
            dit.share_embedders(module, None)
        return self._model(
            f"random-{name.replace('/', '-')}", module, spec, config, scheduler, None, dit.VAE_FACTOR,
            lambda dtypes: draw_weights(module, dtypes),
        )  # fmt: skip

    def from_folder(self, name: str, folder: Path, vae: str | None = None) -> Model:
        """A pipeline in diffusers form, or its transformer alone. `vae` is where its VAE is found again."""
        source = self.options.source
        bare = (folder / "config.json").is_file()
        part = folder if bare else folder / "transformer"
        config = _config(part / "config.json", "transformer", source)
        architecture = str(config.get("_class_name", "nothing that names its class"))
        if architecture not in CLASSES:
            raise ModelError(
                f"{source!r} holds {architecture}; fora-trt knows {', '.join(CLASSES)}, and for any other network "
                "package.module:factory with --cache patterns, see 'A network of your own' in the README"
            )
        index = {} if bare else _config(folder / "model_index.json", "pipeline", source)
        autoencoder = _autoencoder(folder, source) if _has(index, "vae") else None
        where = (vae or str(folder)) if autoencoder else None
        own_scheduler = None if bare else _config(folder / "scheduler/scheduler_config.json", "scheduler", source)
        tensors = tensors_from_folder(part)
        module = _empty(architecture, config)
        config = {**config, **dict(module.config)}  # with the defaults of what is left out
        patch = config["patch_size"]
        if architecture == dit.ARCHITECTURE:
            self._takes("image_size")
            pixels = autoencoder is None and config["in_channels"] in (1, 3)
            factor = 1 if pixels else _vae_factor(autoencoder)
            spec = dit.spec_from_config(
                config,
                sample_size=self._square(
                    *self._latent_size((config["sample_size"],) * 2, factor, config["patch_size"])
                ),
                scale=1.0 if pixels else (autoencoder or {}).get("scaling_factor") or dit.VAE_SCALE,
                pixels=pixels,
            )
            dit.share_embedders(module, tensors)
        else:
            self._takes("image_size", "text_length")
            named = str(index.get("_class_name"))
            pipeline = named if named in pixart.TEXT_LENGTH else pixart.ALPHA
            factor = _vae_factor(autoencoder)
            size = self._latent_size((config["sample_size"],) * 2, factor, patch)
            encoder = (vae or str(folder)) if _has(index, "text_encoder") else None
            spec = self._pixart_spec(config, size, pipeline, autoencoder or {}, encoder)
        scheduler = own_scheduler or spec.scheduler or dit.SCHEDULER
        fill = self._placing(module, tensors, config)
        return self._model(name, module, spec, config, scheduler, where, factor, fill)

    def from_state_dict(self, path: Path) -> Model:
        """A file of the DiT or SiT authors."""
        self._takes("image_size", "architecture", "num_heads")
        tensors, what = tensors_from_file(path), str(path)
        if not is_dit_checkpoint(tensors):
            shown = ", ".join(list(tensors)[:4])
            raise ModelError(
                f"{what} is not a state dict of the DiT or SiT authors: it holds {shown}, ...; give the folder of a "
                "model in diffusers form, or package.module:factory for a network of your own"
            )
        config = config_from_checkpoint(tensors, self.options.num_heads, what)
        trained = config["sample_size"]
        size = self._square(*self._latent_size((trained, trained), dit.VAE_FACTOR, config["patch_size"]))
        config["sample_size"] = size
        spec = dit.spec_from_config(config, sample_size=size, scale=dit.VAE_SCALE, pixels=False)
        spec = guided_as_authors(spec)
        if self._architecture(path) == SIT:
            spec = sit_spec(spec)
        module = _empty(dit.ARCHITECTURE, config)
        dit.share_embedders(module, None)
        positions = tensors.get("pos_embed")
        set_up_as_authors(module, positions, what)
        renamed = as_diffusers(tensors, config["num_layers"])
        return self._model(
            path.stem, module, spec, config, spec.scheduler or dit.SCHEDULER, dit.VAE,
            dit.VAE_FACTOR, self._placing(module, renamed, config),
        )  # fmt: skip

    def from_factory(self) -> Model:
        """A module of the user's own."""
        self._takes("inputs")
        module, spec = module_from_factory(self.options)

        def cast(dtypes: Mapping[str, torch.dtype]) -> None:
            for name, parameter in module.named_parameters():
                parameter.data = parameter.data.to(dtypes[name])

        name = self.options.source.replace(":", "-")
        assert spec.latents is not None
        factor = 1 if spec.latents.pixels else None
        return self._model(name, module, spec, {}, spec.scheduler or dit.SCHEDULER, None, factor, cast)

    def _model(
        self,
        name: str,
        module: nn.Module,
        spec: ModelSpec,
        config: Mapping[str, Any],
        scheduler: Mapping[str, Any],
        vae: str | None,
        factor: int | None,
        fill: Callable[[Mapping[str, torch.dtype]], None],
    ) -> Model:
        """Find the cache sites, let `fill` place the weights in the dtypes that follow from them, set the casts."""
        sites = find_sites(module, spec.cache_sites, self.cache)
        paths = [path for path, _ in sites]
        kept = spec.fp32_in_bf16 if self.precision == "bf16" else ()
        fill(dtypes_of_parameters(module, self.precision, paths, kept))
        half = None if self.precision == "fp32" else HalfPrecision(module, self.precision, paths, kept)
        assert spec.latents is not None
        size = spec.latents.shape[1:]
        shown = {key: value for key, value in config.items() if not key.startswith("_")}
        if len(set(size)) == 1 and "sample_size" in shown:
            shown["sample_size"] = size[-1]  # a pipeline takes its default image size from here
        return Model(
            options=self.options,
            name=name,
            module=module.eval().requires_grad_(False),
            spec=spec,
            sites=sites,
            config=shown,
            precision=self.precision,
            half=half,
            scheduler=dict(scheduler),
            vae=self.options.vae or vae,
            image_size=(size[0] * factor, size[1] * factor) if factor and len(size) == 2 else None,
        )

    def _placing(
        self, module: nn.Module, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> Callable[[Mapping[str, torch.dtype]], None]:
        told = {key: config.get(key) for key in ("num_layers", "num_attention_heads", "attention_head_dim")}
        fits = (
            f"the configuration says {', '.join(f'{key} {value}' for key, value in told.items())}{_depth_of(tensors)}"
        )
        return lambda dtypes: place_weights(module, tensors, dtypes, repr(self.options.source), fits)

    def _takes(self, *names: str) -> None:
        """Raise `ModelError` for an option that says nothing of this kind of source."""
        for name, kind in TAKEN_BY.items():
            if getattr(self.options, name) is not None and name not in names:
                raise ModelError(f"{self.options.source!r} takes no {name}, which is for {kind}; leave it out")

    def _latent_size(self, default: tuple[int, int], factor: int, patch: int) -> tuple[int, int]:
        """Height and width of the latents, which are cut into patches; `default` is the model's own."""
        if self.options.image_size is None:
            return default
        height, width = self.options.image_size
        if any(side < 1 or side % (factor * patch) for side in (height, width)):
            shown = str(height) if height == width else f"{height} x {width}"
            raise ModelError(
                f"an image size of {shown} does not fit {self.options.source!r}: give a multiple of {factor * patch}"
            )
        return height // factor, width // factor

    def _square(self, height: int, width: int) -> int:
        if height != width:
            raise ModelError(f"{self.options.source!r} is a DiT, whose images are square; give --image-size one number")
        return height

    def _pixart_spec(
        self,
        config: Mapping[str, Any],
        size: tuple[int, int],
        pipeline: str,
        autoencoder: Mapping[str, Any],
        encoder: str | None,
    ) -> ModelSpec:
        return pixart.spec_from_config(
            config,
            size=size,
            factor=_vae_factor(autoencoder),
            scale=autoencoder.get("scaling_factor") or pixart.VAE_SCALE[pipeline],
            shift=autoencoder.get("shift_factor") or 0.0,
            text=TextSpec(self.options.text_length or pixart.TEXT_LENGTH[pipeline], pipeline, encoder),
        )

    def _architecture(self, path: Path) -> str:
        """DiT or SiT: their weights have the same names and shapes, so it is said, or told by the file's name."""
        said = self.options.architecture
        known = {name.lower(): name for name in (DIT, SIT)}
        if said is not None and said.lower() not in known:
            raise ModelError(f"the architecture is {said!r}; a state dict can be {' or '.join(known.values())}")
        return known[said.lower()] if said else SIT if path.name.lower().startswith("sit") else DIT


def _empty(architecture: str, config: Mapping[str, Any]) -> Any:
    """The diffusers module of a configuration, its parameters without memory; positions and the like are computed."""
    for key in SIZES:
        if key in config and (type(config[key]) is not int or config[key] < 1):
            raise ModelError(
                f"the configuration is none of a {architecture}: {key} is {config[key]!r}, and a whole number from 1 "
                "on was expected"
            )
    try:
        with init_empty_weights(include_buffers=False), quiet("diffusers"):
            module = CLASSES[architecture].from_config(dict(config))
    except Exception as error:  # whatever a value that it does not check leads to
        raise ModelError(f"the configuration is none of a {architecture}: {first_line(error)}") from error
    return module


def _depth_of(tensors: Mapping[str, Tensor]) -> str:
    found = {int(match[1]) for name in tensors if (match := re.match(r"(?:transformer_)?blocks\.(\d+)\.", name))}
    return f", and the weights have {max(found) + 1} blocks (num_layers)" if found else ""


def _config(path: Path, what: str, source: str) -> dict[str, Any]:
    """A JSON file of a model's configuration. Raises `ModelError` where it is none."""
    if not path.is_file():
        raise ModelError(
            f"no {what} configuration was found for {source!r}: a diffusers folder has transformer/config.json, "
            f"scheduler/scheduler_config.json and model_index.json; {KNOWN}"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"the {what} configuration of {source!r} is not JSON: {first_line(error)}") from error
    if not isinstance(config, dict):
        raise ModelError(f"the {what} configuration of {source!r} is not a table of settings")
    return config


def _downloaded(hub_id: str) -> Path:
    """The repository's parts that an export needs, from the cache or the hub."""
    from huggingface_hub import snapshot_download

    try:
        with quiet("huggingface_hub"):  # it speaks of every retry; the error at the end says enough
            return Path(snapshot_download(hub_id, allow_patterns=list(FILES)))
    except Exception as error:  # of many libraries: no network, no such repository, no right to read it
        raise ModelError(
            f"{hub_id!r} is no folder here and cannot be downloaded ({type(error).__name__}); download the repository "
            f"where there is a network (hf download {hub_id} --local-dir {hub_id.split('/')[1]}), copy that folder "
            "here and give its path"
        ) from error


def _has(index: Mapping[str, Any], part: str) -> bool:
    """Whether a pipeline comes with this part: its index names library and class, or twice nothing."""
    named = index.get(part)
    return isinstance(named, list) and any(named)


def _autoencoder(folder: Path, source: str) -> dict[str, Any]:
    """The configuration of a pipeline's VAE. Raises `ModelError` unless it tells what latents are."""
    config = _config(folder / "vae" / "config.json", "VAE", source)
    numbers = [config.get(key) for key in ("scaling_factor", "shift_factor")]
    blocks = config.get("block_out_channels")
    if not isinstance(blocks, list) or not blocks or not all(isinstance(one, float | int | None) for one in numbers):
        raise ModelError(
            f"the VAE configuration of {source!r} is none of an AutoencoderKL: block_out_channels is {blocks!r}, and "
            f"scaling_factor and shift_factor are {numbers[0]!r} and {numbers[1]!r}"
        )
    return config


def _vae_factor(autoencoder: Mapping[str, Any] | None) -> int:
    """How many pixels one latent pixel covers along a side."""
    return 2 ** (len(autoencoder["block_out_channels"]) - 1) if autoencoder else dit.VAE_FACTOR
