"""What is made once and used by many tests: traces in a process, folders in all processes of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from filelock import FileLock

from fora_trt.bundle import Bundle
from fora_trt.contract import OPTIMIZATIONS, Optimization
from fora_trt.evaluate.export_check import GraphCheck
from fora_trt.export import write
from fora_trt.export.traced import TracedModel, traced_from_model
from fora_trt.export.write import bundle_from_model, weights_digest
from fora_trt.models.spec import Model

_TRACED: dict[object, TracedModel] = {}


def traced_once(model: Model, opset: int = 23, report: Callable[[str], None] = lambda stage: None) -> TracedModel:
    """The trace of a model; of one that computes the same, the trace that was made before."""
    weights, spec = weights_digest(model.module), model.spec
    key = (weights, model.precision, opset, *model.sites, type(model.module), spec.call, *spec.inputs)
    if key not in _TRACED:
        _TRACED[key] = traced_from_model(model, opset, report)
    return replace(_TRACED[key], model=model)


@contextmanager
def one_trace_for_all() -> Iterator[None]:
    """Exports are what they are otherwise, but take their traces from `traced_once`."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(write, "traced_from_model", traced_once)
        yield


@contextmanager
def measured_pilot() -> Iterator[None]:
    """A machine whose reuse steps always take a tenth of a full one."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("fora_trt.evaluate.rounds.reuse_share_of", lambda *_: 0.1)
        yield


def made_once(folder: Path, make: Callable[[Path], object]) -> Path:
    """`folder`, which `make` fills for the first process that asks; others wait until it is there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            with TemporaryDirectory(dir=folder.parent, prefix=".making-") as beside:
                unfinished = Path(beside) / folder.name
                make(unfinished)
                unfinished.rename(folder)
    return folder


def bundles_once(folder: Path, name: str, load: Callable[[], Model]) -> dict[Optimization, Bundle]:
    """Bundles of this name in `folder`, one at each level, all of one trace."""

    def make(unfinished: Path) -> None:
        model = load()
        with one_trace_for_all():
            for level in OPTIMIZATIONS:
                bundle_from_model(model, unfinished / level / name, optimization=level, check=GraphCheck())

    made_once(folder, make)
    return {level: Bundle.read(folder / level / name) for level in OPTIMIZATIONS}


def bundle_once(folder: Path, load: Callable[[], Model]) -> Bundle:
    """The bundle `folder`, at the highest optimization level that its model supports."""

    def make(unfinished: Path) -> None:
        with one_trace_for_all():
            bundle_from_model(load(), unfinished, check=GraphCheck())

    return Bundle.read(made_once(folder, make))
