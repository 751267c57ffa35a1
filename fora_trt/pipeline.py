"""The pipeline: combines scheduler, schedule, denoiser, guidance and decoder of a bundle to make images.

from fora_trt import Pipeline

pipeline = Pipeline("export/digits", cache_interval=3)
images = pipeline(class_labels=[3, 7], steps=50, seed=0).images
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass, field, fields, replace
from functools import cached_property
from numbers import Real
from pathlib import Path
from threading import RLock
from typing import Any

import torch
from diffusers import SchedulerMixin
from PIL import Image
from torch import Tensor

from fora_trt.bundle import Bundle, Manifest
from fora_trt.contract import CacheSite
from fora_trt.engines.backends import AUTO, Backend, backend_from_name, device_from_name
from fora_trt.engines.options import EngineOptions, Progress
from fora_trt.errors import BundleError, InputError, ScheduleError
from fora_trt.files import MANIFEST, sha256_of
from fora_trt.images.decode import Decoder, can_decode
from fora_trt.presets import usual_text
from fora_trt.runtime.denoiser import Denoiser
from fora_trt.runtime.inputs import integer_of
from fora_trt.runtime.interface import Predictor
from fora_trt.runtime.variants import networks_of, variants_of
from fora_trt.sampling.conditioning import Conditioning, usual_guidance_scale
from fora_trt.sampling.guidance import Guidance
from fora_trt.sampling.loop import Sampler, Trajectory, Watch
from fora_trt.sampling.request import conditioning_of
from fora_trt.sampling.scheduler_step import SchedulerStep, scheduler_step_from
from fora_trt.sampling.schedulers import scheduler_choice, scheduler_from_config
from fora_trt.schedule import NONE, Schedule, with_forecast

GUIDED = Guidance(2.0)
"""Guidance on all steps, at an arbitrary scale: the batch of every step is twice the number of images."""


@dataclass(frozen=True)
class PipelineConfig:
    """All settings of a pipeline, as values that can be pickled. None means the model's default.

    `schedule` is a text form (`fora:3`, `none`), a .json file, or a `Schedule`; `cache_interval=3` is short for
    `schedule="fora:3"`, the default of most bundles. `forecast` is the order in which reuse steps extrapolate features,
    0 (FORA) to 3: the option `forecast=2` of the text form. Alone, `forecast=2` stands for `dense:every=3,forecast=2`.
    `scheduler` is a short name (`ddim`) or a diffusers class, with settings in a text form such as
    `dpm-solver++:order=3,spacing=lu`; `timestep_spacing` is leading, linspace or trailing. `guidance_interval` has the
    first guided step and the step after the last; None means all steps. `engines` is the folder of TensorRT plans.
    `batch_size` images are denoised together. `vae` is a folder or hub id. With `trust_source`, a comparison with
    PyTorch may call the factory that the bundle names as its source.
    """

    bundle: str | Path
    schedule: Schedule | str = ""
    scheduler: str | None = None
    timestep_spacing: str | None = None
    steps: int = 50
    guidance_scale: float | None = None
    guidance_interval: tuple[int, int] | None = None
    batch_size: int = 64
    backend: str = AUTO
    device: str = AUTO
    engines: str | Path = "engines"
    vae: str | None = None
    trust_source: bool = False
    cache_interval: InitVar[int | None] = None
    forecast: InitVar[int | None] = None

    def __post_init__(self, cache_interval: int | None, forecast: int | None) -> None:
        if self.schedule and cache_interval is not None:
            raise InputError(
                f"schedule={self.schedule!r} and cache_interval={cache_interval} say the same thing in two ways; give "
                "one of them"
            )
        given = self.schedule and with_forecast(self.schedule, forecast)
        if given or cache_interval is not None or forecast is not None:
            object.__setattr__(self, "schedule", given or usual_text(cache_interval, forecast))
        integer_of("the batch size", self.batch_size, 1)
        scale, interval = self.guidance_scale, self.guidance_interval
        if scale is not None and (isinstance(scale, bool) or not isinstance(scale, Real)):
            raise InputError(f"guidance_scale is {scale!r}; a number is needed")
        if interval is not None and not (isinstance(interval, tuple | list) and len(interval) == 2):
            raise InputError(f"guidance_interval is {interval!r}; give the first step and the step after the last")
        for step in interval or ():
            integer_of("a step of the guidance interval", step, 0)


@dataclass
class PipelineOutput:
    """Result of a pipeline call.

    `latents` are (N, C, H, W) in fp32 on the CPU; `images` are decoded at the first access. `trajectory` has the times
    of all batches, `sampling` and `guidance` the settings they were made with.
    """

    latents: Tensor
    trajectory: Trajectory
    sampling: Sampling
    guidance: Guidance
    batch_size: int
    decode: Callable[[Tensor], list[Image.Image]] = field(repr=False)

    @property
    def full_steps(self) -> int:
        """Full steps of one trajectory; more than in the schedule if guidance begins after the first step."""
        return len(self.trajectory.full_seconds) // -(-len(self.latents) // self.batch_size)

    @cached_property
    def images(self) -> list[Image.Image]:
        """The decoded images. Raises `InputError` if there is no VAE to decode the latents."""
        return self.decode(self.latents)


@dataclass(frozen=True)
class Sampling:
    """A scheduler at a number of steps, and a schedule that says for each model evaluation whether it runs in full.

    `name` is the text form of the scheduler: its class and the settings that replace those of the model.
    """

    scheduler: SchedulerMixin
    steps: int
    scheduler_step: SchedulerStep
    schedule: Schedule
    name: str
    sites: Sequence[CacheSite] | None = None

    @classmethod
    def of(
        cls,
        scheduler: SchedulerMixin,
        steps: int,
        schedule: Schedule | str = NONE,
        name: str = "",
        sites: Sequence[CacheSite] | None = None,
    ) -> Sampling:
        """Create both; the scheduler is copied, because its steps change it.

        `sites` are the cache sites of the model, for per-layer schedules. Raises `InputError` or `ScheduleError` if one
        of them does not support the number of steps.
        """
        scheduler = copy.deepcopy(scheduler)
        scheduler_step = scheduler_step_from(scheduler, steps)
        schedule = _schedule_for(scheduler, scheduler_step, schedule, sites)
        return cls(scheduler, steps, scheduler_step, schedule, name or type(scheduler).__name__, sites)

    @property
    def nfe(self) -> int:
        """Number of model evaluations (NFE), which is larger than the number of steps for Heun and PNDM."""
        return self.scheduler_step.nfe

    def with_schedule(self, schedule: Schedule | str) -> Sampling:
        """The same scheduler and steps with another schedule."""
        return replace(self, schedule=_schedule_for(self.scheduler, self.scheduler_step, schedule, self.sites))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled without the tensors of a trajectory."""
        return Sampling.of, (self.scheduler, self.steps, self.schedule, self.name, self.sites)


