"""Image quality with caching: compares the pictures and latents of every setting with those without caching.

All settings start from the same noise. This module combines the batches that `rounds.py` computes. Shapes: N images,
D features, S steps.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from fora_trt import metrics
from fora_trt.bundle import Manifest
from fora_trt.errors import InputError
from fora_trt.evaluate.candidates import candidates_of, file_name_of
from fora_trt.evaluate.features import INCEPTION_URL, Extractor, extractor_for, reference_pictures
from fora_trt.evaluate.rounds import CHOSEN_ON, Arrays, Rounds, measured_by
from fora_trt.evaluate.work_folder import WorkFolder, work_folder
from fora_trt.evaluate.workers import Workers
from fora_trt.files import Record, sha256_of, write_whole
from fora_trt.images.grid import grid
from fora_trt.images.save import save_image
from fora_trt.pipeline import Pipeline, Sampling
from fora_trt.report.environment import versions
from fora_trt.report.page import GRID, WORK
from fora_trt.report.results import About, Quality, QualityRow, Setting
from fora_trt.report.tables import labels
from fora_trt.sampling.conditioning import Conditioning
from fora_trt.sampling.loop import Watch
from fora_trt.sampling.schedulers import SchedulerChoice, fine_solver

FINISHED = "quality.json"
IN_GRID = 8  # images


class QualityOptions(Record):
    """The settings to compare, and the number of images. The scheduler None is the model's own.

    With `truth_steps` all settings are also compared with so many steps of DDIM (flow matching: Euler).
    """

    images: int
    schedulers: tuple[str | None, ...] = (None,)
    steps: tuple[int, ...] = (50,)
    schedules: tuple[str, ...] = ("fora:2", "fora:3", "fora:5")
    seed: int = 0
    keep_images: bool = True
    truth_steps: int | None = None


class _Settings(QualityOptions):
    """All settings that determine the content of a work folder; inputs and weights are recorded by digest."""

    bundle: str
    guidance_scale: float
    batch_size: int
    backend: str
    device: str
    vae: str | None
    conditioning: str
    features: str | None
    reference: str | None
    metrics: tuple[str, ...]
    plans: tuple[str, ...]


def measure_quality(
    pipeline: Pipeline,
    options: QualityOptions,
    conditioning: Conditioning,
    folder: Path,
    *,
    inception_weights: Path | None = None,
    reference: Path | None = None,
    resume: bool = False,
    watch: Watch = iter,
    watch_steps: Watch = iter,
    workers: Workers | None = None,
) -> Quality:
    """Compare every setting with no caching on `options.images` images; image k has the seed `options.seed` + k.

    `pipeline` has the bundle, guidance, backend and batch size. The images cycle through the rows of `conditioning`.
    `folder`/quality gets the intermediate parts and then the pictures of every setting, one .npz file per setting in
    the layout of the ADM evaluator; the image grid is written to `folder`. `reference` is a .npz file in the same
    layout. `watch` wraps batches and settings, `watch_steps` the steps of each, for a progress bar. With `resume` an
    interrupted measurement continues; a finished one returns its result. If there are `workers`, they compute the
    batches, and times are measured in them.
    Raises `InputError` or `ScheduleError` for invalid options, for a folder that is in use or was made with other
    options, and for invalid files; `BackendError` if the backend does not work here.
    """
    manifest, shape = pipeline.manifest, _picture_shape(pipeline.manifest)
    metrics.check_torchmetrics()
    _check(options)
    if pipeline.can_decode:
        pipeline.decoder  # noqa: B018 # raises for a missing VAE before anything is computed
    elif inception_weights is not None or reference is not None:
        given = "--inception-weights" if inception_weights is not None else "--reference"
        raise InputError(
            f"{given} compares images, and {manifest.name} has no VAE to decode its latents; give --vae FOLDER too"
        )
    candidates = candidates_of(pipeline, options.schedulers, options.steps, options.schedules)
    guidance = pipeline.guidance(conditioning, candidates[0].sampling)
    solution = None if options.truth_steps is None else _solution(pipeline, options)
    extractor = extractor_for(manifest, inception_weights, pipeline.device)
    pictures = None if reference is None else reference_pictures(reference, shape)
    if pictures is not None and extractor is None:
        raise InputError(f"--reference needs image features, but {_why_no_features(manifest)}")
    settings = _Settings(
        **dict(options),
        bundle=About.of(pipeline.bundle).sha256,
        guidance_scale=guidance.scale,
        batch_size=min(pipeline.config.batch_size, options.images),
        backend=pipeline.backend.name,
        device=str(pipeline.device),
        vae=pipeline.config.vae,
        conditioning=conditioning.digest(),
        features=None if extractor is None else f"{extractor.name}, {extractor.digest}",
        reference=None if reference is None else sha256_of(reference),
        metrics=tuple(measured_by(pipeline, shape, solution=False)),
        plans=tuple(one.sampling.schedule.digest() for one in candidates),
    )
    with work_folder(folder / WORK, settings, resume) as work:
        if (work.folder / FINISHED).is_file():
            work.clear()  # parts are still there if the run was interrupted at this point
            return _read(work.folder / FINISHED)
        if workers is None:
            pipeline.start(options.images, guidance)
        rounds = Rounds(
            pipeline,
            candidates,
            conditioning,
            guidance,
            images=options.images,
            batch_size=settings.batch_size,
            seed=options.seed,
            extractor=extractor,
            shape=shape,
            solution=solution,
        )
        crew = None if workers is None else workers.crew(rounds)
        shares = rounds.plan(work, crew)
        rounds.run(work, watch, watch_steps, crew)
        compared = None if pictures is None else rounds.reference_features(pictures, work, watch)
        rows, same, shown = _rows(rounds, work, compared, options.keep_images)
        if shown:
            made_with = {**settings.model_dump(mode="json"), "versions": versions()}
            save_image(grid(shown, labels([row.setting for row in rows])), folder / GRID, made_with)
        fewest = options.images if compared is None else min(options.images, len(compared))
        found = Quality(
            backend=settings.backend,
            device=settings.device,
            images=options.images,
            guidance_scale=guidance.scale,
            solution=None
            if solution is None
            else f"{solution.steps} steps of {SchedulerChoice.from_text(solution.name).label}",
            features=None if extractor is None else extractor.name,
            notes=(*_notes(shares, same, options.images), *_missing(pipeline, shape, extractor, fewest)),
            rows=rows,
            grid=GRID if pipeline.can_decode else "",
        )
        _write(found, work.folder / FINISHED)
        work.clear()
    return found


def _check(options: QualityOptions) -> None:
    if options.images < 2:
        raise InputError(f"the number of images is {options.images}; a comparison of image sets needs at least 2")


def _solution(pipeline: Pipeline, options: QualityOptions) -> Sampling:
    """The sampling of the fine solution. Raises `InputError` unless it has more steps than the settings."""
    steps = options.truth_steps or 0
    if steps <= max(options.steps):
        raise InputError(
            f"the fine solution has {steps} steps; give more than the {max(options.steps)} steps of the settings"
        )
    return pipeline.uncached(fine_solver(pipeline.bundle.scheduler_config), steps)


def _write(found: Quality, path: Path) -> None:
    text = found.model_dump_json(indent=2) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))


def _read(path: Path) -> Quality:
    try:
        return Quality.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError) as error:
        raise InputError(f"{path} cannot be read, so the result is lost; give another folder") from error


def _picture_shape(manifest: Manifest) -> tuple[int, ...] | None:
    """Height, width and channels of the bundle's pictures; None if the manifest has no image size."""
    if manifest.latents.pixels:
        return (*manifest.latents.shape[1:], manifest.latents.shape[0])
    return None if manifest.model.image_size is None else (*manifest.model.image_size, 3)


