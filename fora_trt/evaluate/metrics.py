"""How far pictures are from others: image by image, and as sets of features. Knows nothing of what made them.

Shapes: B pictures (B, H, W, C) of whole levels from 0 to 255; N features of D dimensions (N, D).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

from fora_trt.errors import InputError

LEVELS = 255.0
GAUSSIAN_WINDOW, SMALL_WINDOW = 11, 7  # pixels a side
SMALLEST_FOR_LPIPS = 32  # pixels a side; AlexNet has nothing left of less
NEIGHBOURS = 3
DISTANCES_AT_ONCE = 1 << 24


def check_torchmetrics() -> None:
    """Raise `InputError` where the package that computes the metrics is missing."""
    if find_spec("torchmetrics") is None:
        raise InputError("the metrics need torchmetrics, which is not installed; pip install 'fora-trt[report]'")


def psnr(pictures: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture in dB, (B,); infinite where nothing differs."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    pair = (pictures.double(), reference.double())
    return peak_signal_noise_ratio(*pair, data_range=LEVELS, reduction="none", dim=(1, 2, 3))


def mean_psnr(each: Tensor) -> float | None:
    """Mean over those of (B,) that are finite: a picture without any difference has no ratio, and is left out.

    None where nothing differs at all.
    """
    finite = each[each.isfinite()]
    return finite.mean().item() if len(finite) else None


def ssim(pictures: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity of each picture, (B,), 1 where nothing differs.

    The window is the Gaussian one of 11 x 11 pixels, with a standard deviation of 1.5. Pictures that are smaller than
    that are compared in a uniform window of 7 x 7 pixels, or of the largest odd side that fits.
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
    """Why there is no LPIPS of pictures of the `shape` (H, W, C), for a note; None where there is.

    Nothing is ever downloaded for it.
    """
    if shape is None:
        return "nobody knows how large the pictures will be"
    if min(shape[:2]) < SMALLEST_FOR_LPIPS:
        return f"the pictures have fewer than {SMALLEST_FOR_LPIPS} pixels a side"
    try:
        from torchvision.models import AlexNet_Weights
    except (ImportError, RuntimeError):  # the latter where it does not fit the torch that is installed
        return "torchvision is not installed"
    weights = Path(torch.hub.get_dir(), "checkpoints", Path(urlparse(AlexNet_Weights.DEFAULT.url).path).name)
    return None if weights.is_file() else f"the weights of AlexNet are not in {weights}"


def lpips(device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """Learned perceptual distance (arXiv 1801.03924) over AlexNet: of two batches of pictures, that of each, (B,)."""
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    metric = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True).to(device)

    @torch.no_grad()
    def distances(pictures: Tensor, reference: Tensor) -> Tensor:
        pair = [
            levels.permute(0, 3, 1, 2).expand(-1, 3, -1, -1).to(device).float() / LEVELS
            for levels in (pictures, reference)
        ]
        each = [metric(one[None], other[None]) for one, other in zip(*pair, strict=True)]  # it gives means alone
        metric.reset()
        return torch.stack(each).double().cpu()

    return distances


def relative_errors(latents: Tensor, reference: Tensor) -> Tensor:
    """Latents after each of S steps, (S, B, ...) -> (B, S): norm of the difference over the norm of the reference."""
    found, wanted = (steps.flatten(2).double() for steps in (latents, reference))
    ratio: Tensor = torch.linalg.vector_norm(found - wanted, dim=2) / torch.linalg.vector_norm(wanted, dim=2)
    return ratio.T


class _Stored(nn.Module):
    """Stands where an extractor is expected: what it is given are features already."""

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
    return max(0.0, float(metric.compute()))  # rounding can leave equal sets a little under it


def precision_and_recall(features: Tensor, reference: Tensor) -> tuple[float, float]:
    """Improved precision and recall (arXiv 1904.06991) of features (N, D) against a reference (M, D).

    Precision is the part of `features` that lie in the manifold of the reference, recall that of the reference in
    theirs. A manifold is a ball around each feature, up to its third neighbour in its own set.
    """
    return _part_within(features, reference), _part_within(reference, features)


def _part_within(features: Tensor, manifold: Tensor) -> float:
    neighbours = min(NEIGHBOURS, len(manifold) - 1)  # in a row of distances each feature comes before them
    radii = torch.cat([rows.kthvalue(neighbours + 1, dim=1).values for rows in _distances(manifold, manifold)])
    return torch.cat([(rows <= radii).any(1) for rows in _distances(features, manifold)]).double().mean().item()


def _distances(features: Tensor, others: Tensor) -> Iterator[Tensor]:
    """(N, D), (M, D) -> rows of (N, M), a few at once. Differences are taken before they are squared.

    The faster way, by products of matrices, leaves features that are equal a distance of rounding errors.
    """
    at_once = max(1, DISTANCES_AT_ONCE // len(others))
    exact = "donot_use_mm_for_euclid_dist"
    for rows in torch.split(features, at_once):
        yield torch.cdist(rows.double(), others.double(), compute_mode=exact)
