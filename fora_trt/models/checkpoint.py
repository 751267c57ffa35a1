"""Weight files: opened lazily; tensors are read, cast and placed in an empty module one at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from fora_trt.downloads import is_safetensors, problem_of, text_of
from fora_trt.errors import ModelError, first_line
from fora_trt.models.pickles import content_of_pickle

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".tar")
"""Usual suffixes of weight files; what a file contains is read from the file."""

TRANSFORMER = "diffusion_pytorch_model"
"""Name of the weight files of a diffusers model, before variant, number of the shard and suffix."""

PREFERRED = (None, "fp32", "bf16", "fp16")
"""Variants that differ in precision, the best first."""

NAMED = 3
"""Largest number of tensors that a message lists by name."""


class Tensors(Mapping[str, Tensor]):
    """Tensors by name; each is read on access."""

    def __init__(self, read: Mapping[str, Callable[[], Tensor]]) -> None:
        self._read = dict(read)

    def __getitem__(self, name: str) -> Tensor:
        return self._read[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._read)

    def __len__(self) -> int:
        return len(self._read)


class Renamed(Mapping[str, Tensor]):
    """Tensors under other names: `names` has the name in `tensors` for each new one; each is read on access."""

    def __init__(self, names: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
        self._names, self._tensors = names, tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def content_of_file(path: Path) -> Any:
    """The content of a weight file, whatever its name: `Tensors` of a .safetensors file, or the object in a pickle.

    No code in a pickle runs. Raises `ModelError` for a file that is missing, of another kind, or damaged.
    """
    try:
        if problem := problem_of(path):
            raise ModelError(f"{path} {problem}")
        return _safetensors(path) if is_safetensors(path) else content_of_pickle(path)
    except ModelError:
        raise
    except Exception as error:  # a file of another format can raise anything
        reason = f"{type(error).__name__}: {first_line(error)}".rstrip(": ")
        raise ModelError(f"the weights in {path} cannot be read ({reason}); download or copy the file again") from error


def tensors_from_file(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a weight file that contains nothing else. Raises `ModelError`."""
    content = content_of_file(path)
    if isinstance(content, Tensors):
        return content
    if not isinstance(content, Mapping) or not content:
        kind = "an empty dictionary" if content == {} else f"an object of type {type(content).__name__}"
        raise ModelError(f"{path} contains {kind}; a dictionary of tensors was expected; save model.state_dict()")
    for name, one in content.items():
        if not isinstance(name, str) or not isinstance(one, Tensor):
            raise ModelError(
                f"{path} contains {name!r}: {type(one).__name__}; a dictionary of tensors was expected; save "
                "model.state_dict()"
            )
    return content


