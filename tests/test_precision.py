"""Half precision in the cache sites and fp32 between them; and what is said when it is not enough."""

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from click.testing import CliRunner
from diffusers import DiTPipeline

from fora_trt import Schedule, load
from fora_trt.bundle import Bundle
from fora_trt.cli import main
from fora_trt.errors import BackendError
from fora_trt.evaluate.verify import compare_with_pytorch, with_measured_trajectory
from fora_trt.export.statistics import bytes_kept_for_sums
from fora_trt.export.write import bundle_from_model
from fora_trt.models.sources import model_from_source
from fora_trt.models.spec import Model
from fora_trt.runtime.conditioning import conditioning_of_classes
from fora_trt.runtime.sampling import Sampler
from fora_trt.runtime.schedulers import scheduler_from_config
from fora_trt.runtime.updates import update_from_scheduler

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def half(pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    model = model_from_source(str(pipeline_folder), "fp16")
    return bundle_from_model(model, tmp_path_factory.mktemp("export") / "half", optimization="none")


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_sites_compute_in_half_and_the_stream_between_them_in_fp32(
    precision: str, dtype: torch.dtype, pipeline_folder: Path
) -> None:
    model = model_from_source(str(pipeline_folder), precision)
    seen: dict[str, torch.dtype] = {}

    def look(name: str) -> None:
        owner = model.module.get_submodule(name)
        forward = owner.forward

        def looked(*args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
            seen[name] = (*args, *kwargs.values())[0].dtype
            output: torch.Tensor = forward(*args, **kwargs)
            return output

        owner.forward = looked

    inside = ["transformer_blocks.1.attn1", "transformer_blocks.1.attn1.to_q", "transformer_blocks.1.ff.net.2"]
    between = ["transformer_blocks.1.norm3", "norm_out", "transformer_blocks.0.norm1.emb"]
    embedder = "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1"
    layers = ["proj_out_2", "transformer_blocks.1.norm1.linear"]
    for name in (*inside, *between, *layers, embedder):
        look(name)
    x, labels = torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
    with torch.no_grad():
        out = model.spec.call(
            model.module, {"latents": x, "timestep": torch.tensor([5.0, 9.0]), "class_labels": labels}
        )
    assert out.dtype == torch.float32
    assert [seen[name] for name in inside] == [dtype] * 3
    assert [seen[name] for name in between] == [torch.float32] * 3
    assert [seen[name] for name in layers] == [dtype] * 2, "large matrices are halved wherever they are"
    assert seen[embedder] == (torch.float16 if precision == "fp16" else torch.float32), "bf16 has too few bits for it"


def test_the_graph_adds_and_normalises_in_fp32(half: Bundle) -> None:
    graph = ir.load(half.graph_path("full")).graph
    dtypes = {
        kind: {str(node.outputs[0].dtype) for node in graph if node.op_type == kind}
        for kind in ("Attention", "LayerNormalization")
    }
    assert dtypes == {"Attention": {"FLOAT16"}, "LayerNormalization": {"FLOAT"}}
    features = {str(value.dtype) for value in graph.outputs[1:]}
    assert features == {"FLOAT16"}
    total = next(node for node in reversed(list(graph)) if node.op_type == "LayerNormalization").inputs[0]
    assert total is not None
    assert str(total.dtype) == "FLOAT", "the residual sum"


def test_fp16_is_close_to_fp32_and_the_manifest_says_how_close(half: Bundle, tmp_path: Path) -> None:
    for comparison in compare_with_pytorch(half, "torch", CPU, 10, (3,)):
        assert comparison.error.relative < 2e-3, comparison
    assert half.manifest.trajectory_error is None
    measured = with_measured_trajectory(half, "torch", CPU, within_seconds=600)
    found = Bundle.open(half.folder).manifest.trajectory_error
    assert found is not None
    assert found == measured.manifest.trajectory_error
    assert (found.steps, found.backend, list(found.errors)) == (50, "torch", [1, 3])
    assert all(0 < error.relative < 1e-2 for error in found.errors.values())
    assert with_measured_trajectory(half, "torch", CPU, within_seconds=0).manifest == half.manifest


def test_folded_sums_read_features_in_the_precision_of_the_bundle(
    pipeline_folder: Path, optimized: dict[str, Bundle], tmp_path: Path
) -> None:
    """Six features of 16 tokens and 16 channels, at a batch of 2 and with 3 steps in the window."""
    bundle = bundle_from_model(model_from_source(str(pipeline_folder), "fp16"), tmp_path / "half")
    assert bundle.manifest.optimization == "fold"
    full, plain = (ir.load(one.graph_path("full")).graph for one in (bundle, optimized["fold"]))
    feature, summed = 2 * 16 * 16, 3 * 2 * 16 * 16 * 4
    assert bytes_kept_for_sums(plain, 2, 3) == 6 * feature * 4
    assert bytes_kept_for_sums(full, 2, 3) == 6 * feature * 2
    assert bytes_kept_for_sums(plain, 2, 3, postponed=False) == 5 * feature * 4, "in fp32 a group is added up at once"
    assert bytes_kept_for_sums(full, 2, 3, postponed=False) == summed, "what has been added up so far"
    for comparison in compare_with_pytorch(bundle, "onnxruntime", CPU, 10, (3,)):
        assert comparison.error.relative < 2e-3, comparison


def test_a_measurement_that_cannot_be_written_leaves_the_bundle(half: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(path: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    before = {path.name: path.read_bytes() for path in half.folder.iterdir()}
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", full_disk)
        with pytest.raises(BackendError, match="cannot be written: No space left on device"):
            with_measured_trajectory(half, "torch", CPU, within_seconds=600)
    assert {path.name: path.read_bytes() for path in half.folder.iterdir()} == before


def test_export_measures_trajectories_of_small_models(pipeline_folder: Path, tmp_path: Path) -> None:
    command = ["export", str(pipeline_folder), "--precision", "bf16", "--out", str(tmp_path), "--name"]
    made = CliRunner().invoke(main, [*command, "a"])
    assert "error of 50 steps relative to fp32, on torch: " in made.stdout
    without = CliRunner().invoke(main, [*command, "b", "--no-measure-trajectory", "--json"])
    assert json.loads(without.stdout)["trajectory_error"] is None


def overflowing(pipeline_folder: Path, precision: str) -> Model:
    """A model whose second block puts out more than fp16 holds."""
    model = model_from_source(str(pipeline_folder), precision)
    with torch.no_grad():
        model.module.get_submodule("transformer_blocks.1.ff.net.2").bias.fill_(6e4)  # type: ignore[operator]
        model.module.get_submodule("transformer_blocks.1.ff.net.2").weight.mul_(3e4)  # type: ignore[operator]
    return model


def test_overflow_names_the_first_tensor_that_is_not_finite(pipeline_folder: Path, tmp_path: Path) -> None:
    bundle = bundle_from_model(overflowing(pipeline_folder, "fp16"), tmp_path / "export" / "over", optimization="none")
    schedule = Schedule.static(6, 2)
    denoiser = load(bundle, schedule=schedule, backend="onnxruntime", device="cpu")
    scheduler = scheduler_from_config(bundle.scheduler_config, None, learned_sigma=True)
    sampler = Sampler(denoiser, update_from_scheduler(scheduler, 6))
    with pytest.raises(BackendError) as raised:
        sampler(schedule, conditioning_of_classes(bundle.manifest, [1]), [0], 1.5)
    assert "first tensor that is not is feature.transformer_blocks.1.ff, at step 0 of 6, a full step" in str(
        raised.value
    )
    assert "--precision bf16 or fp32" in str(raised.value)

    pipe = DiTPipeline.from_pretrained(pipeline_folder)
    pipe.transformer = denoiser.as_transformer()
    with pytest.raises(BackendError, match=r"not finite in fp16, first in feature\.transformer_blocks\.1\.ff"):
        pipe(class_labels=[1], num_inference_steps=6)


def test_an_export_that_is_not_finite_says_so(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = overflowing(pipeline_folder, "fp16")
    monkeypatch.setattr("fora_trt.models.sources.model_from_source", lambda *_: model)
    command = ["export", str(pipeline_folder), "--precision", "fp16", "--no-measure-trajectory", "--out", str(tmp_path)]
    command += ["--optimize", "none"]
    shown = CliRunner().invoke(main, command)
    assert "the graphs put out what is not finite in fp16" in shown.stderr
    assert "export it with --precision bf16 or fp32" in shown.stderr


def test_the_sum_of_the_stream_does_not_overflow(pipeline_folder: Path, tmp_path: Path) -> None:
    """Each feature fits fp16 and their sum does not: 40000 from one layer and again from the next."""
    model = model_from_source(str(pipeline_folder), "fp16")
    with torch.no_grad():
        for name in ("transformer_blocks.0.ff.net.2", "transformer_blocks.1.ff.net.2"):
            model.module.get_submodule(name).bias.fill_(4e4)  # type: ignore[operator]
        for block in model.module.transformer_blocks:  # type: ignore[union-attr]
            block.norm1.linear.bias[-16:] = 1.0
    bundle = bundle_from_model(model, tmp_path / "export" / "large")
    assert bundle.manifest.measured_error is not None
    assert bundle.manifest.measured_error["full"].relative < 1e-2
    denoiser = load(bundle, schedule=Schedule.static(1, 1), backend="onnxruntime", device="cpu")
    out = denoiser(torch.randn(1, 4, 8, 8), 3, class_labels=torch.tensor([1]))
    assert out.isfinite().all()


def test_a_vae_that_overflows_is_no_black_picture(exported: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    from fora_trt.errors import InputError
    from fora_trt.runtime.images import Decoder

    with pytest.raises(InputError, match=r"the pictures of tiny are not finite, though the latents were: its VAE"):
        Decoder(exported.manifest).images(torch.full((1, 4, 8, 8), float(np.finfo(np.float32).max)), CPU)
