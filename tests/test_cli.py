import json
import logging
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from fora_trt.bundle import Bundle
from fora_trt.cli import main
from fora_trt.cli.options import Schedulers
from fora_trt.doctor import EXTRAS
from fora_trt.engines.torch import engine as torch_engine
from fora_trt.errors import ForaWarning
from fora_trt.exporting import export
from fora_trt.schedule import Schedule


def fora(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception  # a traceback on the user's screen is a defect
    return result


@pytest.mark.parametrize("command", ["", *main.commands])
def test_help_is_instant_and_has_an_example(command: str) -> None:
    began = time.perf_counter()
    shown = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "fora_trt", *command.split(), "--help"],
        capture_output=True,
        text=True,
    )
    assert time.perf_counter() - began < 1.5  # half a second on a machine that does nothing else
    assert f"fora-trt {command or 'demo'}" in shown.stdout.partition("Example")[2]
    loaded = {line.rpartition("|")[2].strip() for line in shown.stderr.splitlines()}
    assert "click" in loaded
    assert not loaded & {"torch", "onnx", "numpy", "diffusers", "rich", "pydantic"}


def test_a_checkpoint_goes_through_every_command(pipeline_folder: Path, tmp_path: Path) -> None:
    exported = fora("export", pipeline_folder, "--out", tmp_path, "--name", "mine", "--json")
    manifest = json.loads(exported.stdout)
    assert manifest["name"] == "mine"
    assert manifest["precision"] == "fp32"

    verified = fora("verify", tmp_path / "mine", "--steps", 6, "--cache-intervals", "2,3")
    assert verified.exit_code == 0
    for row in ("full graph", "reuse graph", "6 steps, fora:2", "6 steps, fora:3", "ok"):
        assert row in verified.stdout

    picture, latents = tmp_path / "grid.png", tmp_path / "latents.npy"
    ran = fora(
        "run", tmp_path / "mine", "--class-labels", "3,7,7", "--steps", 6, "--json",
        "-o", picture, "--latents-out", latents,
    )  # fmt: skip
    figures = json.loads(ran.stdout)
    assert (figures["steps"], figures["full_steps"], figures["images"]) == (6, 3, 3)
    assert figures["backend"] == "onnxruntime"
    assert all(0 < figures[f"{kind}_step_ms"] < 1000 * figures["seconds"] for kind in ("full", "reuse"))
    assert np.load(latents).shape == (3, 4, 8, 8)
    assert Image.open(picture).size == (2 * 68 + 4, 2 * 68 + 4)

    inspected = fora("inspect", tmp_path / "mine")
    for text in ("3 attention, 3 feed-forward", "['batch', 16, 16]", "6.0 KiB per sample", "GFLOP", "2.78x"):
        assert text in inspected.stdout


def test_excluded_sites_are_not_cached_and_the_manifest_tells_how(pipeline_folder: Path, tmp_path: Path) -> None:
    chosen = ["--cache", "attention,transformer_blocks.*.ff", "--exclude", "transformer_blocks.0.*", "--exclude"]
    chosen.append("*.2.ff")
    made = fora("export", pipeline_folder, "--out", tmp_path, "--name", "some", *chosen)
    assert made.exit_code == 0, made.output
    manifest = Bundle.open(tmp_path / "some").manifest
    sites = [site.module for site in manifest.cache_sites]
    assert sites == ["transformer_blocks.1.attn1", "transformer_blocks.1.ff", "transformer_blocks.2.attn1"]
    command = shlex.split(manifest.export_command())
    assert command[2:5] == [str(pipeline_folder), "--name", "some"]
    again = fora(*command[1:], "--out", tmp_path / "again")
    assert again.exit_code == 0, again.output
    assert Bundle.open(tmp_path / "again" / "some").manifest.cache_sites == manifest.cache_sites
    assert fora("verify", tmp_path / "some", "--steps", 4, "--cache-intervals", 2).exit_code == 0

    (tmp_path / "some.toml").write_text(f'source = "{pipeline_folder}"\nexclude = ["feed-forward"]\n')
    assert fora("export", tmp_path / "some.toml", "--out", tmp_path, "--name", "kind").exit_code == 0
    assert {site.kind for site in Bundle.open(tmp_path / "kind").manifest.cache_sites} == {"attention"}
    in_python = export(pipeline_folder, tmp_path / "python", exclude=["feed-forward"])
    assert {site.kind for site in in_python.manifest.cache_sites} == {"attention"}


