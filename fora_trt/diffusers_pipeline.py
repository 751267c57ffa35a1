"""Runs the diffusers pipeline that a bundle was exported from, with the drop-in in place of its transformers.

Prompts, guidance, scheduler and decoding are the pipeline's own. `fora_trt.Pipeline` is for bundles whose loop is in
`sampling/`.
"""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import fora_trt.saved_pipeline  # noqa: F401 # diffusers loads a part only from a module that is imported
from fora_trt.bundle import Bundle
from fora_trt.call import PipelineSpec
from fora_trt.engines.backends import AUTO, backend_from_name, device_from_name, how_to_install
from fora_trt.engines.options import EngineOptions, Progress
from fora_trt.errors import BundleError, ForaError, InputError, ModelError, first_line
from fora_trt.models.checkpoint import preferred, variants_in
from fora_trt.models.diffusers_loading import load_pipeline, pipeline_class
from fora_trt.models.parts import folder_of, read_config
from fora_trt.presets import usual_text
from fora_trt.runtime.denoiser import load
from fora_trt.runtime.transformer import DenoiserTransformer
from fora_trt.schedule import Schedule
from fora_trt.untrusted import shown

FILES = ("*.json", "*/*")
"""Files of a hub repository that a whole pipeline needs."""

INDEX = "model_index.json"

RESERVED = {"num_inference_steps": "--steps", "generator": "--seed", "output_type": "-o or --latents-out"}
"""Arguments of a pipeline that options stand for."""

COUNTS = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")
"""Names for the number of results for each prompt."""


@dataclass(frozen=True)
class Result:
    """What a pipeline made: an image or the frames of a video for each sample, or latents where it has no VAE."""

    pictures: list[list[Image.Image]]
    latents: Tensor | None
    seconds: float
    full_steps: int
    reuse_steps: int
    partial_steps: int = 0


