"""Real builds with TensorRT-RTX, which needs no GPU, and the store of plans."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from fora_trt.bundle import Bundle
from fora_trt.cli import main
from fora_trt.engines.options import EngineOptions
from fora_trt.engines.tensorrt.library import TENSORRT, TENSORRT_RTX, Gpu, Library, library_from_name
from fora_trt.engines.tensorrt.plan_builder import PlanOptions, Profile, plan_from_onnx
from fora_trt.engines.tensorrt.plan_store import (
    PORTABLE,
    PlanSet,
    Target,
    build_plans,
    default_profile,
    open_plans,
    plans_for,
    target_of,
)
from fora_trt.errors import BackendError, BundleError, PlanError
from fora_trt.evaluate.export_check import GraphCheck
from fora_trt.export.graphs import Writer
from fora_trt.export.write import bundle_from_model
from fora_trt.models.sources import model_from_source
from tests.conftest import BundleAt
from tests.damage import flip_a_byte, replace_by_link, rewrite
from tests.shared import made_once, traced_once

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'fora-trt[rtx]'")

ADA = Gpu("NVIDIA GeForce RTX 4090", "8.9")
HOPPER = Gpu("NVIDIA H100 80GB HBM3", "9.0")


@pytest.fixture(scope="module")
def library() -> Library:
    return library_from_name(TENSORRT_RTX)


@pytest.fixture(scope="module")
def target(library: Library) -> Target:
    return target_of(library, None, ("8.9",))


@pytest.fixture
def half(bundle_at: BundleAt) -> Bundle:
    """The small DiT in fp16; its head size of 8 is too small for a fused kernel."""
    return bundle_at("fold", "fp16")


def options(*profiles: tuple[int, int, int]) -> PlanOptions:
    wanted = profiles or ((1, 2, 4),)
    return PlanOptions(profiles=tuple(Profile(minimum=a, optimum=b, maximum=c) for a, b, c in wanted))


@pytest.fixture
def built(exported: Bundle, library: Library, target: Target, run_folder: Path, tmp_path: Path) -> PlanSet:
    """A copy of plans of the small DiT."""
    once = made_once(run_folder / "engines", lambda folder: build_plans(exported, target, options(), folder))
    (folder,) = Path(shutil.copytree(once, tmp_path / "engines")).glob("*/tensorrt-rtx-*")
    return open_plans(folder, exported, library)


def fora(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def test_a_set_holds_a_plan_for_each_graph_and_says_what_it_is_for(built: PlanSet, exported: Bundle) -> None:
    manifest = built.manifest
    assert visible(built.folder) == ["full.plan", "manifest.json", "reuse.plan"]
    assert built.folder.name.startswith(f"tensorrt-rtx-{manifest.version}-sm89-")
    assert built.folder.parent.name == "tiny"
    assert manifest.compute_capabilities == ("8.9",)
    assert manifest.gpu is None
    assert manifest.bundle_files["full.onnx"] == exported.manifest.files["full.onnx"].sha256
    assert [len(plan.attentions) for plan in manifest.plans.values()] == [3, 0]
    assert manifest.plans["full"].attentions[1].name == "transformer_blocks.1.attn1"
    assert manifest.files["full.plan"].size > manifest.files["reuse.plan"].size > 1000


def test_what_is_there_is_used_and_other_options_are_another_set(
    built: PlanSet, exported: Bundle, target: Target
) -> None:
    engines = built.folder.parents[1]
    before = (built.folder / "full.plan").stat().st_mtime_ns
    again, found = build_plans(exported, target, options(), engines)
    assert found
    assert again == built
    assert (built.folder / "full.plan").stat().st_mtime_ns == before
    other, found = build_plans(exported, target, options((1, 2, 4), (8, 8, 8)), engines)
    assert not found
    assert other.folder != built.folder
    forced, found = build_plans(exported, target, options(), engines, force=True)
    assert not found
    assert (built.folder / "full.plan").stat().st_mtime_ns > before
    assert forced.folder == built.folder
    assert visible(built.folder.parent) == sorted([built.folder.name, other.folder.name])


ODD: dict[str, tuple[str, str, tuple[int, int, int]]] = {
    "fp32": ("exported", "8.9", (1, 2, 16)),
    "head size 8 in fp16": ("half", "8.9", (1, 2, 16)),
    "a batch of one": ("half", "8.9", (1, 1, 1)),
    "an old GPU": ("half", "7.5", (1, 2, 2)),
    "a new GPU": ("exported", "12.0", (4, 4, 4)),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_shapes_build(case: str, library: Library, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    fixture, capability, profile = ODD[case]
    bundle = request.getfixturevalue(fixture)
    target = target_of(library, None, (capability,))
    plans, _ = build_plans(bundle, target, options(profile), tmp_path / "engines")
    full = plans.manifest.plans["full"]
    assert len(full.attentions) == 3
    assert not any(one.fused for one in full.attentions), "no fused kernel is this small, or in fp32"


def test_one_head_at_a_batch_of_one_builds(library: Library, target: Target, tmp_path: Path) -> None:
    """The one shape of attention that has no kernel of its own even in fp16."""
    import torch
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    network = DiTTransformer2DModel(
        num_attention_heads=1, attention_head_dim=64, in_channels=4, out_channels=8, num_layers=2, sample_size=8
    )
    network.save_pretrained(tmp_path / "one-head")
    model = model_from_source(str(tmp_path / "one-head"), precision="fp16")
    bundle = bundle_from_model(model, tmp_path / "export" / "one-head", check=GraphCheck())
    single, _ = build_plans(bundle, target, options((1, 1, 1)), tmp_path / "engines")
    assert [one.fused for one in single.manifest.plans["full"].attentions] == [False, False]
    several, _ = build_plans(bundle, target, options((1, 2, 4)), tmp_path / "engines")
    assert [one.fused for one in several.manifest.plans["full"].attentions] == [True, True]


def test_targets(library: Library) -> None:
    assert target_of(library, None).compute_capabilities == PORTABLE
    assert target_of(library, ADA).compute_capabilities == PORTABLE
    assert target_of(library, Gpu("RTX 2080", "7.5")).compute_capabilities == ("7.5",)
    with pytest.raises(PlanError, match=r"does not support GPUs of compute capability 9\.0 .* --backend tensorrt"):
        target_of(library, HOPPER)
    with pytest.raises(PlanError, match=r"does not support compute capability '9\.0'; choose from 7\.5, 8\.0"):
        target_of(library, None, ("8.9", "9.0"))
    full = Library(TENSORRT, library.module)
    assert target_of(full, HOPPER) == Target(full, ("9.0",), HOPPER.name)
    with pytest.raises(PlanError, match=r"on the GPU that will run them, and torch finds no GPU"):
        target_of(full, None)
    with pytest.raises(PlanError, match="leave --compute-capability out, or give --backend tensorrt-rtx"):
        target_of(full, HOPPER, ("9.0",))


def test_profiles_by_default() -> None:
    assert str(default_profile(2)) == "1:2:16"
    assert str(default_profile(16)) == "1:16:16"
    assert str(default_profile(20)) == "1:20:32"


def test_bf16_is_refused_where_the_gpu_has_none(bundle_at: BundleAt, library: Library, tmp_path: Path) -> None:
    bundle = bundle_at("fold", "bf16")
    with pytest.raises(PlanError, match=r"7\.5 does not support the bf16 of .* export with --precision fp16"):
        build_plans(bundle, target_of(library, None, ("8.9", "7.5")), options(), tmp_path / "engines")
    assert not (tmp_path / "engines").exists()


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped byte in a plan": (lambda f: flip_a_byte(f / "full.plan"), "full.plan was altered"),
    "a flipped byte in the other": (lambda f: flip_a_byte(f / "reuse.plan", 0), "reuse.plan was altered"),
    "a shorter plan": (lambda f: os.truncate(f / "full.plan", 9), "full.plan has 9 bytes; the manifest records"),
    "a missing plan": (lambda f: (f / "reuse.plan").unlink(), "reuse.plan is missing"),
    "a link": (lambda f: replace_by_link(f / "full.plan"), "full.plan is a link"),
    "a flipped byte in the manifest": (
        lambda f: (f / "manifest.json").write_text((f / "manifest.json").read_text().replace("8.9", "8.6")),
        "manifest.json was altered",
    ),
    "no manifest": (lambda f: (f / "manifest.json").write_text(""), "is not the manifest of a set of plans"),
    "a lost plan": (lambda f: rewrite(f, lambda m: m["plans"].pop("reuse")), "does not contain a plan for each graph"),
    "an unknown key": (lambda f: rewrite(f, lambda m: m.update(plugin="x.so")), "is damaged at plugin"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_set_is_refused_by_name(damage: str, built: PlanSet, exported: Bundle, library: Library) -> None:
    harm, message = DAMAGE[damage]
    harm(built.folder)
    for source in (EngineOptions(built.folder.parents[1]), EngineOptions(built.folder)):
        with pytest.raises(PlanError) as raised:
            plans_for(exported, library, ADA, source)
        assert message in str(raised.value)
        assert "\n" not in str(raised.value)
    shown = fora("build", exported.folder, "--compute-capability", "8.9", "--batch", "1:2:4", "--out",
                 built.folder.parents[1])  # fmt: skip
    assert shown.exit_code == 1
    assert "--force" in shown.output or "copy the file" in shown.output


MISFIT: dict[str, tuple[Callable[[Path], object], Gpu, int, str]] = {
    "another version": (
        lambda f: rewrite(f, lambda m: m.update(version="1.6.1.120")),
        ADA, 2, "was built with tensorrt-rtx 1.6.1.120; tensorrt-rtx 1.",
    ),
    "another library": (
        lambda f: rewrite(f, lambda m: m.update(backend="tensorrt")), ADA, 2, "was built with tensorrt 1."
    ),
    "another GPU": (
        lambda f: None, HOPPER, 2, "was built for compute capability 8.9; NVIDIA H100 80GB HBM3 has 9.0"
    ),
    "another model of GPU": (
        lambda f: rewrite(f, lambda m: m.update(gpu="NVIDIA L4")),
        ADA, 2, "was built on NVIDIA L4; this GPU is NVIDIA GeForce RTX 4090",
    ),
    "another bundle": (
        lambda f: rewrite(f, lambda m: m["bundle_files"].update({"full.onnx": "0" * 64})),
        ADA, 2, "was built from other graphs than",
    ),
    "a larger batch": (lambda f: None, ADA, 9, "was built for batches of 1:2:4 (min:opt:max); a batch of 9"),
}  # fmt: skip


@pytest.mark.parametrize("misfit", MISFIT)
def test_a_set_that_does_not_fit_is_never_used(
    misfit: str, built: PlanSet, exported: Bundle, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, gpu, batch, message = MISFIT[misfit]
    change(built.folder)
    with pytest.raises(PlanError) as raised:
        plans_for(exported, library, gpu, EngineOptions(built.folder, batch))
    assert message in str(raised.value)
    assert f"fora-trt build {exported.folder} --backend tensorrt-rtx" in str(raised.value)
    # among other sets it is passed over, with a word, and one that fits is built
    said: list[str] = []
    monkeypatch.setattr(
        "fora_trt.engines.tensorrt.plan_store.target_of", lambda library, gpu: Target(library, ("8.9",), None)
    )
    found = plans_for(exported, library, gpu, EngineOptions(built.folder.parents[1], batch, said.append))
    assert found.folder != built.folder
    assert message in said[0]
    assert "building the full plan" in said[1]


def test_the_newest_set_that_fits_is_used(
    built: PlanSet, exported: Bundle, library: Library, target: Target, tmp_path: Path
) -> None:
    source = EngineOptions(built.folder.parents[1])
    assert plans_for(exported, library, ADA, source).folder == built.folder
    newer, _ = build_plans(exported, target, options((2, 2, 2)), source.folder)
    assert plans_for(exported, library, ADA, source).folder == newer.folder
    assert plans_for(exported, library, ADA, EngineOptions(source.folder, batch=3)).folder == built.folder


def test_a_damaged_bundle_never_reaches_the_parser(
    bundle_copy: Path, target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT's parser follows a link where the others refuse it."""
    bundle = Bundle.open(bundle_copy)
    build_plans(bundle, target, options(), tmp_path / "engines")
    monkeypatch.setattr("fora_trt.engines.tensorrt.plan_store.plan_from_onnx", lambda *_: pytest.fail("parsed"))
    replace_by_link(bundle_copy / "full.onnx.data")
    with pytest.raises(BundleError, match=r"full\.onnx\.data is a link"):
        build_plans(bundle, target, options((2, 2, 2)), tmp_path / "engines")
    with pytest.raises(BundleError, match=r"full\.onnx\.data is a link"):
        build_plans(bundle, target, options(), tmp_path / "engines")
    shown = fora("build", bundle_copy, "--backend", "tensorrt-rtx", "--out", tmp_path / "engines")
    assert shown.exit_code == 1
    assert "full.onnx.data is a link" in shown.output


