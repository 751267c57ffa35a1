import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel, Transformer2DModel
from safetensors.torch import load_file
from torch import Tensor

from fora_trt.errors import ModelError
from fora_trt.models.options import SourceOptions
from fora_trt.models.sources import model_from_source
from fora_trt.models.spec import Model
from tests.checkpoints import authors_state, pixart_pipeline
from tests.published import CAPTION, TOKENS, WIDTH, aged, as_pickle, authors_pixart, pixart_state, with_tensors
from tests.shared import made_once


@pytest.fixture
def dit(pipeline_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pipeline_folder, tmp_path / "dit"))


@pytest.fixture
def sigma(run_folder: Path, tmp_path: Path) -> Path:
    made = made_once(run_folder / "checkpoints" / "pixart-sigma", partial(pixart_pipeline, kind="sigma"))
    return Path(shutil.copytree(made, tmp_path / "sigma"))


def opened(source: Path | str, **options: Any) -> Model:
    return model_from_source(SourceOptions(source=str(source), **options))


def parameters(model: Model) -> list[Tensor]:
    return [one.detach() for one in model.module.parameters()]


def test_the_published_dit_is_read_as_diffusers_reads_it(dit: Path) -> None:
    aged(dit, "ada_norm_zero")
    as_pickle(dit / "transformer")
    model = opened(dit)
    theirs = Transformer2DModel.from_pretrained(dit, subfolder="transformer", use_safetensors=False).eval()
    assert isinstance(theirs, DiTTransformer2DModel)
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([7.0, 900.0]), torch.tensor([3, 1000])
    with torch.no_grad():
        ours = model.spec.call(model.module, {"latents": x, "timestep": t, "class_labels": y})
        assert torch.equal(ours, theirs(x, timestep=t, class_labels=y).sample)
    assert model.spec.architecture == "DiTTransformer2DModel"
    assert model.notes == ()


def test_the_published_pixart_is_read_and_the_null_prompt_ignored_with_a_word(sigma: Path) -> None:
    plain = opened(sigma)
    aged(sigma, "ada_norm_single", cross_attention_dim=24)
    with_tensors(sigma / "transformer", **{"caption_projection.y_embedding": torch.zeros(120, 12)})
    model = opened(sigma)
    assert all(map(torch.equal, parameters(model), parameters(plain)))
    assert model.notes == ("ignored, as in diffusers: caption_projection.y_embedding",)
    with_tensors(sigma / "transformer", **{"transformer_blocks.2.attn1.to_q.weight": torch.zeros(24, 24)})
    with pytest.raises(ModelError, match=r"1 unexpected \(transformer_blocks\.2\.attn1\.to_q\.weight\)"):
        opened(sigma)


def test_another_transformer_of_the_old_class_is_named_with_its_norm(dit: Path) -> None:
    aged(dit, "layer_norm")
    with pytest.raises(ModelError, match="is Transformer2DModel with norm_type 'layer_norm'; supported are"):
        opened(dit)


SAVINGS: dict[str, dict[str, Any]] = {
    "a variant": {"variant": "fp16"},
    "another variant": {"variant": "bf16"},
    "shards": {"max_shard_size": "20KB"},
    "shards of a variant": {"max_shard_size": "20KB", "variant": "fp16"},
    "pickles": {"safe_serialization": False},
    "pickles of a variant": {"safe_serialization": False, "variant": "fp16"},
    "shards in pickles": {"safe_serialization": False, "max_shard_size": "20KB"},
}


@pytest.mark.parametrize("saving", SAVINGS)
@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_every_layout_that_diffusers_writes_is_read(saving: str, part: str, dit: Path) -> None:
    before = opened(dit)
    kind: Any = {"transformer": DiTTransformer2DModel, "vae": AutoencoderKL}[part]
    module = kind.from_pretrained(dit, subfolder=part)
    shutil.rmtree(dit / part)
    module.save_pretrained(dit / part, **SAVINGS[saving])
    assert not (dit / part / "diffusion_pytorch_model.safetensors").exists()
    model = opened(dit)
    assert all(map(torch.equal, parameters(model), parameters(before)))
    assert model.vae is not None
    assert before.vae is not None
    assert (model.vae.sha256 == before.vae.sha256) is (part == "transformer")