def attach(pipe: Any, bundle: str | Path | Bundle, **settings: Any) -> dict[str, DenoiserTransformer]:
    """Replace the transformers of a loaded pipeline by the engines of a bundle, and of the bundles beside it.

    `settings` are those of `load`, such as `cache_interval=3`. Returns the replacements by component. Raises
    `InputError` for a bundle of another pipeline.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    bundles = bundles_of(opened)
    if missing := bundles.keys() - pipe.components.keys():
        raise InputError(f"{type(pipe).__name__} has no part {min(missing)!r}, for which {opened.folder} was exported")
    for component, found in bundles.items():
        _check_same(pipe.components[component], found)
    ours = {one: load(found, **settings).as_transformer(pipe) for one, found in bundles.items()}
    for component, transformer in ours.items():
        setattr(pipe, component, transformer)
    return ours


def bundles_of(bundle: Bundle) -> dict[str, Bundle]:
    """The bundles of all transformers of a pipeline by component: the given one and those beside it.

    A bundle that was exported alone, with `component`, has none beside it. Raises `InputError` if one of them cannot be
    opened.
    """
    own, spec = bundle.manifest.name, bundle.manifest.pipeline
    if spec is None:
        return {"transformer": bundle}
    alone = bundle.manifest.model.options.component == spec.components[0]
    names = {spec.call.component: own} if alone else spec.siblings(own)
    return {one: bundle if name == own else _beside(bundle, name, one) for one, name in names.items()}


def _beside(bundle: Bundle, name: str, component: str) -> Bundle:
    folder = bundle.folder.with_name(name)
    several = f"the pipeline of {bundle.folder} has several transformers, and {folder} with the {component}"
    if not folder.is_dir():
        raise InputError(f"{several} is missing; copy it there, or export the pipeline again")
    try:
        found = Bundle.open(folder)
    except BundleError as error:
        raise InputError(f"{several} cannot be opened: {error}") from error
    if found.manifest.pipeline is None or found.manifest.pipeline.call.component != component:
        raise InputError(f"{several} is the bundle of something else; export the pipeline again")
    return found


def _check_same(module: Any, bundle: Bundle) -> None:
    """Raise `InputError` if a bundle was exported from another transformer than that of a pipeline.

    Nothing is compared if the pipeline has none, or the bundle was exported without one.
    """
    if module is None or bundle.manifest.pipeline is None:
        return
    model, kind = bundle.manifest.model, module.__class__.__name__
    if kind != model.architecture:
        raise InputError(f"{bundle.folder} was exported from a {model.architecture}; the pipeline has a {kind}")
    own, exported = (json.loads(json.dumps(dict(one), default=str)) for one in (module.config, model.config))
    both = [name for name in own if name in exported and not name.startswith("_")]
    if other := next((name for name in both if own[name] != exported[name]), None):
        raise InputError(
            f"{bundle.folder} was exported from a {kind} with {other}={exported[other]!r}; that of the pipeline has "
            f"{own[other]!r}: export this pipeline"
        )


class DiffusersPipeline:
    """The pipeline of a bundle. Its parts and the engines are loaded by the first call, or by `start`.

    `schedule` is a text form or a file; without one the bundle's own counts. `where` is the folder of the pipeline, for
    a bundle that does not name one.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        schedule: str = "",
        backend: str = AUTO,
        device: str = AUTO,
        engines: Path = Path("engines"),
        where: str | None = None,
        report: Callable[[str], None] = lambda line: None,
        progress: Progress = lambda fraction, phase: None,
    ) -> None:
        if bundle.manifest.pipeline is None:
            raise InputError(f"{bundle.folder} was not exported from a diffusers pipeline; give it to Pipeline()")
        self.bundle, self.spec = bundle, bundle.manifest.pipeline
        self.schedule = schedule or bundle.schedule or usual_text()
        self.backend = backend_from_name(backend, bundle.manifest, device)
        self.device = device_from_name(device, self.backend)
        self._engines, self._where, self._report, self._progress = engines, where, report, progress
        self._pipe: Any = None
        self._started_for = 0
        self.transformers: dict[str, DenoiserTransformer] = {}

    def __call__(
        self,
        prompts: Sequence[str] = (),
        *,
        steps: int,
        seed: int = 0,
        num_images: int = 1,
        latents: bool = False,
        arguments: Mapping[str, Any] | None = None,
        watch: Callable[[Any], Any] | None = None,
    ) -> Result:
        """Make results for each prompt; result k has the seed `seed` + k.

        With `latents` they are not decoded, nor without a VAE. `arguments` are further arguments of the pipeline, such
        as `negative_prompt`. Raises `InputError` for arguments that the pipeline does not take or the bundle was not
        exported for.
        """
        given = self._arguments(prompts, num_images, dict(arguments or {}))
        samples = self._samples(given, num_images)
        self.start(samples)
        if prompts and getattr(self._pipe, "text_encoder", self) is None:
            raise InputError(f"{self.spec.name} was loaded without a text encoder; give --prompt-embeds FILE instead")
        seeds = range(seed, seed + samples)
        generators = [torch.Generator(self.device).manual_seed(one) for one in seeds]
        before, decoded = self._counts(), self.decodes and not latents
        began = time.perf_counter()
        if watch is not None:
            self._pipe.progress_bar = lambda iterable=None, total=None: _Bar(watch, iterable, total)
        try:
            with torch.no_grad():
                made = self._pipe(
                    **given,
                    num_inference_steps=steps,
                    generator=generators if samples > 1 else generators[0],
                    output_type="pil" if decoded else "latent",
                )
        except ForaError:
            raise
        except Exception as error:  # a pipeline can raise anything
            raise InputError(
                f"{self.spec.name} cannot be called with {', '.join(sorted(given))} "
                f"({type(error).__name__}: {first_line(error)}); correct them, or give others with --call"
            ) from error
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - began
        full, reuse, partial = (after - one for after, one in zip(self._counts(), before, strict=True))
        return _result(made, decoded, seconds, full, reuse, partial)

    def use_schedule(self, schedule: Schedule | str) -> None:
        """Run the next calls with another schedule; the engines must have started."""
        for transformer in self.transformers.values():
            transformer.use_schedule(schedule)

    @cached_property
    def parameters(self) -> tuple[str, ...]:
        """The names of the arguments of the pipeline's call."""
        kind = pipeline_class(self.bundle.manifest.name, self.spec.name)
        return tuple(name for name in inspect.signature(kind.__call__).parameters if name != "self")

    @property
    def decodes(self) -> bool:
        """Whether the pipeline has a VAE."""
        folder = self._folder
        return "vae" in _parts(folder) and (folder / "vae").is_dir()

    def start(self, samples: int) -> None:
        """Load the parts of the pipeline, and start the engines for this many results at once.

        Engines that were built for fewer are started again.
        """
        if self._pipe is not None and (samples <= self._started_for or not self.backend.builds):
            return
        folder, batch = self._folder, samples * self.spec.samples
        options = EngineOptions(self._engines, batch, self._report, self._progress)
        self.transformers = {
            component: load(
                bundle, schedule=self.schedule, backend=self.backend.name, device=self.device, plans=options
            ).as_transformer()
            for component, bundle in bundles_of(self.bundle).items()
        }
        if self._pipe is None:
            self._report(f"loading {self.spec.name}")
            self._pipe = _loaded(self.spec, folder, self.transformers, self.device)
        self._started_for = samples
        for component, transformer in self.transformers.items():
            setattr(self._pipe, component, transformer)
            transformer.follow(self._pipe)

    @cached_property
    def _folder(self) -> Path:
        name = self.bundle.manifest.name
        if self._where is None and self.spec.where is None:
            raise InputError(
                f"{name} was exported from a pipeline in memory, so its text encoder and VAE are not known; in Python, "
                f"set pipe.transformer = fora_trt.load({str(self.bundle.folder)!r}, ...).as_transformer(pipe), or give "
                "--pipeline the folder of the pipeline"
            )
        try:
            if self._where is not None:
                folder = Path(self._where).expanduser()
                if not (folder / INDEX).is_file():
                    raise InputError(f"{folder} is not the folder of a pipeline: it has no {INDEX}")
                kind = read_config(folder / INDEX, "pipeline", str(folder)).get("_class_name")
                if kind != self.spec.name:
                    raise InputError(
                        f"{folder} is a {shown(kind)}; {self.bundle.folder} was exported from a {self.spec.name}: give "
                        "the folder of such a pipeline"
                    )
                return folder
            assert self.spec.where is not None
            return folder_of(self.spec.where, FILES)
        except ModelError as error:
            raise InputError(str(error)) from error

    def _counts(self) -> tuple[int, int, int]:
        ours = self.transformers.values()
        kinds = ("full_steps", "reuse_steps", "partial_steps")
        full, reuse, partial = (sum(getattr(one, kind) for one in ours) for kind in kinds)
        return full, reuse, partial

    def _arguments(self, prompts: Sequence[str], num_images: int, extra: dict[str, Any]) -> dict[str, Any]:
        """The arguments of the pipeline's call. Raises `InputError` for one that it does not take."""
        known = self.parameters
        given: dict[str, Any] = {name: one for name, one in self.spec.arguments.items() if name in known}
        if prompts:
            given["prompt"] = prompts[0] if len(prompts) == 1 else list(prompts)
        if num_images > 1:
            given[next((name for name in COUNTS if name in known), COUNTS[0])] = num_images
        if taken := next((name for name in extra if name in RESERVED), None):
            raise InputError(f"{taken!r} is no further argument of the pipeline; give {RESERVED[taken]} instead")
        given |= extra
        if unknown := given.keys() - {*known}:
            raise InputError(f"{self.spec.name} has no argument {min(unknown)!r}; its arguments are {', '.join(known)}")
        if "prompt" in known and not any(name.startswith("prompt") for name in given):
            raise InputError(f"{self.spec.name} needs a prompt; give --prompt, or --prompt-embeds FILE")
        return given

    def _samples(self, given: Mapping[str, Any], num_images: int) -> int:
        """How many results a call makes."""
        of_prompts = [
            len(one) if isinstance(one, list | Tensor) else 1
            for name, one in given.items()
            if name in ("prompt", "prompt_embeds", "class_labels")
        ]
        return max(of_prompts, default=1) * num_images