def variants_in(folder: Path, base: str = TRANSFORMER) -> dict[str | None, Path]:
    """For each variant of the weights in a folder the file, or the index of several files; None for no variant.

    The names are those that diffusers and transformers write, such as `{base}.safetensors`, `{base}.fp16.bin`,
    `{base}.safetensors.index.json` and `{base}.safetensors.index.fp16.json`. A .safetensors file is preferred.
    """
    kinds = r"(?P<kind>safetensors|bin)"
    patterns = (
        rf"{re.escape(base)}(?:\.(?P<variant>[\w-]+))?\.{kinds}",
        rf"{re.escape(base)}(?:\.(?P<variant>[\w-]+))?\.{kinds}\.index\.json",
        rf"{re.escape(base)}\.{kinds}\.index(?:\.(?P<variant>[\w-]+))?\.json",
    )
    found: dict[tuple[int, int], dict[str | None, Path]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        for k, pattern in enumerate(patterns):
            if (match := re.fullmatch(pattern, path.name)) and not re.search(r"-\d+-of-\d+", path.name):
                order = found.setdefault((match["kind"] == "bin", min(k, 1)), {})
                order.setdefault(match["variant"], path)
    return {variant: path for order in sorted(found, reverse=True) for variant, path in found[order].items()}


def preferred(variants: Mapping[str | None, Path]) -> str | None:
    """The variant that is used without an option: none, else the best precision, else the first by name."""
    return min(variants, key=lambda one: (PREFERRED.index(one) if one in PREFERRED else len(PREFERRED), str(one)))


def tensors_of(file: Path) -> Mapping[str, Tensor]:
    """The tensors of a weight file, or of all files that an index lists. Raises `ModelError`."""
    return _sharded(file) if file.suffix == ".json" else tensors_from_file(file)


def depth_of(names: Iterable[str]) -> int:
    """Number of blocks (num_layers) in the names of tensors, of diffusers or of the authors; 0 if they name none."""
    found = (re.match(r"(?:transformer_)?blocks\.(\d+)\.", name) for name in names)
    return 1 + max((int(one[1]) for one in found if one), default=-1)


def _safetensors(path: Path) -> Tensors:
    file: Any = safe_open(path, framework="pt")
    return Tensors({name: lambda name=name: file.get_tensor(name) for name in file.keys()})  # type: ignore[misc] # noqa: SIM118 # a file is no mapping


def files_of_index(index: Path) -> list[Path]:
    """The weight files that an index lists, in its folder. Raises `ModelError`."""
    try:
        if problem := problem_of(index, text=True):
            raise ModelError(f"{index} {problem}")
        files: dict[str, str] = json.loads(text_of(index))["weight_map"]
        names = sorted({Path(file).name for file in files.values()})
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ModelError(
            f"the index {index} of the weights cannot be read ({first_line(error)}); download or copy the file again"
        ) from error
    for name in names:
        if not (index.parent / name).is_file():
            raise ModelError(f"{index.parent / name} is missing, which {index.name} lists; download or copy it")
    return [index.parent / name for name in names]


def _sharded(index: Path) -> Tensors:
    shards = [tensors_from_file(file) for file in files_of_index(index)]
    return Tensors({name: lambda shard=shard, name=name: shard[name] for shard in shards for name in shard})  # type: ignore[misc]


def place_weights(
    module: nn.Module, tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype], what: str, fits: str
) -> None:
    """Fill an empty module, whose parameters are on the meta device; buffers do not change.

    `tensors` may hold a copy for each name of a shared parameter; the first is used. Raises `ModelError` that lists
    missing and unexpected tensors, wrong shapes and invalid values, and ends with `fits`, a hint on what would fit.
    """
    wanted = dict(module.named_parameters(remove_duplicate=False))
    buffers = dict(module.named_buffers())
    missing = [name for name in wanted if name not in tensors]
    extra = [name for name in tensors if name not in wanted and name not in buffers]
    misshapen, odd = [], []
    placed: dict[int, nn.Parameter] = {}
    if not missing and not extra:
        for name, empty in wanted.items():
            tensor = None if id(empty) in placed else tensors[name]
            if tensor is not None and tensor.shape != empty.shape:
                misshapen.append(f"{name} is {list(tensor.shape)} instead of {list(empty.shape)}")
            elif tensor is not None and (problem := _problem_of(tensor)):
                odd.append(f"{name} {problem}")
            elif tensor is not None:
                placed[id(empty)] = nn.Parameter(_own(tensor, dtypes[name]), requires_grad=False)
    wrong = [
        _counted(missing, "missing"),
        _counted(extra, "unexpected"),
        _counted(misshapen, "of wrong shape"),
        _counted(odd, "invalid"),
    ]
    if any(wrong):
        raise ModelError(f"the weights of {what} do not fit: {'; '.join(filter(None, wrong))}; {fits}")
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            setattr(owner, name, placed[id(parameter)])


def _problem_of(tensor: Tensor) -> str | None:
    """Why a tensor of the right shape is not a valid weight: it is quantized, sparse, or not finite; None if valid."""
    if not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.device.type != "cpu":
        return f"is {tensor.dtype}, {tensor.layout} on {tensor.device.type}"
    return None if tensor.float().isfinite().all() else "is not finite"


def _own(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast a tensor; one that has the dtype already stays memory-mapped."""
    return tensor.to(dtype).contiguous()


def _counted(names: list[str], verdict: str) -> str:
    shown = ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
    return f"{len(names)} {verdict} ({shown})" if names else ""