def _rows(
    rounds: Rounds, work: WorkFolder, compared: Tensor | None, keep_images: bool
) -> tuple[tuple[QualityRow, ...], list[int], list[list[Image.Image]]]:
    """One row per setting, how many of its pictures are identical to those without caching, and its first `IN_GRID`.

    Also writes the pictures of every setting. A model without a VAE has none; its latents are written.
    """
    rows: list[QualityRow] = []
    same: list[int] = []
    shown: list[list[Image.Image]] = []
    plain: Tensor | None = None  # features without caching
    for turn, candidate in enumerate(rounds.candidates):
        arrays = rounds.read(work, turn)
        if plain is None and "features" in arrays:
            plain = torch.from_numpy(arrays["features"])
        rows.append(_row(candidate.setting, arrays, rounds, plain, compared))
        same.append(int(numpy.isinf(arrays["psnr"]).sum()))
        made = arrays["pictures" if "pictures" in arrays else "latents"]
        if "pictures" in arrays:
            shown.append([Image.fromarray(one.squeeze(-1) if one.shape[-1] == 1 else one) for one in made[:IN_GRID]])
        if keep_images:
            classes = rounds.labels()
            content = {"arr_0": made} if classes is None else {"arr_0": made, "arr_1": classes}
            _save_arrays(content, work.folder / f"{file_name_of(candidate.setting)}.npz")
    return tuple(rows), same, shown