def test_a_folder_that_cannot_be_written_is_named(exported: Bundle, target: Target, tmp_path: Path) -> None:
    (tmp_path / "engines").write_text("a file")
    with pytest.raises(PlanError, match=r"engines cannot be written \(.*\); choose another folder"):
        build_plans(exported, target, options(), tmp_path / "engines")
    assert (tmp_path / "engines").read_text() == "a file"


@pytest.mark.parametrize("failure", [KeyboardInterrupt, MemoryError, OSError])
def test_a_build_that_fails_leaves_nothing(
    exported: Bundle, target: Target, tmp_path: Path, failure: type[BaseException]
) -> None:
    """Both plans or none: the failure comes while the second is built."""

    def fail(fraction: float, phase: str) -> None:
        if fraction > 0.6:
            raise failure

    with pytest.raises((failure, PlanError)):
        build_plans(exported, target, options(), tmp_path / "engines", progress=fail)
    assert visible(tmp_path / "engines" / "tiny") == []
    assert [path.name for path in (tmp_path / "engines" / "tiny").iterdir()] == []


def test_progress_rises_to_the_end(exported: Bundle, target: Target, tmp_path: Path) -> None:
    told: list[tuple[float, str]] = []
    build_plans(exported, target, options(), tmp_path / "engines", progress=lambda *event: told.append(event))
    fractions = [fraction for fraction, _ in told]
    assert fractions == sorted(fractions)
    assert fractions[0] < 0.1
    assert fractions[-1] > 0.9
    assert "Building engine" in {phase for _, phase in told}


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "fora_trt", *map(str, arguments)]


