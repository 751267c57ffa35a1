from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fora_trt.bundle import Bundle
from fora_trt.contract import Part
from fora_trt.errors import ModelError
from fora_trt.evaluate.export_check import GraphCheck
from fora_trt.export.write import bundle_from_model
from fora_trt.models.options import SourceOptions
from fora_trt.models.sources import model_from_source
from fora_trt.models.spec import Model
from fora_trt.pipeline import Pipeline
from fora_trt.sampling.conditioning import conditioning_of_classes
from fora_trt.sampling.scheduler_step import SchedulerStep
from fora_trt.sampling.schedulers import scheduler_from_config
from tests.checkpoints import CLASSES, DEPTH, HEADS, WIDTH, authors_dit, authors_state
from tests.shared import bundle_once, made_once


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    return authors_state()


@pytest.fixture
def path(state: dict[str, torch.Tensor], tmp_path: Path) -> Path:
    torch.save(state, tmp_path / "DiT-small.pt")
    return tmp_path / "DiT-small.pt"


@pytest.fixture
def small(run_folder: Path) -> Bundle:
    """The bundle of those weights."""
    file = run_folder / "checkpoints" / "DiT-small" / "DiT-small.pt"

    def save(folder: Path) -> None:
        folder.mkdir()
        torch.save(authors_state(), folder / file.name)

    made_once(file.parent, save)
    return bundle_once(run_folder / "export" / "DiT-small", lambda: opened(file))


def opened(path: Path, precision: str = "fp32", **options: Any) -> Model:
    return model_from_source(SourceOptions(source=str(path), num_heads=HEADS, **options), precision)


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(3, 4, 8, 8, generator=generator)
    return x, torch.tensor([999.0, 500.0, 0.0]), torch.tensor([1, 7, CLASSES])


def predicted(model: Model) -> torch.Tensor:
    x, t, y = inputs()
    with torch.no_grad():
        return model.spec.call(model.module, {"latents": x, "timestep": t, "class_labels": y})


