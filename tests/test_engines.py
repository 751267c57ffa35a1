import importlib.util
import shutil
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from fora_trt import Denoiser, Schedule, load
from fora_trt.bundle import Bundle
from fora_trt.engines.backends import BACKENDS, backend_from_name, device_from_name
from fora_trt.errors import BackendError, SourceError
from fora_trt.evaluate.eager_fora import EagerFora
from fora_trt.evaluate.unfolded import reference_from_bundle
from fora_trt.evaluate.verify import graph_errors, trajectory_errors
from fora_trt.models.examples import example_inputs
from fora_trt.pipeline import Pipeline
from fora_trt.runtime.window import Window
from tests.conftest import ON_CPU
from tests.damage import rewrite

CPU = torch.device("cpu")


@pytest.mark.parametrize("backend", ON_CPU)
def test_every_backend_computes_the_same_steps(exported: Bundle, backend: str) -> None:
    schedule = Schedule.from_flags((True, False))
    tested = load(exported, schedule=schedule, backend=backend, device="cpu")
    reference = load(exported, schedule=schedule, backend="torch", device="cpu")
    for seed in (0, 1):
        inputs = example_inputs(
            tested.engines["full"].inputs.values(), tested.manifest.conditioning, batch=3, seed=seed
        )
        torch.testing.assert_close(tested(**inputs), reference(**inputs), atol=1e-5, rtol=1e-5)


def test_onnxruntime_takes_projections_apart_on_a_cpu(exported: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """There joined ones are slower by the copy of their parts."""
    read: list[ir.Graph] = []
    session = onnxruntime.InferenceSession

    def noted(model: Any, *arguments: Any, **options: Any) -> Any:
        read.append(
            (
                ir.serde.deserialize_model(onnx.load_from_string(model)) if isinstance(model, bytes) else ir.load(model)
            ).graph
        )
        return session(model, *arguments, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", noted)
    before = exported.graph_path("full").read_bytes()
    backend_from_name("onnxruntime").engines(exported, torch.device("cpu"))
    kinds = [[node.op_type for node in graph] for graph in read]
    assert [(one.count("Attention"), one.count("Gather")) for one in kinds] == [(3, 3), (0, 3)], "of class embeddings"
    assert exported.graph_path("full").read_bytes() == before


@pytest.mark.parametrize("backend", ON_CPU)
def test_results_appear_in_the_bound_tensors(exported: Bundle, backend: str) -> None:
    engine = backend_from_name(backend).engines(exported, torch.device("cpu"))["full"]
    inputs = example_inputs(engine.inputs.values(), exported.manifest.conditioning, batch=2)
    outputs = {name: torch.full(tensor.sized(2), torch.nan) for name, tensor in engine.outputs.items()}
    addresses = {name: tensor.data_ptr() for name, tensor in outputs.items()}
    launch = engine.bind(inputs | outputs)
    launch()
    assert all(tensor.isfinite().all() for tensor in outputs.values())
    first = outputs["noise_prediction"].clone()
    inputs["latents"].neg_()  # the engine reads the address again
    launch()
    assert not torch.equal(outputs["noise_prediction"], first)
    assert {name: tensor.data_ptr() for name, tensor in outputs.items()} == addresses


def test_unknown_backend_and_device_are_named() -> None:
    with pytest.raises(
        BackendError, match="unknown backend 'tensorflow'; choose one of auto, tensorrt, tensorrt-rtx, on"
    ):
        backend_from_name("tensorflow")
    torch_backend = BACKENDS["torch"]
    with pytest.raises(BackendError, match="unknown device 'gpu7'"):
        device_from_name("gpu7", torch_backend)
    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match="torch finds no CUDA device; give --device cpu"):
            device_from_name("cuda", torch_backend)


def test_auto_takes_a_gpu_only_where_the_backend_can_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch from PyPI sees the GPU of a machine on which onnxruntime was installed for the CPU."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    providers = ["CPUExecutionProvider"]
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: providers)
    assert device_from_name("auto", BACKENDS["onnxruntime"]).type == "cpu"
    assert device_from_name("auto", BACKENDS["torch"]).type == "cuda"
    providers.insert(0, "CUDAExecutionProvider")
    assert device_from_name("auto", BACKENDS["onnxruntime"]).type == "cuda"


def test_a_backend_that_is_not_installed_says_how_to_install_it(
    exported: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "fora_trt.engines.onnxruntime.find_spec", lambda name: None if name == "onnxruntime" else found(name)
    )
    with pytest.raises(BackendError, match=r"onnxruntime is not installed; pip install 'fora-trt\[cpu\]'"):
        load(exported, schedule=Schedule.fora(2, 1), backend="onnxruntime")
    assert backend_from_name("auto").name == "torch"


def test_plain_pytorch_refuses_a_checkpoint_that_changed(exported: Bundle, bundle_copy: Path) -> None:
    rewrite(bundle_copy, lambda m: m["model"].update(weights_sha256="0" * 64))
    with pytest.raises(BackendError, match=r"weights of .* differ from those"):
        reference_from_bundle(Bundle.open(bundle_copy), CPU)
    rewrite(bundle_copy, lambda m: m["model"]["options"].update(source="moved/away/checkpoint"))
    with pytest.raises(SourceError, match=r"reference needs the checkpoint .* 'moved/away/checkpoint' cannot be"):
        EagerFora(Bundle.open(bundle_copy), CPU)


@pytest.mark.parametrize("level", ["none", "conditioning", "fold"])
def test_torch_and_its_reference_need_no_checkpoint(
    exported: Bundle, optimized: dict[str, Bundle], level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The unfolded graph stands in for the module, and says so; a graph that is wrong shows against it."""
    with_source = exported if level == "none" else optimized[level]
    folder = Path(shutil.copytree(with_source.folder, tmp_path / "tiny"))
    rewrite(folder, lambda m: m["model"]["options"].update(source="moved/away/checkpoint"))
    bundle = Bundle.open(folder)
    reference, told = reference_from_bundle(bundle, CPU)
    assert told == "the unfolded full graph (the checkpoint is not available)"
    pipeline = Pipeline(bundle, steps=12, backend="torch", device="cpu")
    denoiser = pipeline.denoiser
    assert isinstance(denoiser, Denoiser)
    for _, error in graph_errors(denoiser, reference, batch=3):
        assert error.relative < 1e-5
    module = EagerFora(with_source, CPU)
    for one in (reference, module):
        for schedule, error in trajectory_errors(pipeline, pipeline.over(one), ("none", "fora:3")):
            assert error.relative < 1e-5, schedule
    launch = Window._launch
    monkeypatch.setattr(
        Window, "_launch", lambda self, offset, *where: launch(self, min(offset, 1), *where)
    )  # the sum of another step
    ((_, error),) = trajectory_errors(pipeline, pipeline.over(reference), ("fora:3",))
    assert (error.relative > 3e-5) == (level == "fold")