@pytest.mark.parametrize(
    ("exclude", "message"),
    [
        (
            "blocks.*.ff",
            "the exclude pattern 'blocks.*.ff' matches no cache site; the cache sites are transformer_",
        ),
        ("attention,feed-forward", "--exclude attention and feed-forward leaves no cache site; exclude fewer sites"),
    ],
)
def test_an_exclusion_without_effect_or_without_rest_is_refused(
    exclude: str, message: str, pipeline_folder: Path, tmp_path: Path
) -> None:
    refused = fora("export", pipeline_folder, "--out", tmp_path, "--exclude", exclude)
    assert refused.exit_code == 1
    assert message in refused.stderr


def test_caching_some_sites_only(pipeline_folder: Path, tmp_path: Path) -> None:
    fora("export", pipeline_folder, "--out", tmp_path, "--name", "some", "--cache", "transformer_blocks.*.ff")
    sites = json.loads(fora("inspect", tmp_path / "some", "--json").stdout)["cache_sites"]
    assert sites == {"feed-forward": 3}
    assert fora("verify", tmp_path / "some", "--steps", 4, "--cache-intervals", 2).exit_code == 0


def test_images_go_to_a_folder_one_file_each(exported: Bundle, tmp_path: Path) -> None:
    fora(
        "run", exported.folder, "--class-labels", "1,2", "--steps", 2, "--cache-interval", 1, "-o", tmp_path / "images"
    )
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == ["0000.png", "0001.png"]
    assert Image.open(tmp_path / "images" / "0001.png").size == (16, 16)


def test_a_time_that_includes_compiling_says_so(
    exported: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_engine, "compiled", lambda step: step)
    run = [
        "run",
        exported.folder,
        "--class-labels",
        "1",
        "--steps",
        3,
        "-o",
        tmp_path / "one.png",
        "--force",
        "--backend",
    ]
    assert "on torch-compile (cpu), compilation included: 3 steps" in fora(*run, "torch-compile").output
    assert "on torch (cpu): 3 steps" in fora(*run, "torch").output


def test_what_was_typed_goes_before_the_recipe(pipeline_folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text(f"source = '{pipeline_folder}'\nname = 'mine'\nprecision = 'fp16'\ncache = ['attention']\n")
    manifest = json.loads(
        fora("export", recipe, "--out", tmp_path, "--name", "other", "--no-measure-trajectory", "--json").stdout
    )
    assert manifest["name"] == "other"
    assert manifest["precision"] == "fp16"
    assert {site["kind"] for site in manifest["cache_sites"]} == {"attention"}


def test_doctor_names_every_backend() -> None:
    shown = fora("doctor")
    assert shown.exit_code == 0
    for text in ("fora-trt", "torch", "GPU", "backend onnxruntime", "backend torch"):
        assert text in shown.stdout
    found = json.loads(fora("doctor", "--json").stdout)["findings"]
    assert {one["what"] for one in found} >= {"Python", "GPU", *(f"extra {name}" for name in EXTRAS if name != "cpu")}


def test_verify_fails_where_the_graphs_differ(exported: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("fora_trt.evaluate.verify").evaluate.verify.GRAPH_TOLERANCE, "fp32", 1e-12)
    result = fora("verify", exported.folder, "--steps", 2, "--cache-intervals", 2)
    assert result.exit_code == 1
    assert "TOO LARGE" in result.stdout
    assert "differs from PyTorch by more than the tolerance for fp32" in result.stderr


def test_a_bundle_that_is_there_is_kept(bundle_copy: Path, pipeline_folder: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in bundle_copy.iterdir()}
    result = fora("export", pipeline_folder, "--out", bundle_copy.parent, "--name", "tiny")
    assert result.exit_code == 1
    assert "already exists; give --force" in result.stderr
    assert {path.name: path.stat().st_mtime_ns for path in bundle_copy.iterdir()} == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "tiny already exists; give --force to replace it or --name to choose another name"),
        (["--opset", "3", "--force"], "the opset is 3; give --opset a value from 20 to 24"),
    ],
)
def test_what_will_fail_in_the_end_is_said_before_anything_is_loaded(
    options: list[str], message: str, bundle_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object) -> None:
        raise AssertionError("nothing is loaded")

    monkeypatch.setattr("fora_trt.models.diffusers_folder.downloaded", load)
    made = fora("export", "somebody/tiny", "--out", bundle_copy.parent, *options)
    assert made.exit_code == 1
    assert message in made.output


