"""Weight files: opened lazily; tensors are read, cast and placed in an empty module one at a time."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from fora_trt.errors import ModelError, first_line

PICKLES = (".pt", ".pth", ".bin", ".ckpt")
SUFFIXES = (".safetensors", *PICKLES)
AVERAGED = ("ema", "state_dict", "model")
"""Keys under which training scripts store the weights in a larger dictionary; averaged weights (EMA) come first."""

WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes that distributed training and torch.compile add to every parameter name."""

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


def tensors_from_file(path: Path) -> Tensors:
    """The weights of a .safetensors file or of a PyTorch file. Raises `ModelError`.

    PyTorch files are pickles; `weights_only=True` prevents code in them from running.
    """
    try:
        found = _safetensors(path) if path.suffix == ".safetensors" else _pickled(path)
    except ModelError:
        raise
    except Exception as error:  # a file of another format can raise anything
        reason = f"{type(error).__name__}: {first_line(error)}".rstrip(": ")
        raise ModelError(f"the weights in {path} cannot be read ({reason}); download or copy the file again") from error
    return _unwrapped(found)


def tensors_from_folder(folder: Path) -> Tensors:
    """The weights of a model in diffusers format: one file, or several with an index. Raises `ModelError`."""
    names = [f"diffusion_pytorch_model{end}" for end in (".safetensors", ".bin", ".fp16.safetensors")]
    for name in names:
        if (folder / name).is_file():
            return tensors_from_file(folder / name)
        if (index := folder / f"{name}.index.json").is_file():
            return _sharded(folder, index)
    raise ModelError(
        f"{folder} contains no weights: {' or '.join(names[:2])} was expected; download or copy the folder again"
    )


def _safetensors(path: Path) -> Tensors:
    file: Any = safe_open(path, framework="pt")
    return Tensors({name: lambda name=name: file.get_tensor(name) for name in file.keys()})  # type: ignore[misc] # noqa: SIM118 # a file is no mapping


def _sharded(folder: Path, index: Path) -> Tensors:
    try:
        files: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = {Path(file).name for file in files.values()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(
            f"the index {index} of the weights cannot be read ({first_line(error)}); download or copy the file again"
        ) from error
    shards = [tensors_from_file(folder / name) for name in sorted(names)]
    return Tensors({name: lambda shard=shard, name=name: shard[name] for shard in shards for name in shard})  # type: ignore[misc]


def _pickled(path: Path) -> Tensors:
    options: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
    try:
        try:
            content = torch.load(path, mmap=True, **options)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            content = torch.load(path, **options)  # files older than PyTorch 1.6 cannot be memory-mapped
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{path} contains objects other than tensors ({_culprit(error)}), and loading them could run code of its "
            "author; save only the weights, with torch.save(model.state_dict(), ...) or as .safetensors"
        ) from error
    inner = content
    for key in AVERAGED:
        if isinstance(inner, dict) and isinstance(inner.get(key), dict):
            inner = inner[key]
    named = isinstance(inner, dict) and all(isinstance(name, str) for name in inner)
    if not named or not inner or not all(isinstance(one, Tensor) for one in inner.values()):
        kind = f"an object of type {type(inner).__name__}" if not isinstance(inner, dict) else _odd_one(inner)
        raise ModelError(f"{path} contains {kind}; a dictionary of tensors was expected; save model.state_dict()")
    return Tensors({name: lambda tensor=tensor: tensor for name, tensor in inner.items()})  # type: ignore[misc]


def _odd_one(content: Mapping[Any, Any]) -> str:
    """The first entry of a dictionary that is not a tensor under a string name, for a message."""
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            return f"a dictionary with {name!r}: {type(value).__name__}"
    return "an empty dictionary"


def _culprit(error: Exception) -> str:
    """The class that the unpickler refused, cut out of PyTorch's message, which advises to disable the check."""
    words = str(error).replace("\n", " ").split()
    refused = [after.strip("`.,") for word, after in pairwise(words) if word in ("GLOBAL", "global")]
    return refused[0] if refused else first_line(error)[:120]


def _unwrapped(tensors: Tensors) -> Tensors:
    names = list(tensors)
    for prefix in WRAPPERS:
        if names and all(name.startswith(prefix) for name in names):
            stripped = {name.removeprefix(prefix): lambda name=name: tensors[name] for name in names}
            return _unwrapped(Tensors(stripped))
    return tensors


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
