"""Mutants of bundles and of sets of plans run, or are refused in one sentence: no crash, no hang, no traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from fora_trt.bundle import Bundle
from fora_trt.engines.options import EngineOptions
from fora_trt.engines.tensorrt import plan_store
from fora_trt.engines.tensorrt.library import TENSORRT_RTX, Gpu, Library
from fora_trt.engines.tensorrt.plan_builder import BuiltPlan, PlanOptions
from fora_trt.engines.tensorrt.plan_store import Target, build_plans, plans_for
from fora_trt.errors import ForaError
from tests.mutants import Outcome, Workers, counted, mutate

COMMANDS = (
    ("run", "--class-labels", "3", "--steps", "4", "--latents-out", "latents.npy", "--backend", "onnxruntime"),
    ("inspect",),
    ("run", "--class-labels", "3", "--steps", "4", "--latents-out", "latents.npy", "--backend", "torch"),
    ("verify", "--steps", "3", "--cache-intervals", "2"),
)
"""The commands that mutants are given to in turn."""


@pytest.fixture
def workers(pixels: Bundle, tmp_path: Path) -> Iterator[Workers]:
    (tmp_path / "first").mkdir()
    running = Workers(["verify", pixels.folder, "--steps", "3", "--cache-intervals", "2"], tmp_path / "first")
    yield running
    running.end()


def mutants_of(bundle: Bundle, seeds: range, workers: Workers, folder: Path) -> Iterator[Outcome]:
    """What becomes of a mutant of each seed, with one of `COMMANDS`; a file outside of its folder is a fault."""
    for seed in seeds:
        where = folder / str(seed)
        mutant = Path(shutil.copytree(bundle.folder, where / "in" / bundle.folder.name))
        what = mutate(mutant, seed)
        command, *options = COMMANDS[seed % len(COMMANDS)]
        kind, said = workers.run([command, mutant, *options], where)
        strange = {path.name for path in where.rglob("*") if mutant not in (path, *path.parents)}
        written = strange - {"in", "moved", "latents.npy"}
        yield Outcome(seed, f"{command}, {what}", "wrote" if written else kind, said)
        shutil.rmtree(where)


@pytest.mark.slow
def test_five_hundred_mutants_of_a_bundle_run_or_are_refused(pixels: Bundle, workers: Workers, tmp_path: Path) -> None:
    outcomes = [*mutants_of(pixels, range(500), workers, tmp_path)]
    assert not [one for one in outcomes if one.is_fault]
    assert sum(one.kind == "refused" for one in outcomes) > 250, counted(outcomes)
    assert sum(one.kind == "ran" for one in outcomes) > 50, counted(outcomes)


def test_a_crash_and_a_hang_of_a_command_are_seen(tmp_path: Path, workers: Workers) -> None:
    """What the other tests here rely on."""
    assert workers.run(["inspect", tmp_path], tmp_path)[0] == "refused"
    workers._process.kill()
    workers._process.join()
    assert workers.run(["inspect", tmp_path], tmp_path, 0.5)[0] == "crash"
    assert workers.run(["inspect", "/dev/null" * 3, "--json"], tmp_path)[0] == "refused"


@pytest.fixture
def plans(exported: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Library]:
    """A set of plans whose files hold anything: no mutant may be read as far as its plans."""
    capabilities = type("ComputeCapability", (), {"__members__": {"SM80": 0, "SM89": 1, "SM120": 2}})
    library = Library(TENSORRT_RTX, type("Module", (), {"__version__": "1.2.3.4", "ComputeCapability": capabilities}))

    def build(library: Library, onnx: Path, plan: Path, *more: object) -> BuiltPlan:
        plan.write_bytes(b"a plan of the " + plan.stem.encode())
        return BuiltPlan((), 0.5)

    monkeypatch.setattr(plan_store, "plan_from_onnx", build)
    options = PlanOptions(profiles=(plan_store.default_profile(2),))
    target = Target(library, ("8.9",), None)
    return build_plans(exported, target, options, tmp_path / "engines")[0].folder, library


def test_mutants_of_a_set_of_plans_are_read_as_they_were_built_or_refused(
    plans: tuple[Path, Library], exported: Bundle, tmp_path: Path
) -> None:
    folder, library = plans
    gpu, refused = Gpu("NVIDIA GeForce RTX 4090", "8.9"), 0
    for seed in range(150):
        mutant = Path(shutil.copytree(folder, tmp_path / "mutants" / f"{seed}"))
        mutate(mutant, seed)
        try:
            found = plans_for(exported, library, gpu, EngineOptions(mutant, 2))
        except ForaError as error:
            refused += 1
            assert "\n" not in str(error)
            assert len(str(error)) < 5000
            continue
        (there,) = {found.path(name).parent for name in exported.manifest.graphs}
        assert there == mutant or not (mutant / "manifest.json").exists(), "without it a set is built in this folder"
        bundle_files = json.loads((there / "manifest.json").read_text())["bundle_files"]
        assert bundle_files == plan_store._files_of(exported)
    assert refused > 75