class _Bar:
    """The progress bar of a pipeline as `watch` shows it."""

    def __init__(self, watch: Callable[[Any], Any], iterable: Any, total: int | None) -> None:
        steps = iterable if iterable is not None else range(total or 0)
        self._steps = iter(watch(steps))

    def __iter__(self) -> Any:
        return self._steps

    def __enter__(self) -> _Bar:
        self.update()
        return self

    def update(self, *_: Any) -> None:
        with suppress(StopIteration):
            next(self._steps)

    def __exit__(self, *_: object) -> None:
        for _step in self._steps:
            pass


def _loaded(spec: PipelineSpec, folder: Path, transformers: Mapping[str, Any], device: torch.device) -> Any:
    """The pipeline with our transformers; parts that its folder lacks are left out."""
    absent = [name for name in _parts(folder) if not (folder / name).is_dir()]
    variants = variants_in(folder / "text_encoder", "model") | variants_in(folder / "vae")
    variant = preferred(variants) if variants else None
    kind = pipeline_class(folder.name, spec.name)
    try:
        return load_pipeline(kind, folder, device, variant, **{**dict.fromkeys(absent), **transformers})
    except ImportError as error:
        raise InputError(f"{spec.name} needs more packages: {first_line(error)}; {how_to_install('text')}") from error
    except Exception as error:  # from many libraries: a missing or damaged file, no network
        raise InputError(
            f"the pipeline in {folder} cannot be loaded ({type(error).__name__}: {first_line(error)}); download or "
            "copy the whole folder again"
        ) from error


def _parts(folder: Path) -> list[str]:
    """The names of the parts that a pipeline lists."""
    index = read_config(folder / INDEX, "pipeline", str(folder))
    return [name for name, one in index.items() if isinstance(one, list)]


def _result(made: Any, decodes: bool, seconds: float, full: int, reuse: int, partial: int) -> Result:
    """What a pipeline returned, in one form."""
    found = next(getattr(made, name) for name in ("images", "frames", "audios", "sample") if hasattr(made, name))
    if not decodes:
        return Result([], torch.as_tensor(found).float().cpu(), seconds, full, reuse, partial)
    if not isinstance(found, list) or not found:
        raise InputError(f"the pipeline made {type(found).__name__}, which is neither images nor videos")
    pictures = [[one] if isinstance(one, Image.Image) else list(one) for one in found]
    if not all(isinstance(frame, Image.Image) for one in pictures for frame in one):
        raise InputError("the pipeline made neither images nor videos; only these can be written")
    return Result(pictures, None, seconds, full, reuse, partial)
