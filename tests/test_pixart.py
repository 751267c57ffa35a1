import json
import shutil
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from click.testing import CliRunner, Result
from diffusers import DiffusionPipeline, PixArtAlphaPipeline, PixArtSigmaPipeline
from PIL import Image
from safetensors.torch import save_file

from fora_trt import Schedule, load
from fora_trt.bundle import Bundle
from fora_trt.cli import main
from fora_trt.errors import InputError
from fora_trt.evaluate.export_check import GraphCheck
from fora_trt.evaluate.verify import compare_with_pytorch
from fora_trt.export.write import bundle_from_model
from fora_trt.models.options import SourceOptions
from fora_trt.models.sources import model_from_source
from fora_trt.pipeline import Pipeline
from fora_trt.sampling.conditioning import conditioning_from_file
from fora_trt.sampling.prompts import conditioning_of_prompts
from tests.checkpoints import pixart_pipeline
from tests.hooks import Hooked
from tests.shared import bundle_once, made_once

TOKENS = 12
CLASSES = {"alpha": PixArtAlphaPipeline, "sigma": PixArtSigmaPipeline}
KINDS = pytest.mark.parametrize("kind", ["alpha", "sigma"])


@pytest.fixture(scope="module")
def folders(run_folder: Path) -> dict[str, Path]:
    made = run_folder / "checkpoints"
    return {kind: made_once(made / f"pixart-{kind}", partial(pixart_pipeline, kind=kind)) for kind in CLASSES}


@pytest.fixture(scope="module")
def bundles(folders: dict[str, Path], run_folder: Path) -> dict[str, Bundle]:
    made = run_folder / "export"
    options = {kind: SourceOptions(source=str(folder), text_length=TOKENS) for kind, folder in folders.items()}
    return {kind: bundle_once(made / f"pixart-{kind}", partial(model_from_source, options[kind])) for kind in CLASSES}


def fora(*arguments: Any) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@KINDS
def test_text_is_an_input_of_the_full_graph_alone(kind: str, bundles: dict[str, Bundle]) -> None:
    manifest = bundles[kind].manifest
    sizes = ["resolution", "aspect_ratio"] if kind == "alpha" else []
    text = ["encoder_hidden_states", "encoder_attention_mask"]
    assert [one.name for one in manifest.inputs] == ["latents", "timestep", *text, *sizes]
    read = {name: [one.name for one in graph.inputs] for name, graph in manifest.graphs.items()}
    assert manifest.optimization == "fold"
    assert read["conditioning"] == ["timestep", *sizes]
    assert read["full"][:3] == ["latents", *text]
    assert read["reuse"][:2] == ["latents", "folded.0"]
    assert not {"timestep", *text, *sizes} & {*read["reuse"], *read["full"][3:]}
    kinds = sorted(site.kind for site in manifest.cache_sites)
    assert kinds == ["attention"] * 2 + ["cross-attention"] * 2 + ["feed-forward"] * 2
    assert manifest.model.image_size == ((256, 256) if kind == "alpha" else (16, 16))
    if kind == "alpha":
        assert manifest.conditioning["resolution"].default == (256.0, 256.0)


@KINDS
def test_projections_of_the_text_are_joined_for_each_block(kind: str, bundles: dict[str, Bundle]) -> None:
    counted = Counter(node.op_type for node in ir.load(bundles[kind].graph_path("full")).graph)
    assert counted["Conv"] == 0
    assert counted["Attention"] == 2 * 2
    assert counted["Gather"] == 2 * (3 + 2), "Q, K, V of the image; K and V of the text"


@KINDS
@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_graphs_and_trajectories_equal_pytorch(kind: str, backend: str, bundles: dict[str, Bundle]) -> None:
    pipeline = Pipeline(bundles[kind], steps=50, backend=backend, device="cpu")
    forecasts = [f"fora:3,forecast={order}" for order in (1, 2, 3)]
    for comparison in compare_with_pytorch(pipeline, ["fora:2", "fora:3", "fora:5", *forecasts]):
        assert comparison.error.relative < 1e-4, comparison