def _row(setting: Setting, arrays: Arrays, rounds: Rounds, plain: Tensor | None, compared: Tensor | None) -> QualityRow:
    # a smaller last batch is not timed: its CUDA graphs are captured again
    whole = len(rounds.batches) - (len(rounds.batches[-1]) < len(rounds.batches[0]))
    return QualityRow(
        setting=setting,
        seconds_per_image=statistics.median(arrays["seconds"][:whole].tolist()),
        metrics=_metrics(arrays, rounds, plain, compared),
        latent_errors=tuple(arrays["latent_errors"].mean(0).tolist()) if "latent_errors" in arrays else (),
    )


def _metrics(arrays: Arrays, rounds: Rounds, plain: Tensor | None, compared: Tensor | None) -> dict[str, float | None]:
    """All measured metrics: the summaries of per-picture metrics, and the set metrics."""
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    labels = rounds.labels()
    found = metrics.PictureSet(
        features=tensors.get("features"),
        plain=plain,
        reference=compared,
        classes=tensors.get("classes"),
        labels=None if labels is None else torch.from_numpy(labels),
    )
    values: dict[str, float | None] = {}
    for name, metric in metrics.METRICS.items():
        if name in rounds.metrics:
            values[name] = metric.summary(tensors[name])
        elif metric.of_set is not None and (value := metric.of_set(found)) is not None:
            values[name] = value
    return values


def _save_arrays(arrays: Arrays, path: Path) -> None:
    write_whole(path, lambda file: numpy.savez(file, **arrays))  # type: ignore[arg-type] # of the stubs


def _notes(shares: Mapping[str, float], same: Sequence[int], images: int) -> list[str]:
    """Remarks on controls and on images that are identical, for the report."""
    notes = []
    if shares:
        by_schedule = ", ".join(f"{share:.1%} with {schedule}" for schedule, share in shares.items())
        notes.append(
            f"equal-time controls: each is the best of several solver settings on {min(CHOSEN_ON, images)} images; the "
            f"numbers of steps follow from a pilot run, in which a reuse step took this fraction of the time of a full "
            f"step: {by_schedule}"
        )
    if any(same[1:]):
        counts = ", ".join(map(str, same[1:]))
        notes.append(
            f"PSNR is the mean over images that differ; identical images per row, from the second row on: {counts}"
        )
    return notes


def _missing(pipeline: Pipeline, shape: tuple[int, ...] | None, extractor: Extractor | None, fewest: int) -> list[str]:
    """Metrics that were not measured and why, and those of too few images, for the report."""
    manifest = pipeline.manifest
    if not pipeline.can_decode:
        return [
            f"{manifest.name} has no VAE, so latents are compared instead of images: the peak of the PSNR is the range "
            "of each image's latents without caching; --vae FOLDER compares images, with all metrics"
        ]
    notes = []
    problems = {one.column: one.problem(shape) for one in metrics.METRICS.values()}
    notes += [f"no {column}: {problem}" for column, problem in problems.items() if problem is not None]
    if extractor is None:
        notes.append(f"no Fréchet distance, precision and recall: {_why_no_features(manifest)}")
    elif fewest <= extractor.dimensions:
        notes.append(
            f"{fewest} images are too few for {extractor.dimensions} features: the covariances of the Fréchet distance "
            "do not have full rank; compare it only with distances from the same number of images"
        )
    return notes


def _why_no_features(manifest: Manifest) -> str:
    return (
        f"the built-in classifier reads 8 x 8 digits only, which {manifest.name} does not make; give "
        f"--inception-weights FILE, from {INCEPTION_URL}"
    )
