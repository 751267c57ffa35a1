"""Metrics of pictures against a reference: image by image, and between sets of image features.

A metric is one entry of `METRICS`: its name, unit, functions and column.

Shapes: B pictures (B, H, W, C), levels from 0 to 255, which need not be integers; N image features of D dimensions
(N, D).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

from fora_trt.engines.backends import how_to_install
from fora_trt.errors import InputError
from fora_trt.registry import Registry

LEVELS = 255.0
SOLUTION_PSNR = "solution_psnr"
"""Name of the metric that compares with the fine solution instead of no caching."""

GAUSSIAN_WINDOW, SMALL_WINDOW = 11, 7  # pixels a side
SMALLEST_FOR_LPIPS = 32  # pixels a side; AlexNet's pooling reduces smaller pictures to nothing
NEIGHBOURS = 3
DISTANCES_AT_ONCE = 1 << 24


def check_torchmetrics() -> None:
    """Raise `InputError` if torchmetrics, which computes the metrics, is missing."""
    if find_spec("torchmetrics") is None:
        raise InputError(f"the metrics need torchmetrics, which is not installed; {how_to_install('report')}")


def psnr(pictures: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture in dB, (B,); infinite for identical pictures."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    pair = (pictures.double(), reference.double())
    return peak_signal_noise_ratio(*pair, data_range=LEVELS, reduction="none", dim=(1, 2, 3))


def latent_psnr(latents: Tensor, reference: Tensor, pixels: bool) -> Tensor:
    """PSNR of each of the latents (B, C, H, W) in dB, (B,), at most 200.

    The peak of pixels is 2, from -1 to 1, to which they are clipped; that of other latents is the range of `reference`.
    """
    if pixels:
        latents, reference = latents.clamp(-1, 1), reference.clamp(-1, 1)
    peak = 2.0 if pixels else float(reference.max() - reference.min())
    errors = (latents.double() - reference.double()).square().flatten(1).mean(1).clamp_min(1e-20 * peak**2)
    return 10 * torch.log10(peak**2 / errors)


def psnr_of_latents(latents: Tensor, reference: Tensor) -> Tensor:
    """PSNR of each of the latents (B, C, ...) in dB, (B,); infinite for identical ones.

    The peak is the range of each reference, because latents of a model without a VAE have no known limits.
    """
    found, wanted = (one.flatten(1).double() for one in (latents, reference))
    peak = wanted.amax(1) - wanted.amin(1)
    return 10 * torch.log10(peak**2 / (found - wanted).square().mean(1))


def mean_psnr(each: Tensor) -> float | None:
    """Mean PSNR of the pictures that differ: identical pictures have an infinite PSNR and are left out.

    None if all pictures are identical.
    """
    finite = each[each.isfinite()]
    return finite.mean().item() if len(finite) else None


def ssim(pictures: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity of each picture, (B,); 1 for identical pictures.

    The window is Gaussian with 11 x 11 pixels and a standard deviation of 1.5. Smaller pictures are compared in a
    uniform window of 7 x 7 pixels, or of the largest odd side that fits.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    side = min(pictures.shape[1:3])
    small = side < GAUSSIAN_WINDOW
    found = structural_similarity_index_measure(
        pictures.permute(0, 3, 1, 2).double(),
        reference.permute(0, 3, 1, 2).double(),
        gaussian_kernel=not small,
        kernel_size=min(SMALL_WINDOW, side - (side + 1) % 2) if small else GAUSSIAN_WINDOW,
        reduction="none",
        data_range=LEVELS,
    )
    assert isinstance(found, Tensor)
    return found


def lpips_problem(shape: tuple[int, ...] | None) -> str | None:
    """Why LPIPS cannot be measured on pictures of `shape` (H, W, C), for a note in the report; None if it can.

    Weights are never downloaded.
    """
    if shape is None:
        return "the manifest has no image size"
    if min(shape[:2]) < SMALLEST_FOR_LPIPS:
        return f"the pictures have fewer than {SMALLEST_FOR_LPIPS} pixels a side"
    try:
        from torchvision.models import AlexNet_Weights
    except (ImportError, RuntimeError):  # RuntimeError if torchvision does not match the installed torch
        return "torchvision, of the release that fits torch, is not installed; pip install torchvision"
    url = AlexNet_Weights.DEFAULT.url
    weights = Path(torch.hub.get_dir(), "checkpoints", Path(urlparse(url).path).name)
    return None if weights.is_file() else f"the weights of AlexNet are not in {weights}; download {url}"


def lpips(device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """LPIPS (arXiv 1801.03924) with AlexNet: a function of two batches of pictures that returns distances (B,)."""
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    metric = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True).to(device)

    @torch.no_grad()
    def distances(pictures: Tensor, reference: Tensor) -> Tensor:
        pair = [
            levels.permute(0, 3, 1, 2).expand(-1, 3, -1, -1).to(device).float() / LEVELS
            for levels in (pictures, reference)
        ]
        each = [metric(one[None], other[None]) for one, other in zip(*pair, strict=True)]  # a batch would be averaged
        metric.reset()
        return torch.stack(each).double().cpu()

    return distances


def relative_errors(latents: Tensor, reference: Tensor) -> Tensor:
    """Latents after each of S steps, (S, B, ...) -> (B, S): norm of the difference / norm of the reference."""
    found, wanted = (steps.flatten(2).double() for steps in (latents, reference))
    ratio: Tensor = torch.linalg.vector_norm(found - wanted, dim=2) / torch.linalg.vector_norm(wanted, dim=2)
    return ratio.T


class _Stored(nn.Module):
    """Replaces the feature extractor of torchmetrics: its inputs are features already."""

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        self.num_features = dimensions

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """Fréchet distance (arXiv 1706.08500) of two sets of features, (N, D) and (M, D), in double precision."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_Stored(features.shape[1])).set_dtype(torch.float64)
    metric.update(reference.double(), real=True)
    metric.update(features.double(), real=False)
    return max(0.0, float(metric.compute()))  # rounding can make the distance of equal sets slightly negative