def test_of_several_variants_the_most_precise_or_averaged_is_taken(dit: Path) -> None:
    module = DiTTransformer2DModel.from_pretrained(dit, subfolder="transformer")
    folder = dit / "transformer"
    module.save_pretrained(folder, variant="fp16")
    assert opened(dit).notes == ()
    assert opened(dit, weights="fp16").notes == (f"weights of {dit} ('fp16'; not averaged)",)
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "diffusion_pytorch_model.ema.safetensors")
    assert opened(dit).notes == (f"weights of {dit} ('ema'; averaged); --weights raw takes the others",)
    (folder / "diffusion_pytorch_model.ema.safetensors").unlink()
    module.save_pretrained(folder, variant="bf16")
    assert opened(dit).notes[0].startswith(f"weights of {dit}: the variant bf16; --weights takes another of ")


def test_a_missing_shard_and_a_missing_vae_are_named_at_export(dit: Path) -> None:
    module = DiTTransformer2DModel.from_pretrained(dit, subfolder="transformer")
    shutil.rmtree(dit / "transformer")
    module.save_pretrained(dit / "transformer", max_shard_size="20KB")
    shard = sorted((dit / "transformer").glob("*-of-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelError, match=rf"{shard.name} is missing, which diffusion_pytorch_model.safetensors.index"):
        opened(dit)
    module.save_pretrained(dit / "transformer")
    (dit / "vae/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"the VAE at .* has no weights: diffusion_pytorch_model.safetensors was"):
        opened(dit)


def test_averaged_weights_in_a_folder_of_their_own_are_taken(dit: Path) -> None:
    shutil.copytree(dit / "transformer", dit / "transformer_ema")
    weights = load_file(dit / "transformer_ema/diffusion_pytorch_model.safetensors")
    with_tensors(dit / "transformer_ema", **{"proj_out_2.bias": weights["proj_out_2.bias"] + 1})
    averaged, raw = opened(dit), opened(dit, weights="raw")
    biases = [dict(model.module.named_parameters())["proj_out_2.bias"] for model in (averaged, raw)]
    assert torch.equal(biases[0], biases[1] + 1)
    assert averaged.notes == (f"weights of {dit} ('transformer_ema'; averaged); --weights raw takes the others",)


def test_a_folder_with_a_transformer_alone_is_read_with_a_word_about_the_vae(dit: Path, sigma: Path) -> None:
    for name in ("model_index.json", "scheduler", "vae"):
        path = dit / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    model = opened(dit)
    assert (model.vae, model.latents.scale) == (None, 0.18215)
    assert model.notes == (
        "no VAE is known: latents are scaled by 0.18215, as in the DiT paper; --vae FOLDER brings its own scale",
    )
    bare = opened(sigma / "transformer")
    assert bare.spec.text is not None
    assert (bare.spec.text.length, bare.latents.scale) == (120, 0.18215)
    assert bare.notes[0].startswith("taken for a PixArt-alpha with prompts of 120 tokens; --architecture says")
    assert bare.notes[1].startswith("latents are scaled by 0.18215, as in PixArt-alpha; --vae FOLDER")


@pytest.mark.parametrize("kind", ["PixArt-Sigma", "pixart-sigma"])
def test_what_is_guessed_about_a_transformer_can_be_given(kind: str, sigma: Path) -> None:
    model = opened(sigma / "transformer", architecture=kind)
    assert model.spec.text is not None
    assert (model.spec.text.length, model.spec.text.pipeline) == (300, "PixArtSigmaPipeline")
    assert model.latents.scale == 0.13025
    with pytest.raises(ModelError, match="the architecture is 'DiT'; choose PixArt-alpha or PixArt-Sigma"):
        opened(sigma / "transformer", architecture="DiT")


def test_a_given_vae_brings_its_own_scale_and_shift(dit: Path, sigma: Path, tmp_path: Path) -> None:
    config = json.loads((dit / "vae/config.json").read_text())
    (dit / "vae/config.json").write_text(json.dumps({**config, "scaling_factor": 0.13025, "shift_factor": 0.5}))
    alone = opened(sigma / "transformer", vae=str(dit / "vae"), image_size=16)
    assert (alone.latents.scale, alone.latents.shift) == (0.13025, 0.5)
    assert alone.notes[0].startswith("taken for a PixArt-Sigma with prompts of 300 tokens")
    assert alone.image_size == (16, 16)
    drawn = opened("random:DiT-S/8", vae=str(dit))
    assert (drawn.latents.scale, drawn.latents.shift) == (0.13025, 0.5)
    torch.save(authors_state(), tmp_path / "DiT.pt")
    state = opened(tmp_path / "DiT.pt", vae=str(dit), num_heads=4)
    assert (state.latents.scale, state.latents.shift, state.image_size) == (0.13025, 0.5, (16, 16))
    assert state.vae is not None
    assert state.vae.where == str(dit)


@pytest.mark.parametrize("file", ["model.pth.tar", "UPPER.PT", "0050000", "a.b.c.ckpt", "weights.safetensors.bin"])
def test_a_file_is_read_whatever_its_name(file: str, tmp_path: Path) -> None:
    torch.save(authors_state(), tmp_path / file)
    model = opened(tmp_path / file, num_heads=4)
    assert model.config["num_layers"] == 3
    assert model.name == {"model.pth.tar": "model", "UPPER.PT": "UPPER", "a.b.c.ckpt": "a.b.c"}.get(
        file, file.split(".")[0]
    )


def test_a_folder_with_an_odd_name_is_a_folder(dit: Path, tmp_path: Path) -> None:
    renamed = dit.rename(tmp_path / "checkpoint.pt")
    assert opened(renamed).name == "checkpoint.pt"


def test_a_weight_file_of_a_folder_is_read_with_its_configuration(dit: Path) -> None:
    model = opened(dit / "transformer/diffusion_pytorch_model.safetensors")
    assert all(map(torch.equal, parameters(model), parameters(opened(dit / "transformer"))))


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("manifest.json", "is a bundle that was exported already; give it to 'fora-trt run'"),
        ("zero_to_fp32.py", "is a DeepSpeed checkpoint; run its zero_to_fp32.py"),
        (".metadata", "is a distributed checkpoint in parts; join them"),
        ("unet/config.json", "is a pipeline with a U-Net"),
    ],
)
def test_a_folder_of_another_kind_is_named(file: str, message: str, tmp_path: Path) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("{}")
    with pytest.raises(ModelError, match=message):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("transformer_blocks.0.attn1.to_q.weight", "has the tensor names of diffusers; give its folder"),
        ("lora_unet_x.lora_down.weight", "contains LoRA weights, not a model"),
        ("model.diffusion_model.input_blocks.0.weight", "is a Stable Diffusion checkpoint"),
        ("decoder.conv_in.weight", "is a VAE; give it with --vae"),
        ("double_blocks.0.img_attn.qkv.weight", "is a FLUX checkpoint"),
    ],
)
def test_a_file_of_another_kind_is_named(name: str, message: str, tmp_path: Path) -> None:
    torch.save({"state_dict": {name: torch.ones(1)}}, tmp_path / "a.pt")
    with pytest.raises(ModelError, match=message):
        opened(tmp_path / "a.pt")