@pytest.fixture
def build(exported: Bundle, tmp_path: Path) -> list[str]:
    return command("build", exported.folder, "--backend", "tensorrt-rtx", "--out", tmp_path / "engines", "--json")


def test_a_set_whose_replacement_was_killed_is_found_again(
    built: PlanSet, exported: Bundle, library: Library, target: Target
) -> None:
    engines, name = built.folder.parents[1], built.folder.name
    for folder in (engines, built.folder):
        built.folder.rename(built.folder.with_name(f".{name}.fora-old"))
        for what in ("lock", "new"):
            built.folder.with_name(f".{name}.fora-{what}").touch()
        assert plans_for(exported, library, ADA, EngineOptions(folder, 2)).folder == built.folder
        assert [path.name for path in built.folder.parent.iterdir()] == [name]


def test_a_build_that_finds_its_set_clears_what_a_killed_one_has_left(
    built: PlanSet, exported: Bundle, target: Target
) -> None:
    unfinished = built.folder.with_name(f".{built.folder.name}.fora-new")
    unfinished.mkdir()
    unfinished.with_name(f".{built.folder.name}.fora-lock").touch()
    (unfinished / "full.plan").touch()
    assert build_plans(exported, target, options(), built.folder.parents[1])[1]
    assert [path.name for path in built.folder.parent.iterdir()] == [built.folder.name]


