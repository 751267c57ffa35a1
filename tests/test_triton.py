"""A bundle as a model of Triton: its configuration against Triton's own schema, its `model.py` against a stand-in."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fora_trt import Pipeline
from fora_trt.bundle import Bundle
from fora_trt.contract import TextSpec
from fora_trt.errors import InputError
from fora_trt.sampling.joined import JoinedSampler
from fora_trt.schedule import Schedule
from fora_trt.serve.triton import inputs_of, instance_group
from fora_trt.serve.triton_model import ModelSettings, device_of
from tests.conftest import BundleAt
from tests.test_cli import fora

pytest.importorskip("tritonclient")
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

from tests.triton_standin import InferenceRequest, Logger, TritonError, arguments_of, executed, loaded

STEPS = 4
GOOD: dict[str, Any] = {"class_label": 3, "seed": 1, "num_inference_steps": STEPS}


def config_in(folder: Path) -> Any:
    """The configuration of a model, read with the schema of Triton: unknown fields and wrong types are errors."""
    return text_format.Parse((folder / "config.pbtxt").read_text(), ModelConfig())


def fields_of(fields: Any) -> list[tuple[str, str, list[int]]]:
    kinds = ModelConfig.DESCRIPTOR.file.enum_types_by_name["DataType"].values_by_number
    return [(one.name, kinds[one.data_type].name, [*one.dims]) for one in fields]


def pictures_of(response: Any) -> np.ndarray[Any, Any]:
    assert not response.has_error(), response.error().message()
    image, seed = response.output_tensors()
    assert (image.name(), seed.name()) == ("image", "seed")
    assert (image.values.dtype, seed.values.dtype) == (np.uint8, np.int64)
    assert (len(image.values), 1) == seed.values.shape
    found: np.ndarray[Any, Any] = image.values
    return found


def wanted_of(
    bundle: Bundle, labels: list[int], seed: int, steps: int = STEPS, **settings: Any
) -> np.ndarray[Any, Any]:
    """The same images by a pipeline, (N, H, W, C)."""
    pipeline = Pipeline(bundle, backend="onnxruntime", device="cpu", **settings)
    images = pipeline(class_labels=labels, steps=steps, seed=seed).images
    made = np.stack([np.asarray(image) for image in images])
    return made if made.ndim == 4 else made[..., None]


@pytest.fixture(scope="module")
def repository(pixels: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository that was written in one folder and moved to another."""
    written = tmp_path_factory.mktemp("written")
    options = ("--backend", "onnxruntime", "--max-batch-size", 4, "--max-steps", 100)
    told = fora("triton", pixels.folder, "-o", written / "repository", *options)
    assert told.stdout == f"wrote {written / 'repository' / 'pixels'}\n"
    moved = tmp_path_factory.mktemp("server") / "models"
    (written / "repository").rename(moved)
    return moved


@pytest.fixture(scope="module")
def model(repository: Path) -> Iterator[Any]:
    with (
        pytest.MonkeyPatch.context() as patched,
        loaded(folder := repository / "pixels", config_in(folder), patched) as one,
    ):
        yield one


# --- the configuration


def test_every_field_of_the_configuration(repository: Path) -> None:
    assert sorted(path.name for path in (repository / "pixels").iterdir()) == [
        "1", "bundle", "config.pbtxt", "engines", "manifest.json",
    ]  # fmt: skip
    config = config_in(repository / "pixels")
    assert (config.name, config.backend, config.max_batch_size) == ("pixels", "python", 4)
    assert fields_of(config.input) == [
        ("class_label", "TYPE_INT64", [1]),
        ("seed", "TYPE_INT64", [1]),
        ("num_inference_steps", "TYPE_INT32", [1]),
        ("guidance_scale", "TYPE_FP64", [1]),
        ("schedule", "TYPE_STRING", [1]),
    ]
    assert all(one.optional and not one.allow_ragged_batch for one in config.input)
    assert fields_of(config.output) == [("image", "TYPE_UINT8", [8, 8, 1]), ("seed", "TYPE_INT64", [1])]
    batching = config.dynamic_batching
    assert (batching.max_queue_delay_microseconds, batching.default_queue_policy.max_queue_size) == (0, 64)
    (group,) = config.instance_group
    assert (group.count, group.kind, [*group.gpus]) == (1, ModelInstanceGroup.KIND_AUTO, [])
    assert {key: one.string_value for key, one in config.parameters.items()} == {
        "backend": "onnxruntime", "max_wait_ms": "0.0", "join": "true", "max_prompt": "4000", "max_steps": "100",
    }  # fmt: skip
    assert {field.name for field, _ in config.ListFields()} == {
        "name", "backend", "max_batch_size", "input", "output", "dynamic_batching", "instance_group", "parameters",
    }  # fmt: skip


