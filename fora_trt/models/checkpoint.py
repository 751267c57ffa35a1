"""Weights in files: opened without being read, then cast and placed in an empty module one tensor at a time."""

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
"""Where training scripts keep the weights in a larger dictionary; the averaged ones are those to sample with."""

WRAPPERS = ("module.", "_orig_mod.")
"""What distributed training and torch.compile put before every name."""

NAMED = 3
"""How many tensors a message names before it counts the rest."""


class Tensors(Mapping[str, Tensor]):
    """Tensors by name, each read when it is asked for."""

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

    PyTorch files are pickles: they are read with `weights_only=True`, which runs no code of theirs.
    """
    try:
        found = _safetensors(path) if path.suffix == ".safetensors" else _pickled(path)
    except ModelError:
        raise
    except Exception as error:  # a file that is no such one can lead to any
        reason = f"{type(error).__name__}: {first_line(error)}".rstrip(": ")
        raise ModelError(f"the weights in {path} cannot be read ({reason}); download or copy the file again") from error
    return _unwrapped(found)


def tensors_from_folder(folder: Path) -> Tensors:
    """The weights of a model in diffusers form, in one file or in several with an index. Raises `ModelError`."""
    names = [f"diffusion_pytorch_model{end}" for end in (".safetensors", ".bin", ".fp16.safetensors")]
    for name in names:
        if (folder / name).is_file():
            return tensors_from_file(folder / name)
        if (index := folder / f"{name}.index.json").is_file():
            return _sharded(folder, index)
    raise ModelError(f"the weights in {folder} cannot be read: there is no {' or '.join(names[:2])}")


def _safetensors(path: Path) -> Tensors:
    file: Any = safe_open(path, framework="pt")
    return Tensors({name: lambda name=name: file.get_tensor(name) for name in file.keys()})  # type: ignore[misc] # noqa: SIM118 # a file is no mapping


def _sharded(folder: Path, index: Path) -> Tensors:
    try:
        files: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = {Path(file).name for file in files.values()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"the index {index} of the weights cannot be read: {first_line(error)}") from error
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
            content = torch.load(path, **options)  # a file of before PyTorch 1.6, which cannot be mapped
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{path} holds more than tensors ({_culprit(error)}), and loading that could run code of whoever made it; "
            "save the weights alone: torch.save(model.state_dict(), ...), or as .safetensors"
        ) from error
    inner = content
    for key in AVERAGED:
        if isinstance(inner, dict) and isinstance(inner.get(key), dict):
            inner = inner[key]
    named = isinstance(inner, dict) and all(isinstance(name, str) for name in inner)
    if not named or not inner or not all(isinstance(one, Tensor) for one in inner.values()):
        kind = type(inner).__name__ if not isinstance(inner, dict) else _odd_one(inner)
        raise ModelError(f"{path} holds {kind} where a dictionary of tensors was expected; save model.state_dict()")
    return Tensors({name: lambda tensor=tensor: tensor for name, tensor in inner.items()})  # type: ignore[misc]


def _odd_one(content: Mapping[Any, Any]) -> str:
    """What makes a dictionary something else than tensors by name."""
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            return f"a dictionary with {name!r}: {type(value).__name__}"
    return "an empty dictionary"


def _culprit(error: Exception) -> str:
    """What the unpickler would not make: it names it in the middle of an advice that must not be followed."""
    words = str(error).replace("\n", " ").split()
    told = [after.strip("`.,") for word, after in pairwise(words) if word in ("GLOBAL", "global")]
    return told[0] if told else first_line(error)[:120]


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
    """Fill an empty module, whose parameters are on the meta device; buffers are left as they are.

    `tensors` may hold copies for each name of a shared parameter; the first is taken. Raises `ModelError` that names
    what is missing, left over, of another shape or no numbers to compute with, and says what `fits`.
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
                misshapen.append(f"{name} is {list(tensor.shape)} and not {list(empty.shape)}")
            elif tensor is not None and (problem := _problem_of(tensor)):
                odd.append(f"{name} {problem}")
            elif tensor is not None:
                placed[id(empty)] = nn.Parameter(_own(tensor, dtypes[name]), requires_grad=False)
    wrong = [
        _counted(missing, "missing"),
        _counted(extra, "not expected"),
        _counted(misshapen, "of another shape"),
        _counted(odd, "unfit to compute with"),
    ]
    if any(wrong):
        raise ModelError(f"the weights of {what} do not fit: {'; '.join(filter(None, wrong))}; {fits}")
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            setattr(owner, name, placed[id(parameter)])


def _problem_of(tensor: Tensor) -> str | None:
    """Why a tensor of the right shape is no weight: quantized or sparse ones would need what belongs to them."""
    if not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.device.type != "cpu":
        return f"is {tensor.dtype}, {tensor.layout} on {tensor.device.type}"
    return None if tensor.float().isfinite().all() else "is not finite"


def _own(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast; a tensor that needs no cast stays where it is mapped."""
    return tensor.to(dtype).contiguous()


def _counted(names: list[str], verdict: str) -> str:
    shown = ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
    return f"{len(names)} {verdict} ({shown})" if names else ""
