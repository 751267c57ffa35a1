"""Workers of Ray compute the same as one process, also if they are killed."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import click
import numpy as np
import psutil
import pytest
import torch

from fora_trt import ray_cluster
from fora_trt.bundle import Bundle
from fora_trt.cli.options import workers_of as cli_workers
from fora_trt.errors import BackendError, BundleError, InputError, RoomError
from fora_trt.evaluate.candidates import candidates_of
from fora_trt.evaluate.features import Digits
from fora_trt.evaluate.rounds import Rounds
from fora_trt.evaluate.workers import Worker, Workers, computed_here, threads_each
from fora_trt.pipeline import Pipeline, PipelineConfig
from fora_trt.report.environment import versions
from fora_trt.sampling.conditioning import balanced_labels, conditioning_of_classes
from fora_trt.sampling.guidance import Guidance
from tests.test_cli import fora
from tests.test_kills import orphans_of
from tests.test_sample_set import IMAGES, contents, sample_set

KILLS = 5
MARK = "FORA_TEST_WORKERS"
COMMANDS = ("sample", "quality", "calibrate")


def test_what_workers_are_sent_computes_the_same_after_pickling(exported: Bundle, tmp_path: Path) -> None:
    here = sample_set(exported, tmp_path / "set")
    batches = here._batches()
    there = pickle.loads(pickle.dumps(replace(here)))  # as one that has not sampled
    for batch, made in computed_here(lambda batch: here.made(*batch), batches):
        assert np.array_equal(there.made(*batch), made)
    assert sum(len(images) for _, images in batches) == IMAGES


def test_rounds_are_pickled_with_their_controls(pixels: Bundle) -> None:
    pipeline = Pipeline(pixels, batch_size=2, backend="torch", device="cpu")
    given = conditioning_of_classes(pixels.manifest, balanced_labels(pixels.manifest, 4))
    candidates = candidates_of(pipeline, [None], [6], ["fora:2"])
    rounds = Rounds(
        pipeline, candidates, given, Guidance(1.5), images=4, batch_size=2, seed=3, extractor=Digits(), shape=(8, 8, 1)
    )
    rounds.candidates = rounds.candidates[::-1]
    there = pickle.loads(pickle.dumps(rounds))
    assert [one.setting for one in there.candidates] == [one.setting for one in rounds.candidates]
    arrays, again = rounds.batch(1, rounds.candidates), there.batch(1, rounds.candidates)
    assert {*arrays} == {*again}
    for name in arrays:
        assert name.endswith("seconds") or np.array_equal(arrays[name], again[name], equal_nan=True), name


def test_a_pipeline_is_pickled_as_its_settings(pixels: Bundle, bundle_copy: Path) -> None:
    pipeline = Pipeline(bundle_copy, steps=7, backend="torch", device="cpu", engines="plans")
    pickled = pickle.dumps(pipeline)
    there = pickle.loads(pickled)
    assert there.config.engines == Path("plans").absolute()
    assert (there.config.steps, there.config.backend, there.config.bundle) == (7, "torch", bundle_copy)
    shutil.rmtree(bundle_copy)
    shutil.copytree(pixels.folder, bundle_copy)
    with pytest.raises(BundleError, match="is another bundle on the machine of a worker"):
        pickle.loads(pickled)
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(pipeline.over(object()))  # type: ignore[arg-type] # no predictor, which is not looked at


def test_an_error_about_room_keeps_its_numbers() -> None:
    error = pickle.loads(pickle.dumps(RoomError("too large", 64, 16)))
    assert (type(error), str(error), error.batch, error.fits) == (RoomError, "too large", 64, 16)


def test_a_worker_refuses_other_versions() -> None:
    work = pickle.dumps(Guidance(2.0))
    assert Worker(work, versions()).do(3, "guides", 0) == (3, True)
    with pytest.raises(BackendError, match=r"a worker has torch .*, and the command 1.0; install the same versions"):
        Worker(work, {**versions(), "torch": "1.0"}).do(0, "guides", 0)


@pytest.mark.parametrize(
    ("machines", "count", "takes_gpu", "threads"),
    [
        ([(8, 0)], 2, False, 4),
        ([(8, 0)], 3, False, 2),
        ([(2, 0)], 3, False, 0),
        ([(3, 0), (3, 0)], 3, False, 1),
        ([(4, 0), (16, 0)], 2, False, 8),
        ([(16, 8)], 8, True, 2),
        ([(16, 8)], 9, True, 0),
        ([(16, 0), (4, 2)], 2, True, 2),
        ([], 1, False, 0),
    ],
)
def test_workers_share_the_cores_of_each_machine(
    machines: list[tuple[int, int]], count: int, takes_gpu: bool, threads: int
) -> None:
    assert threads_each(machines, count, takes_gpu) == threads


@pytest.fixture
def commands(exported: Bundle, tmp_path: Path) -> dict[str, list[object]]:
    few = [exported.folder, "--steps", 4, "--num-images", 4]
    return {
        "sample": ["sample", *few, "--out", tmp_path / "set"],
        "quality": ["quality", *few, "--out", tmp_path / "report"],
        "calibrate": ["calibrate", *few, "--full-steps", 2, "-o", tmp_path / "schedule.json"],
    }


@pytest.mark.parametrize("name", COMMANDS)
def test_without_ray_a_sentence_says_how_to_install_it(
    commands: dict[str, list[object]], name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ray_cluster, "installed_version", lambda name: None)
    shown = fora(*commands[name], "--workers", 2)
    assert shown.exit_code == 1
    assert "--workers needs Ray, which is not installed: pip install 'fora-trt[serve]'" in shown.output
    assert not [*tmp_path.glob("set")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workers", 0], "0 is not in the range"),
        (
            ["--ray-address", "ray://here:1"],
            "'ray://here:1' is not an address of a Ray cluster; give HOST:PORT",
        ),
        (["--ray-address", "nonsense"], "no Ray cluster answers at nonsense"),
    ],
)
def test_each_mistake_has_its_sentence(
    commands: dict[str, list[object]], options: list[object], message: str, tmp_path: Path
) -> None:
    shown = fora(*commands["sample"], *options)
    assert shown.exit_code in (1, 2)
    assert message in shown.output
    assert not (tmp_path / "set").exists()


def test_ray_assigns_the_gpus() -> None:
    pipeline: Any = SimpleNamespace(config=PipelineConfig("bundle", device="cuda:1"))
    with pytest.raises(click.UsageError, match="--device cuda:1 names one GPU, and Ray assigns GPUs; give cuda"):
        cli_workers(pipeline, {"workers": 2, "ray_address": None})


def test_there_are_not_more_workers_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with (
        pytest.raises(InputError, match="this machine has 2; give --workers 2 or less"),
        Workers(3, None, torch.device("cuda:0")),
    ):
        pass


# -- with Ray ----------------------------------------------------------------------------------------------------------


@contextmanager
def running(*arguments: object, tmp: Path, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`fora-trt` in a process of its own, and the mark of all processes that it starts."""
    mark = uuid4().hex
    tmp.mkdir(exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "fora_trt", *map(str, arguments)],
        env={**os.environ, MARK: mark, "TMPDIR": str(tmp), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process, mark
    finally:
        process.kill()
        process.wait()


def ran(*arguments: object, tmp: Path, **environment: str) -> str:
    """What a command says that must succeed and leave no process."""
    with running(*arguments, tmp=tmp, **environment) as (process, mark):
        said = process.communicate(timeout=500)[0]
        assert process.returncode == 0, said
        assert not orphans_of(mark)
        assert not [*tmp.glob("fora-*")]
    return said


def workers_of(mark: str) -> list[int]:
    """The processes that are workers of a command."""
    found = []
    for one in psutil.process_iter():
        with suppress(psutil.Error):
            if one.environ().get(MARK) == mark and " ".join(one.cmdline()).startswith("ray::Worker"):
                found.append(one.pid)
    return found


def digits_of(bundle: Bundle, *options: object) -> list[object]:
    return ["sample", bundle.folder, "--steps", 20, "--batch-size", 5, *options]


@pytest.mark.slow
def test_workers_that_are_killed_lose_and_double_nothing(digits: Bundle, tmp_path: Path) -> None:
    """Five kills at random moments, each of a random worker after one more batch."""
    command = digits_of(digits, "--num-images", 150, "--out")
    ran(*command, tmp_path / "alone", tmp=tmp_path / "t")
    folder = tmp_path / "workers"
    with running(*command, folder, "--workers", 2, tmp=tmp_path / "t") as (process, mark):
        killed: list[int] = []
        finished = 0
        while len(killed) < KILLS:
            parts = len([*folder.glob("parts/*.npz")])
            assert process.poll() is None, f"it was to be killed {KILLS} times; {process.communicate()}"
            if parts > finished and (alive := workers_of(mark)):
                time.sleep(random.uniform(0, 0.5))
                with suppress(ProcessLookupError):
                    os.kill(pid := random.choice(alive), signal.SIGKILL)
                    killed.append(pid)
                finished = parts
            time.sleep(0.01)
        said = process.communicate(timeout=500)[0]
        assert process.returncode == 0, said
        assert len({*killed}) == KILLS
        assert not orphans_of(mark)
    print(f"killed {killed}; {said.splitlines()[-1]}")
    assert [one for one in said.splitlines() if "ray" in one.lower()] == ["starting Ray ..."]
    assert contents(folder / "samples.npz") == contents(tmp_path / "alone/samples.npz")
    assert (folder / "settings.json").read_bytes() == (tmp_path / "alone/settings.json").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("begun_with", "layout"), [("workers", "png"), ("none", "npz")])