@pytest.mark.usefixtures("one_trace")
def test_a_model_of_latents_without_a_vae_wants_latents_out(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fora("export", pipeline_folder / "transformer", "--out", tmp_path, "--name", "bare")
    refused = fora("run", tmp_path / "bare", "--class-labels", "1", "-o", tmp_path / "a.png")
    assert refused.exit_code == 1
    assert "has none; name one with --vae FOLDER; or write the latents with --latents-out FILE.npy" in refused.stderr
    taken = fora("run", tmp_path / "bare", "--class-labels", "1", "--steps", 3, "--latents-out", tmp_path / "l.npy")
    assert taken.exit_code == 0, taken.output
    assert np.load(tmp_path / "l.npy").shape == (1, 4, 8, 8)
    monkeypatch.chdir(tmp_path)
    kept = fora("run", tmp_path / "bare", "--class-labels", "1", "--steps", 3)
    assert kept.exit_code == 0, kept.output
    assert "bare has no VAE, so its latents are written" in kept.stderr
    assert np.load("bare.npy").shape == (1, 4, 8, 8)
    small = ["--num-images", 3, "--steps", 3, "--batch-size", 2]
    made = fora("sample", tmp_path / "bare", *small, "--out", tmp_path / "set")
    assert made.exit_code == 0, made.output
    assert "bare has no VAE, so latents are written" in made.stderr
    with np.load(tmp_path / "set" / "latents.npz") as content:
        assert (content["arr_0"].shape, content["arr_0"].dtype) == ((3, 4, 8, 8), np.float32)
        assert content["arr_1"].tolist() == [0, 1, 2]
    as_pictures = fora("sample", tmp_path / "bare", *small, "--format", "png", "--out", tmp_path / "pngs")
    assert as_pictures.exit_code == 1
    assert "bare has no VAE to decode latents, which do not fit into PNG files" in as_pictures.stderr
    assert not (tmp_path / "pngs").exists()


@pytest.mark.slow
def test_ctrl_c_during_export_leaves_the_old_bundle(bundle_copy: Path, pipeline_folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in bundle_copy.iterdir()}
    command = [sys.executable, "-m", "fora_trt", "export", str(pipeline_folder), "--out", str(bundle_copy.parent)]
    process = subprocess.Popen(
        [*command, "--name", "tiny", "--force"],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in the background ignore it
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("cutting the reuse graph"):
            process.send_signal(signal.SIGINT)
            break
    rest = process.stderr.read()
    assert process.wait() == 130
    assert rest.endswith("interrupted\n")
    assert "Traceback" not in rest
    assert {path.name: path.read_bytes() for path in bundle_copy.iterdir()} == before
    assert [path.name for path in bundle_copy.parent.iterdir()] == ["tiny"]


class Slow:
    """Takes the place of what a command does, and lets a signal come."""

    def __init__(self, number: signal.Signals) -> None:
        self.number = number

    def __call__(self, *_: object, **__: object) -> None:
        os.kill(os.getpid(), self.number)
        time.sleep(5)
        raise AssertionError("the signal was ignored")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", ["inspect", "sample", "quality"])
def test_an_interruption_is_130_and_names_resume_where_there_is_one(
    number: signal.Signals, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background ignore it
    monkeypatch.setattr(Bundle, "open", Slow(number))
    monkeypatch.setattr(Bundle, "read", Slow(number))
    out = [] if command == "inspect" else ["--out", tmp_path / "out"]
    stopped = fora(command, tmp_path, *out)
    signal.signal(signal.SIGINT, before)
    assert stopped.exit_code == 130
    assert stopped.stderr.startswith("interrupted")
    assert ("--resume to go on" in stopped.stderr) == (command != "inspect")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize(
    ("to", "code", "said"),
    [
        (">/dev/full", 1, "Error: the output cannot be written: No space left on device; write it elsewhere\n"),
        (">&-", 0, ""),
        ("<&- >&- 2>&-", 0, ""),
        ("| true; exit ${PIPESTATUS[0]}", 1, ""),
    ],
)
def test_output_that_goes_nowhere(to: str, code: int, said: str) -> None:
    command = f"sleep 0.2; {sys.executable} -m fora_trt --help {to}"
    shown = subprocess.run(["bash", "-c", command], capture_output=True, text=True)  # noqa: S607 # wherever it is
    assert (shown.returncode, shown.stderr) == (code, said)


def test_no_progress_bar_in_a_pipe(exported: Bundle, tmp_path: Path) -> None:
    piped = fora("run", exported.folder, "--class-labels", "1", "--steps", "6", "-o", tmp_path / "a.png")
    assert piped.exit_code == 0
    assert "denoising" not in piped.output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "shown"),
    [
        (["run", "--class-labels", "1", "-o", "a.png"], b"denoising"),
        (["sample", "--num-images", "6", "--batch-size", "2", "--out", "set"], b"sampling"),
        (["quality", "--num-images", "4", "--cache-intervals", "2", "--out", "report"], b"comparing"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_one_display_on_a_terminal(command: list[str], shown: bytes, exported: Bundle, tmp_path: Path) -> None:
    """On a terminal the cursor is hidden once, and shown again once: when the one display begins and ends."""
    name, *options = command
    line = [sys.executable, "-m", "fora_trt", name, str(exported.folder), *options, "--steps", "6"]
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        line, stderr=theirs, stdout=subprocess.DEVNULL, cwd=tmp_path, env={**os.environ, "TERM": "xterm"}
    )
    os.close(theirs)
    printed = b""
    with suppress(OSError):  # when the command has ended
        while part := os.read(ours, 1 << 16):
            printed += part
    assert process.wait() == 0, printed
    assert shown in printed
    assert (printed.count(b"\x1b[?25l"), printed.count(b"\x1b[?25h")) == (1, 1)
    assert b"Warning" not in printed


def test_a_forecast_is_asked_for_in_two_ways(exported: Bundle, tmp_path: Path) -> None:
    common = ["run", exported.folder, "--class-labels", "1,2", "--steps", 8, "--backend", "torch", "--json"]
    ways: dict[str, list[object]] = {
        "option": ["--cache-interval", 2, "--forecast", 2],
        "text": ["--schedule", "fora:2,forecast=2"],
        "none": ["--cache-interval", 2],
    }
    latents = {}
    for way, options in ways.items():
        done = fora(*common, *options, "--latents-out", tmp_path / f"{way}.npy")
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["schedule"] == ("fora:2" if way == "none" else "fora:2,forecast=2")
        latents[way] = np.load(tmp_path / f"{way}.npy")
    assert np.array_equal(latents["option"], latents["text"])
    assert not np.array_equal(latents["option"], latents["none"])


def test_a_list_of_schedulers_keeps_their_settings() -> None:
    given = "ddim,dpm-solver++:order=3,spacing=lu,unipc:spacing=trailing"
    expected = ("ddim", "dpm-solver++:order=3,spacing=lu", "unipc:spacing=trailing")
    assert Schedulers().convert(given, None, None) == expected


def test_a_recipe_gives_the_bundle_its_schedule(pipeline_folder: Path, tmp_path: Path) -> None:
    """A file is copied, so the bundle stands alone."""
    given = tmp_path / "given.json"
    Schedule.of_full_steps(8, [0, 3, 6, 7]).with_forecast(1).to_file(given)
    recipe = tmp_path / "mine.toml"
    small = f"source = '{pipeline_folder}'\nname = 'mine'\n"
    run = [
        "run",
        tmp_path / "mine",
        "--class-labels",
        1,
        "--backend",
        "torch",
        "--latents-out",
        tmp_path / "x.npy",
        "--force",
    ]
    found = []
    for schedule in ("given.json", "dense:every=4,forecast=2"):
        recipe.write_text(f"{small}schedule = '{schedule}'\n")
        done = fora("export", recipe, "--out", tmp_path, "--force", "--json")
        assert done.exit_code == 0, done.output
        given.unlink(missing_ok=True)
        found.append(json.loads(fora(*run, "--steps", 8, "--json").stdout))
        shown = fora("inspect", tmp_path / "mine").stdout
        assert "schedule where none is given: " in shown
        assert ("schedule.json" in shown) == (schedule == "given.json")
    assert [(one["full_steps"], Path(one["schedule"]).name) for one in found] == [
        (4, "schedule.json"), (3, "dense:3,0.3,forecast=2"),
    ]  # fmt: skip
    asked = json.loads(fora(*run, "--steps", 8, "--cache-interval", 2, "--json").stdout)
    assert asked["schedule"] == "fora:2", "what is given goes before"


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("forra:3", "there is no schedule 'forra:3'; give none, fora:N"),
        ("missing.json", "the schedule missing.json cannot be read"),
        ("other.json", "was calibrated for other .*, not for this model"),
    ],
)
def test_a_schedule_that_does_not_fit_is_refused_at_export(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schedule: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    content = json.loads(Schedule.fora(8, 2).to_json())
    model = {"name": "other", "source": "elsewhere", "weights_sha256": "0"}
    Path("other.json").write_text(json.dumps({**content, "made_from": {"model": model}}))
    refused = fora("export", pipeline_folder, "--name", "mine", "--out", tmp_path, "--schedule", schedule)
    assert refused.exit_code == 1
    assert re.search(message, " ".join(refused.stderr.split()))
    assert not (tmp_path / "mine").exists()


def test_existing_files_are_kept_without_force(
    exported: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = ["run", exported.folder, "--class-labels", "1,2", "--steps", 3, "--backend", "torch"]
    folder = tmp_path / "images"
    folder.mkdir()
    Path("a.png").write_text("mine")
    (folder / "b.txt").write_text("mine")
    for option, path in (("-o", "a.png"), ("--latents-out", "a.png"), ("-o", folder)):
        refused = fora(*run, option, path)
        assert refused.exit_code == 1
        assert "or --force to write over what is there" in " ".join(refused.stderr.split())
    assert Path("a.png").read_text() == "mine"
    assert [path.name for path in folder.iterdir()] == ["b.txt"]
    assert fora(*run, "-o", "a.png", "--force").exit_code == 0
    assert Image.open("a.png").format == "PNG"
    assert [json.loads(fora(*run, "--json").stdout)["output"] for _ in range(2)] == ["tiny.png", "tiny-2.png"]


def test_a_png_carries_its_settings(exported: Bundle, tmp_path: Path) -> None:
    run = ["run", exported.folder, "--class-labels", "1,2", "--steps", 3, "--seed", 7, "--backend", "torch"]
    said = json.loads(fora(*run, "-o", tmp_path / "a.png", "--json").stdout)
    text = json.loads(Image.open(tmp_path / "a.png").info["fora-trt"])
    assert {name: said[name] for name in text} == text
    assert (text["seed"], text["class_labels"], text["steps"], text["schedule"]) == (7, [1, 2], 3, "fora:3")
    assert {"fora_trt", "torch"} <= text["versions"].keys()
    assert fora(*run, "-o", tmp_path / "images").exit_code == 0
    second = json.loads(Image.open(tmp_path / "images" / "0001.png").info["fora-trt"])
    assert (second["image"], second["image_seed"], second["class_label"]) == (1, 8, 2)


def test_a_folder_has_the_images_of_one_call(exported: Bundle, tmp_path: Path) -> None:
    run = ["run", exported.folder, "--steps", 3, "--backend", "torch", "-o", tmp_path / "images"]
    assert fora(*run, "--class-labels", "1,2,3").exit_code == 0
    (tmp_path / "images" / "note.txt").write_text("mine")
    assert fora(*run, "--class-labels", "4", "--force").exit_code == 0
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == ["0000.png", "note.txt"]


def test_json_is_one_object_with_the_options(exported: Bundle, tmp_path: Path) -> None:
    run = ["run", exported.folder, "--class-labels", "1,2", "--steps", 3, "--backend", "torch", "--json"]
    shown = fora(*run, "-o", tmp_path / "a.png", "--seed", 4)
    said = json.loads(shown.stdout)
    assert (said["command"], said["options"]["seed"], said["options"]["class_labels"]) == ("run", 4, [1, 2])
    assert said["options"]["batch_size"] == 64


def test_only_own_warnings_are_shown_and_with_verbose_all(
    exported: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def noisy() -> dict[str, str]:
        warnings.warn("a library\nspeaks", DeprecationWarning, stacklevel=1)
        logging.getLogger("library").error("a library logs")
        warnings.warn("this takes longer", ForaWarning, stacklevel=1)
        return {}

    monkeypatch.setattr("fora_trt.report.environment.versions", noisy)
    run = ["run", exported.folder, "--class-labels", "1", "--steps", 2, "--backend", "torch", "-o", tmp_path / "a.png"]
    assert fora(*run).stderr == "warning: this takes longer\n"
    loud = fora(*run, "--force", "-v").stderr
    assert "warning: a library speaks (DeprecationWarning, " in loud
    assert "warning: this takes longer\n" in loud


def test_quiet_and_verbose(bundle_copy: Path, tmp_path: Path) -> None:
    export = ["export", "digits", "--out", tmp_path]
    assert "tracing" in fora(*export).stderr
    assert fora(*export, "--force", "-q").stderr == ""
    refused = fora(*export, "-q", "-v")
    assert (refused.exit_code, "--verbose and --quiet exclude each other" in refused.stderr) == (2, True)
    (bundle_copy / "manifest.json").write_text("{")
    short, long = (fora("inspect", bundle_copy, *more) for more in ((), ("-v",)))
    assert (short.exit_code, short.stderr.count("\n")) == (1, 1)
    assert long.exit_code == 1
    assert "Traceback" in long.stderr and long.stderr.endswith(short.stderr)


def test_latents_are_kept_where_they_cannot_be_decoded(
    exported: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("fora_trt.images.decode.Decoder.images", fails)
    picture = tmp_path / "a.png"
    failed = fora("run", exported.folder, "--class-labels", 1, "--steps", 3, "--backend", "torch", "-o", picture)
    assert failed.exit_code == 1
    assert "out of memory; the latents are in" in failed.stderr
    assert len(np.load(tmp_path / "a.npy")) == 1
    assert not picture.exists()


@pytest.mark.slow
def test_inspect_does_not_import_torch(exported: Bundle) -> None:
    code = "import sys; from fora_trt.cli import main; main(['inspect', sys.argv[1]], standalone_mode=False); "
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, str(exported.folder)], check=False).returncode == 0
