"""PyTorch files, which are pickles: read with `weights_only=True`, so that no code in them runs.

Training scripts store more than tensors: arguments, configurations, NumPy numbers, whole modules. Each class that
PyTorch does not allow is replaced by a stand-in of this module, which keeps the state of the object and does nothing.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from fora_trt.errors import ModelError

RUNS_CODE = re.compile(
    r"(builtins\.)?(eval|exec|compile|open|setattr|delattr|__import__|input|breakpoint|globals|vars)|"
    r"io\.open|(os|nt|posix|sys|subprocess|commands|shutil|socket|runpy|importlib|pty|ctypes|webbrowser|code|pdb|timeit|multiprocessing|"
    r"asyncio|urllib|http|requests|builtins\.__\w+)\..*"
)
"""Names that no training script stores: a file that calls one of them was made to run code when it is loaded.

`getattr` is not one of them: Python 3.11.0 to 3.11.3 stores the member of an enumeration as a call of it.
"""

UNKNOWN = re.compile(r"GLOBAL (\S+) was not an allowed global|unsupported GLOBAL (\S+) whose module")
NO_DICTIONARY = re.compile(r"Can only SETITEMS? for .* but got <class 'stand-in\.(.+)'>")
NO_LIST = re.compile(r"Can only (?:append to|extend) lists, but got <class 'stand-in\.(.+)'>")
CALLED = re.compile(r"unrecognized function <stand-in\.(\S+) object")
"""Messages of PyTorch on a name that it does not allow, and on a stand-in that must be a container or is called."""


class StandIn:
    """Takes the place of an object of a class that is not loaded."""

    state: Any = None

    def __new__(cls, *arguments: object, **named: object) -> Any:
        return super().__new__(cls)

    def __init__(self, *arguments: object, **named: object) -> None:
        """Ignore the arguments."""

    def __setstate__(self, state: object) -> None:
        self.state = state

    def __hash__(self) -> int:
        return 0  # it may be a key of a dictionary


class DictionaryStandIn(StandIn):
    """Takes the place of an object of a subclass of `dict`."""

    def __new__(cls, *arguments: object, **named: object) -> Any:
        return OrderedDict()


class ListStandIn(StandIn):
    """Takes the place of an object of a subclass of `list`, or of a deque."""

    def __new__(cls, *arguments: object, **named: object) -> Any:
        return []


def content_of_pickle(path: Path) -> Any:
    """The object that `torch.save` stored in a file, with stand-ins for all objects except tensors and containers.

    Raises `ModelError` for a file that would run code or cannot be unpickled; a file of another format can raise
    anything.
    """
    try:
        unknown = set(get_unsafe_globals_in_checkpoint(path))
    except (ValueError, UnpicklingError):  # a file older than PyTorch 1.6, or pickled by another protocol
        unknown = set()
    kinds: dict[str, type[StandIn]] = dict.fromkeys(unknown, StandIn)
    while True:
        try:
            with safe_globals([(_stand_in(name, kind, path), name) for name, kind in kinds.items()]):
                return _loaded(path)
        except UnpicklingError as error:  # noqa: PERF203 # a few iterations at most
            name, kind = _needed(str(error))
            if called := CALLED.search(str(error)):
                raise _runs_code(called[1], path) from error
            if name is None or kinds.get(name) is kind:
                lines = str(error).partition("WeightsUnpickler error:")[2].split("\n")
                reason = next(filter(None, map(str.strip, lines)), "a damaged pickle")
                raise ModelError(
                    f"the weights in {path} cannot be read ({reason}); save only them, with "
                    "torch.save(model.state_dict(), ...) or as .safetensors"
                ) from error
            kinds[name] = kind


def _needed(message: str) -> tuple[str | None, type[StandIn]]:
    """The name that lacks a stand-in, and the kind of it; None for a message about something else."""
    for pattern, kind in ((UNKNOWN, StandIn), (NO_DICTIONARY, DictionaryStandIn), (NO_LIST, ListStandIn)):
        if found := pattern.search(message):
            name = next(filter(None, found.groups()))
            return name if "." in name else f"builtins.{name}", kind
    return None, StandIn


def _stand_in(name: str, kind: type[StandIn], path: Path) -> type[StandIn]:
    if RUNS_CODE.fullmatch(name):
        raise _runs_code(name, path)
    return type(name, (kind,), {"__module__": "stand-in", "__qualname__": name})


def _runs_code(name: str, path: Path) -> ModelError:
    return ModelError(
        f"{path} contains a call of {name}, so loading it could run code of its author; do not use this file: "
        "get the weights from their publisher, as .safetensors if possible"
    )


def _loaded(path: Path) -> Any:
    options: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
    try:
        return torch.load(path, mmap=True, **options)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        return torch.load(path, **options)  # files older than PyTorch 1.6 cannot be memory-mapped