@KINDS
def test_a_pipeline_makes_the_same_pictures_with_any_number_of_steps(
    kind: str, folders: dict[str, Path], bundles: dict[str, Bundle]
) -> None:
    pipe: DiffusionPipeline = CLASSES[kind].from_pretrained(folders[kind])
    pipe.set_progress_bar_config(disable=True)
    seen: list[int] = []
    module = pipe.transformer

    def images(steps: int, **more: Any) -> np.ndarray:
        made = pipe(
            ["a dog", "cats"], num_inference_steps=steps, generator=torch.manual_seed(3), output_type="np",
            use_resolution_binning=False, clean_caption=False, max_sequence_length=TOKENS, **more,
        )  # fmt: skip
        return np.asarray(made.images)

    before = {steps: images(steps) for steps in (4, 9)}
    pipe.transformer = load(bundles[kind], cache_interval=1, backend="onnxruntime", device="cpu").as_transformer()
    for steps in (4, 9, 4):
        assert np.abs(images(steps) - before[steps]).max() < 1 / 255
    images(4, callback=lambda step, timestep, latents: seen.append(step))
    assert seen == [0, 1, 2, 3]

    pipe.transformer = module
    sites = [site.module for site in bundles[kind].manifest.cache_sites]
    Hooked(module, sites, Schedule.fora(9, 3).with_forecast(2).plan)
    expected = images(9)
    denoiser = load(bundles[kind], cache_interval=3, forecast=2, backend="onnxruntime", device="cpu")
    pipe.transformer = denoiser.as_transformer()
    assert np.abs(images(9) - expected).max() < 1 / 255

    denoiser = load(bundles[kind], cache_interval=3, backend="onnxruntime", device="cpu")
    pipe.transformer = denoiser.as_transformer()
    images(9)
    assert denoiser.schedule.full == (True, False, True, False, False, True, False, False, True), "FORA's rule, at 9"
    images(4)
    assert denoiser.schedule.steps == 4
    with pytest.raises(
        InputError,
        match=r"latents have shape \[4, 4, \d+, \d+\]; pixart-.* takes \[4, 4, \d+, \d+\]; call the pipeline as at",
    ):
        images(2, height=64, width=64)
    with pytest.raises(
        InputError,
        match=r"'encoder_hidden_states' has shape \[2, 7, 12\]; pixart-.* takes \[2, 12, 12\]; .*max_sequence_length",
    ):
        pipe("a dog", num_inference_steps=2, use_resolution_binning=False, clean_caption=False, max_sequence_length=7)


@KINDS
def test_prompts_on_the_command_line(kind: str, bundles: dict[str, Bundle], tmp_path: Path) -> None:
    bundle = bundles[kind].folder
    made = fora(
        "run", bundle, "--prompt", "a dog", "--prompt", "cats", "--negative-prompt", "fog", "--num-images", 2,
        "--steps", 4, "-o", tmp_path / "a.png", "--latents-out", tmp_path / "a.npy", "--device", "cpu", "--json",
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["guidance_scale"] == 4.5
    latents = np.load(tmp_path / "a.npy")
    assert len(latents) == 4
    assert np.abs(latents[0] - latents[1]).max() > 0.1, "another seed"

    given = conditioning_of_prompts(
        bundles[kind].manifest, ["a dog", "a dog", "cats", "cats"], "fog", torch.device("cpu")
    )
    assert given.unconditional is not None
    names = {"encoder_hidden_states": "prompt_embeds", "encoder_attention_mask": "prompt_attention_mask"}
    tensors = {names[key]: value for key, value in given.conditional.items() if key in names}
    tensors |= {f"negative_{names[key]}": value for key, value in given.unconditional.items() if key in names}
    save_file(tensors, tmp_path / "prompts.safetensors")
    np.savez(tmp_path / "prompts.npz", allow_pickle=False, **{key: value.numpy() for key, value in tensors.items()})
    for file in ("prompts.safetensors", "prompts.npz"):
        again = fora(
            "run", bundle, "--prompt-embeds", tmp_path / file, "--steps", 4, "--latents-out", tmp_path / "b.npy",
            "--device", "cpu", "--force",
        )  # fmt: skip
        assert again.exit_code == 0, again.output
        assert np.array_equal(np.load(tmp_path / "b.npy"), latents)
    loaded = conditioning_from_file(bundles[kind].manifest, tmp_path / "prompts.npz")
    assert loaded.images == 4


def test_quality_takes_prompts_in_turn(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    said = ["--prompt", "a red cat", "--prompt", "a blue dog", "--steps", 4]
    out = tmp_path / "report"
    compared = ["--num-images", 3, "--cache-intervals", 2, "--batch-size", 2, "--out", out, "--json"]
    done = fora("quality", bundles["sigma"].folder, *said, *compared)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["guidance_scale"], found["features"]) == (4.5, None)
    with np.load(out / "quality" / "dpm-solver-4-steps-fora-2.npz") as content:
        assert content.files == ["arr_0"], "no classes"
        pictures = content["arr_0"]
    fora("run", bundles["sigma"].folder, *said, "--cache-interval", 2, "-o", tmp_path / "images")
    run = [np.asarray(Image.open(tmp_path / "images" / f"000{k}.png")) for k in range(2)]
    assert np.array_equal(pictures[:2], run)
    assert not np.array_equal(pictures[0], pictures[2]), "same prompt, other seed"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "pixart-sigma needs conditioning inputs; give --prompt, or --prompt-embeds FILE"),
        (["--prompt", "a " * 40], "has 81 tokens; pixart-sigma was exported for at most 12; shorten the prompt, or"),
        (["--prompt", "a", "--class-labels", "1"], "--class-labels and --prompt exclude each other; give one of them"),
        (["--class-labels", "1"], "pixart-sigma has no classes; it takes encoder_hidden_states"),
        (
            ["--prompt", "a", "--height", "32"],
            "exported for images of 16x16 (height x width), not 32x16; export it again",
        ),
        (["--prompt-embeds", "none.npz"], "none.npz does not exist"),
        (["--prompt-embeds", "none.txt"], "none.txt does not exist"),
        (["--prompt", "a", "--guidance-interval", "3"], "'3' is not a range of two integers such as 5:30"),
        (["--prompt", "a", "--guidance-interval", "4:9"], "no step is guided: the guidance interval is 4:9"),
        (["--prompt-embeds", "a.npz", "--num-images", "2"], "--prompt-embeds already determines the number of images"),
    ],
)
def test_wrong_input_gets_a_sentence(arguments: list[str], message: str, bundles: dict[str, Bundle]) -> None:
    refused = fora("run", bundles["sigma"].folder, "--steps", 4, "--device", "cpu", *arguments)
    assert refused.exit_code != 0
    assert message in " ".join(refused.stderr.split()), refused.stderr
    assert "Traceback" not in refused.output


