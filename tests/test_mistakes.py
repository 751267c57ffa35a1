"""What a newcomer gets wrong: each mistake is answered by one sentence that names what came and how to mend it."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import pytest
from PIL import Image

from fora_trt.bundle import Bundle
from fora_trt.cli import main
from tests.test_cli import fora

RUN = "run export/pixels --class-labels 1"

MISTAKES: dict[str, tuple[int, str]] = {
    # commands and bundles
    "exprot digits": (2, "No such command 'exprot'"),
    "inspect": (2, "Missing argument 'BUNDLE'"),
    "inspect export/pixels --jsno": (2, "No such option '--jsno'. Did you mean '--json'?"),
    "inspect .": (1, ". is not a bundle: it contains no manifest.json"),
    "inspect nowhere": (1, "nowhere is not a bundle"),
    "run pixels --class-labels 1": (1, "did you mean export/pixels?"),
    "run export/pixels/full.onnx --class-labels 1": (1, "did you mean export/pixels?"),
    "run export/pixels/manifest.json --class-labels 1": (1, "did you mean export/pixels?"),
    "run export --class-labels 1": (1, "export is not a bundle"),
    "doctor --fix": (2, "No such option '--fix'"),
    "run export/pixels -v -q --class-labels 1": (2, "--verbose and --quiet exclude each other"),
    # serving
    "serve": (2, "Missing argument 'BUNDLE...'"),
    "serve nowhere": (1, "nowhere is not a bundle"),
    "serve export/pixels export/pixels": (1, "two bundles are named pixels"),
    "serve export/pixels --port 70000": (2, "70000 is not in the range"),
    "serve export/pixels --max-wait-ms 5": (2, "--max-wait-ms has no effect: images join a batch at once"),
    "serve export/pixels --engines plans --backend torch": (2, "--engines has no effect: no TensorRT plans are loaded"),
    "triton export/pixels -o models --max-wait-ms 5": (2, "--max-wait-ms has no effect"),
    "serve export/pixels --join never": (2, "'never' is not one of 'none', 'windows'"),
    "serve export/pixels --queue 0": (2, "0 is not in the range"),
    "serve export/pixels --max-steps 10": (1, "names no steps takes 50, more than --max-steps 10"),
    "triton export/pixels -o models --max-steps 10": (1, "give --max-steps 50 or more"),
    "triton export/pixels -o export --force": (1, "is in the bundle"),
    "triton export/pixels -o export/pixels": (1, "is in the bundle"),
    "sample export/pixels --workers 1000 --out s": (1, "1000 workers share the"),
    "serve export/pixels --replicas 0": (2, "0 is not in the range"),
    "serve export/pixels --api-key-file no.txt": (1, "the file of API keys no.txt cannot be read"),
    "serve export/pixels --schedule fora:3": (1, "--schedule fora:3 is not a .json file"),
    "serve export/pixels --vae some/vae": (1, "leave --vae out"),
    "triton export/pixels": (2, "Missing option '-o' / '--output'"),
    "triton nowhere -o models": (1, "nowhere is not a bundle"),
    "triton export/pixels -o models --name a/b": (1, "the name 'a/b' is a path; give another --name"),
    "triton export/pixels -o models --device gpu": (1, "unknown device 'gpu'; give auto, cpu, cuda"),
    "triton export/pixels -o models --device cpu:1": (1, "unknown device 'cpu:1'"),
    "triton export/pixels -o models --backend mxnet": (1, "unknown backend 'mxnet'"),
    "triton export/pixels -o models --join never": (2, "'never' is not one of 'none', 'windows'"),
    "triton export/pixels -o models --instances 0": (2, "0 is not in the range"),
    "triton export/pixels -o models --max-batch-size 0": (2, "0 is not in the range"),
    "triton export/pixels -o models --schedule fora:x": (1, "'x' in the schedule 'fora:x' is not an integer"),
    "triton export/pixels -o models --schedule no.json": (1, "the schedule no.json cannot be read"),
    "triton export/pixels -o models --schedule fora:3 --steps 2": (1, "the cache interval 3 is larger"),
    "triton export/pixels -o models --scheduler x": (1, "there is no scheduler 'x' for this model"),
    "triton export/pixels -o models --engines folder": (1, "folder holds no plans of pixels"),
    "triton export/pixels -o models --vae some/vae": (1, "leave --vae out"),
    "triton export/pixels -o there.png": (1, "cannot be written"),
    # inputs of a run
    "run export/pixels": (1, "pixels needs conditioning inputs; give --class-labels"),
    "run export/pixels --class-labels 10": (1, "there is no class 10; pixels has the classes 0 to 9"),
    "run export/pixels --class-labels -1": (1, "there is no class -1"),
    "run export/pixels --class-labels cat": (2, "'cat' is not a list of integers such as 3,7,7"),
    "run export/pixels --class-labels 1.5": (2, "'1.5' is not a list of integers"),
    "run export/pixels --class-labels ''": (2, "'' is not a list of integers"),
    "run export/pixels --prompt 'a cat'": (1, "pixels takes no prompt; give --class-labels"),
    f"{RUN} --prompt 'a cat'": (1, "--class-labels and --prompt exclude each other"),
    f"{RUN} --negative-prompt people": (1, "--negative-prompt needs --prompt"),
    f"{RUN} --num-images 4": (1, "--class-labels already determines the number of images"),
    "run export/pixels --conditioning no.npz": (1, "no.npz"),
    "run export/pixels --conditioning text.txt": (1, "text.txt is text that begins with"),
    f"{RUN} --height 512": (1, "was exported for images of 8x8 (height x width), not 512x8"),
    f"{RUN} --seed -1": (2, "-1 is not in the range"),
    f"{RUN} --seed {2**64}": (2, "is not in the range"),
    # steps and schedules
    f"{RUN} --steps 0": (2, "0 is not in the range x>=1"),
    f"{RUN} --steps -5": (2, "-5 is not in the range"),
    f"{RUN} --steps ten": (2, "'ten' is not a valid integer"),
    f"{RUN} --steps 1001": (1, "DDIMScheduler does not support 1001 steps"),
    f"{RUN} --cache-interval 0": (2, "0 is not in the range"),
    f"{RUN} --steps 4 --cache-interval 5": (1, "the cache interval 5 is larger than the number of steps 4"),
    f"{RUN} --schedule fora": (1, "the schedule 'fora' lacks the cache interval"),
    f"{RUN} --schedule fora:x": (1, "'x' in the schedule 'fora:x' is not an integer"),
    f"{RUN} --schedule dense:18,0.3,0.4": (1, "'0.4' in the schedule 'dense:18,0.3,0.4' is not understood"),
    f"{RUN} --schedule none --forecast 2": (1, "without caching no step can forecast"),
    f"{RUN} --schedule no.json": (1, "the schedule no.json cannot be read"),
    f"{RUN} --schedule text.json": (1, "text.json"),
    f"{RUN} --schedule fora:3 --cache-interval 3": (1, "--cache-interval and --schedule exclude each other"),
    f"{RUN} --forecast 4": (2, "4 is not in the range 0<=x<=3"),
    f"{RUN} --scheduler x": (1, "there is no scheduler 'x' for this model; give one of ddim"),
    f"{RUN} --scheduler ddim:order=9": (1, "'order=9' in the scheduler 'ddim:order=9' is not an order"),
    f"{RUN} --timestep-spacing even": (2, "'even' is not one of 'leading', 'linspace', 'trailing'"),
    f"{RUN} --guidance-scale -1": (2, "-1.0 is not in the range"),
    f"{RUN} --guidance-scale nan": (1, "the guidance scale is nan"),
    f"{RUN} --guidance-interval 5": (2, "'5' is not a range of two integers such as 5:30"),
    f"{RUN} --guidance-interval 60:70": (1, "no step is guided: the guidance interval is 60:70"),
    # machines and files
    f"{RUN} --backend mxnet": (1, "unknown backend 'mxnet'; choose one of auto, tensorrt"),
    f"{RUN} --backend cuda": (1, "unknown backend 'cuda'"),
    f"{RUN} --device abacus": (1, "unknown device 'abacus'; give a name such as cpu, cuda or cuda:1"),
    f"{RUN} --batch-size 0": (2, "0 is not in the range"),
    f"{RUN} --vae folder": (1, "pixels makes pixels and needs no VAE; leave --vae out"),
    f"{RUN} -o a.docx": (1, "a.docx does not have the suffix of an image format"),
    f"{RUN} -o no/such/a.png": (1, "no/such/a.png cannot be written: No such file or directory"),
    f"{RUN} -o there.png": (1, "there.png already exists; give another name, or --force"),
    f"{RUN} -o folder": (1, "folder is a folder with files in it"),
    f"{RUN} --latents-out .": (1, "is a folder"),
    f"{RUN} --force": (2, "--force has no effect"),
    # export
    "export": (2, "Missing argument 'SOURCE'"),
    "export mnist": (1, "the source 'mnist' is neither a file, a folder nor a known name"),
    "export ''": (1, "the source is empty; known sources: digits; "),
    "export model.pt": (1, "the source 'model.pt' does not exist"),
    "export text.txt": (1, "text.txt"),
    "export folder": (1, "folder"),
    "export random:DiT-Q/2": (1, "unknown model 'random:DiT-Q/2'"),
    "export nomodule:make": (1, "there is no module 'nomodule'"),
    "export none.toml": (1, "the recipe none.toml cannot be read: No such file or directory"),
    "export digits --precision fp8": (2, "'fp8' is not one of"),
    "export digits --name ../x": (2, "is not a folder name"),
    f"export digits --name {'x' * 300}": (2, "has more than 200 bytes"),
    "export digits --opset 9": (1, "the opset is 9; give --opset a value from 20 to 24"),
    "export digits --image-size big": (2, "'big' is not an image size such as 512"),
    "export digits --cache 'blocks.*.attn'": (1, "'blocks.*.attn' matches no module"),
    "export digits --cache ,": (1, "no cache sites are given"),
    "export digits --weights ema": (1, "digits contains no averaged weights"),
    "export digits --num-heads 3": (1, "does not take num_heads"),
    "export digits --schedule fora:x": (1, "'x' in the schedule 'fora:x' is not an integer"),
    "export digits --name pixels": (1, "export/pixels already exists; give --force"),
    # plans
    "build export/pixels --batch 4": (2, "'4' is not a profile of three integers min:opt:max"),
    "build export/pixels --batch 4:2:1": (2, "expected 1 <= min <= opt <= max"),
    "build export/pixels --backend onnxruntime": (2, "'onnxruntime' is not one of"),
    # evaluation
    "verify export/pixels --cache-intervals 0": (1, "0"),
    "verify export/pixels --steps 2 --cache-intervals 3": (1, "cache interval 3 is larger"),
    "verify export/pixels --trust-source": (1, "is no factory, so no code of it runs"),
    "sample export/pixels": (2, "Missing option '--out'"),
    "sample export/pixels --num-images 0 --out s": (2, "0 is not in the range"),
    "sample export/pixels --prompts no.txt --out s": (1, "no.txt"),
    "sample export/pixels --format jpg --out s": (2, "'jpg' is not one of"),
    "sample export/pixels --num-images 2 --out folder": (1, "folder already contains note.txt"),
    "bench export/pixels --batch-sizes 0": (1, "a batch size is 0"),
    "bench export/pixels --backends mxnet": (1, "unknown backend 'mxnet'"),
    "bench export/pixels --cache-intervals x": (2, "'x' is not a list of integers"),
    "bench export/pixels --out there.png": (1, "there.png is a file; give a folder"),
    "quality export/pixels": (2, "Missing option '--out'"),
    "quality export/pixels --num-images 1 --out q": (2, "1 is not in the range"),
    "quality export/pixels --num-images 2 --reference no.npz --out q": (1, "no.npz cannot be read"),
    "quality export/pixels --num-images 2 --inception-weights no.pth --out q": (1, "--inception-weights"),
    "quality export/pixels --truth-steps 10 --out q": (1, "the fine solution has 10 steps; give more than the 50"),
    "calibrate export/pixels -o x.json": (1, "give exactly one of --full-steps, --speedup and --max-loss"),
    "calibrate export/pixels -o x.json --full-steps 9 --speedup 3": (1, "give exactly one of --full-steps"),
    "calibrate export/pixels -o x.txt --full-steps 9": (2, "x.txt does not end in .json"),
    "calibrate export/pixels -o x.json --full-steps 60": (1, "60 full steps is not possible with 50 evaluations"),
    "demo --cache-intervals 3": (2, "the first must be 1"),
    "demo --steps 2": (2, "2 is not in the range x>=5"),
}


@pytest.fixture
def desk(pixels: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a bundle in `export/` and a few files, as the current one."""
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "pixels").symlink_to(pixels.folder)
    (tmp_path / "folder").mkdir()
    for name in ("text.txt", "text.json", "folder/note.txt"):
        (tmp_path / name).write_text("hello\n")
    Image.new("L", (2, 2)).save(tmp_path / "there.png")
    np.savez(tmp_path / "there.npz", a=np.zeros(2))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_answered_by_one_sentence(line: str, desk: Path) -> None:
    code, message = MISTAKES[line]
    before = sorted(path for path in desk.rglob("*") if path.is_file())
    arguments = shlex.split(line)
    shown = fora(*arguments)
    assert shown.exit_code == code, shown.output
    said = shown.stderr.rstrip().splitlines()
    errors = [number for number, one in enumerate(said) if one.startswith("Error: ")]
    assert errors, shown.output
    sentence = " ".join(said[errors[0] :])
    assert message in sentence
    assert len(errors) == 1 and (code == 2 or len(said) == errors[0] + 1), "more than one line"
    assert shown.stdout == ""
    assert "[Errno" not in sentence and "Traceback" not in shown.output
    assert "default" not in sentence
    unknown = {*re.findall(r"(?<![\w-])--[a-z][a-z-]+", sentence)} - {*_options(arguments[0], sentence)}
    assert not unknown - set(arguments), "advice names an option that the command does not have"
    assert sorted(path for path in desk.rglob("*") if path.is_file()) == before, "something half-written"


def _options(command: str, sentence: str) -> Iterator[str]:
    """The options of a command, and of those that a sentence names with `fora-trt` before them."""
    for name in {command, *re.findall(r"fora-trt (\w+)", sentence)}:
        found = main.commands.get(name)
        assert found is None or isinstance(found, click.Command)
        for parameter in found.params if found else ():
            yield from (*parameter.opts, *parameter.secondary_opts)
    if "hf download" in sentence:
        yield "--local-dir"


def test_there_are_more_than_sixty_mistakes() -> None:
    assert len(MISTAKES) > 100
    assert {line.split()[0] for line in MISTAKES} >= {*main.commands}


def test_what_is_said_after_a_mistake_helps(desk: Path) -> None:
    """The folder that was meant works."""
    said = fora("inspect", "pixels").stderr
    meant = re.search(r"did you mean (\S+)\?", said)
    assert meant is not None
    assert json.loads(fora("inspect", meant[1], "--json").stdout)["name"] == "pixels"
