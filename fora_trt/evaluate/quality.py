"""What caching costs: pictures and latents of every setting against those without caching, from the same noise.

Puts together what `rounds.py` made of each batch. Shapes: N images, D features, S steps.
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

from fora_trt.bundle import Bundle, Manifest
from fora_trt.engines.plan_store import PlanSource
from fora_trt.errors import InputError
from fora_trt.evaluate import metrics
from fora_trt.evaluate.candidates import candidates_of, file_name_of
from fora_trt.evaluate.features import Extractor, extractor_for, reference_pictures
from fora_trt.evaluate.report import GRID, WORK
from fora_trt.evaluate.results import About, Quality, QualityRow, Setting
from fora_trt.evaluate.rounds import Arrays, Rounds, Watch
from fora_trt.evaluate.tables import labels
from fora_trt.evaluate.work_folder import WorkFolder, work_folder
from fora_trt.folders import Record, sha256_of
from fora_trt.runtime.conditioning import Conditioning
from fora_trt.runtime.denoiser import load
from fora_trt.runtime.images import Decoder, grid
from fora_trt.runtime.outputs import save_image, write_whole
from fora_trt.runtime.sampling import Guidance
from fora_trt.schedule import Schedule

FINISHED = "quality.json"
IN_GRID = 8  # images


class QualityOptions(Record):
    """What is compared, and on how many images. A scheduler that is None is the model's own."""

    images: int
    schedulers: tuple[str | None, ...] = (None,)
    steps: tuple[int, ...] = (50,)
    cache_intervals: tuple[int, ...] = (2, 3, 5)
    guidance_scale: float = 1.0
    seed: int = 0
    batch_size: int = 64
    keep_images: bool = True
    vae: str | None = None


class _Settings(QualityOptions):
    """All that decides what a work folder holds: what was compared is there by digest, what compares it by name."""

    bundle: str
    backend: str
    device: str
    conditioning: str
    features: str | None
    reference: str | None
    lpips: bool


def measure_quality(
    bundle: Bundle,
    options: QualityOptions,
    conditioning: Conditioning,
    folder: Path,
    *,
    backend: str,
    device: torch.device,
    plans: PlanSource | None = None,
    inception_weights: Path | None = None,
    reference: Path | None = None,
    resume: bool = False,
    watch: Watch = iter,
) -> Quality:
    """Compare every setting with no caching on `options.images` images; image k has the seed `options.seed` + k.

    The images take the rows of `conditioning` in turn. The parts and then the pictures of every setting, each a .npz
    in the layout of the ADM evaluator, go to `folder`/quality, the grid beside it. `reference` is such a file too.
    With `resume` it goes on where it was stopped; complete, it returns what was found.
    Raises `InputError` or `ScheduleError` for options that do not fit, for a folder that is in use or was made with
    others, and for files of the wrong kind; `BackendError` where the backend does not work.
    """
    manifest, shape = bundle.manifest, _picture_shape(bundle.manifest)
    metrics.check_torchmetrics()
    _check(options)
    decoder = Decoder(manifest, options.vae, or_latents=False)
    candidates = candidates_of(bundle, options.schedulers, options.steps, options.cache_intervals)
    extractor = extractor_for(manifest, inception_weights, device)
    pictures = None if reference is None else reference_pictures(reference, shape)
    if pictures is not None and extractor is None:
        raise InputError(f"a reference is compared by features, and {_why_no_features(manifest)}")
    no_lpips = metrics.lpips_problem(shape)
    settings = _Settings(
        **dict(options),
        bundle=About.of(bundle).sha256,
        backend=backend,
        device=str(device),
        conditioning=conditioning.digest(),
        features=None if extractor is None else f"{extractor.name}, {extractor.digest}",
        reference=None if reference is None else sha256_of(reference),
        lpips=no_lpips is None,
    )
    with work_folder(folder / WORK, settings, resume) as work:
        _remove_halves(work.folder)
        if (work.folder / FINISHED).is_file():
            work.clear()  # unless it was stopped there
            return _read(work.folder / FINISHED)
        rounds = Rounds(
            load(bundle, schedule=Schedule.static(1, 1), backend=backend, device=device, plans=plans),
            candidates,
            conditioning,
            Guidance(options.guidance_scale),
            decoder,
            images=options.images,
            batch_size=options.batch_size,
            seed=options.seed,
            extractor=extractor,
            lpips=no_lpips is None,
        )
        shares = rounds.plan(work)
        rounds.run(work, watch)
        compared = None if pictures is None else rounds.reference_features(pictures, work, watch)
        rows, same = _rows(rounds, work, compared, folder, options.keep_images)
        fewest = options.images if compared is None else min(options.images, len(compared))
        found = Quality(
            backend=backend,
            device=str(device),
            images=options.images,
            guidance_scale=options.guidance_scale,
            features=None if extractor is None else extractor.name,
            notes=_notes(manifest, shares, same, no_lpips, extractor, fewest),
            rows=rows,
            grid=GRID,
        )
        _write(found, work.folder / FINISHED)
        work.clear()
    return found