def test_the_pixart_authors_weights_give_the_authors_prediction(tmp_path: Path) -> None:
    state = pixart_state()
    torch.save(
        {"state_dict": {**state, "t_block.1.bias": state["t_block.1.bias"] + 1}, "state_dict_ema": state},
        tmp_path / "epoch_3.pth",
    )
    model = opened(tmp_path / "epoch_3.pth", text_length=TOKENS)
    generator = torch.Generator().manual_seed(7)
    x, y = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, TOKENS, CAPTION, generator=generator)
    t, mask = torch.tensor([999.0, 3.0]), torch.ones(2, TOKENS, dtype=torch.int64)
    mask[1, 5:] = 0
    inputs = {"latents": x, "timestep": t, "encoder_hidden_states": y, "encoder_attention_mask": mask}
    with torch.no_grad():
        assert (model.spec.call(model.module, inputs) - authors_pixart(state, x, t, y, mask)).abs().max() < 1e-4
    assert model.notes[0].startswith(f"weights of {tmp_path / 'epoch_3.pth'} ('state_dict_ema'; averaged)")
    assert model.image_size == (64, 64)
    assert model.config["num_attention_heads"] == WIDTH // 72


@pytest.mark.parametrize(
    ("tokens", "sizes", "options", "pipeline", "length"),
    [
        (120, False, {"image_size": 512}, "PixArtAlphaPipeline", 120),
        (300, False, {"image_size": 512}, "PixArtSigmaPipeline", 300),
        (77, True, {}, "PixArtAlphaPipeline", 120),
        (77, False, {"image_size": 512, "architecture": "PixArt-Sigma"}, "PixArtSigmaPipeline", 300),
    ],
)
def test_the_kind_of_pixart_follows_from_its_tensors(
    tokens: int, sizes: bool, options: dict[str, Any], pipeline: str, length: int, tmp_path: Path
) -> None:
    torch.save(pixart_state(tokens, sizes, with_positions=False), tmp_path / "PixArt-XL-2.pth")
    model = opened(tmp_path / "PixArt-XL-2.pth", **options)
    assert model.spec.text is not None
    assert (model.spec.text.pipeline, model.spec.text.length) == (pipeline, length)
    assert [one.name for one in model.spec.inputs[4:]] == (["resolution", "aspect_ratio"] if sizes else [])
    assert model.image_size == ((1024, 1024) if sizes else (512, 512))
    assert model.config["interpolation_scale"] == (2 if sizes else 1)