@pytest.mark.slow
def test_eight_builds_at_once_make_one_set(build: list[str], tmp_path: Path) -> None:
    running = [subprocess.Popen(build, stdout=subprocess.PIPE, text=True) for _ in range(8)]
    said = [json.loads(process.communicate()[0]) for process in running]
    assert [process.returncode for process in running] == [0] * 8
    assert sorted(one["reused"] for one in said) == [False, *[True] * 7]
    assert len({one["folder"] for one in said}) == 1
    assert len(visible(tmp_path / "engines" / "tiny")) == 1


@pytest.mark.slow
def test_a_build_that_is_killed_leaves_no_set(build: list[str], tmp_path: Path, exported: Bundle) -> None:
    """Ten moments from the first to the last; what a later call finds is whole or is built."""
    began = time.perf_counter()
    subprocess.run(build, check=True, capture_output=True)
    whole = time.perf_counter() - began
    (folder,) = (tmp_path / "engines" / "tiny").iterdir()
    for share in sorted(random.Random(0).uniform(0.3, 1.02) for _ in range(10)):
        for left in (tmp_path / "engines" / "tiny").iterdir():
            subprocess.run(["rm", "-r", str(left)], check=True)  # noqa: S607 # wherever it is
        process = subprocess.Popen(build, stdout=subprocess.DEVNULL)
        time.sleep(share * whole)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if folder.exists():  # the moment was after the end
            open_plans(folder, exported, library_from_name(TENSORRT_RTX))
        assert visible(folder.parent) in ([], [folder.name]) if folder.parent.exists() else True
    said = json.loads(subprocess.run(build, check=True, capture_output=True, text=True).stdout)
    assert Path(said["folder"]) == folder
    assert [path.name for path in folder.parent.iterdir()] == [folder.name], "what was left behind is cleared away"


