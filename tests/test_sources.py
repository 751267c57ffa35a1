import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fora_trt.errors import ModelError
from fora_trt.models.options import SourceOptions
from fora_trt.models.recipes import read_recipe
from fora_trt.models.sources import model_from_source, source_from_options

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(pipeline_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pipeline_folder, tmp_path / "checkpoint"))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_digits_are_a_trained_model_in_pixel_space() -> None:
    model = model_from_source("digits")
    assert model.spec.guidance is not None
    assert (model.name, model.latents.pixels, model.spec.guidance.num_classes) == ("digits", True, 10)
    assert model.latents.learned_sigma
    weights = Path(__file__).parents[1] / "fora_trt/models/digits" / WEIGHTS
    assert weights.stat().st_size <= 4 * 2**20


def test_a_pipeline_and_its_transformer_alone_are_read(folder: Path) -> None:
    whole, bare = model_from_source(str(folder)), model_from_source(str(folder / "transformer"))
    assert (whole.vae and whole.vae.where, bare.vae) == (str(folder), None)
    assert whole.image_size == (16, 16)  # the VAE of the test halves, the usual one takes an eighth
    assert bare.image_size == (64, 64)
    assert whole.scheduler["clip_sample"] is False
    for left, right in zip(whole.module.parameters(), bare.module.parameters(), strict=True):
        assert torch.equal(left, right)


def test_equal_embedders_are_shared_and_different_ones_are_not(folder: Path) -> None:
    assert len({id(block.norm1.emb) for block in model_from_source(str(folder)).module.transformer_blocks}) == 3  # type: ignore[union-attr]
    weights = load_file(folder / WEIGHTS)
    for name in list(weights):
        if ".norm1.emb." in name:
            weights[name] = weights["transformer_blocks.0" + name[len("transformer_blocks.0") :]].clone()
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    assert len({id(block.norm1.emb) for block in model_from_source(str(folder)).module.transformer_blocks}) == 1  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)]
)
def test_weights_are_cast_to_the_precision(folder: Path, precision: str, dtype: torch.dtype) -> None:
    """All but those of the timestep embedders; at the edges of the graphs stands fp32."""
    model = model_from_source(str(folder), precision)
    found: dict[bool, set[torch.dtype]] = {True: set(), False: set()}
    for name, parameter in model.module.named_parameters():
        found["timestep_embedder" in name].add(parameter.dtype)
    embedder = dtype if precision == "fp16" else torch.float32  # the eight bits of bf16 are too few for it
    assert found == {True: {embedder}, False: {dtype}}
    assert (model.spec.inputs[0].dtype, model.output.dtype) == ("float32", "float32")


def test_the_image_size_changes_the_latents(folder: Path) -> None:
    model = model_from_source(SourceOptions(source=str(folder), image_size=24))
    assert model.spec.inputs[0].shape == ("batch", 4, 12, 12)
    with pytest.raises(ModelError, match="image size of 25 does not fit"):
        model_from_source(SourceOptions(source=str(folder), image_size=25))
    with pytest.raises(ModelError, match=r"an image size of 18 does not fit .* give a multiple of 4"):
        model_from_source(SourceOptions(source=str(folder), image_size=18))


def test_random_models_are_seeded_and_have_gates() -> None:
    first, second = model_from_source("random:DiT-S/8"), model_from_source("random:DiT-S/8")
    for left, right in zip(first.module.parameters(), second.module.parameters(), strict=True):
        assert torch.equal(left, right)
    gates = first.module.transformer_blocks[0].norm1.linear.weight  # type: ignore[union-attr, index]
    assert gates.std() > 0.01
    assert first.spec.inputs[0].shape == ("batch", 4, 32, 32)
    larger = model_from_source(SourceOptions(source="random:DiT-S/8", image_size=512))
    assert larger.spec.inputs[0].shape == ("batch", 4, 64, 64)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "digit",
            "the source 'digit' is neither a file, a folder nor a known name; known sources: digits; the folder or "
            "hub id of a diffusers pipeline with a transformer, such as facebook/DiT-XL-2-256; ",
        ),
        ("/no/such/folder", "neither a file, a folder nor a known name"),
        ("random:DiT-XXL/2", "unknown model 'random:DiT-XXL/2'; NAME must be one of DiT-S/2"),
        ("random:DiT-XL/3", "unknown model 'random:DiT-XL/3'"),
        ("random:", "unknown model 'random:'"),
    ],
)
def test_an_unknown_source_is_named(source: str, message: str) -> None:
    with pytest.raises(ModelError) as raised:
        model_from_source(source)
    assert message in str(raised.value)