def test_what_is_begun_with_workers_is_resumed_without_and_the_other_way_round(
    digits: Bundle, tmp_path: Path, begun_with: str, layout: str
) -> None:
    """Begun, ended with SIGTERM after two batches, and resumed."""
    command = digits_of(digits, "--num-images", 100, "--format", layout, "--out")
    parts = "set/parts/*.npz" if layout == "npz" else "set/*.png"
    ran(*command, tmp_path / "whole", tmp=tmp_path / "t")
    ways: list[list[object]] = [["--workers", 2], []]
    first, second = ways if begun_with == "workers" else ways[::-1]
    with running(*command, tmp_path / "set", *first, tmp=tmp_path / "t") as (process, mark):
        while len([*tmp_path.glob(parts)]) < 2:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.terminate()
        said = process.communicate(timeout=60)[0]
        assert process.returncode == 130, said
        assert said.count("interrupted; what is finished is kept") == 1
        assert "Traceback" not in said
        assert "SIGTERM" not in said
        assert not orphans_of(mark)
        assert not [*(tmp_path / "t").glob("fora-*")]
    assert len([*tmp_path.glob(parts)]) >= 2
    ran(*command, tmp_path / "set", *second, "--resume", tmp=tmp_path / "t")
    made = Path("samples.npz") if layout == "npz" else Path()
    assert contents(tmp_path / "set" / made) == contents(tmp_path / "whole" / made)