@pytest.mark.slow
def test_ctrl_c_cancels_and_leaves_nothing(half: Bundle, tmp_path: Path) -> None:
    build = command("build", half.folder, "--backend", "tensorrt-rtx", "--out", tmp_path / "engines")
    process = subprocess.Popen(
        build, stderr=subprocess.PIPE, text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    )
    assert process.stderr is not None
    assert "building the conditioning plan" in process.stderr.readline()
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    shown = process.communicate(timeout=30)[1]
    assert process.returncode != 0
    assert "Traceback" not in shown
    assert list((tmp_path / "engines" / "tiny").iterdir()) == []


MISTAKES: dict[str, tuple[list[str], str]] = {
    "no such backend": (["--backend", "onnxruntime"], "'onnxruntime' is not one of 'auto', 'tensorrt', 'tensorrt-rtx'"),
    "tensorrt without it": (
        ["--backend", "tensorrt"],
        "tensorrt is not installed; pip uninstall onnxruntime, then pip install",
    ),
    "not a batch": (["--batch", "16"], "'16' is not a profile of three integers min:opt:max such as 1:2:16"),
    "a falling batch": (["--batch", "4:2:8"], "'4:2:8' is not a valid profile; expected 1 <= min <= opt <= max"),
    "a level too high": (["--optimization-level", "9"], "9 is not in the range 0<=x<=5"),
    "Hopper": (["--backend", "tensorrt-rtx", "--compute-capability", "9.0"], "does not support compute capability"),
    "no capability": (["--backend", "tensorrt-rtx", "--compute-capability", "ada"], "compute capability 'ada'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_sentence(mistake: str, exported: Bundle, tmp_path: Path) -> None:
    arguments, message = MISTAKES[mistake]
    if mistake == "tensorrt without it":
        pytest.importorskip("tensorrt_rtx")
        try:
            library_from_name(TENSORRT)
        except BackendError:
            pass
        else:
            pytest.skip("TensorRT is installed here")
    shown = fora("build", exported.folder, *arguments, "--out", tmp_path / "engines")
    assert shown.exit_code != 0
    assert message in " ".join(shown.output.split())
    assert not (tmp_path / "engines").exists()


def test_options_without_effect_are_named_and_change_nothing(exported: Bundle, built: PlanSet) -> None:
    shown = fora(
        "build", exported.folder, "--backend", "tensorrt-rtx", "--compute-capability", "8.9", "--batch", "1:2:4",
        "--optimization-level", "5", "--workspace", "2", "--out", built.folder.parents[1], "--json",
    )  # fmt: skip
    assert shown.exit_code == 2
    assert "--optimization-level and --workspace have no effect: tensorrt-rtx times nothing" in shown.stderr


def test_run_says_that_no_gpu_is_there(exported: Bundle) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    shown = fora("run", exported.folder, "--class-labels", "1", "--backend", "tensorrt-rtx")
    assert shown.exit_code == 1
    assert "tensorrt-rtx needs an NVIDIA GPU, and torch finds none; it can build plans on this machine" in shown.output


@pytest.mark.slow
def test_every_attention_becomes_one_kernel(half_digits: Bundle, tmp_path: Path) -> None:
    """Of the digits; the test of DiT-XL/2 sees to it for a published size."""
    target = target_of(library_from_name(TENSORRT_RTX), None)
    options = PlanOptions(profiles=(default_profile(2),))
    plans = build_plans(half_digits, target, options, tmp_path / "engines")[0].manifest.plans
    assert [one.fused for one in plans["full"].attentions] == [True] * 8
    assert plans["reuse"].attentions == ()


@pytest.mark.slow
def test_a_block_of_dit_is_nine_layers(library: Library, tmp_path: Path) -> None:
    """Of DiT-S/2 in fp16: a product for Q, K and V, one transpose before the attention and one behind it."""
    graphs = traced_once(model_from_source("random:DiT-S/2", "fp16")).graphs("fold").graphs
    assert not any(node.op_type == "Conv" for graph in graphs.values() for node in graph.onnx.graph)
    full, path = graphs["full"], tmp_path / "full.onnx"
    Writer(path.parent).save(full, path.name)
    built = plan_from_onnx(library, path, path.with_suffix(".plan"), full.inputs, options((1, 2, 16)), ["8.9"])
    assert [one.fused for one in built.attentions] == [True] * 12
    layers = [name for text in library.log.layers for name in re.findall(r"^Name: (\S+), Layer", text, re.MULTILINE)]
    assert len(layers) <= 120, layers
    attentions = [k for k, name in enumerate(layers) if "mha" in name]
    assert {after - before for before, after in pairwise(attentions)} == {9}
