"""The metrics and extractors of `quality` against independent computations."""

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.train_digit_classifier import accuracy_of, digits_split
from fora_trt import metrics
from fora_trt.errors import InputError
from fora_trt.evaluate.digit_classifier import WEIGHTS, digit_classifier, pixels_of
from fora_trt.evaluate.features import INCEPTION_SHAPES, Digits, Inception, reference_pictures

Floats = NDArray[np.float64]


def pictures(seed: int, *shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def tensors(*arrays: NDArray[np.uint8]) -> list[Tensor]:
    return [torch.from_numpy(array) for array in arrays]


def psnr_by_numpy(one: NDArray[Any], other: NDArray[Any]) -> Floats:
    with np.errstate(divide="ignore"):
        error = ((one.astype(float) - other) ** 2).mean((1, 2, 3))
        found: Floats = 10 * np.log10(255**2 / error)
    return found


def frechet_by_numpy(one: Floats, other: Floats) -> float:
    """The square root of the product of covariances through that of one of them, which is symmetric."""
    mean, covariance = zip(*((f.mean(0), np.cov(f.T)) for f in (one, other)), strict=True)
    values, vectors = np.linalg.eigh(covariance[0])
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    both = np.sqrt(np.linalg.eigvalsh(root @ covariance[1] @ root).clip(0)).sum()
    return float(((mean[0] - mean[1]) ** 2).sum() + np.trace(covariance[0] + covariance[1]) - 2 * both)


def precision_by_numpy(features: Floats, manifold: Floats) -> float:
    within = np.linalg.norm(manifold[:, None] - manifold, axis=2)
    radii = np.sort(within, axis=1)[:, 3]
    return float((np.linalg.norm(features[:, None] - manifold, axis=2) <= radii).any(1).mean())


def ssim_by_numpy(one: NDArray[np.uint8], other: NDArray[np.uint8], weights: Floats) -> Floats:
    """The window slides over pictures that are mirrored at their edges; single channels."""

    def filtered(levels: Floats) -> Floats:
        edge = len(weights) // 2
        padded = np.pad(levels, ((0, 0), (edge, edge), (edge, edge)), mode="reflect")
        windows = np.lib.stride_tricks.sliding_window_view(padded, weights.shape, axis=(1, 2))
        found: Floats = (windows * weights).sum((3, 4))
        return found

    x, y = one[..., 0].astype(float), other[..., 0].astype(float)
    mx, my = filtered(x), filtered(y)
    vx, vy, cov = filtered(x * x) - mx * mx, filtered(y * y) - my * my, filtered(x * y) - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    found: Floats = ((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean((1, 2))
    return found


def test_psnr_is_that_of_numpy_and_infinite_where_nothing_differs() -> None:
    one, other = pictures(1, 5, 9, 7, 3), pictures(2, 5, 9, 7, 3)
    other[2] = one[2]
    found = metrics.psnr(*tensors(one, other))
    np.testing.assert_allclose(found.numpy(), psnr_by_numpy(one, other), rtol=1e-7)  # its logarithm is in fp32
    assert found[2] == torch.inf


def test_the_mean_psnr_leaves_out_what_does_not_differ() -> None:
    assert metrics.mean_psnr(torch.tensor([40.0, torch.inf, 30.0])) == 35
    assert metrics.mean_psnr(torch.tensor([torch.inf, torch.inf])) is None


def test_ssim_is_that_of_numpy_in_a_window_that_fits() -> None:
    bell = np.exp(-((np.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    gaussian = np.outer(bell, bell) / bell.sum() ** 2
    for side, weights in ((8, np.full((7, 7), 1 / 49)), (5, np.full((5, 5), 1 / 25)), (6, np.full((5, 5), 1 / 25)),
                          (11, gaussian), (24, gaussian)):  # fmt: skip
        one = pictures(side, 4, side, side, 1)
        other = (one.astype(int) + pictures(9, *one.shape) // 4).clip(0, 255).astype(np.uint8)
        found = metrics.ssim(*tensors(one, other)).numpy()
        np.testing.assert_allclose(found, ssim_by_numpy(one, other, weights), rtol=1e-9)
        assert (found < 0.999).all()
    assert metrics.ssim(*tensors(one, one)).eq(1).all()


def test_relative_errors_are_of_each_image_and_step() -> None:
    reference = torch.ones(3, 2, 4, 5, 5)
    latents = reference.clone()
    latents[1, 0] *= 1.5
    latents[2, 1, 0] = 3.0
    expected = torch.tensor([[0, 0.5, 0], [0, 0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(metrics.relative_errors(latents, reference), expected)


def test_the_frechet_distance_is_that_of_numpy() -> None:
    random = np.random.default_rng(0)
    one = random.normal(size=(300, 8)) @ random.normal(size=(8, 8))
    other = random.normal(size=(200, 8)) @ random.normal(size=(8, 8)) + 0.3
    found = metrics.frechet_distance(torch.from_numpy(one), torch.from_numpy(other))
    assert found == pytest.approx(frechet_by_numpy(one, other), rel=1e-9)
    assert metrics.frechet_distance(*[torch.from_numpy(one).float()] * 2) == pytest.approx(0, abs=1e-9)
    few = metrics.frechet_distance(torch.from_numpy(one[:5]), torch.from_numpy(other[:5]))
    assert few == pytest.approx(frechet_by_numpy(one[:5], other[:5]), rel=1e-4), "fewer images than features"


def precision_and_recall(features: torch.Tensor, plain: torch.Tensor) -> tuple[float | None, float | None]:
    """The two metrics of sets, as a report has them."""
    found = metrics.PictureSet(features=features, plain=plain)
    precision, recall = (metrics.METRICS[name].of_set for name in ("precision", "recall"))
    assert precision is not None and recall is not None
    return precision(found), recall(found)


def test_precision_and_recall_are_those_of_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "DISTANCES_AT_ONCE", 700)  # a few rows at once
    random = np.random.default_rng(0)
    one, other = random.normal(size=(90, 4)), 0.7 * random.normal(size=(120, 4)) + 0.5
    precision, recall = precision_and_recall(torch.from_numpy(one), torch.from_numpy(other))
    assert precision == pytest.approx(precision_by_numpy(one, other))
    assert recall == pytest.approx(precision_by_numpy(other, one))
    assert 0 < (precision or 0) < 1
    assert 0 < (recall or 0) < 1


def test_precision_and_recall_of_one_mode_out_of_two() -> None:
    modes = torch.cat([torch.randn(50, 3), torch.randn(50, 3) + 100])
    assert precision_and_recall(modes[:50], modes) == (1.0, 0.5)
    assert precision_and_recall(modes, modes) == (1.0, 1.0)
    assert precision_and_recall(modes[:2], modes[:2]) == (1.0, 1.0), "fewer than the neighbours that are asked"


def test_lpips_says_why_it_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert metrics.lpips_problem((8, 8, 1)) == "the pictures have fewer than 32 pixels a side"
    assert metrics.lpips_problem(None) == "the manifest has no image size"
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    assert metrics.lpips_problem((64, 64, 3)) == (
        "torchvision, of the release that fits torch, is not installed; pip install torchvision"
    )
    models = types.ModuleType("torchvision.models")
    models.AlexNet_Weights = types.SimpleNamespace(DEFAULT=types.SimpleNamespace(url="https://x.org/a/alex.pth"))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    missing = tmp_path / "checkpoints" / "alex.pth"
    assert metrics.lpips_problem((64, 64, 3)) == (
        f"the weights of AlexNet are not in {missing}; download https://x.org/a/alex.pth"
    )
    missing.parent.mkdir()
    missing.touch()
    assert metrics.lpips_problem((64, 64, 3)) is None


def test_lpips_is_a_distance_of_each_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers of AlexNet without its weights, which are not here; what torchmetrics adds to them is its own."""
    torch.manual_seed(0)
    widths = [(3, 64, 11, 4, 2), (64, 192, 5, 1, 2), (192, 384, 3, 1, 1), (384, 256, 3, 1, 1), (256, 256, 3, 1, 1)]
    layers: list[nn.Module] = []
    for k, (inputs, outputs, size, stride, padding) in enumerate(widths):
        pool = [nn.MaxPool2d(3, 2)] if k in (1, 2) else []
        layers += [*pool, nn.Conv2d(inputs, outputs, size, stride, padding), nn.ReLU()]
    monkeypatch.setattr("torchmetrics.image.lpip._TORCHVISION_AVAILABLE", True)
    monkeypatch.setattr(
        "torchmetrics.functional.image.lpips._get_tv_model_features", lambda *_, **__: nn.Sequential(*layers)
    )
    side = metrics.SMALLEST_FOR_LPIPS
    one, other = tensors(pictures(1, 3, side, side, 3), pictures(2, 3, side, side, 3))
    other[1] = one[1]
    distances = metrics.lpips(torch.device("cpu"))
    found = distances(one, other)
    assert found.shape == (3,)
    assert (found > 0).tolist() == [True, False, True]
    assert distances(one[2:], other[2:])[0] == found[2], "a batch leaves nothing behind"
    assert distances(one[..., :1], other[..., :1]).shape == (3,), "grey"


def test_the_digit_classifier_reads_held_out_digits() -> None:
    _, held_out, _, classes = digits_split()
    accuracy = accuracy_of(digit_classifier(), held_out, classes)
    assert accuracy > 0.98
    with safe_open(WEIGHTS, framework="pt") as file:
        assert file.metadata()["held_out_accuracy"] == f"{accuracy:.4f}"
    assert WEIGHTS.stat().st_size < 60_000
    levels = ((held_out + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)  # as pictures
    torch.testing.assert_close(pixels_of(levels), held_out, atol=1.01 / 255, rtol=0)
    extractor = Digits()
    assert (extractor.classes(levels) == classes).double().mean() > 0.98
    features = extractor.features(levels)
    assert features.shape == (len(held_out), extractor.dimensions)
    assert torch.linalg.matrix_rank(features.double().T.cov()) == extractor.dimensions, "no feature is dead"


class StandIn(nn.Module):
    """Called as torch-fidelity's network is; keeps what it was given."""

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str | None = None) -> None:
        super().__init__()
        assert feature_extractor_weights_path is not None, "it would download the weights"
        assert features_list == ["2048"]
        self.path = feature_extractor_weights_path
        self.state: dict[str, Tensor] = torch.load(self.path, weights_only=False)
        if "unknown" in self.state:
            raise RuntimeError("Error(s) in loading state_dict for StandIn:\n\tUnexpected key(s)")

    def forward(self, x: Tensor) -> tuple[Tensor]:
        assert x.dtype == torch.uint8
        assert x.shape[1] == 3
        assert len(x) <= 32
        return (x.float().mean((2, 3)).repeat(1, 683)[:, :2048],)


@pytest.fixture
def torch_fidelity(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = StandIn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)


def weights() -> dict[str, Tensor]:
    return {name: torch.randn(shape) for name, shape in INCEPTION_SHAPES.items()}


@pytest.mark.usefixtures("torch_fidelity")
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_inception_is_given_a_copy_that_is_tensors_alone(suffix: str, tmp_path: Path) -> None:
    path, given = tmp_path / f"inception{suffix}", weights()
    save_file(given, path) if suffix == ".safetensors" else torch.save(given, path)
    extractor = Inception(path, torch.device("cpu"))
    network = extractor._model
    assert Path(network.path) != path
    assert not Path(network.path).exists(), "it is removed"
    assert all(torch.equal(network.state[name], tensor) for name, tensor in given.items())
    (grey,) = tensors(pictures(1, 70, 8, 8, 1))
    features = extractor.features(grey)
    assert features.shape == (70, 2048)
    torch.testing.assert_close(features[:, 0], grey.float().mean((1, 2, 3)))
    assert extractor.classes(grey) is None


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("a file ran its code",))


@pytest.mark.usefixtures("torch_fidelity")
def test_weights_of_the_wrong_kind_are_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "w.pth"
    cases: list[tuple[object, str]] = [
        (
            {**weights(), "fc.weight": torch.zeros(1000, 2048)},
            r"fc.weight has shape \[1000, 2048\], expected \[1008, 2048\]",
        ),
        ({"conv1.weight": torch.zeros(64, 3, 7, 7)}, "does not contain the InceptionV3 weights .* is missing"),
        ({**weights(), "unknown": torch.zeros(1)}, "does not fit the InceptionV3 of torch-fidelity"),
        ({**weights(), "run": Evil()}, "contains 'run': builtins.print; a dictionary of tensors was expected"),
        ([1, 2], "contains an object of type list; a dictionary of tensors was expected"),
    ]
    for content, message in cases:
        torch.save(content, path)
        with pytest.raises(InputError, match=message):
            Inception(path, torch.device("cpu"))
    path.write_bytes(b"no weights at all")
    for wrong in (path, tmp_path / "none.pth", tmp_path):
        with pytest.raises(InputError, match="--inception-weights: "):
            Inception(wrong, torch.device("cpu"))
    assert "ran its code" not in capsys.readouterr().out


def test_without_torch_fidelity_inception_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(InputError, match=r"cannot be imported here: .*; pip install torch-fidelity"):
        Inception(tmp_path / "w.pth", torch.device("cpu"))


def test_a_reference_is_in_the_layout_of_adm(tmp_path: Path) -> None:
    path, given = tmp_path / "r.npz", pictures(1, 6, 8, 8, 1)
    np.savez(path, arr_0=given, arr_1=np.arange(6))
    assert np.array_equal(reference_pictures(path, (8, 8, 1)), given)
    assert np.array_equal(reference_pictures(path, None), given)
    for content, message in (
        (
            {"arr_0": pictures(1, 6, 8, 8, 3)},
            r"is uint8 with shape \[6, 8, 8, 3\]; .* uint8 with shape \[images, 8, 8, 1\]",
        ),
        ({"arr_0": given.astype(np.float32)}, "is float32 with shape"),
        ({"arr_0": given[:1]}, "and at least 2 images"),
        ({"arr_0": given[0]}, r"shape \[8, 8, 1\]"),
        ({"mu": np.zeros(3)}, "cannot be read as reference images: .*arr_0"),
        ({"arr_0": np.array([Evil()])}, "cannot be read as reference images"),
    ):
        np.savez(path, **content)
        with pytest.raises(InputError, match=message):
            reference_pictures(path, (8, 8, 1))
    np.save(tmp_path / "r.npy", given)
    path.write_bytes(path.read_bytes()[:50])
    for wrong in (path, tmp_path / "r.npy", tmp_path / "none.npz", tmp_path):
        with pytest.raises(InputError, match="cannot be read as reference images"):
            reference_pictures(wrong, (8, 8, 1))
