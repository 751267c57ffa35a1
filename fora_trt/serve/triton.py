"""Writes a bundle as a model of NVIDIA's Triton server: `config.pbtxt`, `model.py`, and a copy of all that they need.

`triton_model` is what runs there. The folder names nothing outside itself except the text encoder.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fora_trt import __version__
from fora_trt.bundle import SCHEDULE, Bundle, Manifest
from fora_trt.contract import CLASS_LABELS
from fora_trt.engines.backends import AUTO, BACKENDS
from fora_trt.errors import InputError, ModelError
from fora_trt.files import MANIFEST, Record, staging, write_manifest
from fora_trt.models.parts import vae_at, weights_of_vae
from fora_trt.schedule import Schedule, is_file, reads_file
from fora_trt.serve.requests import check_steps
from fora_trt.serve.triton_model import BUNDLE, ENGINES, VAE, ModelSettings
from fora_trt.untrusted import name_problem, shown

if TYPE_CHECKING:
    from fora_trt.pipeline import Pipeline

CONFIG = "config.pbtxt"
VERSION = "1"
"""Name of the only version of a model."""

SCHEDULES = "schedules"
"""Folder of the schedule file, in the folder of a model."""

MODEL = '''"""The model for Triton's Python backend, written by `fora-trt triton`."""

from pathlib import Path

import triton_python_backend_utils as pb_utils

from fora_trt.serve.triton_model import Model


class TritonPythonModel(Model):
    """The bundle beside this folder."""

    folder = Path(__file__).absolute().parents[1]
    utils = pb_utils