def test_options_stand_in_the_configuration(bundle_at: BundleAt, tmp_path: Path) -> None:
    folder = bundle_at("fold", "fp32").folder
    Schedule.fora(6, 2).to_file(tmp_path / 'best "one" é.json')
    told = fora(
        "triton", folder, "-o", tmp_path / "models", "--name", "käse", "--schedule", tmp_path / "best \"one\" é.json",
        "--steps", 6, "--device", "cuda:1", "--instances", 2, "--join", "none", "--max-wait-ms", 20, "--queue", 9,
        "--scheduler", "ddim", "--timestep-spacing", "trailing", "--backend", "tensorrt", "--json",
    )  # fmt: skip
    made = tmp_path / "models" / "käse"
    said = json.loads(told.stdout)
    assert (said["folder"], said["name"], said["text_encoder"]) == (str(made), "käse", None)
    config = config_in(made)
    assert config.name == "käse"
    assert config.dynamic_batching.default_queue_policy.max_queue_size == 9
    (group,) = config.instance_group
    assert (group.count, group.kind, [*group.gpus]) == (2, ModelInstanceGroup.KIND_GPU, [1])
    assert fields_of(config.output)[0] == ("image", "TYPE_UINT8", [16, 16, 3])
    settings = ModelSettings.from_config(json.loads(arguments_of(made, config)["model_config"]))
    assert settings == ModelSettings(
        backend="tensorrt", schedule="schedules/best \"one\" é.json", scheduler="ddim", timestep_spacing="trailing",
        steps=6, max_wait_ms=20, join=False,
    )  # fmt: skip
    assert (made / settings.schedule).is_file()
    assert sorted(path.name for path in (made / "vae").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]


def test_a_model_with_prompts_takes_them(pixels: Bundle) -> None:
    text = TextSpec(length=8, pipeline="PixArtAlphaPipeline", encoder=None)
    manifest = pixels.manifest.model_copy(update={"text": text, "conditioning": {}})
    names = [name for name, _, _ in inputs_of(manifest)]
    assert names[:2] == ["prompt", "negative_prompt"]
    assert "class_label" not in names


def test_the_bundle_is_copied_as_it_is(repository: Path, pixels: Bundle) -> None:
    copied = Bundle.open(repository / "pixels" / "bundle")
    assert copied.manifest == pixels.manifest


def test_no_file_names_where_it_was_written(repository: Path, pixels: Bundle) -> None:
    for name in ("config.pbtxt", "manifest.json", "1/model.py"):
        text = (repository / "pixels" / name).read_text()
        assert str(pixels.folder) not in text
        assert "/tmp" not in text  # noqa: S108 # only looked for


def test_plans_are_copied_and_nothing_else(pixels: Bundle, tmp_path: Path) -> None:
    plans = tmp_path / "plans" / pixels.manifest.name
    for name in ("tensorrt-1/full.plan", "tensorrt-1/manifest.json", ".tensorrt-2.fora-new/full.plan"):
        (plans / name).parent.mkdir(parents=True, exist_ok=True)
        (plans / name).write_text(name)
    for engines in (tmp_path / "plans", plans / "tensorrt-1"):
        assert fora("triton", pixels.folder, "-o", tmp_path / "models", "--engines", engines, "--force").exit_code == 0
        found = tmp_path / "models" / pixels.folder.name / "engines"
        assert sorted(str(path.relative_to(found)) for path in found.rglob("*") if path.is_file()) == [
            f"{pixels.manifest.name}/tensorrt-1/full.plan",
            f"{pixels.manifest.name}/tensorrt-1/manifest.json",
        ]


# --- what the model answers