def part_within(features: Tensor, manifold: Tensor) -> float:
    """The fraction of `features` (N, D) that lies in the manifold of the others (M, D) (arXiv 1904.06991).

    This is the improved precision of images against a reference, and with both arguments exchanged the recall. The
    manifold is the union of balls around the features of `manifold`; each ball reaches to the third nearest neighbour.
    """
    neighbours = min(NEIGHBOURS, len(manifold) - 1)  # + 1 below: each feature is its own nearest neighbour
    radii = torch.cat([rows.kthvalue(neighbours + 1, dim=1).values for rows in _distances(manifold, manifold)])
    return torch.cat([(rows <= radii).any(1) for rows in _distances(features, manifold)]).double().mean().item()


def _distances(features: Tensor, others: Tensor) -> Iterator[Tensor]:
    """Euclidean distances of (N, D) and (M, D), computed from differences; yields a few rows of (N, M) at a time.

    The faster way by matrix products gives equal features a distance above 0, because of rounding errors.
    """
    at_once = max(1, DISTANCES_AT_ONCE // len(others))
    exact = "donot_use_mm_for_euclid_dist"
    for rows in torch.split(features, at_once):
        yield torch.cdist(rows.double(), others.double(), compute_mode=exact)


@dataclass(frozen=True)
class PictureSet:
    """The data of a setting that set metrics compare; None for data that was not computed.

    Image features: `features` (N, D) of the setting's pictures, `plain` (N, D) of the pictures without caching,
    `reference` (M, D) of the user's reference pictures. `classes` (N,) is the classifier's result for each picture,
    `labels` (N,) the requested class.
    """

    features: Tensor | None = None
    plain: Tensor | None = None
    reference: Tensor | None = None
    classes: Tensor | None = None
    labels: Tensor | None = None


def _without_problem(shape: tuple[int, ...] | None) -> str | None:
    return None


def _mean(each: Tensor) -> float | None:
    return each.mean().item()


def _shown(form: str) -> Callable[[float | None], str]:
    return lambda value: "" if value is None else format(value, form)


def _decibels(value: float | None) -> str:
    return "identical" if value is None else f"{value:.1f} dB"


def _four_digits(value: float | None) -> str:
    return _shown(".4f")(value)


@dataclass(frozen=True)
class Metric:
    """A metric of the pictures of a setting against the pictures without caching.

    A model without a VAE makes latents (B, C, ...), which only metrics with `of_latents` compare.

    `each(device)` returns a function of two batches of pictures (B, H, W, C) that returns one value per picture (B,);
    the second batch is without caching, or with `to_solution` the fine solution. `summary` reduces the values of all
    pictures to one number. A set metric has `of_set` instead, which returns None if the set lacks data that it
    compares. `problem(shape)` says why pictures of shape (H, W, C) cannot be measured. `column` is the heading in
    tables, `shown` formats a value with its unit, `explanation` is a sentence for the report.
    """

    name: str
    column: str
    explanation: str
    unit: str = ""
    to_solution: bool = False
    each: Callable[[torch.device], Callable[[Tensor, Tensor], Tensor]] | None = None
    of_latents: Callable[[Tensor, Tensor], Tensor] | None = None
    summary: Callable[[Tensor], float | None] = _mean
    of_set: Callable[[PictureSet], float | None] | None = None
    problem: Callable[[tuple[int, ...] | None], str | None] = _without_problem
    shown: Callable[[float | None], str] = _four_digits


METRICS: Registry[Metric] = Registry("metric", InputError)


def measured_each(shape: tuple[int, ...] | None, solution: bool = False) -> dict[str, Metric]:
    """The per-picture metrics that can be measured on pictures of this shape (H, W, C), with or without a solution."""
    each = [one for one in METRICS.values() if one.each is not None and one.problem(shape) is None]
    return {one.name: one for one in each if solution or not one.to_solution}


def measured_on_latents(solution: bool = False) -> dict[str, Metric]:
    """The metrics that compare latents, with or without a fine solution."""
    each = [one for one in METRICS.values() if one.of_latents is not None]
    return {one.name: one for one in each if solution or not one.to_solution}


def _between(compare: Callable[[Tensor, Tensor], float], side: str) -> Callable[[PictureSet], float | None]:
    """A set metric that compares the features of a setting with the features `side`: `plain` or `reference`."""

    def of_set(pictures: PictureSet) -> float | None:
        other: Tensor | None = getattr(pictures, side)
        return None if pictures.features is None or other is None else compare(pictures.features, other)

    return of_set


def _as_asked(pictures: PictureSet) -> float | None:
    if pictures.classes is None or pictures.labels is None:
        return None
    return (pictures.classes == pictures.labels).double().mean().item()


def _distance(value: float | None) -> str:
    """A Fréchet distance as text; a value below 1e-6 is rounding error and shown as 0."""
    return "" if value is None else format(value if value > 1e-6 else 0.0, ".3g")


for _metric in (
    Metric(
        "psnr", "PSNR",
        "Mean PSNR against the same images without caching, of pixels before they are rounded; higher is closer.",
        "dB", each=lambda device: psnr, of_latents=psnr_of_latents, summary=mean_psnr, shown=_decibels,
    ),
    Metric(
        SOLUTION_PSNR, "PSNR to solution",
        "Mean PSNR against a fine solution: many steps without caching, from the same noise.",
        "dB", to_solution=True, each=lambda device: psnr, of_latents=psnr_of_latents, summary=mean_psnr,
        shown=_decibels,
    ),
    Metric(
        "ssim", "SSIM", "Structural similarity to the images without caching; 1 for identical images.",
        each=lambda device: ssim,
    ),
    Metric(
        "lpips", "LPIPS", "Learned perceptual distance to the images without caching; 0 for identical images.",
        each=lpips,
        problem=lpips_problem,
    ),
    Metric(
        "frechet_distance", "Fréchet",
        "Fréchet distance between the image features with this setting and without caching; lower is closer.",
        of_set=_between(frechet_distance, "plain"), shown=_distance,
    ),
    Metric(
        "precision", "precision",
        "Fraction of these images whose features lie in the manifold of the images without caching.",
        of_set=_between(part_within, "plain"), shown=_shown(".3f"),
    ),
    Metric(
        "recall", "recall",
        "Fraction of the images without caching whose features lie in the manifold of these images.",
        of_set=_between(lambda features, plain: part_within(plain, features), "plain"), shown=_shown(".3f"),
    ),
    Metric(
        "to_reference", "to reference", "Fréchet distance to the images given with --reference.",
        of_set=_between(frechet_distance, "reference"), shown=_distance,
    ),
    Metric(
        "as_asked", "as asked", "Fraction of the images that a classifier assigns to the requested class.",
        of_set=_as_asked, shown=_shown(".1%"),
    ),
):  # fmt: skip
    METRICS.register(_metric)
