"""Load a `Model` from the SOURCE that a user names: determine the kind of source and call the loader of this kind.

Every loader returns an `EmptyModel`: a module, a `ModelSpec`, and a function that places the weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from fora_trt.contract import PRECISIONS
from fora_trt.errors import ModelError
from fora_trt.models.architectures import known_sources
from fora_trt.models.assembly import EmptyModel, model_from_empty
from fora_trt.models.checkpoint import SUFFIXES
from fora_trt.models.custom import empty_from_factory, folder_of_module
from fora_trt.models.diffusers_folder import empty_from_folder, empty_from_hub
from fora_trt.models.options import SourceOptions
from fora_trt.models.parts import local
from fora_trt.models.random_weights import empty_of_published_size
from fora_trt.models.spec import Model
from fora_trt.models.state_dict import empty_from_state_dict
from fora_trt.untrusted import shown

RANDOM = "random:"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@dataclass(frozen=True)
class Source:
    """A source whose kind is known: the name that a bundle of it gets, its options, and its loader.

    The options name local files by absolute paths, so that they are found from any working directory.
    """

    name: str
    options: SourceOptions
    load: Callable[[], EmptyModel]


def model_from_source(
    source: str | SourceOptions,
    precision: str = "fp32",
    cache: Sequence[str] | None = None,
) -> Model:
    """Load the model of `source`, with cache sites in `precision` (fp32, fp16 or bf16) and everything else in fp32.

    `cache` lists kinds of sites or patterns over module paths, in place of `cache` and `exclude` of the options. Raises
    `ModelError` for a source that is unknown or incomplete, `ExportError` for cache sites that do not exist.
    """
    given = source if isinstance(source, SourceOptions) else SourceOptions(source=source)
    if cache is not None:
        given = given.model_copy(update={"cache": tuple(cache), "exclude": None})
    found = source_from_options(given)
    if precision not in PRECISIONS:
        raise ModelError(f"the precision is {precision!r}; choose one of {', '.join(PRECISIONS)}")
    empty, options = found.load(), found.options
    if is_factory(options.source) and options.folder is None:
        options = options.model_copy(update={"folder": folder_of_module(options.source)})
    return model_from_empty(empty, options, precision)


def source_from_options(given: SourceOptions) -> Source:
    """Determine the kind of a source; nothing is loaded or downloaded. Raises `ModelError` for an unknown source."""
    name = given.source
    if not name.strip():
        raise ModelError(f"the source is empty; {known_sources()}")
    vae = given.vae and (local(given.vae) if _exists(Path(given.vae).expanduser()) else given.vae)
    options, path = given.model_copy(update={"vae": vae}), Path(name).expanduser()
    if name == "digits":
        folder = Path(str(files("fora_trt"))) / "models" / "digits"
        return Source(name, options, lambda: empty_from_folder(options, name, folder))
    if name.startswith(RANDOM):
        size = name.removeprefix(RANDOM)
        return Source(f"random-{size.replace('/', '-')}", options, lambda: empty_of_published_size(options, size))
    if _exists(path):
        return _local_source(options.model_copy(update={"source": local(name)}))
    if is_factory(name):
        return Source(name.replace(":", "-"), options, lambda: empty_from_factory(options))
    if HUB_ID.fullmatch(name) and path.suffix.lower() not in SUFFIXES:
        return Source(name.split("/")[1], options, lambda: empty_from_hub(options))
    problem = "does not exist" if path.suffix.lower() in SUFFIXES else "is neither a file, a folder nor a known name"
    raise ModelError(f"the source '{shown(name)}' {problem}; {known_sources()}")


def _local_source(options: SourceOptions) -> Source:
    """A file or folder, whose path is absolute."""
    path = Path(options.source)
    if path.is_dir():
        name = path.resolve().name
        return Source(name, options, lambda: empty_from_folder(options, name, path))
    if not path.is_file():
        raise ModelError(f"{path} is neither a file nor a folder; give a weight file or a diffusers folder")
    name = path.name.lstrip(".")
    while (end := Path(name).suffix) and end.lower() in SUFFIXES:
        name = name.removesuffix(end)
    return Source(name or "model", options, lambda: empty_from_state_dict(options, path, name or "model"))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that is too long, or contains NUL
        return False


def is_factory(source: str) -> bool:
    """Whether a source is `package.module:factory`, code that loading the model would run."""
    known = source.startswith(RANDOM) or _exists(Path(source).expanduser())
    return FACTORY.fullmatch(source) is not None and not known