def test_a_hub_id_without_network_says_what_to_download(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"\(hf download facebook/DiT-XL-2-256 --local-dir DiT-XL-2-256\), copy"):
        model_from_source("facebook/DiT-XL-2-256")


def test_a_folder_without_a_model_says_what_one_has(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"a diffusers folder contains transformer/config.json"):
        model_from_source(str(tmp_path))


def test_another_architecture_is_named(folder: Path) -> None:
    edit(folder / "transformer/config.json", _class_name="OtherTransformer2DModel")
    with pytest.raises(
        ModelError, match="is OtherTransformer2DModel; supported are DiTTransformer2DModel, PixArtTransformer2DModel"
    ):
        model_from_source(str(folder))
    edit(folder / "transformer/config.json", _class_name="FluxTransformer2DModel")
    message = r"is of a FluxTransformer2DModel, and model_index.json lists \['diffusers', 'DiTTransformer2DModel'\]"
    with pytest.raises(ModelError, match=message):
        model_from_source(str(folder))
    message = r"is a FluxTransformer2DModel without its pipeline, .*; give the folder or hub id of the whole pipeline"
    with pytest.raises(ModelError, match=message):
        model_from_source(str(folder / "transformer"))


def test_a_configuration_that_is_no_json_is_named(folder: Path) -> None:
    (folder / "transformer/config.json").write_text("{")
    with pytest.raises(ModelError, match="configuration"):
        model_from_source(str(folder))


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("transformer/config.json", {"_class_name": ["DiT"]}, "is \\['DiT'\\]; supported are"),
        ("transformer/config.json", {"num_layers": 0}, "num_layers is 0; a positive integer is needed"),
        ("transformer/config.json", {"num_layers": 10**9}, "num_layers is 1000000000; .* at most 1000"),
        ("transformer/config.json", {"sample_size": "8"}, "sample_size is '8'; a positive integer is needed"),
        (
            "transformer/config.json",
            {"num_embeds_ada_norm": -3},
            "not a valid DiTTransformer2DModel configuration: Trying to create",
        ),
        ("transformer/config.json", {"activation_fn": "no"}, "not a valid DiTTransformer2DModel configuration"),
        ("vae/config.json", {"block_out_channels": 3}, "block_out_channels is 3"),
        ("vae/config.json", {"scaling_factor": "a"}, "scaling_factor is 'a', shift_factor is None"),
    ],
)
def test_a_setting_of_another_kind_is_named(folder: Path, file: str, changes: dict[str, object], message: str) -> None:
    edit(folder / file, **changes)
    with pytest.raises(ModelError, match=message):
        model_from_source(str(folder))


def test_what_a_configuration_leaves_out_is_as_diffusers_has_it(folder: Path) -> None:
    config = json.loads((folder / "transformer/config.json").read_text())
    del config["in_channels"], config["num_embeds_ada_norm"]  # 4 and 1000, as in the fixture
    (folder / "transformer/config.json").write_text(json.dumps(config))
    edit(folder / "model_index.json", vae=None)
    model = model_from_source(str(folder))
    assert (model.config["in_channels"], model.config["num_embeds_ada_norm"], model.vae) == (4, 1000, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_length": 5}, "does not take text_length, which is for models that take a prompt; leave it out"),
        ({"num_heads": 5}, "does not take num_heads, which is for state dicts"),
        ({"inputs": {"latents": {}, "timestep": {}}}, "does not take inputs, which is for a network of your own"),
    ],
)
def test_an_option_that_would_have_no_effect_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        model_from_source(SourceOptions.model_validate({"source": "digits", **options}))


