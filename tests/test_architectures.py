"""An architecture that this file alone knows: one registration, and every command takes it."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file
from torch import Tensor, nn

from fora_trt import GuidanceSpec, InputSpec, LatentSpec, ModelSpec, TensorSpec
from fora_trt.bundle import Bundle
from fora_trt.cli import main
from fora_trt.errors import ModelError
from fora_trt.evaluate.verify import compare_with_pytorch
from fora_trt.models.architectures import (
    ARCHITECTURES,
    Architecture,
    Config,
    PipelineParts,
    Published,
    StateDictFormat,
    architecture_of,
    prompt_encoding,
)
from fora_trt.models.options import SourceOptions
from fora_trt.models.sources import model_from_source
from fora_trt.models.text import MASKED_PROMPTS, PromptEncoding
from fora_trt.pipeline import Pipeline

CONFIG = {"width": 16, "num_layers": 2, "sample_size": 4, "classes": 5}


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate, self.mixer, self.norm = nn.Linear(width, width), nn.Linear(width, width), nn.LayerNorm(width)

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        branch: Tensor = self.mixer(self.norm(h))
        mixed: Tensor = h + self.gate(c)[:, None] * branch
        return mixed


class TinyMixer(nn.Module):
    """Latents (B, 3, S, S) as tokens of single pixels; no class of diffusers."""

    def __init__(self, width: int, num_layers: int, classes: int) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(3, width), nn.Linear(width, 3)
        self.times, self.labels = nn.Linear(1, width), nn.Embedding(classes + 1, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(num_layers))

    def forward(self, x: Tensor, time: Tensor, y: Tensor) -> Tensor:
        c = (self.times(time[:, None] / 1000) + self.labels(y)).tanh()  # (B, D)
        h = self.enter(x.flatten(2).transpose(1, 2))  # (B, N, D)
        for layer in self.layers:
            h = layer(h, c)
        prediction: Tensor = self.leave(h).transpose(1, 2).reshape(x.shape)
        return prediction


def make(config: Config) -> nn.Module:
    return TinyMixer(config["width"], config["num_layers"], config["classes"])


def spec(config: Config, options: SourceOptions, parts: PipelineParts) -> ModelSpec:
    side = config["sample_size"]
    latents = (3, *options.latent_size((side, side), factor=1, patch=1))
    classes = config["classes"]
    return ModelSpec(
        inputs=(
            TensorSpec("latents", "float32", ("batch", *latents)),
            TensorSpec("timestep", "float32", ("batch",)),
            TensorSpec("class_labels", "int64", ("batch",)),
        ),
        output=TensorSpec("noise_prediction", "float32", ("batch", *latents)),
        cache_sites={"mixer": ("layers.*.mixer",)},
        latents=LatentSpec(latents, pixels=True),
        conditioning={"class_labels": InputSpec(values=(0, classes + 1))},
        guidance=GuidanceSpec(num_classes=classes, null_class=classes),
    )


AUTHORS = StateDictFormat(
    name="Mixer",
    recognises=lambda tensors: "mixer.enter.weight" in tensors,
    config=lambda tensors, options, what: CONFIG,
    renamed=lambda tensors, config: {name.removeprefix("mixer."): tensors[name] for name in tensors},
)

TINY = Architecture(
    name="TinyMixer",
    class_names=("TinyMixerModel", "Transformer2DModel"),
    recognises=lambda config: "classes" in config,
    make=make,
    spec=spec,
    takes=("image_size",),
    published={"TinyMixer-S": Published(lambda options: {**CONFIG, "num_layers": 1})},
    state_dicts=(AUTHORS,),
    guidance_scale=2.5,
    example="somebody/tiny-mixer",
)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    assert {"DiT", "PixArt"} <= {*ARCHITECTURES}, "those that come with fora-trt, found by the look-up"
    ARCHITECTURES.register(TINY)
    yield
    ARCHITECTURES.unregister(TINY.name)


@pytest.fixture
def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return make(CONFIG).state_dict()


@pytest.fixture
def folder(weights: Mapping[str, Tensor], tmp_path: Path) -> Path:
    made = tmp_path / "checkpoint"
    made.mkdir()
    (made / "config.json").write_text(json.dumps({"_class_name": "TinyMixerModel", **CONFIG}))
    save_file(dict(weights), made / "diffusion_pytorch_model.safetensors")
    return made


def fora(*arguments: Any) -> Result:
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done


def test_a_folder_is_exported_inspected_and_run(folder: Path, weights: Mapping[str, Tensor], tmp_path: Path) -> None:
    fora("export", folder, "--name", "tiny", "--out", tmp_path)
    bundle = Bundle.open(tmp_path / "tiny")
    manifest = bundle.manifest
    assert manifest.model.architecture == "TinyMixerModel"
    assert (manifest.guidance_scale, manifest.model.image_size, manifest.optimization) == (2.5, (4, 4), "fold")
    assert [site.module for site in manifest.cache_sites] == ["layers.0.mixer", "layers.1.mixer"]
    assert json.loads(fora("inspect", tmp_path / "tiny", "--json").stdout)["architecture"] == "TinyMixerModel"
    pipeline = Pipeline(bundle, steps=6, backend="onnxruntime", device="cpu")
    assert all(comparison.error.relative < 1e-4 for comparison in compare_with_pytorch(pipeline, ["none", "fora:2"])), (
        "the manifest says how to load the source again"
    )

    made = fora(
        "run", tmp_path / "tiny", "--class-labels", "0,3", "--steps", 4, "--cache-interval", 2, "--device", "cpu",
        "--latents-out", tmp_path / "a.npy", "-o", tmp_path / "a.png", "--json",
    )  # fmt: skip
    assert json.loads(made.stdout)["guidance_scale"] == 2.5
    assert np.load(tmp_path / "a.npy").shape == (2, 3, 4, 4)
    assert (tmp_path / "a.png").is_file()


def test_another_image_size_and_the_options_that_have_no_effect(folder: Path) -> None:
    model = model_from_source(SourceOptions(source=str(folder), image_size=(2, 6)))
    assert (model.latents.shape, model.image_size) == ((3, 2, 6), (2, 6))
    with pytest.raises(ModelError, match="does not take text_length, which is for models that take a prompt"):
        model_from_source(SourceOptions(source=str(folder), text_length=5))


def test_a_published_size_has_random_weights(tmp_path: Path) -> None:
    fora("export", "random:TinyMixer-S", "--out", tmp_path)
    manifest = Bundle.open(tmp_path / "random-TinyMixer-S").manifest
    assert [site.module for site in manifest.cache_sites] == ["layers.0.mixer"]
    assert manifest.model.architecture == "TinyMixerModel"


def test_the_format_of_its_authors_is_recognised(weights: Mapping[str, Tensor], tmp_path: Path) -> None:
    torch.save({f"mixer.{name}": tensor for name, tensor in weights.items()}, tmp_path / "weights.pt")
    model = model_from_source(str(tmp_path / "weights.pt"))
    for name, parameter in model.module.named_parameters():
        assert torch.equal(parameter, weights[name])


def test_messages_name_it(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"a diffusers pipeline .* of the DiT or SiT or .*Mixer authors"):
        model_from_source("nowhere")
    with pytest.raises(ModelError, match=r"NAME must be one of DiT-S/2, .*, TinyMixer-S"):
        model_from_source("random:nothing")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 0}, "not a valid TinyMixerModel configuration: num_layers is 0; a positive integer is needed"),
        ({"width": -1}, "not a valid TinyMixerModel configuration: Trying to create tensor with negative dimension"),
        ({"num_layers": 3}, "the configuration has num_layers 3"),
    ],
)
def test_a_folder_that_does_not_fit_is_named(folder: Path, changes: dict[str, Any], message: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ModelError, match=message):
        model_from_source(str(folder))


def test_a_configuration_without_a_size_is_named(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["sample_size"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="not a valid TinyMixerModel configuration: the key 'sample_size' is missing"):
        model_from_source(str(folder))


def test_an_older_class_name_stands_for_it_where_the_configuration_does() -> None:
    assert architecture_of({"_class_name": "Transformer2DModel", **CONFIG}) is TINY
    assert architecture_of({"_class_name": "Transformer2DModel"}) is not TINY
    assert architecture_of({"_class_name": ["TinyMixerModel"]}) is None


def test_prompts_are_encoded_as_its_entry_says() -> None:
    own = PromptEncoding(lambda pipeline, prompt: 1, lambda *_: ({}, {}))
    entry = Architecture("Reader", ("ReaderModel",), make, spec, prompts=own)
    ARCHITECTURES.register(entry)
    try:
        assert prompt_encoding("ReaderModel") is own
    finally:
        ARCHITECTURES.unregister("Reader")
    assert prompt_encoding("ReaderModel") is MASKED_PROMPTS, "a network of one's own, whose pipeline is as PixArt's"
