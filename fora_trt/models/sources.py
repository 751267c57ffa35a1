"""Load a `Model` from the SOURCE that a user names: determine the kind of source and call the loader of this kind.

Every loader returns an `EmptyModel`: a module, a `ModelSpec`, and a function that places the weights.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from fora_trt.contract import PRECISIONS
from fora_trt.errors import ModelError
from fora_trt.models.architectures import known_sources
from fora_trt.models.assembly import EmptyModel, model_from_empty
from fora_trt.models.checkpoint import SUFFIXES
from fora_trt.models.custom import empty_from_factory
from fora_trt.models.diffusers_folder import empty_from_folder, empty_from_hub
from fora_trt.models.options import SourceOptions
from fora_trt.models.random_weights import empty_of_published_size
from fora_trt.models.spec import Model
from fora_trt.models.state_dict import empty_from_state_dict

RANDOM = "random:"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def model_from_source(
    source: str | SourceOptions,
    precision: str = "fp32",
    cache: Sequence[str] | None = None,
) -> Model:
    """Load the model of `source`, with cache sites in `precision` (fp32, fp16 or bf16) and everything else in fp32.

    `cache` lists kinds of sites or patterns over module paths; None means all kinds of the architecture. Raises
    `ModelError` for a source that is unknown or incomplete, `ExportError` for cache sites that do not exist.
    """
    options = source if isinstance(source, SourceOptions) else SourceOptions(source=source)
    if precision not in PRECISIONS:
        raise ModelError(f"the precision is {precision!r}; choose one of {', '.join(PRECISIONS)}")
    return model_from_empty(_empty(options), options, precision, cache)


def _empty(options: SourceOptions) -> EmptyModel:
    """The model without its weights, from the loader of its kind of source."""
    name = options.source
    if not name.strip():
        raise ModelError(f"the source is empty; {known_sources()}")
    path = Path(name).expanduser()
    if name == "digits":
        return empty_from_folder(options, name, Path(str(files("fora_trt"))) / "models" / "digits")
    if name.startswith(RANDOM):
        return empty_of_published_size(options, name.removeprefix(RANDOM))
    if path.is_file() and path.suffix in SUFFIXES:
        return empty_from_state_dict(options, path)
    if path.is_dir():
        return empty_from_folder(options, path.resolve().name, path)
    if FACTORY.fullmatch(name):
        return empty_from_factory(options)
    if HUB_ID.fullmatch(name) and not path.exists() and path.suffix not in SUFFIXES:
        return empty_from_hub(options)
    problem = "does not exist" if path.suffix in SUFFIXES else "is neither a file, a folder nor a known name"
    raise ModelError(f"the source {name!r} {problem}; {known_sources()}")