def test_pictures_are_those_of_the_pipeline(model: Any, pixels: Bundle) -> None:
    wanted = wanted_of(pixels, [3, 4], 1, schedule="fora:2", guidance_scale=1.3)
    settings = {"num_inference_steps": STEPS, "guidance_scale": 1.3, "schedule": "fora:2"}
    request = InferenceRequest(class_label=[3, 4], seed=[1, 2], **{name: [one] * 2 for name, one in settings.items()})
    (response,) = executed(model, request)
    assert np.array_equal(pictures_of(response), wanted)
    assert response.output_tensors()[1].values.tolist() == [[1], [2]]


def test_requests_of_other_settings_share_a_batch(model: Any, pixels: Bundle) -> None:
    settings: list[dict[str, Any]] = [
        {"schedule": "fora:2"}, {"schedule": "none"}, {"guidance_scale": 1.0}, {"num_inference_steps": 6},
        {"schedule": "full:0,1", "guidance_scale": 4.0}, {},
    ]  # fmt: skip
    requests = [InferenceRequest(**{**GOOD, **one, "seed": k, "class_label": k}) for k, one in enumerate(settings)]
    responses = executed(model, *requests)
    for k, (one, response) in enumerate(zip(settings, responses, strict=True)):
        given = {name: one[name] for name in ("schedule", "guidance_scale") if name in one}
        wanted = wanted_of(pixels, [k], k, one.get("num_inference_steps", STEPS), **given)
        assert np.array_equal(pictures_of(response), wanted), one


def test_requests_join_a_batch_that_runs(model: Any) -> None:
    """`execute` returns before its requests are answered, so a later request of fewer steps comes first."""
    long, short = InferenceRequest(class_label=1, num_inference_steps=90), InferenceRequest(**GOOD)
    model.execute([long])
    assert not long.sender.answered.is_set()
    model.execute([short])
    pictures_of(short.sender.response())
    assert not long.sender.answered.is_set()
    pictures_of(long.sender.response())
    assert any(size > 1 for size in model.batches.counts().batches)


def test_defaults_are_those_of_run(model: Any, pixels: Bundle) -> None:
    (response,) = executed(model, InferenceRequest(class_label=[5, 5]))
    seeds = response.output_tensors()[1].values[:, 0].tolist()
    assert len({*seeds}) == 2
    for picture, seed in zip(pictures_of(response), seeds, strict=True):
        assert np.array_equal(picture, wanted_of(pixels, [5], seed, 50)[0])


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "class": ({"class_label": 10}, "there is no class 10"),
    "no class": ({"class_label": np.zeros((0, 1), np.int64), "seed": np.zeros((0, 1), np.int64)}, "the shape"),
    "kind of class": ({"class_label": 1.5}, "class_label: Input should be a valid integer"),
    "text of class": ({"class_label": "3"}, "class_label: Input should be a valid integer"),
    "seed": ({"seed": -1}, "seed: Input should be greater than or equal to 0"),
    "last seed": ({"seed": 2**63 - 1, "num_inference_steps": 0}, "num_inference_steps: "),
    "steps": ({"num_inference_steps": 101}, "the limit is 100"),
    "scale": ({"guidance_scale": float("nan")}, "guidance_scale: Input should be a finite number"),
    "schedule": ({"schedule": "fora:x"}, "'x' in the schedule 'fora:x' is not an integer"),
    "file": ({"schedule": "/etc/passwd.json"}, "there is no such schedule; give one of none, fora:N"),
    "bytes": ({"schedule": b"\xff\xfe"}, "schedule is not UTF-8 text"),
    "NUL": ({"schedule": b"fora:2\x00"}, "NUL"),
    "prompt": ({"prompt": "a cat", "class_label": 3}, "prompt and class_label exclude each other"),
    "another name": ({"size": "8x9"}, "makes images of 8x8, not 8x9"),
    "no such field": ({"steps": 4}, "steps: there is no field of this name"),
    "rows": ({"class_label": [3, 4]}, "(N, 1) is needed"),
    "shape": ({"class_label": np.array([3])}, "(N, 1) is needed"),
    "wide": ({"class_label": np.array([[3, 4]])}, "(N, 1) is needed"),
}  # fmt: skip