def test_the_authors_weights_give_the_authors_prediction(path: Path, state: dict[str, torch.Tensor]) -> None:
    model = opened(path)
    assert (predicted(model) - authors_dit(state, *inputs())).abs().max() < 1e-5
    told = ("num_layers", "num_attention_heads", "attention_head_dim", "sample_size", "num_embeds_ada_norm")
    assert [model.config[key] for key in told] == [DEPTH, HEADS, WIDTH // HEADS, 8, CLASSES]
    assert model.image_size == (64, 64)
    assert model.vae == Part("stabilityai/sd-vae-ft-ema")


@pytest.mark.parametrize("wrap", ["ema", "model", "state_dict"])
def test_weights_are_found_in_what_training_saves(wrap: str, state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    prefixed = {f"module.{name}": value for name, value in state.items()}
    torch.save({wrap: prefixed, "opt": {"step": 3}}, tmp_path / "0050000.pt")
    assert (predicted(opened(tmp_path / "0050000.pt")) - authors_dit(state, *inputs())).abs().max() < 1e-5


def test_safetensors_and_pruned_depths_load_as_they_are(tmp_path: Path) -> None:
    shallow = authors_state(depth=1)
    save_file(shallow, tmp_path / "tiny.safetensors")
    model = opened(tmp_path / "tiny.safetensors")
    assert model.config["num_layers"] == 1
    assert (predicted(model) - authors_dit(shallow, *inputs())).abs().max() < 1e-5


def test_one_embedder_for_all_blocks_and_one_copy_in_each_graph(path: Path, small: Bundle) -> None:
    model = opened(path)
    distinct = sum(parameter.nbytes for parameter in model.module.parameters())
    assert len({id(block.norm1.emb) for block in model.module.transformer_blocks}) == 1  # type: ignore[union-attr]
    positions = 16 * WIDTH * 4
    assert small.manifest.files["full.onnx.data"].size < 1.02 * (distinct + positions) + 4096 * 10


def test_learned_positions_are_kept_and_fix_the_size(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    state["pos_embed"] = torch.randn(1, 16, WIDTH, generator=torch.Generator().manual_seed(5))
    torch.save(state, tmp_path / "DiT-learned.pt")
    assert (predicted(opened(tmp_path / "DiT-learned.pt")) - authors_dit(state, *inputs())).abs().max() < 1e-5
    with pytest.raises(ModelError, match="has learned position embeddings for 16 patches, but the image size needs 64"):
        opened(tmp_path / "DiT-learned.pt", image_size=128)


def trajectory(bundle: Bundle, scheduler: str | None, steps: int, noise: torch.Tensor, guidance: float) -> torch.Tensor:
    pipeline = Pipeline(bundle, schedule="none", scheduler=scheduler, steps=steps, backend="onnxruntime", device="cpu")
    sampling = pipeline.sampling()
    sampling.scheduler_step.begin = _with_noise(sampling.scheduler_step, noise)  # type: ignore[method-assign]
    given = conditioning_of_classes(bundle.manifest, [1, 7])
    return pipeline.sampler(sampling)(given, [0, 1], guidance).latents


def _with_noise(scheduler_step: SchedulerStep, noise: torch.Tensor) -> Any:
    begin = scheduler_step.begin

    def begun(*args: Any) -> object:
        allocation = begin(*args)
        scheduler_step.latents.copy_(noise)
        return allocation

    return begun


def test_guidance_of_the_authors_leaves_the_fourth_channel_alone(small: Bundle, state: dict[str, torch.Tensor]) -> None:
    """One DDIM step from t = 0 to the image shows the guided noise prediction."""
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    latents = trajectory(small, "ddim", 1, noise, 1.5)
    twice, y = torch.cat([noise, noise]), torch.tensor([1, 7, CLASSES, CLASSES])
    conditional, unconditional = authors_dit(state, twice, torch.zeros(4), y)[:, :4].chunk(2)
    guided = unconditional + 1.5 * (conditional - unconditional)
    guided[:, 3] = conditional[:, 3]
    kept = 1 - 0.0001  # the first alpha of the linear schedule
    expected = (noise - (1 - kept) ** 0.5 * guided) / kept**0.5
    assert (latents - expected).abs().max() < 1e-4


def test_sit_integrates_its_velocity_as_the_authors_do(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """Euler and Heun from t = 0 (noise) to 1 (image) in steps of one length, velocity taken as it is."""
    torch.save(state, tmp_path / "SiT-small.pt")
    model = opened(tmp_path / "SiT-small.pt")
    bundle = bundle_from_model(model, tmp_path / "export" / "sit", check=GraphCheck())
    assert not bundle.manifest.latents.learned_sigma
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    steps, x, y = 8, noise.clone(), torch.tensor([1, 7])
    for k in range(steps):
        x = x + authors_dit(state, x, torch.full((2,), k / steps), y)[:, :4] / steps
    assert (trajectory(bundle, None, steps, noise, 1.0) - x).abs().max() < 1e-4

    grid = np.linspace(1, 0, steps + 1)  # the last step is Euler's
    x = noise.clone()
    for now, after in zip(1 - grid[:-1], 1 - grid[1:], strict=True):
        first = authors_dit(state, x, torch.full((2,), now), y)[:, :4]
        ahead = x + (after - now) * first
        second = first if after == 1 else authors_dit(state, ahead, torch.full((2,), after), y)[:, :4]
        x = x + (after - now) * (first + second) / 2
    assert (trajectory(bundle, "heun", steps, noise, 1.0) - x).abs().max() < 1e-4


def test_the_architecture_can_be_said_and_flow_matching_admits_no_other_scheduler(path: Path) -> None:
    model = opened(path, architecture="sit")
    assert model.scheduler["_class_name"] == "FlowMatchEulerDiscreteScheduler"
    with pytest.raises(
        ValueError, match=r"'ddim' for this model, which was trained by flow matching; give one of euler"
    ):
        scheduler_from_config(model.scheduler, "ddim", learned_sigma=False)
    with pytest.raises(ModelError, match="the architecture is 'unet'; for this state dict choose DiT or SiT"):
        opened(path, architecture="unet")


def test_what_does_not_fit_is_named(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    def refused(changed: dict[str, Any], **options: Any) -> str:
        torch.save(changed, tmp_path / "DiT-wrong.pt")
        with pytest.raises(ModelError) as raised:
            model_from_source(SourceOptions(source=str(tmp_path / "DiT-wrong.pt"), **options))
        return str(raised.value)

    some = {"num_heads": HEADS}
    assert (
        "a width of 48, for which the number of attention heads is unknown; give --num-heads, a divisor of 48"
        in refused(state)
    )
    assert "a divisor of 48" in refused(state, num_heads=7)
    missing = {name: value for name, value in state.items() if name != "blocks.1.mlp.fc2.bias"}
    assert "1 missing (transformer_blocks.1.ff.net.2.bias)" in refused(missing, **some)
    extra = refused({**state, "blocks.0.attn.q_norm.weight": torch.ones(3)}, **some)
    assert "1 unexpected (blocks.0.attn.q_norm.weight)" in extra
    assert "the configuration has num_layers 3, num_attention_heads 4, attention_head_dim 12" in extra
    misshapen = refused({**state, "blocks.2.attn.proj.weight": torch.ones(5, 5)}, **some)
    assert "transformer_blocks.2.attn1.to_out.0.weight is [5, 5] instead of [48, 48]" in misshapen
    assert "is not a state dict of the DiT or SiT or PixArt authors: it contains 'conv.weight'" in refused(
        {"conv.weight": torch.ones(1)}
    )
    wide = {**state, "blocks.0.mlp.fc1.weight": torch.ones(96, 48)}
    assert "2 times as wide as the network" in refused(wide, **some)
    flat = {
        "pos_embed": torch.ones(16, 48),
        "y_embedder.embedding_table.weight": torch.ones(0, 48),
        "x_embedder.proj.weight": torch.ones(48, 4, 0, 0),
        "blocks.0.mlp.fc1.weight": torch.tensor(1.0),
    }
    for name, tensor in flat.items():
        assert f"not its shapes: {name} is {list(tensor.shape)};" in refused({**state, name: tensor}, **some)
    narrow = refused({**state, "pos_embed": torch.ones(1, 16, 40)}, **some)
    assert "are [1, 16, 40] instead of [1, 16, 48], so the file is damaged" in narrow
    for odd in (torch.tensor(1.0), torch.ones(2), torch.ones(145, 48)):
        assert "attn1.to_q.weight is" in refused({**state, "blocks.0.attn.qkv.weight": odd}, **some)
    assert "is not a state dict of the DiT or SiT or PixArt authors: it is empty" in refused({})


def test_a_pickle_with_more_than_tensors_is_refused_unread(tmp_path: Path) -> None:
    class Surprise:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "was-run",))

    torch.save({"x_embedder.proj.weight": torch.ones(1), "args": Surprise()}, tmp_path / "evil.pt")
    with pytest.raises(ModelError, match=r"evil.pt contains a call of builtins.getattr, so loading it could run code"):
        model_from_source(str(tmp_path / "evil.pt"))
    assert not (tmp_path / "was-run").exists()
    (tmp_path / "text.pt").write_text("hello world")
    with pytest.raises(ModelError, match=r"text.pt is text that begins with 'hello world'"):
        model_from_source(str(tmp_path / "text.pt"))
    torch.save([torch.ones(1)], tmp_path / "list.pt")
    with pytest.raises(ModelError, match="authors: it is a list; give a folder in diffusers format"):
        model_from_source(str(tmp_path / "list.pt"))
    (tmp_path / "no.pt").write_bytes(b"\x00no pickle at all\xff")
    with pytest.raises(ModelError, match=r"no\.pt"):
        model_from_source(str(tmp_path / "no.pt"))
    with pytest.raises(ModelError, match=r"'missing\.pt' does not exist; known sources"):
        model_from_source("missing.pt")