def test_a_pixart_that_diffusers_does_not_have_is_refused(tmp_path: Path) -> None:
    torch.save({**pixart_state(), "blocks.0.attn.sr.weight": torch.ones(1)}, tmp_path / "a.pth")
    with pytest.raises(ModelError, match="is a PixArt that compresses keys and values, which diffusers cannot"):
        opened(tmp_path / "a.pth")
    torch.save(pixart_state(with_positions=False), tmp_path / "b.pth")
    with pytest.raises(ModelError, match="has no position embeddings, so its image size is unknown; give --image-size"):
        opened(tmp_path / "b.pth")


def test_a_table_without_a_null_row_has_classes_only(tmp_path: Path) -> None:
    state = authors_state()
    state["y_embedder.embedding_table.weight"] = state["y_embedder.embedding_table.weight"][:10]
    torch.save(state, tmp_path / "DiT.pt")
    guessed, told = opened(tmp_path / "DiT.pt", num_heads=4), opened(tmp_path / "DiT.pt", num_heads=4, null_class=False)
    assert guessed.spec.guidance is not None
    assert told.spec.guidance is not None
    assert (guessed.spec.guidance.num_classes, guessed.spec.guidance.null_class) == (9, 9)
    assert (told.spec.guidance.num_classes, told.spec.guidance.null_class) == (10, None)
    assert told.spec.conditioning["class_labels"].values == (0, 10)
    assert guessed.notes[-1].startswith("the last of 10 rows of the class embeddings is taken for the null class")
    assert told.notes == ()
    with pytest.raises(ModelError, match="does not take null_class, which is for state dicts of models with classes"):
        opened("digits", null_class=False)


def test_an_option_for_weights_without_effect_is_refused() -> None:
    with pytest.raises(ModelError, match="does not take weights, which is for checkpoints with several sets"):
        opened("random:DiT-S/8", weights="ema")
    with pytest.raises(ModelError, match="contains no averaged weights; it contains 'diffusion_pytorch_model'"):
        opened("digits", weights="ema")


def test_other_image_sizes_of_a_state_dict_are_those_of_diffusers(dit: Path, tmp_path: Path) -> None:
    torch.save(authors_state(), tmp_path / "DiT.pt")
    small, large = (opened(tmp_path / "DiT.pt", num_heads=4, image_size=size) for size in (32, 128))
    assert (small.image_size, large.image_size) == ((32, 32), (128, 128))
    assert (small.config["sample_size"], large.config["sample_size"]) == (4, 16)


def test_a_relative_source_is_recorded_so_that_it_is_found_from_elsewhere(
    dit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = opened("dit", vae="dit/vae")
    assert model.options.source == str(dit)
    assert model.options.vae == str(dit / "vae")
    monkeypatch.chdir("/")
    again = model_from_source(model.options)
    assert all(map(torch.equal, parameters(model), parameters(again)))