'''

Field = tuple[str, str, tuple[int, ...]]
"""Name, data type and dimensions without the batch, of an input or output."""


@dataclass(frozen=True)
class TritonConfig:
    """All settings of a model for Triton. Names are those of the options of `fora-trt triton`.

    `steps` None means those of `run`. `device` auto lets the server choose: its GPUs, or else its CPU. `engines` is a
    folder of plans to copy, or one set of plans.
    """

    bundle: Path
    name: str | None = None
    max_batch_size: int = 8
    max_wait_ms: float = 0.0
    join: bool = True
    instances: int = 1
    steps: int | None = None
    schedule: str = ""
    scheduler: str | None = None
    timestep_spacing: str | None = None
    backend: str = AUTO
    device: str = AUTO
    engines: Path | None = None
    vae: str | None = None
    queue: int = 64
    max_prompt: int = 4000
    max_steps: int = 250


class TritonManifest(Record):
    """Marks a folder as one that `fora-trt triton` wrote, so that it may be replaced."""

    format_version: int
    fora_trt: str
    name: str


@dataclass(frozen=True)
class Written:
    """The folder of a model, and what the server needs that is not in it: the text encoder's folder or hub id."""

    folder: Path
    name: str
    text_encoder: str | None


def write_model(config: TritonConfig, repository: Path, force: bool = False) -> Written:
    """Write the model into its folder in a repository of Triton.

    Raises `ForaError` for settings that the bundle does not take, and if the folder exists and `force` is false; then
    nothing is written.
    """
    from fora_trt.pipeline import Pipeline, PipelineConfig

    bundle = Bundle.open(config.bundle)
    if bundle.manifest.pipeline is not None:
        raise InputError(
            f"{config.bundle} was exported from a diffusers pipeline, whose loop does not run in Triton; serve it with "
            "fora-trt serve"
        )
    bundle.manifest.check_one_network("Triton's model")
    name = bundle.folder.resolve().name if config.name is None else config.name
    if problem := name_problem(name):
        raise InputError(f"the name '{shown(name)}' {problem}; give another --name")
    if config.backend != AUTO:
        BACKENDS[config.backend]  # raises for an unknown name; whether it works here does not matter
    group = instance_group(config.device, config.instances)
    settings = {one: getattr(config, one) for one in ("schedule", "scheduler", "timestep_spacing", "vae")}
    pipeline = Pipeline(PipelineConfig(bundle.folder, **settings), opened=bundle)
    pipeline.decoder  # noqa: B018 # raises for a missing VAE
    check_steps(name, pipeline.sampling(_steps(config, bundle)).schedule.steps, config.max_steps)
    if (repository / name).resolve().is_relative_to(bundle.folder.resolve()):
        raise InputError(f"{repository / name} is in the bundle {config.bundle}; give a folder elsewhere with -o")
    with staging(repository / name, force, "model that fora-trt triton wrote", InputError) as folder:
        _copy_engines(config.engines, bundle.manifest, folder)
        bundle.copy(folder / BUNDLE)
        _copy_vae(config.vae, bundle.manifest, folder)
        stored = _copy_schedule(config.schedule, bundle.manifest, folder)
        (folder / VERSION).mkdir()
        (folder / VERSION / "model.py").write_text(MODEL, encoding="utf-8")
        made = ModelSettings(
            backend=config.backend,
            schedule=stored,
            scheduler=config.scheduler,
            timestep_spacing=config.timestep_spacing,
            steps=config.steps,
            max_wait_ms=config.max_wait_ms,
            join=config.join,
            max_prompt=config.max_prompt,
            max_steps=config.max_steps,
        )
        text = config_text(name, config, pipeline, group, made.parameters())
        (folder / CONFIG).write_text(text, encoding="utf-8")
        write_manifest(folder, TritonManifest(format_version=1, fora_trt=__version__, name=name))
    text_spec = bundle.manifest.text
    encoder = None if text_spec is None or text_spec.encoder is None else text_spec.encoder.where
    return Written(repository / name, name, encoder)


def _steps(config: TritonConfig, bundle: Bundle) -> int | None:
    """The steps of a request that gives none; None: those of the pipeline's configuration."""
    return config.steps or (None if config.schedule else bundle.scheduled_steps)


def _copy_engines(engines: Path | None, manifest: Manifest, folder: Path) -> None:
    """Copy the plans of this bundle; missing plans are built on the server, in a folder of this name."""
    target = folder / ENGINES / manifest.name
    target.mkdir(parents=True)
    if engines is None:
        return
    if (engines / MANIFEST).is_file():
        shutil.copytree(engines, target / engines.resolve().name)
    elif (engines / manifest.name).is_dir():
        shutil.copytree(
            engines / manifest.name, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*")
        )  # hidden files are locks and unfinished plans
    else:
        raise InputError(
            f"{engines} holds no plans of {manifest.name}; build them there with fora-trt build, or leave --engines out"
        )


def _copy_vae(vae: str | None, manifest: Manifest, folder: Path) -> None:
    """Copy the configuration and the weights of the VAE, of a hub id too: the server needs no network."""
    if manifest.latents.pixels:
        return
    try:
        part = manifest.model.vae if vae is None else vae_at(vae, with_weights=False)[0]
        assert part is not None
        source, _ = weights_of_vae(part)
    except ModelError as error:
        raise InputError(str(error)) from error
    (folder / VAE).mkdir()
    for path in (source / "config.json", *source.glob("diffusion_pytorch_model*")):
        shutil.copyfile(path, folder / VAE / path.name)


def _copy_schedule(schedule: str, manifest: Manifest, folder: Path) -> str:
    """Copy a schedule that reads a file; its path in the folder. Another text form stays as it is."""
    if not reads_file(schedule):
        return schedule
    name = Path(schedule).name if is_file(schedule) else SCHEDULE
    (folder / SCHEDULES).mkdir()
    Schedule.of_any_length(schedule, manifest.cache_sites).to_file(folder / SCHEDULES / name)
    return f"{SCHEDULES}/{name}"


def instance_group(device: str, instances: int) -> str:
    """The instances of a model: on all GPUs, on one, or on the CPU. Raises `InputError` for an unknown device."""
    found = re.fullmatch(r"(auto|cpu|cuda)(?::([0-9]{1,4}))?", device)
    if found is None or (found[2] and found[1] != "cuda"):
        raise InputError(f"unknown device '{shown(device)}'; give auto, cpu, cuda for every GPU, or one such as cuda:1")
    kind = {"auto": "KIND_AUTO", "cpu": "KIND_CPU", "cuda": "KIND_GPU"}[found[1]]
    gpus = f" gpus: [ {int(found[2])} ]" if found[2] else ""
    return f"{{ count: {instances} kind: {kind}{gpus} }}"


def inputs_of(manifest: Manifest) -> Iterator[Field]:
    """The inputs that requests can give, all of them optional for Triton: the model knows which it needs."""
    if manifest.text is not None:
        yield "prompt", "TYPE_STRING", (1,)
        yield "negative_prompt", "TYPE_STRING", (1,)
    if CLASS_LABELS in manifest.conditioning:
        yield "class_label", "TYPE_INT64", (1,)
    yield "seed", "TYPE_INT64", (1,)
    yield "num_inference_steps", "TYPE_INT32", (1,)
    yield "guidance_scale", "TYPE_FP64", (1,)
    yield "schedule", "TYPE_STRING", (1,)


def outputs_of(manifest: Manifest) -> Iterator[Field]:
    """Images (height, width, channels) and seeds; -1 stands for a size that the manifest does not know."""
    height, width = manifest.model.image_size or (-1, -1)
    channels = manifest.latents.channels if manifest.latents.pixels else 3
    yield "image", "TYPE_UINT8", (height, width, channels)
    yield "seed", "TYPE_INT64", (1,)


def config_text(name: str, config: TritonConfig, pipeline: Pipeline, group: str, parameters: Mapping[str, str]) -> str:
    """The text of `config.pbtxt`, which the schema `ModelConfig` of Triton describes.

    Triton's batcher waits for nothing: `Batches` does, which knows what images of a batch must have in common.
    """
    manifest = pipeline.manifest
    lines = [
        f"name: {_quoted(name)}",
        'backend: "python"',
        f"max_batch_size: {config.max_batch_size}",
        *_fields("input", [*inputs_of(manifest)], " optional: true"),
        *_fields("output", [*outputs_of(manifest)], ""),
        "dynamic_batching {",
        "  max_queue_delay_microseconds: 0",
        f"  default_queue_policy {{ max_queue_size: {config.queue} }}",
        "}",
        f"instance_group [ {group} ]",
        *(
            f"parameters {{ key: {_quoted(key)} value {{ string_value: {_quoted(value)} }} }}"
            for key, value in parameters.items()
        ),
    ]
    return "\n".join(lines) + "\n"


def _fields(what: str, fields: Sequence[Field], more: str) -> Iterator[str]:
    yield f"{what} ["
    for number, (name, kind, sizes) in enumerate(fields):
        comma = "," if number < len(fields) - 1 else ""
        dims = ", ".join(map(str, sizes))
        yield f"  {{ name: {_quoted(name)} data_type: {kind} dims: [ {dims} ]{more} }}{comma}"
    yield "]"


def _quoted(text: str) -> str:
    """A string of the text form of Protocol Buffers; bytes beyond ASCII as octal numbers."""
    plain = (chr(one) if 32 <= one < 127 and chr(one) not in '"\\' else f"\\{one:03o}" for one in text.encode())
    return '"' + "".join(plain) + '"'