def _schedule_for(
    scheduler: SchedulerMixin,
    scheduler_step: SchedulerStep,
    schedule: Schedule | str,
    sites: Sequence[CacheSite] | None,
) -> Schedule:
    nfe = scheduler_step.nfe
    made = Schedule.from_text(schedule, nfe, sites) if isinstance(schedule, str) else schedule.checked(nfe)
    made.check_scheduler(type(scheduler).__name__, scheduler_step.timesteps.tolist())
    return made


def _unpickled(config: PipelineConfig, sha256: str) -> Pipeline:
    pipeline = Pipeline(config)
    if sha256_of(pipeline.bundle.folder / MANIFEST) != sha256:
        raise BundleError(f"{config.bundle} is another bundle on the machine of a worker; copy the bundle there")
    return pipeline


class Pipeline:
    """Makes images with a bundle. Engines start at the first call, or with `start`.

    `settings` are the fields of `PipelineConfig`. A `predictor` replaces the engines, such as plain PyTorch for a
    comparison. `report` is called with a line before each long operation, `progress` while plans are built.
    """

    def __init__(
        self,
        bundle: str | Path | Bundle | PipelineConfig,
        *,
        opened: Bundle | None = None,
        predictor: Predictor | None = None,
        report: Callable[[str], None] = lambda stage: None,
        progress: Progress = lambda fraction, phase: None,
        **settings: Any,
    ) -> None:
        if isinstance(bundle, PipelineConfig):
            self.config = replace(bundle, **settings)
            self.bundle = opened or Bundle.open(bundle.bundle, self.config.trust_source)
        else:
            opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
            trust = settings.setdefault("trust_source", opened.trust_source)
            self.bundle = replace(opened, trust_source=trust)
            self.config = PipelineConfig(self.bundle.folder, **settings)
        self._predictor, self.report, self._progress = predictor, report, progress
        self._built_for: int | None = None
        self._one_call = RLock()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as its settings, with absolute paths; engines start again where it is unpickled.

        There, the bundle must be in the same folder. Raises `TypeError` for a pipeline with another predictor.
        """
        if self._predictor is not None and not self._denoisers:
            raise TypeError(f"a pipeline with a {type(self._predictor).__name__} cannot be pickled")
        folder, vae = self.bundle.folder.absolute(), self.config.vae
        config = replace(
            self.config,
            bundle=folder,
            engines=Path(self.config.engines).absolute(),
            backend=self.backend.name,
            device=str(self.device),
            vae=str(Path(vae).absolute()) if vae is not None and Path(vae).is_dir() else vae,
        )
        return _unpickled, (config, sha256_of(folder / MANIFEST))

    def __call__(
        self,
        *,
        class_labels: Sequence[int] | None = None,
        prompt: str | Sequence[str] = (),
        negative_prompt: str = "",
        conditioning: Conditioning | str | Path | None = None,
        num_images: int | None = None,
        steps: int | None = None,
        seed: int = 0,
        watch: Watch = iter,
    ) -> PipelineOutput:
        """Make images from class labels, prompts, a file of inputs, or noise alone; image k has the seed `seed` + k.

        `num_images` is the number of images per prompt, or of an unconditional model. `steps` replaces the
        configuration's for this call. `watch` wraps the steps, for a progress bar. Raises `InputError` for inputs that
        the bundle does not take, `BackendError` if the backend does not work here or latents are not finite,
        `BusyError` in a process that was forked after the engines were started. Threads that call a pipeline at once
        wait for each other.
        """
        for denoiser in self._denoisers:
            denoiser.access.check_process()
        with self._one_call:
            return self._made(class_labels, prompt, negative_prompt, conditioning, num_images, steps, seed, watch)

    def _made(
        self,
        class_labels: Sequence[int] | None,
        prompt: str | Sequence[str],
        negative_prompt: str,
        conditioning: Conditioning | str | Path | None,
        num_images: int | None,
        steps: int | None,
        seed: int,
        watch: Watch,
    ) -> PipelineOutput:
        integer_of("the seed", seed, 0)
        sampling = self.sampling(steps)
        given = self.conditioning(class_labels, prompt, negative_prompt, conditioning, num_images)
        guidance, batch_size = self.guidance(given, sampling), self.config.batch_size
        self.start(given.images, guidance)
        seeds = range(seed, seed + given.images)
        done = self.sampler(sampling).in_batches(given, seeds, guidance, batch_size, watch)
        return PipelineOutput(
            done.latents,
            done,
            sampling,
            guidance,
            min(batch_size, given.images),
            lambda latents: self.decoder.images(latents, self.device),
        )

    @property
    def manifest(self) -> Manifest:
        """The manifest of the bundle."""
        return self.bundle.manifest

    @cached_property
    def backend(self) -> Backend:
        """The backend; for `auto` the best one that works here and supports the bundle. Raises `BackendError`."""
        return backend_from_name(self.config.backend, self.manifest, self.config.device)

    @cached_property
    def device(self) -> torch.device:
        """The device of the engines. Raises `BackendError`."""
        return self._predictor.device if self._predictor else device_from_name(self.config.device, self.backend)

    @property
    def denoiser(self) -> Predictor:
        """The denoiser, or the predictor that replaces it; the first access starts the engines."""
        return self._predictor or self.start()

    @property
    def can_decode(self) -> bool:
        """Whether there is a VAE to decode latents, or they are pixels; else latents are what a pipeline makes."""
        return self.config.vae is not None or can_decode(self.manifest)

    @cached_property
    def decoder(self) -> Decoder:
        """Decodes latents to images. Raises `InputError` if the bundle needs a VAE and has none."""
        return Decoder(self.manifest, self.config.vae)

    @cached_property
    def scheduler(self) -> SchedulerMixin:
        """The scheduler of the configuration. Raises `InputError` for one that does not fit the model."""
        return self.scheduler_named(self.config.scheduler)

    def scheduler_named(self, name: str | None) -> SchedulerMixin:
        """A scheduler of diffusers for this model, by text form; None is the model's own.

        Raises `InputError` for one that does not fit, and for a model that predicts only some channels of its input.
        """
        if not self.manifest.denoises_all_latents:
            raise InputError(
                f"{self.manifest.name} predicts fewer channels than its latents have (the others are a condition, such "
                "as an image or a mask), so it needs the loop of its own pipeline; give the bundle to that pipeline of "
                "diffusers"
            )
        learned = self.manifest.latents.learned_sigma
        return scheduler_from_config(self.bundle.scheduler_config, name, learned, self._spacing_of(name))

    def scheduler_text(self, name: str | None) -> str:
        """The text form of the same scheduler, with the name of its class. Raises `InputError`."""
        return scheduler_choice(self.bundle.scheduler_config, name, self._spacing_of(name)).text

    def _spacing_of(self, name: str | None) -> str | None:
        """The spacing of the configuration, which is one of its own scheduler."""
        return self.config.timestep_spacing if name == self.config.scheduler else None

    def uncached(self, name: str | None, steps: int) -> Sampling:
        """Any scheduler at any number of steps, without caching. Raises `InputError`."""
        return Sampling.of(self.scheduler_named(name), steps, name=self.scheduler_text(name), sites=self._sites)

    def sampling(self, steps: int | None = None, schedule: Schedule | str | None = None) -> Sampling:
        """Scheduler, steps and schedule of the configuration; `steps` and `schedule` replace the configured values.

        Raises `InputError` or `ScheduleError`.
        """
        config = self.config
        taken = config.steps if steps is None else steps
        asked = config.schedule if schedule is None else schedule
        uncached = Sampling.of(self.scheduler, taken, name=self.scheduler_text(config.scheduler), sites=self._sites)
        if not asked:
            return uncached.with_schedule(self._default_for(uncached))
        sampling = uncached.with_schedule(asked)
        self.check_schedule(sampling.schedule)
        return sampling

    @property
    def _sites(self) -> Sequence[CacheSite]:
        return self.bundle.manifest.cache_sites

    def _default_for(self, uncached: Sampling) -> Schedule:
        """The schedule where none is given: the bundle's if it fits the scheduler and the steps, else the usual one.

        An interval longer than the trajectory is shortened.
        """
        usual = Schedule.open(usual_text(), uncached.nfe)
        if self.bundle.schedule is None:
            return usual
        try:
            own = uncached.with_schedule(Schedule.open(self.bundle.schedule, uncached.nfe, self._sites)).schedule
            self.check_schedule(own)
        except ScheduleError as error:
            self.report(f"{usual.text} is used instead of the bundle's schedule: {error}")
            return usual
        return own

    def conditioning(
        self,
        class_labels: Sequence[int] | None = None,
        prompt: str | Sequence[str] = (),
        negative_prompt: str = "",
        conditioning: Conditioning | str | Path | None = None,
        num_images: int | None = None,
    ) -> Conditioning:
        """The conditioning of the images, from class labels, prompts or a file. Raises `InputError`."""
        if isinstance(conditioning, Conditioning):
            if class_labels is not None or prompt or negative_prompt or num_images is not None:
                raise InputError("the conditioning contains the inputs of all images; leave the other inputs out")
            return conditioning
        if num_images is not None:
            integer_of("num_images", num_images, 1)
        prompts = (prompt,) if isinstance(prompt, str) else tuple(prompt)
        file = None if conditioning is None else Path(conditioning)
        return conditioning_of(self.manifest, class_labels, prompts, negative_prompt, file, num_images, self.device)

    def guidance(self, given: Conditioning, sampling: Sampling) -> Guidance:
        """Guidance of the configuration, on all steps or in the guidance interval, which must not be empty."""
        asked, interval = self.config.guidance_scale, self.config.guidance_interval
        scale = usual_guidance_scale(self.manifest, given) if asked is None else asked
        guidance = Guidance(scale, *(interval or (0, None)))
        if interval is not None and not any(map(guidance.guides, range(sampling.nfe))):
            raise InputError(
                f"no step is guided: the guidance interval is {interval[0]}:{interval[1]}, the scale {scale:g}; give "
                f"an interval within steps 0 to {sampling.nfe - 1} and a scale above 1, or leave the interval out"
            )
        return guidance

    def check_schedule(self, schedule: Schedule) -> None:
        """Raise `ScheduleError` for a schedule that was calibrated for another model, or whose graphs there are not."""
        model = self.manifest.model
        schedule.check_model(model.weights_sha256, model.options.source)
        if schedule.masks and self.manifest.variants:
            raise ScheduleError(
                f"{self.manifest.name} has other networks for some timesteps, and a schedule with partial steps is for "
                "the layers of one; give a schedule of full and reuse steps"
            )
        if self._predictor is None or self._denoisers:  # others need no graphs
            self.manifest.check_graphs(schedule.masks, schedule.text)

    @property
    def _denoisers(self) -> Sequence[Denoiser]:
        """The running denoisers: one for each network; none before the start, and for a predictor without engines."""
        found = [] if self._predictor is None else networks_of(self._predictor)
        return [one for one in found if isinstance(one, Denoiser)]

    def over(self, predictor: Predictor) -> Pipeline:
        """A pipeline with the same settings that runs its steps with another predictor."""
        settings = {one.name: getattr(self.config, one.name) for one in fields(self.config) if one.name != "bundle"}
        return Pipeline(self.bundle, predictor=predictor, **settings)

    def start(self, images: int | None = None, guidance: Guidance = GUIDED) -> Predictor:
        """Start the engines if they are not running; plans that are missing are built for batches of `images` images.

        Engines that were built for smaller batches are started again. Raises `BackendError` if the backend does not
        work here.
        """
        batch = min(self.config.batch_size, images or self.config.batch_size) * (2 if guidance.scale > 1 else 1)
        if self._predictor is None or (self._built_for is not None and batch > self._built_for):
            self._built_for = batch if self.backend.builds else None
            options = EngineOptions(Path(self.config.engines), batch, self.report, self._progress)
            denoisers = [
                Denoiser(self.backend.engines(one, self.device, options), one.manifest, self.backend.name)
                for one in (self.bundle, *(bundle for _, bundle in self.bundle.variants))
            ]
            self._predictor = variants_of(self.manifest, denoisers)
        return self._predictor

    def sampler(self, sampling: Sampling) -> Sampler:
        """The sampling loop with this pipeline's denoiser, which is started if it is not running.

        Raises `ScheduleError` for a schedule that was calibrated for another model.
        """
        self.check_schedule(sampling.schedule)
        return Sampler(self.denoiser, sampling.scheduler_step, sampling.schedule)