def _check(options: QualityOptions) -> None:
    if options.images < 2:
        raise InputError(f"the number of images is {options.images}; at least 2 are needed to compare sets of them")


def _remove_halves(folder: Path) -> None:
    """Remove what a process that was killed had not written to its end."""
    for half in (*folder.glob(".*.npz.*"), *folder.glob(".*.json.*")):
        half.unlink()


def _write(found: Quality, path: Path) -> None:
    text = found.model_dump_json(indent=2) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))


def _read(path: Path) -> Quality:
    try:
        return Quality.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError) as error:
        raise InputError(f"{path} cannot be read, so there is nothing to resume; give another folder") from error


def _picture_shape(manifest: Manifest) -> tuple[int, ...] | None:
    """Height, width and channels of what the bundle makes; None where only the VAE knows."""
    if manifest.latents.pixels:
        return (*manifest.latents.shape[1:], manifest.latents.shape[0])
    return None if manifest.model.image_size is None else (*manifest.model.image_size, 3)


def _rows(
    rounds: Rounds, work: WorkFolder, compared: Tensor | None, folder: Path, keep_images: bool
) -> tuple[tuple[QualityRow, ...], list[int]]:
    """A row for each setting, and how many of its pictures are those without caching.

    Writes the pictures, and the first of all settings in a grid.
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
        pictures = arrays["pictures"]
        shown.append([Image.fromarray(one.squeeze(-1) if one.shape[-1] == 1 else one) for one in pictures[:IN_GRID]])
        if keep_images:
            classes = rounds.labels()
            content = {"arr_0": pictures} if classes is None else {"arr_0": pictures, "arr_1": classes}
            _save_arrays(content, work.folder / f"{file_name_of(candidate.setting)}.npz")
    save_image(grid(shown, labels([row.setting for row in rows])), folder / GRID)
    return tuple(rows), same


def _row(setting: Setting, arrays: Arrays, rounds: Rounds, plain: Tensor | None, compared: Tensor | None) -> QualityRow:
    features = torch.from_numpy(arrays["features"]) if "features" in arrays else None
    distance = precision = recall = to_reference = None
    if features is not None and plain is not None:
        distance = metrics.frechet_distance(features, plain)
        precision, recall = metrics.precision_and_recall(features, plain)
        to_reference = None if compared is None else metrics.frechet_distance(features, compared)
    whole = len(rounds.batches) - (len(rounds.batches[-1]) < len(rounds.batches[0]))  # a smaller one is captured anew
    return QualityRow(
        setting=setting,
        seconds_per_image=statistics.median(arrays["seconds"][:whole].tolist()),
        psnr=metrics.mean_psnr(torch.from_numpy(arrays["psnr"])),
        ssim=float(arrays["ssim"].mean()),
        lpips=float(arrays["lpips"].mean()) if "lpips" in arrays else None,
        latent_errors=tuple(arrays["latent_errors"].mean(0).tolist()) if "latent_errors" in arrays else (),
        frechet_distance=distance,
        precision=precision,
        recall=recall,
        to_reference=to_reference,
        as_asked=float((arrays["classes"] == rounds.labels()).mean()) if "classes" in arrays else None,
    )


def _save_arrays(arrays: Arrays, path: Path) -> None:
    write_whole(path, lambda file: numpy.savez(file, **arrays))  # type: ignore[arg-type] # of the stubs


def _notes(
    manifest: Manifest,
    shares: Mapping[int, float],
    same: Sequence[int],
    no_lpips: str | None,
    extractor: Extractor | None,
    fewest: int,
) -> tuple[str, ...]:
    """What was left out and why, and what must be known to read the figures."""
    notes = []
    if shares:
        told = ", ".join(f"{share:.1%} at interval {interval}" for interval, share in shares.items())
        notes.append(f"fewer steps at equal time: in a pilot a reuse step took this part of a full one: {told}")
    if any(same[1:]):
        counts = ", ".join(map(str, same[1:]))
        notes.append(f"PSNR is of the images that differ; those that do not, row by row below the first: {counts}")
    if no_lpips is not None:
        notes.append(f"no LPIPS: {no_lpips}")
    if extractor is None:
        notes.append(f"no Fréchet distance, precision and recall: {_why_no_features(manifest)}")
    elif fewest <= extractor.dimensions:
        notes.append(
            f"{fewest} images are too few for {extractor.dimensions} features: the covariances under the Fréchet "
            "distances have not full rank, so compare them with those of as many images alone"
        )
    return tuple(notes)


def _why_no_features(manifest: Manifest) -> str:
    return f"{manifest.name} does not make the digits that the built-in classifier reads; give --inception-weights FILE"
