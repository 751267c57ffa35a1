from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fora_trt.bundle import Bundle
from fora_trt.evaluate import rounds as rounds_module
from fora_trt.evaluate.candidates import candidates_of
from fora_trt.evaluate.features import Digits
from fora_trt.evaluate.rounds import FIRST_BATCH, PILOT, Rounds
from fora_trt.evaluate.work_folder import WorkFolder
from fora_trt.pipeline import Pipeline
from fora_trt.sampling.conditioning import Conditioning, conditioning_of_classes
from fora_trt.sampling.guidance import Guidance
from fora_trt.sampling.loop import Sampler
from tests.test_metrics import psnr_by_numpy

SEED, STEPS = 7, 4


def rounds_of(bundle: Bundle, schedules: Sequence[str] = ("fora:2",), **settings: Any) -> Rounds:
    """Of seven images of the classes 0, 3 and 7."""
    pipeline = Pipeline(bundle, backend="onnxruntime", device="cpu")
    candidates = candidates_of(pipeline, [None], [STEPS], schedules)
    usual = {"images": 7, "batch_size": 3, "seed": SEED, "extractor": None, "shape": (8, 8, 1)}
    given = conditioning_of_classes(bundle.manifest, [0, 3, 7])
    return Rounds(pipeline, candidates, given, Guidance(1.5), **{**usual, **settings})


def unrounded(bundle: Bundle, schedule: str) -> NDArray[np.float32]:
    """The same seven pictures before they are rounded."""
    pipeline = Pipeline(
        bundle, schedule=schedule, steps=STEPS, batch_size=3, guidance_scale=1.5, backend="onnxruntime", device="cpu"
    )
    made = pipeline(class_labels=[0, 3, 7, 0, 3, 7, 0], seed=SEED)
    return pipeline.decoder.pictures(made.latents, pipeline.device).numpy()


@pytest.fixture
def work(tmp_path: Path) -> WorkFolder:
    (tmp_path / "parts").mkdir()
    return WorkFolder(tmp_path)


def test_an_image_has_its_own_seed_and_class_in_batches_of_any_size(pixels: Bundle, tmp_path: Path) -> None:
    found = []
    for size in (3, 7):
        (tmp_path / str(size) / "parts").mkdir(parents=True)
        work, rounds = WorkFolder(tmp_path / str(size)), rounds_of(pixels, batch_size=size)
        rounds.run(work)
        found.append([rounds.read(work, turn)["pictures"].astype(int) for turn in range(2)])
        np.testing.assert_array_equal(rounds.labels(), [0, 3, 7, 0, 3, 7, 0])
    for small, large in zip(*found, strict=True):
        assert small.shape == (7, 8, 8, 1)
        assert np.abs(small - large).max() <= 1, "a batch of another size may round otherwise"
    alone = Pipeline(pixels, backend="onnxruntime", device="cpu", guidance_scale=1.5, schedule="fora:2")
    (image,) = alone(class_labels=[3], steps=STEPS, seed=SEED + 4).images
    assert np.abs(np.asarray(image) - found[0][1][4, :, :, 0]).max() <= 1


def test_all_settings_start_from_the_same_noise_and_are_compared_with_the_first(
    pixels: Bundle, work: WorkFolder
) -> None:
    rounds = rounds_of(pixels, ("fora:2", "fora:4"))
    rounds.run(work)
    plain, *cached = (rounds.read(work, turn) for turn in range(3))
    pictures = [unrounded(pixels, schedule) for schedule in ("none", "fora:2", "fora:4")]
    for arrays, own in zip((plain, *cached), pictures, strict=True):
        np.testing.assert_array_equal(arrays["pictures"], own.round())
        np.testing.assert_allclose(arrays["psnr"], psnr_by_numpy(own, pictures[0]), rtol=1e-5)
    assert not plain["latent_errors"].any()
    assert np.isinf(plain["psnr"]).all()
    for arrays in cached:
        assert arrays["latent_errors"].shape == (7, STEPS)
        assert not arrays["latent_errors"][:, 0].any(), "the first step is full"
        assert arrays["latent_errors"][:, 2].all(), "the third one reuses"
    assert [len(arrays["seconds"]) for arrays in (plain, *cached)] == [3] * 3, "one for each batch"


def test_only_missing_batches_are_computed(pixels: Bundle, work: WorkFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds_of(pixels).run(work)
    whole = rounds_of(pixels).read(work, 1)["pictures"]
    (work.folder / "parts" / f"{FIRST_BATCH + 1:06d}.npz").unlink()
    seen: list[Conditioning] = []
    call = Sampler.__call__

    def counted(self: Sampler, given: Conditioning, *others: Any, **more: Any) -> Any:
        seen.append(given)
        return call(self, given, *others, **more)

    monkeypatch.setattr(Sampler, "__call__", counted)
    again = rounds_of(pixels)
    again.run(work)
    assert len(seen) == 2 * 2, "a warm-up and a trajectory of each setting"
    assert (again.read(work, 1)["pictures"] == whole).all()
    again.run(work)
    assert len(seen) == 2 * 2, "nothing is missing"


def test_the_pilot_runs_once_for_each_schedule(
    pixels: Bundle, work: WorkFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = {"fora:2": 0.5, "fora:4": 0.0}
    asked = []

    def share_of(pipeline: Pipeline, candidate: Any, *others: Any) -> float:
        asked.append(candidate.setting.schedule)
        return shares[candidate.setting.schedule]

    monkeypatch.setattr(rounds_module, "reuse_share_of", share_of)
    for _ in range(2):
        rounds = rounds_of(pixels, ("fora:2", "fora:4"))
        assert rounds.plan(work) == shares
        assert sorted(asked) == ["fora:2", "fora:4"]
        assert [one.setting.label for one in rounds.candidates] == [
            "no cache", "fora:2", "4 steps, no cache", "fora:4", "2 steps, no cache",
        ]  # fmt: skip
    assert work.has(PILOT)


def test_without_caching_there_is_no_pilot(pixels: Bundle, work: WorkFolder) -> None:
    rounds = rounds_of(pixels, ())
    assert rounds.plan(work) == {}
    assert len(rounds.candidates) == 1
    assert not work.has(PILOT)


def test_features_of_a_reference_are_kept_in_parts(
    pixels: Bundle, work: WorkFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds_module, "REFERENCE_AT_ONCE", 4)
    pictures = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 1)).astype(np.uint8)
    reader = Digits()
    rounds = rounds_of(pixels, extractor=reader)
    found = rounds.reference_features(pictures, work)
    torch.testing.assert_close(found, reader.features(torch.from_numpy(pictures)))
    monkeypatch.setattr(reader, "features", lambda pictures: pytest.fail("they are there"))
    assert torch.equal(rounds.reference_features(pictures, work), found)


def test_a_model_without_classes_has_no_labels(pixels: Bundle) -> None:
    rounds = rounds_of(pixels)
    rounds._conditioning = Conditioning(3, {"text": torch.zeros(3, 2)}, None)
    assert rounds.labels() is None
