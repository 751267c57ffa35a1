"""Folders of diffusers pipelines as a source: export by watching, and `run` through the pipeline's own parts."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from click.testing import CliRunner
from diffusers import AuraFlowPipeline, AutoencoderKL, FlowMatchEulerDiscreteScheduler
from PIL import Image

from fora_trt.bundle import Bundle
from fora_trt.cli import main
from fora_trt.diffusers_pipeline import DiffusersPipeline
from fora_trt.engines.options import EngineOptions
from fora_trt.errors import BundleError
from fora_trt.runtime.denoiser import Denoiser, load
from tests.damage import rewrite
from tests.tiny_pipelines import PIPELINES
from tests.tiny_transformers import TRANSFORMERS

STEPS = 6


def call(*arguments: object, code: int = 0) -> str:
    """Run the command line; return its standard output, or with an error everything that it printed."""
    result = CliRunner().invoke(main, [str(one) for one in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result.stdout if code == 0 else result.output


@pytest.fixture(scope="module")
def auraflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a pipeline with a text encoder, its tokenizer (of single letters) and a VAE that halves."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    torch.manual_seed(0)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *((one, -3.0) for one in letters)]
    encoder = T5Config(vocab_size=len(vocabulary) + 8, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    vae = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4,
    )  # fmt: skip
    transformer, _ = TRANSFORMERS["auraflow"]()
    folder = tmp_path_factory.mktemp("pipelines") / "auraflow"
    AuraFlowPipeline(
        tokenizer=T5Tokenizer(vocab=vocabulary, extra_ids=0),
        text_encoder=T5EncoderModel(encoder),
        vae=vae,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bundle(auraflow: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("export")
    call("export", auraflow, "--out", out, "--image-size", 16, "--text-length", 8, "--schedule", "fora:2")
    return Bundle.open(out / "auraflow")


def test_a_folder_is_exported_without_the_weights_of_its_text_encoder(
    auraflow: Path, bundle: Bundle, tmp_path: Path
) -> None:
    spec = bundle.manifest.pipeline
    assert spec is not None
    assert (spec.name, spec.components, spec.samples) == ("AuraFlowPipeline", ("transformer",), 2)
    assert spec.where is not None
    assert spec.where.where == str(auraflow)
    assert {one.name: one.shape for one in bundle.manifest.inputs}["encoder_hidden_states"] == ("batch", 8, 16)
    assert bundle.manifest.optimization == "fold"


def test_run_makes_the_images_of_the_pipeline(auraflow: Path, bundle: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "foxes"
    told = json.loads(
        call("run", bundle.folder, "--prompt", "a fox", "--num-images", 2, "--steps", STEPS, "--cache-interval", 1,
             "--seed", 3, "-o", out, "--json")
    )  # fmt: skip
    assert (told["full_steps"], told["reuse_steps"], told["results"]) == (STEPS, 0, 2)
    pipe = AuraFlowPipeline.from_pretrained(auraflow)
    pipe.set_progress_bar_config(disable=True)
    made = pipe(
        "a fox", num_images_per_prompt=2, num_inference_steps=STEPS, height=16, width=16, max_sequence_length=8,
        generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)],
    )  # fmt: skip
    for k, expected in enumerate(made.images):
        got = numpy.asarray(Image.open(out / f"{k:04d}.png")).astype(int)
        assert numpy.abs(got - numpy.asarray(expected).astype(int)).max() <= 1
    text = Image.open(out / "0000.png").text  # type: ignore[attr-defined]
    assert json.loads(text["fora-trt"])["schedule"] == "none"


def test_run_takes_the_schedule_of_the_bundle_and_arguments_of_the_pipeline(bundle: Bundle, tmp_path: Path) -> None:
    told = json.loads(
        call("run", bundle.folder, "--prompt", "a fox", "--negative-prompt", "a dog", "--guidance-scale", 2, "--steps",
             STEPS, "-o", tmp_path / "fox.png", "--call", "return_dict=true", "--json")
    )  # fmt: skip
    assert (told["schedule"], told["full_steps"], told["reuse_steps"]) == ("fora:2", 4, 2)


def test_engines_are_started_once_for_all_results_of_a_call(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[int] = []

    def recording(*args: Any, plans: EngineOptions, **settings: Any) -> Denoiser:
        batches.append(plans.batch)
        return load(*args, plans=plans, **settings)

    monkeypatch.setattr("fora_trt.diffusers_pipeline.load", recording)
    pipeline = DiffusersPipeline(bundle, device="cpu")
    assert pipeline.decodes
    assert batches == []
    made = pipeline(["a fox", "a dog"], steps=2, num_images=2, latents=True)
    assert made.latents is not None
    assert len(made.latents) == 4
    assert batches == [4 * 2], "each result has a negative prompt"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--prompt", "a", "--call", "num_inference_steps=3"), "'num_inference_steps' is no further argument of the"),
        (("--prompt", "a", "--call", "prompt=b"), "'prompt' of the pipeline is given by --call and by another option"),
        (
            ("--prompt", "a", "--negative-prompt", "b", "--call", "negative_prompt=c"),
            "'negative_prompt' of the pipeline",
        ),
        ((), "AuraFlowPipeline needs a prompt; give --prompt, or --prompt-embeds FILE"),
    ],
)
def test_arguments_that_do_not_fit_together_are_refused(
    options: tuple[str, ...], message: str, bundle: Bundle, tmp_path: Path
) -> None:
    assert message in call("run", bundle.folder, *options, "-o", tmp_path / "a.png", code=1)
    assert not [*tmp_path.iterdir()]


def test_the_folder_of_another_pipeline_and_another_vae_are_refused(
    auraflow: Path, bundle: Bundle, tmp_path: Path
) -> None:
    other = shutil.copytree(auraflow, tmp_path / "other")
    index = other / "model_index.json"
    index.write_text(index.read_text().replace("AuraFlowPipeline", "SanaPipeline"))
    said = call("run", bundle.folder, "--prompt", "a", "--pipeline", other, "-o", tmp_path / "a.png", code=1)
    assert "other is a SanaPipeline; " in said
    assert "was exported from a AuraFlowPipeline: give the folder of such a pipeline" in said
    said = call("export", auraflow, "--vae", "elsewhere", "--out", tmp_path, "--image-size", 16, code=1)
    assert "is a pipeline with a VAE of its own; leave vae out" in said


def test_latents_are_written_if_asked_for(bundle: Bundle, tmp_path: Path) -> None:
    at = ("run", bundle.folder, "--prompt", "a fox", "--steps", 2, "--latents-out", tmp_path / "latents.npy")
    call(*at)
    assert numpy.load(tmp_path / "latents.npy").shape == (1, 4, 8, 8)
    assert [path.name for path in tmp_path.iterdir()] == ["latents.npy"]
    assert "already exists" in call(*at, code=1)
    assert "either images or latents" in call(*at, "--force", "-o", tmp_path / "fox.png", code=1)


def test_options_without_effect_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    at = ("run", bundle.folder, "--prompt", "a fox", "--steps", 2)
    assert "--scheduler has no effect: AuraFlowPipeline has its own loop" in call(*at, "--scheduler", "ddim", code=2)
    assert "AuraFlowPipeline has no argument 'hight'" in call(*at, "--call", "hight=8", code=1)
    assert "latents have shape [2, 4, 16, 8]; auraflow takes [2, 4, 8, 8]" in call(*at, "--call", "height=32", code=1)
    assert "is not NAME=VALUE" in call(*at, "--call", "height", code=2)
    assert not [*tmp_path.iterdir()]


def test_verify_compares_with_the_module_in_the_folder(bundle: Bundle) -> None:
    told = json.loads(call("verify", bundle.folder, "--steps", 4, "--cache-intervals", "1,2", "--json"))
    assert told["passed"]
    assert told["reference"] == "PyTorch"
    assert max(one["relative"] for one in told["comparisons"]) < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p["call"]["time"].update(scale=0.0), "the times of the pipeline's scheduler are not mapped"),
        (lambda p: p.update(components=["../../etc"]), "the pipeline has a part or an argument whose name is none"),
        (lambda p: p["call"]["arguments"].pop("hidden_states"), "lacks latents or a timestep"),
        (lambda p: p.update(samples=10**9), "has 1000000000 samples for one prompt"),
        (lambda p: p["call"]["arguments"]["timestep"].update(kind="factory"), "damaged at pipeline.call.arguments"),
    ],
)
def test_a_pipeline_that_a_manifest_garbles_is_refused(
    change: Any, message: str, bundle: Bundle, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(bundle.folder, tmp_path / "auraflow"))
    rewrite(folder, lambda manifest: change(manifest["pipeline"]))
    with pytest.raises(BundleError, match=message):
        Bundle.open(folder)


def test_attributes_in_a_manifest_do_not_replace_those_of_the_drop_in(bundle: Bundle, tmp_path: Path) -> None:
    from fora_trt import load

    folder = Path(shutil.copytree(bundle.folder, tmp_path / "auraflow"))
    names = {"forward": "x", "denoiser": "x", "_slots": "x", "dtype": "x", "inner": 3}
    rewrite(folder, lambda manifest: manifest["pipeline"]["call"].update(attributes=names))
    transformer = load(folder, schedule="none", device="cpu").as_transformer()
    assert transformer.inner == 3
    assert "x" not in [vars(transformer).get(name) for name in names]


def test_a_source_that_is_not_a_pipeline_of_diffusers_is_a_sentence(auraflow: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(auraflow, tmp_path / "strange"))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "MyPipeline"}))
    at = ("export", folder, "--out", tmp_path / "export")
    assert "is a pipeline of the class 'MyPipeline', which the installed diffusers does not have" in call(*at, code=1)
    (folder / "model_index.json").write_text(json.dumps({**index, "text_encoder": ["os", "system"]}))
    assert "is a os.system, which is not installed" in call(*at, code=1)
    (folder / "model_index.json").write_text(json.dumps(index))
    assert "AuraFlowPipeline has no argument 'num_frames' or 'video_length'; leave frames out" in call(
        *at, "--frames", 4, code=1
    )
    assert "has no transformer 'other'; its transformers: transformer" in call(*at, "--component", "other", code=1)
    assert not (tmp_path / "export").exists() or not [*(tmp_path / "export").iterdir()]


@pytest.mark.slow
def test_two_transformers_become_two_bundles_that_run_finds(tmp_path: Path) -> None:
    pipe, given = PIPELINES["wan22"]()
    pipe.save_pretrained(tmp_path / "wan")
    sizes = ("--image-size", 64, "--frames", 5, "--text-length", 6)
    told = json.loads(call("export", tmp_path / "wan", "--out", tmp_path / "export", *sizes, "--json"))
    assert [Path(one["bundle"]).name for one in (told, *told["other_transformers"])] == ["wan", "wan-transformer_2"]
    numpy.savez(tmp_path / "prompt.npz", **{name: one.numpy() for name, one in given.items() if hasattr(one, "numpy")})
    ran = json.loads(
        call("run", tmp_path / "export/wan", "--prompt-embeds", tmp_path / "prompt.npz", "--steps", STEPS,
             "--latents-out", tmp_path / "latents.npy", "--cache-interval", 1, "--json")
    )  # fmt: skip
    assert ran["full_steps"] == 2 * STEPS
    at = ("run", tmp_path / "export/wan", "--prompt-embeds", tmp_path / "prompt.npz", "--steps", 2)
    assert "WanPipeline has no VAE, so it makes no images" in call(*at, "-o", tmp_path / "fox.webp", code=1)
    expected = pipe(
        **given, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0), output_type="latent"
    )
    latents = torch.from_numpy(numpy.load(tmp_path / "latents.npy"))
    assert (latents - expected.frames).abs().max() < 1e-5 * expected.frames.abs().max()