def test_embeddings_of_another_length_or_without_a_negative_half(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    np.savez(tmp_path / "long.npz", prompt_embeds=np.zeros((1, 20, 12), dtype=np.float32))
    long = fora("run", bundles["sigma"].folder, "--prompt-embeds", tmp_path / "long.npz")
    assert "'encoder_hidden_states' has shape [1, 20, 12]; pixart-sigma takes [1, 12, 12]" in long.stderr
    np.savez(tmp_path / "half.npz", prompt_embeds=np.zeros((1, TOKENS, 12), dtype=np.float32))
    half = ["run", bundles["sigma"].folder, "--prompt-embeds", tmp_path / "half.npz", "--steps", 4]
    half += ["--force", "-o", tmp_path / "a.png"]
    assert fora(*half).exit_code == 0, "without guidance"
    assert (
        "guidance needs unconditional inputs; none were given for pixart-sigma"
        in fora(*half, "--guidance-scale", 3).stderr
    )


@pytest.mark.usefixtures("one_trace")
def test_a_transformer_alone_takes_embeddings_and_says_why_no_prompt(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["sigma"] / "transformer", tmp_path / "bare")
    options = SourceOptions(source=str(tmp_path / "bare"), text_length=TOKENS)
    bundle = bundle_from_model(model_from_source(options), tmp_path / "export" / "bare", check=GraphCheck())
    assert bundle.manifest.text is not None
    assert bundle.manifest.text.encoder is None
    with pytest.raises(InputError, match=r"exported without access to a text encoder.*give --prompt-embeds FILE"):
        conditioning_of_prompts(bundle.manifest, ["a"], "", torch.device("cpu"))


def test_a_prompt_without_transformers_says_what_to_install(
    bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    monkeypatch.setattr("fora_trt.sampling.prompts.find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=r"--prompt needs transformers and sentencepiece; pip install 'fora-trt\[text\]'"
    ):
        conditioning_of_prompts(bundles["sigma"].manifest, ["a"], "", torch.device("cpu"))


def test_an_oblong_image_is_exported_and_run(folders: dict[str, Path], tmp_path: Path) -> None:
    source = ("export", folders["alpha"], "--image-size", "256x512", "--text-length", TOKENS, "--out", tmp_path)
    made = fora(*source, "--name", "wide")
    assert made.exit_code == 0, made.output
    bundle = Bundle.open(tmp_path / "wide")
    assert bundle.manifest.conditioning["aspect_ratio"].default == (0.5,)
    assert bundle.manifest.latents.shape == (4, 128, 256)
    for comparison in compare_with_pytorch(Pipeline(bundle, steps=4, backend="onnxruntime", device="cpu"), ["fora:2"]):
        assert comparison.error.relative < 1e-4, comparison
    assert "give a multiple of 32" in fora(*source[:3], "255x512").stderr
    assert "250 x 512 does not fit" in fora(*source[:3], "250x512").stderr