@pytest.mark.slow
def test_workers_find_the_same_schedule(pixels: Bundle, tmp_path: Path) -> None:
    command = ["calibrate", pixels.folder, "--steps", 10, "--full-steps", 4, "--num-images", 8, "-o"]
    ran(*command, tmp_path / "workers.json", "--workers", 2, tmp=tmp_path / "t")
    ran(*command, tmp_path / "alone.json", "--batch-size", 1, tmp=tmp_path / "t")
    assert (tmp_path / "workers.json").read_bytes() == (tmp_path / "alone.json").read_bytes()


@pytest.mark.slow
def test_workers_compare_the_same_images(pixels: Bundle, tmp_path: Path) -> None:
    command = ["quality", pixels.folder, "--steps", 6, "--cache-intervals", 2, "--num-images", 24, "--batch-size", 4]
    found = {}
    for way in ([], ["--workers", 2]):
        out = tmp_path / "-".join(["out", *map(str, way)])
        ran(*command, *way, "--out", out, tmp=tmp_path / "t")
        rows = json.loads((out / "report.json").read_text())["quality"]["rows"]
        kept = [row for row in rows if row["setting"]["control_of"] is None]  # controls follow from measured times
        for row in kept:
            assert row.pop("seconds_per_image") > 0
        names = [name for one in out.glob("quality/*.npz") if "-for-" not in (name := one.name)]
        found[bool(way)] = kept, {name: (out / "quality" / name).read_bytes() for name in sorted(names)}
    assert found[True] == found[False]
    assert len(found[True][1]) == 3


@pytest.mark.slow
def test_a_mistake_in_a_worker_is_the_sentence_of_one_process(pixels: Bundle, tmp_path: Path) -> None:
    """Weights that make latents infinite: the worker raises `BackendError`."""
    command = digits_of(pixels, "--num-images", 10, "--guidance-scale", 1e38, "--out")
    said = []
    for way in ([], ["--workers", 2]):
        with running(*command, tmp_path / f"set{len(way)}", *way, tmp=tmp_path / "t") as (process, _):
            said.append(process.communicate(timeout=200)[0].splitlines()[-1])
            assert process.returncode == 1, said
    assert said[0].startswith("Error: the latents of")
    assert said[0] == said[1]