def test_each_mistake_is_answered_alone(model: Any, pixels: Bundle) -> None:
    """All in one call of `execute`, with a good request before and after each."""
    bad = {name: InferenceRequest(**{**GOOD, **inputs}) for name, (inputs, _) in BAD.items()}
    bad["nothing"] = InferenceRequest()
    good = [InferenceRequest(**GOOD) for _ in range(len(bad) + 1)]
    mixed = [one for pair in zip(good, bad.values(), strict=False) for one in pair]
    executed(model, *mixed, good[-1])
    for name, request in bad.items():
        error = request.sender.response().error()
        assert error is not None, name
        assert error.code() == TritonError.INVALID_ARG, (name, error.message())
        assert BAD.get(name, ({}, "the request has no input"))[1] in error.message(), name
        assert not re.search(r'Traceback|File "|\.py|/tmp|/root|/home', error.message()), name
    wanted = wanted_of(pixels, [3], 1)
    for request in good:
        assert np.array_equal(pictures_of(request.sender.response()), wanted)


def test_one_bad_row_refuses_its_request(model: Any) -> None:
    (response,) = executed(model, InferenceRequest(class_label=[3, 11, 4], num_inference_steps=[STEPS] * 3))
    assert response.has_error()
    assert "there is no class 11" in response.error().message()