def test_weights_that_do_not_fit_are_named(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    missing = dict(weights)
    del missing["proj_out_1.weight"]
    save_file(missing, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 missing \(proj_out_1\.weight\)"):
        model_from_source(str(folder))
    save_file({**weights, "lora.weight": torch.zeros(1)}, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 unexpected \(lora\.weight\)"):
        model_from_source(str(folder))
    save_file({**weights, "proj_out_1.weight": torch.zeros(3, 3)}, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 of wrong shape \(proj_out_1\.weight is \[3, 3\] instead of \[32, 16\]\)"):
        model_from_source(str(folder))
    for wrong, why in (
        (torch.full((32, 16), torch.nan), "is not finite"),
        (torch.ones(32, 16).char(), "is torch.int8"),
    ):
        save_file({**weights, "proj_out_1.weight": wrong}, folder / WEIGHTS, metadata={"format": "pt"})
        with pytest.raises(ModelError, match=rf"1 invalid \(proj_out_1\.weight {why}"):
            model_from_source(str(folder))
    (folder / WEIGHTS).write_bytes(b"not safetensors")
    with pytest.raises(ModelError, match=r"is text that begins with 'not safetensors'"):
        model_from_source(str(folder))
    (folder / WEIGHTS).unlink()
    with pytest.raises(ModelError, match=r"contains no weights: diffusion_pytorch_model.safetensors"):
        model_from_source(str(folder))


@pytest.mark.parametrize("recipe", sorted((Path(__file__).parents[1] / "export").glob("*.toml")), ids=lambda p: p.stem)
def test_recipes_are_short_and_valid(recipe: Path) -> None:
    assert len(recipe.read_text().splitlines()) <= 15
    assert read_recipe(recipe).name == recipe.stem


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = 'x'", "is invalid at 'source': Field required"),
        ("source = 'digits'\nprecison = 'fp16'", "is invalid at 'precison'"),
        ("source = 'digits'\nopset = 'new'", "is invalid at 'opset'"),
        pytest.param(f"cache = {'[' * 10**5}", "cannot be read: ", id="deep"),
        ("source = ", "cannot be read"),
    ],
)
def test_a_wrong_recipe_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(ModelError, match=message):
        read_recipe(path)


NETWORK = """
import torch
from fora_trt import InputSpec, ModelSpec, TensorSpec

class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = torch.nn.Linear(4, 4)

    def forward(self, h):
        return h + self.attn(h)

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([Block()])

    def forward(self, x, t):
        return self.blocks[0](x) * t[:, None]

def make():
    torch.manual_seed(SEED)
    latents, timestep = TensorSpec("latents", "float32", ("batch", 4)), TensorSpec("timestep", "float32", ("batch",))
    return Net(), ModelSpec(inputs=(latents, timestep))
"""


def test_the_folder_of_a_network_is_recorded_and_another_module_of_its_name_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    for seed, folder in enumerate((here, elsewhere)):
        folder.mkdir()
        (folder / "network_of_mine.py").write_text(NETWORK.replace("SEED", str(seed)))
    monkeypatch.chdir(here)
    model = model_from_source("network_of_mine:make", cache=["blocks.*.attn"])
    assert model.options.folder == str(here)
    monkeypatch.chdir(elsewhere)
    for forgotten in (True, False):
        if forgotten:
            monkeypatch.delitem(sys.modules, "network_of_mine")
        again = model_from_source(model.options, cache=["blocks.*.attn"])
        assert all(map(torch.equal, again.module.parameters(), model.module.parameters()))
    moved = model.options.model_copy(update={"folder": str(elsewhere)})
    with pytest.raises(ModelError, match=f"was imported from {here}/network_of_mine.py, not from {elsewhere}; start a"):
        model_from_source(moved, cache=["blocks.*.attn"])
    shutil.rmtree(here)
    monkeypatch.delitem(sys.modules, "network_of_mine")
    with pytest.raises(
        ModelError, match=r"the folder .*here', from which 'network_of_mine:make' was imported, is missing"
    ):
        model_from_source(model.options, cache=["blocks.*.attn"])


@pytest.mark.parametrize("source", ["weights.pt", "folder", "random:DiT-S/2", "somebody/model", "package.module:make"])
def test_the_name_of_a_bundle_is_known_before_anything_is_loaded(source: str, tmp_path: Path) -> None:
    (tmp_path / "weights.pt").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    named = str(tmp_path / source) if (tmp_path / source).exists() else source
    names = {
        "random:DiT-S/2": "random-DiT-S-2",
        "somebody/model": "model",
        "package.module:make": "package.module-make",
    }
    assert source_from_options(SourceOptions(source=named)).name == names.get(source, source.removesuffix(".pt"))


@pytest.mark.parametrize("source", ["x" * 5000, "a\0b", "\n"])
def test_a_source_that_no_path_can_be_is_named(source: str) -> None:
    with pytest.raises(ModelError, match=r"the source (.{,210} is neither a file, a folder nor a known name|is empty)"):
        model_from_source(source)
