import argparse
import functools
import os
import pickle
import subprocess
import sys
import types
from collections import OrderedDict, defaultdict, deque
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fora_trt.errors import ModelError
from fora_trt.models.checkpoint import content_of_file, tensors_from_file
from fora_trt.models.pickles import StandIn


class AttributeDict(dict[str, Any]):
    """As Lightning and others have it."""


class Names(list[str]):
    pass


class Phase(Enum):
    TRAIN = 1


class EarlierMember:
    """Stored as Python 3.11.0 to 3.11.3 store the member of an enumeration."""

    def __reduce__(self) -> tuple[object, tuple[type, str]]:
        return getattr, (Phase, "TRAIN")


class Slots:
    __slots__ = ("rate",)

    def __init__(self) -> None:
        self.rate = 0.1


WEIGHT = torch.arange(6.0).view(2, 3)

EXTRAS: dict[str, Any] = {
    "arguments": argparse.Namespace(lr=1e-4, path=Path("data")),
    "a namespace": types.SimpleNamespace(lr=1),
    "a number of NumPy": np.float64(3.5),
    "an array of NumPy": np.arange(3),
    "a default dictionary": defaultdict(list, {"loss": [1.0]}),
    "a subclass of a dictionary": AttributeDict(lr=1e-4),
    "a subclass of a list": Names(["a", "b"]),
    "a deque": deque([1, 2]),
    "an enumeration": Phase.TRAIN,
    "an enumeration of Python 3.11.2": EarlierMember(),
    "slots": Slots(),
    "a time": datetime(2026, 1, 1),
    "a partial function": functools.partial(print, "x"),
    "a class": nn.Linear,
    "a module": nn.Linear(2, 3),
    "all of them": [argparse.Namespace(a=AttributeDict(b=deque([Phase.TRAIN])))],
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", EXTRAS)
def test_what_trainers_store_beside_the_weights_does_not_refuse_a_file(kind: str, zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    torch.save({"extra": EXTRAS[kind], "model": {"w": WEIGHT}}, path, _use_new_zipfile_serialization=zipped)
    if not zipped and kind in ("a class", "a module"):  # with their source text, which PyTorch does not read any more
        with pytest.raises(ModelError, match=r"cannot be read \(.*\); save only them, with torch\.save"):
            content_of_file(path)
        return
    assert torch.equal(content_of_file(path)["model"]["w"], WEIGHT)


def test_stand_ins_keep_the_state_and_are_not_the_class(tmp_path: Path) -> None:
    torch.save({"args": argparse.Namespace(lr=1e-4), "w": WEIGHT}, tmp_path / "a.pt")
    found = content_of_file(tmp_path / "a.pt")["args"]
    assert isinstance(found, StandIn)
    assert found.state == {"lr": 1e-4}
    assert "argparse.Namespace" in str(type(found))


class Payload:
    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("call", "name"),
    [
        (os.system, r"(posix|nt)\.system"),
        (subprocess.Popen, r"commands\.Popen"),
        (eval, r"builtins\.eval"),
        (exec, r"builtins\.exec"),
        (open, r"io\.open"),
        (__import__, r"builtins\.__import__"),
    ],
)
def test_a_file_that_calls_code_is_refused_by_name_and_runs_nothing(
    call: Any, name: str, zipped: bool, tmp_path: Path
) -> None:
    mark, path = tmp_path / "was-run", tmp_path / "evil.pt"
    argument = f"touch {mark}" if call is os.system else f"open({str(mark)!r}, 'w')"
    torch.save({"w": WEIGHT, "args": Payload(call, argument)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ModelError, match=rf"evil\.pt contains a call of {name}, so loading it could run code"):
        content_of_file(path)
    assert not mark.exists()


def test_an_unknown_function_is_not_called(tmp_path: Path) -> None:
    torch.save({"w": WEIGHT, "args": Payload(pickle.dump, {}, "x")}, tmp_path / "a.pt")
    assert isinstance(content_of_file(tmp_path / "a.pt")["args"], StandIn)


def test_a_class_of_a_package_that_is_not_installed_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = types.ModuleType("trainer_of_somebody")
    package.Config = type("Config", (), {"__module__": "trainer_of_somebody"})  # type: ignore[attr-defined]
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "trainer_of_somebody", package)
        torch.save({"config": package.Config(), "model": OrderedDict(w=WEIGHT)}, tmp_path / "a.pt")
    assert torch.equal(content_of_file(tmp_path / "a.pt")["model"]["w"], WEIGHT)


def test_flat_files_contain_tensors_alone(tmp_path: Path) -> None:
    torch.save({"w": WEIGHT}, tmp_path / "a.bin")
    assert torch.equal(tensors_from_file(tmp_path / "a.bin")["w"], WEIGHT)
    torch.save({"w": WEIGHT, "epoch": 3}, tmp_path / "b.bin")
    with pytest.raises(ModelError, match="contains 'epoch': int; a dictionary of tensors was expected"):
        tensors_from_file(tmp_path / "b.bin")
    torch.save([WEIGHT], tmp_path / "c.bin")
    with pytest.raises(ModelError, match="contains an object of type list"):
        tensors_from_file(tmp_path / "c.bin")