def test_a_defect_is_told_to_the_log_alone(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    Logger.errors.clear()

    def fails(*_: object) -> None:
        raise RuntimeError("/srv/secret")

    with monkeypatch.context() as patched:
        patched.setattr(model.requests, "images", fails)
        (response,) = executed(model, InferenceRequest(**GOOD))
    assert response.error().code() == TritonError.INTERNAL
    assert response.error().message() == "the server failed to answer this request; its operator finds the reason"
    (logged,) = Logger.errors
    assert "RuntimeError: /srv/secret" in logged
    pictures_of(*executed(model, InferenceRequest(**GOOD)))


def test_a_client_that_goes_away_frees_its_place(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    window = JoinedSampler.window

    def slowly(self: JoinedSampler) -> Any:
        time.sleep(0.02)  # else the images are done before the model looks
        return window(self)

    monkeypatch.setattr(JoinedSampler, "window", slowly)
    request = InferenceRequest(class_label=[1] * 4, num_inference_steps=[100] * 4, schedule=["none"] * 4)
    model.execute([request])
    request.sender.cancelled = True
    response = request.sender.response()
    assert response.error().code() == TritonError.CANCELLED
    pictures_of(*executed(model, InferenceRequest(**GOOD)))
    assert model.batches.counts().running == 0


def test_more_than_twice_a_batch_waits_in_the_queue_of_triton(model: Any) -> None:
    """`execute` holds the ninth image back until one of the eight before it is made."""
    made = model.batches.counts().pictures
    requests = [InferenceRequest(class_label=k, num_inference_steps=100) for k in range(9)]
    model.execute(requests)
    assert model.batches.counts().pictures > made
    for one in requests:
        pictures_of(one.sender.response())


def test_unloading_answers_what_was_accepted(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = repository / "pixels"
    with loaded(folder, config_in(folder), monkeypatch) as one:
        requests = [InferenceRequest(**GOOD, schedule="fora:2") for _ in range(3)]
        one.execute(requests)
    for request in requests:
        assert request.sender.answered.is_set()
        pictures_of(request.sender.response())
    late = InferenceRequest(**GOOD)
    one.execute([late])
    assert late.sender.response().error().code() == TritonError.UNAVAILABLE


def test_a_schedule_and_a_vae_of_the_repository(
    bundle_at: BundleAt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The defaults of the command are those of a request, also without joining and after a move."""
    bundle = bundle_at("fold", "fp32")
    Schedule.fora(6, 2).to_file(tmp_path / "best.json")
    options = ("--schedule", tmp_path / "best.json", "--steps", 6, "--join", "none", "--backend", "onnxruntime")
    assert fora("triton", bundle.folder, "-o", tmp_path / "models", *options).exit_code == 0
    (name,) = (path.name for path in (tmp_path / "models").iterdir())
    folder = Path(shutil.move(tmp_path / "models" / name, tmp_path / "moved"))
    (tmp_path / "best.json").unlink()
    config = config_in(folder)
    config.parameters["EXECUTION_ENV_PATH"].string_value = "$$TRITON_MODEL_DIRECTORY/env.tar.gz"  # of Triton itself
    with loaded(folder, config, monkeypatch) as one:
        own, named, other = executed(
            one,
            InferenceRequest(class_label=[2, 3], seed=[4, 5]),
            InferenceRequest(class_label=2, seed=4, schedule="best", num_inference_steps=6),
            InferenceRequest(class_label=2, seed=4, schedule="none", num_inference_steps=6),
        )
    wanted = wanted_of(bundle, [2, 3], 4, 6, schedule="fora:2")
    assert np.array_equal(pictures_of(own), wanted)
    assert np.array_equal(pictures_of(named)[0], wanted[0])
    assert not np.array_equal(pictures_of(other)[0], wanted[0])


def test_the_schedule_in_the_bundle_is_the_default(
    pixels: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels.copy(tmp_path / "own", Schedule.fora(6, 2))
    assert fora("triton", tmp_path / "own", "-o", tmp_path / "models", "--backend", "onnxruntime").exit_code == 0
    folder = tmp_path / "models" / "own"
    assert Bundle.open(folder / "bundle").manifest == Bundle.open(tmp_path / "own").manifest
    with loaded(folder, config_in(folder), monkeypatch) as one:
        (response,) = executed(one, InferenceRequest(class_label=3, seed=1))
    assert np.array_equal(pictures_of(response), wanted_of(pixels, [3], 1, 6, schedule="fora:2"))


def test_an_instance_takes_the_device_that_triton_gives_it() -> None:
    assert [device_of(*one) for one in (("GPU", "2"), ("CPU", "0"))] == ["cuda:2", "cpu"]
    assert [instance_group(one, 1) for one in ("auto", "cpu", "cuda", "cuda:3")] == [
        "{ count: 1 kind: KIND_AUTO }",
        "{ count: 1 kind: KIND_CPU }",
        "{ count: 1 kind: KIND_GPU }",
        "{ count: 1 kind: KIND_GPU gpus: [ 3 ] }",
    ]


def test_wrong_parameters_end_the_start(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_in(repository / "pixels")
    config.parameters["max_steps"].string_value = "many"
    message = "the parameter max_steps in config.pbtxt: Input should be a valid integer"
    with pytest.raises(InputError, match=message), loaded(repository / "pixels", config, monkeypatch):
        pass


# --- writing


def test_neither_ray_nor_the_client_of_triton_is_needed() -> None:
    code = "import sys, fora_trt.serve.triton, fora_trt.serve.triton_model; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "fora_trt.serve.batches" in loaded
    assert not {"ray", "tritonclient", "triton_python_backend_utils"} & {*loaded}


def test_an_existing_model_is_replaced_only_with_force(pixels: Bundle, tmp_path: Path) -> None:
    write = ("triton", pixels.folder, "-o", tmp_path / "models")
    assert fora(*write).exit_code == 0
    again = fora(*write, "--max-batch-size", 2)
    assert (again.exit_code, "already exists; give --force" in again.stderr) == (1, True)
    assert config_in(tmp_path / "models" / pixels.folder.name).max_batch_size == 8
    assert fora(*write, "--max-batch-size", 2, "--force").exit_code == 0
    assert config_in(tmp_path / "models" / pixels.folder.name).max_batch_size == 2
    assert fora(*write, "--name", "second").exit_code == 0
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == [pixels.folder.name, "second"]


def test_nothing_is_left_of_a_model_that_fails(pixels: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fora_trt.serve.triton.config_text", full)
    told = fora("triton", pixels.folder, "-o", tmp_path / "models")
    assert (told.exit_code, "No space left on device" in told.stderr) == (1, True)
    assert [*(tmp_path / "models").iterdir()] == []


def test_a_folder_that_something_else_wrote_is_kept(pixels: Bundle, tmp_path: Path) -> None:
    other = tmp_path / "models" / pixels.folder.name / "config.pbtxt"
    other.parent.mkdir(parents=True)
    other.write_text("mine")
    told = fora("triton", pixels.folder, "-o", tmp_path / "models", "--force")
    assert (told.exit_code, "is not a model that fora-trt triton wrote" in told.stderr) == (1, True)
    assert other.read_text() == "mine"


def test_a_bundle_of_a_pipeline_is_refused_as_by_serve(
    pixels: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    piped = pixels.manifest.model_copy(update={"pipeline": object()})
    monkeypatch.setattr(Bundle, "open", lambda folder: Bundle(Path(folder), piped))
    told = fora("triton", pixels.folder, "-o", tmp_path / "models")
    assert (told.exit_code, "from a diffusers pipeline, whose loop does not run in Triton" in told.stderr) == (1, True)
    assert not (tmp_path / "models").exists()
