import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

from fora_trt import Schedule, load
from fora_trt.bundle import Bundle
from fora_trt.errors import ForaError, InputError
from fora_trt.evaluate.candidates import candidates_of, file_name_of
from fora_trt.evaluate.digit_classifier import makes_digits
from fora_trt.evaluate.features import Digits
from fora_trt.evaluate.quality import QualityOptions, measure_quality
from fora_trt.evaluate.solvers import solvers_for
from fora_trt.pipeline import Pipeline
from fora_trt.report.page import read_report
from fora_trt.report.results import Quality, Setting
from fora_trt.sampling.conditioning import conditioning_of_classes
from fora_trt.sampling.scheduler_step import CalledScheduler
from tests.processes import kill_after
from tests.test_cli import fora
from tests.test_metrics import frechet_by_numpy, precision_by_numpy, psnr_by_numpy

CPU = torch.device("cpu")
SETTINGS = ["no cache", "fora:2", "5 steps, no cache", "fora:3", "4 steps, no cache"]


def options(**given: Any) -> QualityOptions:
    small = {"images": 10, "steps": (8,), "schedules": ("fora:2", "fora:3"), "seed": 7}
    return QualityOptions.model_validate({**small, **given})


def measure(bundle: Bundle, folder: Path, given: QualityOptions | None = None, **more: Any) -> Quality:
    own = {"backend": "onnxruntime", "batch_size": 4}
    settings = {name: more.pop(name, value) for name, value in own.items()}
    pipeline = Pipeline(bundle, device="cpu", guidance_scale=1.5, **settings)
    conditioning = more.pop("conditioning", None) or conditioning_of_classes(bundle.manifest, [0, 3, 7])
    return measure_quality(pipeline, given or options(), conditioning, folder, **more)


def saved(folder: Path, setting: Setting) -> dict[str, NDArray[Any]]:
    with np.load(folder / "quality" / f"{file_name_of(setting)}.npz", allow_pickle=False) as content:
        return {name: content[name] for name in content.files}


def unrounded(bundle: Bundle, setting: Setting, images: int, batch_size: int = 4) -> NDArray[np.float32]:
    """The pictures of a setting before they are rounded, made without `quality`."""
    pipeline = Pipeline(
        bundle, scheduler=setting.scheduler, steps=setting.steps, schedule=setting.schedule, guidance_scale=1.5,
        backend="onnxruntime", device="cpu", batch_size=batch_size,
    )  # fmt: skip
    made = pipeline(class_labels=[(0, 3, 7)[k % 3] for k in range(images)], seed=7)
    return pipeline.decoder.pictures(made.latents, pipeline.device).numpy()


def without_times(quality: Quality) -> dict[str, Any]:
    found: dict[str, Any] = quality.model_dump(mode="json")
    for row in found["rows"]:
        assert row.pop("seconds_per_image") > 0
    return found


def trajectory(bundle: Bundle, schedule: Schedule, label: int, seed: int) -> list[torch.Tensor]:
    """One image alone, its latents after each step read off trajectories of the diffusers scheduler, step by step."""
    denoiser = load(bundle, schedule=schedule, backend="onnxruntime", device="cpu")
    scheduler = DDIMScheduler.from_config(bundle.scheduler_config)
    scheduler.set_timesteps(schedule.steps)
    denoiser.reset(timesteps=scheduler.timesteps)
    latents = torch.randn(1, *bundle.manifest.latents.shape, generator=torch.Generator().manual_seed(seed))
    null = bundle.manifest.guidance.null_class  # type: ignore[union-attr]
    steps = []
    for t in scheduler.timesteps:
        both = denoiser(torch.cat([latents] * 2), t, class_labels=torch.tensor([label, null]))
        conditional, unconditional = both[:, : latents.shape[1]].chunk(2)
        noise = unconditional + 1.5 * (conditional - unconditional)
        latents = scheduler.step(noise, t, latents).prev_sample
        steps.append(latents)
    return steps


@pytest.mark.usefixtures("pilot")
def test_all_figures_are_those_of_the_saved_images(pixels: Bundle, tmp_path: Path) -> None:
    assert makes_digits(pixels.manifest)
    digits = load_digits()
    np.savez(tmp_path / "real.npz", arr_0=np.round(digits.images[:90] * 255 / 16).astype(np.uint8)[..., None])
    found = measure(pixels, tmp_path / "out", reference=tmp_path / "real.npz")
    assert [row.setting.label for row in found.rows] == SETTINGS
    assert [row.setting.control_of for row in found.rows] == [None, None, "fora:2", None, "fora:3"]
    assert [row.setting.method for row in found.rows] == ["no cache", "FORA", "no cache", "FORA", "no cache"]
    assert (found.backend, found.device, found.images, found.features) == ("onnxruntime", "cpu", 10, "digit classifier")
    reader = Digits()

    def features(pictures: NDArray[np.uint8]) -> NDArray[np.float64]:
        return reader.features(torch.from_numpy(pictures)).double().numpy()

    plain = saved(tmp_path / "out", found.rows[0].setting)
    real = features(np.load(tmp_path / "real.npz")["arr_0"])
    assert plain["arr_0"].shape == (10, 8, 8, 1)
    assert plain["arr_1"].tolist() == [0, 3, 7, 0, 3, 7, 0, 3, 7, 0]
    for row in found.rows:
        images = saved(tmp_path / "out", row.setting)["arr_0"]
        pictures = unrounded(pixels, row.setting, 10)
        np.testing.assert_array_equal(images, pictures.round())
        each = psnr_by_numpy(pictures, unrounded(pixels, found.rows[0].setting, 10))
        if row is found.rows[0]:
            assert row.psnr is None
            assert row.metrics["ssim"] == 1
        else:
            assert row.psnr == pytest.approx(each[np.isfinite(each)].mean(), rel=1e-6)
            assert (row.metrics["ssim"] or 0) < 1
        here, there = features(images), features(plain["arr_0"])
        assert row.metrics["frechet_distance"] == pytest.approx(frechet_by_numpy(here, there), rel=1e-3, abs=1e-4)
        assert row.metrics["to_reference"] == pytest.approx(frechet_by_numpy(here, real), rel=1e-3)
        assert row.metrics["precision"] == precision_by_numpy(here, there)
        assert row.metrics["recall"] == precision_by_numpy(there, here)
        read = reader.classes(torch.from_numpy(images)).numpy()
        assert row.metrics["as_asked"] == (read == plain["arr_1"]).mean()
        assert "lpips" not in row.metrics
    assert any("10 images are too few for 64 features" in note for note in found.notes)
    assert any("of a full step: 10.0% with fora:2, 10.0% with fora:3" in note for note in found.notes)
    grid = Image.open(tmp_path / "out" / found.grid)
    assert grid.height == 5 * 68 + 4
    assert grid.width > 8 * 68
    assert not (tmp_path / "out" / "quality" / "parts").exists()


@pytest.mark.usefixtures("pilot")
def test_latent_errors_are_those_of_plain_loops(pixels: Bundle, tmp_path: Path) -> None:
    found = measure(pixels, tmp_path / "out", options(images=2), batch_size=2)
    for row in (one for one in found.rows if one.setting.control_of is None):
        schedule = Schedule.from_text(row.setting.schedule, 8)
        each = []
        for image, label in enumerate((0, 3)):
            steps = trajectory(pixels, schedule, label, 7 + image)
            plain = trajectory(pixels, Schedule.fora(8, 1), label, 7 + image)
            each.append([float((a - b).norm() / b.norm()) for a, b in zip(steps, plain, strict=True)])
        np.testing.assert_allclose(row.latent_errors, np.mean(each, axis=0), rtol=1e-3, atol=1e-6)
        assert len(row.latent_errors) == 8
    plain_row, two, one_control, three, other_control = found.rows
    assert set(plain_row.latent_errors) == {0.0}
    assert two.latent_errors[0] == 0, "the first step is full"
    assert three.latent_errors[-1] > two.latent_errors[-1] > 0
    assert [row.latent_errors for row in (one_control, other_control)] == [(), ()]


@pytest.mark.usefixtures("pilot")
def test_pictures_of_a_vae_without_features(exported: Bundle, tmp_path: Path) -> None:
    found = measure(exported, tmp_path / "out", options(images=3, schedules=("fora:2",)), batch_size=2)
    plain, cached, control = found.rows
    images = saved(tmp_path / "out", cached.setting)["arr_0"]
    assert images.shape == (3, 16, 16, 3)
    pictures = [unrounded(exported, row.setting, 3, batch_size=2) for row in (cached, plain)]
    assert cached.psnr == pytest.approx(psnr_by_numpy(*pictures).mean(), rel=1e-5)
    assert ({*control.metrics}, found.features) == ({"psnr", "ssim"}, None)
    assert any(
        "digits only, which tiny does not make" in note and "--inception-weights" in note for note in found.notes
    )
    assert any(note.startswith("no LPIPS: ") for note in found.notes)

    pipeline = Pipeline(exported, cache_interval=2, steps=8, guidance_scale=1.5, backend="onnxruntime", device="cpu")
    shown = [np.asarray(one) for one in pipeline(class_labels=[0, 3], seed=7).images]
    assert np.array_equal(images[:2], shown), "the images that run makes of the same seeds"


def first(count: int, steps: Iterable[Any]) -> Iterator[Any]:
    return islice(steps, count)


@pytest.mark.parametrize("scheduler", ["ddim", "unipc"])
def test_watching_the_latents_changes_nothing(exported: Bundle, scheduler: str) -> None:
    pipeline = Pipeline(exported, backend="onnxruntime", device="cpu")
    (candidate, cached) = candidates_of(pipeline, [scheduler], [10], ["fora:3"])
    assert isinstance(candidate.sampling.scheduler_step, CalledScheduler) == (scheduler == "unipc")
    sampler, wanted = pipeline.sampler(cached.sampling), conditioning_of_classes(exported.manifest, [1, 2])
    seen: list[torch.Tensor] = []
    watched = sampler(wanted, [0, 1], 1.5, observe=lambda latents: seen.append(latents.clone()))
    assert torch.equal(watched.latents, sampler(wanted, [0, 1], 1.5).latents)
    assert len(seen) == 10
    assert torch.equal(seen[-1], watched.latents)
    for steps in (1, 4):
        few = sampler(wanted, [0, 1], 1.5, watch=partial(first, steps))
        assert torch.equal(seen[steps - 1], few.latents)


def test_the_pilot_measures_what_the_controls_follow(pixels: Bundle, tmp_path: Path) -> None:
    found = measure(pixels, tmp_path / "out", options(images=2))
    (note,) = (note for note in found.notes if "from a pilot" in note)
    controls = [row for row in found.rows if row.setting.control_of is not None]
    assert controls
    for row in controls:
        interval = int(str(row.setting.control_of).removeprefix("fora:"))
        share = float(note.split(f"% with fora:{interval}")[0].split()[-1]) / 100
        assert 0 < share <= 1
        full = Schedule.fora(8, interval).full_steps
        assert abs(row.setting.steps - (full + (8 - full) * share)) <= 0.51


@pytest.mark.usefixtures("pilot")
def test_no_caching_alone_has_no_controls(pixels: Bundle, tmp_path: Path) -> None:
    given = options(images=2, schedules=("none",), schedulers=("ddim", "dpm-solver++"), steps=(4, 6), keep_images=False)
    found = measure(pixels, tmp_path / "out", given)
    assert [(row.setting.scheduler, row.setting.steps) for row in found.rows] == [
        (name, steps) for name in ("DDIMScheduler", "DPMSolverMultistepScheduler") for steps in (6, 4)
    ]
    assert [row.psnr is None for row in found.rows] == [True, False, False, False]
    assert not any("pilot" in note for note in found.notes)
    assert not list((tmp_path / "out" / "quality").glob("*.npz"))


def stopped_after(turns: int) -> Callable[[Iterable[Any]], Iterator[Any]]:
    def watch(items: Iterable[Any]) -> Iterator[Any]:
        for turn, item in enumerate(items):
            if turn == turns:
                raise KeyboardInterrupt
            yield item

    return watch


@pytest.mark.usefixtures("pilot")
def test_stopped_anywhere_and_resumed_it_finds_the_same(
    pixels: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = measure(pixels, tmp_path / "whole")
    for turns in (0, 3, 6, 9):
        with pytest.raises(KeyboardInterrupt):
            measure(pixels, tmp_path / "parts", resume=True, watch=stopped_after(turns))
        monkeypatch.setattr("fora_trt.evaluate.rounds.reuse_share_of", lambda *_: pytest.fail("one pilot is enough"))
    parts = [path.name for path in sorted((tmp_path / "parts" / "quality" / "parts").iterdir())]
    assert parts[:1] == ["000000.npz"]
    with pytest.raises(InputError, match="give --resume to continue it"):
        measure(pixels, tmp_path / "parts")
    with pytest.raises(InputError, match=r"was made with seed 7; 8 was given; resume it with its original settings"):
        measure(pixels, tmp_path / "parts", options(seed=8), resume=True)
    with pytest.raises(InputError, match="was made with conditioning '"):
        other = conditioning_of_classes(pixels.manifest, [0, 3, 8])
        measure(pixels, tmp_path / "parts", resume=True, conditioning=other)
    half = tmp_path / "parts" / "quality" / ".ddim-8-steps-no-cache.npz.fora-new"
    half.touch()  # of a process that was killed
    resumed = measure(pixels, tmp_path / "parts", resume=True)
    assert not half.exists()
    assert without_times(resumed) == without_times(whole)
    for row in whole.rows:
        one, other_ = saved(tmp_path / "whole", row.setting), saved(tmp_path / "parts", row.setting)
        assert all(np.array_equal(one[name], other_[name]) for name in ("arr_0", "arr_1"))

    monkeypatch.setattr(Pipeline, "start", lambda *_, **__: pytest.fail("it is complete"))
    assert measure(pixels, tmp_path / "parts", resume=True) == resumed


@pytest.mark.slow
@pytest.mark.usefixtures("pilot")
def test_killed_at_random_and_resumed_it_finds_the_same(pixels: Bundle, tmp_path: Path) -> None:
    command = ["quality", str(pixels.folder), "--num-images", "24", "--steps", "12", "--cache-intervals", "3"]
    command += ["--batch-size", "2", "--resume", "--json", "--out"]
    for kills in range(2):
        kill_after(3 * (kills + 1), 0.1, tmp_path / "parts", *command)
    found = {name: json.loads(fora(*command, tmp_path / name).stdout) for name in ("whole", "parts")}
    for quality in found.values():
        del quality["out"], quality["options"]
        for row in quality["rows"]:
            row.pop("seconds_per_image")
    assert found["parts"] == found["whole"]
    for name in ("ddim-12-steps-no-cache", "ddim-12-steps-fora-3"):
        one, other = (np.load(tmp_path / run / "quality" / f"{name}.npz")["arr_0"] for run in found)
        assert np.array_equal(one, other)


def test_the_command_writes_a_report_and_a_table(pixels: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "report"
    out.mkdir()
    (out / "speedup.png").touch()  # of a benchmark
    small = ["--num-images", 12, "--steps", 6, "--cache-intervals", 3, "--out", out]
    shown = fora("quality", pixels.folder, *small)
    assert shown.exit_code == 0, shown.output
    for text in ("12 images on onnxruntime (cpu)", "fora:3", "Fréchet", "as asked", " dB"):
        assert text in shown.stdout
    assert "no LPIPS: the pictures have fewer" in shown.stdout
    assert shown.stdout.count("LPIPS") == 1, "a column without figures"
    report = read_report(out)
    assert report is not None
    assert report.quality is not None
    assert report.recommendation.splitlines()[0] in " ".join(shown.stdout.split())
    assert report.about.name == "pixels"
    assert np.array_equal(saved(out, report.quality.rows[0].setting)["arr_1"], [k % 10 for k in range(12)])
    again = json.loads(fora("quality", pixels.folder, *small, "--resume", "--json").stdout)
    assert again["rows"] == report.quality.model_dump(mode="json")["rows"]


def test_one_file_of_inputs_serves_all_images_in_turn(pixels: Bundle, tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", class_labels=np.array([4, 2]), negative_class_labels=np.array([10, 10]))
    small = ["--num-images", 3, "--steps", 2, "--cache-intervals", 2, "--out", tmp_path / "out"]
    done = fora("quality", pixels.folder, *small, "--conditioning", tmp_path / "in.npz", "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    (plain, *_) = Quality.model_validate({name: said[name] for name in Quality.model_fields}).rows
    assert saved(tmp_path / "out", plain.setting)["arr_1"].tolist() == [4, 2, 4]


BAD: dict[str, tuple[list[str], int, str]] = {
    "interval over the steps": (
        ["--steps", "4", "--cache-intervals", "5"],
        1,
        "the cache interval 5 is larger than the number of steps 4",
    ),
    "no interval": (["--cache-intervals", "0"], 1, "the cache interval is 0"),
    "no steps": (["--steps", "0"], 1, "the number of steps is 0"),
    "more steps than noise levels": (["--steps", "1001"], 1, "does not support 1001"),
    "unknown scheduler": (["--schedulers", "ddim,x"], 1, "there is no scheduler 'x'"),
    "one image": (["--num-images", "1"], 2, "1 is not in the range x>=2"),
    "no weights": (["--inception-weights", "none.pth"], 1, "torch-fidelity"),
    "no reference": (["--reference", "none.npz"], 1, "none.npz cannot be read as reference images"),
    "a prompt": (["--prompt", "a cat"], 1, "takes no prompt"),
    "unknown backend": (["--backend", "mxnet"], 1, "unknown backend 'mxnet'"),
    "two ways": (["--prompt", "a", "--conditioning", "b.npz"], 1, "give one of them"),
}


@pytest.mark.parametrize("mistake", BAD)
def test_a_mistake_gets_a_sentence_and_leaves_nothing(
    mistake: str, pixels: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, code, message = BAD[mistake]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    result = fora("quality", pixels.folder, *given, "--out", "out")
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_folders_that_are_not_taken(pixels: Bundle, tmp_path: Path) -> None:
    (tmp_path / "thesis.doc").touch()
    with pytest.raises(InputError, match="cannot be written"):
        measure(pixels, tmp_path / "thesis.doc")
    (tmp_path / "out" / "quality").mkdir(parents=True)
    (tmp_path / "out" / "quality" / "mine.npz").touch()
    with pytest.raises(InputError, match=r"already contains mine.npz; give --resume"):
        measure(pixels, tmp_path / "out")
    with pytest.raises(InputError, match=r"has no settings.json, so it cannot be resumed"):
        measure(pixels, tmp_path / "out", resume=True)


def test_what_cannot_be_compared_is_a_sentence(pixels: Bundle, exported: Bundle, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the number of images is 1; .* needs at least 2"):
        measure(pixels, tmp_path / "out", options(images=1))
    np.savez(tmp_path / "r.npz", arr_0=np.zeros((4, 16, 16, 3), np.uint8))
    with pytest.raises(InputError, match=r"--reference needs image features, .* digits only, which tiny does not make"):
        measure(exported, tmp_path / "out", reference=tmp_path / "r.npz")
    with pytest.raises(InputError, match=r"a reference for this bundle must be uint8 with shape \[images, 8, 8, 1\]"):
        measure(pixels, tmp_path / "out", reference=tmp_path / "r.npz")
    assert exported.manifest.model.vae is not None
    lost = replace(exported.manifest.model.vae, where=str(tmp_path / "moved"))
    record = exported.manifest.model.model_copy(update={"vae": lost})
    bare = Bundle(exported.folder, exported.manifest.model_copy(update={"model": record}))
    with pytest.raises(InputError, match=r"moved"):
        measure(bare, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ForaError):
        measure(pixels, tmp_path / "out", backend="tensorrt")
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file() and path.name != ".lock"]


@pytest.mark.slow
def test_the_error_of_digits_grows_with_the_interval(digits: Bundle, tmp_path: Path) -> None:
    """On a few of the images of the README, to take seconds and not minutes; figures from those that it kept."""
    real = load_digits()
    np.savez(tmp_path / "real.npz", arr_0=np.round(real.images * 255 / 16).astype(np.uint8)[..., None])
    command = ["quality", digits.folder, "--num-images", 50, "--steps", 15, "--batch-size", 50]
    began = time.perf_counter()
    done = fora(*command, "--reference", tmp_path / "real.npz", "--out", tmp_path / "out")
    print(f"{time.perf_counter() - began:.0f} s\n{done.output}")
    assert done.exit_code == 0
    report = read_report(tmp_path / "out")
    assert report is not None
    assert report.quality is not None
    rows = {
        row.setting.label if row.setting.control_of is None else f"control of {row.setting.control_of}": row
        for row in report.quality.rows
    }
    cached = [rows[f"fora:{interval}"] for interval in (2, 3, 5)]
    plain, reader = saved(tmp_path / "out", rows["no cache"].setting), Digits()
    assert plain["arr_0"].shape == (50, 8, 8, 1)
    assert np.bincount(plain["arr_1"]).tolist() == [5] * 10
    last = [row.latent_errors[-1] for row in cached]
    distances = [row.metrics["frechet_distance"] or 0.0 for row in cached]
    ratios = [row.psnr or math.inf for row in cached]
    assert sorted(last) == last
    assert sorted(distances) == distances
    assert sorted(ratios, reverse=True) == ratios
    there = reader.features(torch.from_numpy(plain["arr_0"])).double().numpy()
    for row in cached:
        images = saved(tmp_path / "out", row.setting)["arr_0"]
        each = psnr_by_numpy(images, plain["arr_0"])
        assert row.psnr == pytest.approx(each[np.isfinite(each)].mean(), rel=0.01)
        here = reader.features(torch.from_numpy(images)).double().numpy()
        assert row.metrics["frechet_distance"] == pytest.approx(frechet_by_numpy(here, there), rel=1e-4)
        assert row.metrics["precision"] == pytest.approx(precision_by_numpy(here, there))
        assert row.metrics["recall"] == pytest.approx(precision_by_numpy(there, here))
        assert (row.metrics["as_asked"] or 0) > 0.97


def test_a_schedule_that_reuses_nothing_is_a_setting_all_the_same(pixels: Bundle, tmp_path: Path) -> None:
    """FORA at two steps and interval 2: both steps are full."""
    found = measure(pixels, tmp_path / "out", options(images=2, steps=(2,), schedules=("fora:2",)))
    assert [(row.setting.label, row.setting.full_steps) for row in found.rows] == [
        ("no cache", 2), ("fora:2", 2), ("2 steps, no cache", 2),
    ]  # fmt: skip
    assert [row.psnr for row in found.rows] == [None, None, None]


@pytest.mark.usefixtures("pilot")
def test_a_fine_solution_is_a_second_reference_and_chooses_the_controls(pixels: Bundle, tmp_path: Path) -> None:
    found = measure(pixels, tmp_path / "out", options(images=4, schedules=("fora:2",), truth_steps=40))
    assert found.solution == "40 steps of ddim"
    fine = Setting(scheduler="ddim", steps=40, nfe=40, full_steps=40, schedule="none")
    wanted = unrounded(pixels, fine, 4)
    for row in found.rows:
        each = psnr_by_numpy(unrounded(pixels, row.setting, 4), wanted)
        assert row.metrics["solution_psnr"] == pytest.approx(each.mean(), rel=1e-5)
        assert row.accuracy == row.metrics["solution_psnr"]
    control = found.rows[-1]
    rivals = [one.name for one in solvers_for(Pipeline(pixels), control.setting.steps)]
    assert control.setting.scheduler in rivals
    others = [control.setting.model_copy(update={"scheduler": name}) for name in rivals]
    best = max(psnr_by_numpy(unrounded(pixels, one, 4), wanted).mean() for one in others)
    assert control.metrics["solution_psnr"] == pytest.approx(best, abs=0.05), "no other solver comes closer"
    with pytest.raises(InputError, match="the fine solution has 8 steps; give more than the 8 steps of the settings"):
        measure(pixels, tmp_path / "other", options(truth_steps=8))


@pytest.mark.usefixtures("pilot")
def test_the_command_compares_forecasts_and_a_file(pixels: Bundle, tmp_path: Path) -> None:
    made = tmp_path / "made.json"
    Schedule.of_full_steps(6, [0, 2, 4, 5]).with_forecast(1).to_file(made)
    small = ["--num-images", 2, "--steps", 6, "--cache-intervals", 2, "--truth-steps", 12, "--schedule", made]
    shown = fora("quality", pixels.folder, *small, "--out", tmp_path / "out", "--json")
    assert shown.exit_code == 0, shown.output
    rows = json.loads(shown.stdout)["rows"]
    assert [(row["setting"]["schedule"], row["setting"]["method"]) for row in rows] == [
        ("none", "no cache"),
        ("fora:2", "FORA"),
        ("dense:4,0.3,forecast=2", "forecast"),
        (str(made), "forecast"),
        ("none", "no cache"),
    ]
    for name in ("latency-quality.png", "latency-solution.png"):
        assert Image.open(tmp_path / "out" / name).width == 1280
    page = (tmp_path / "out" / "report.html").read_text()
    assert "PSNR to solution" in page
    assert "solution: 12 steps of ddim" in page


@pytest.mark.usefixtures("one_trace")
def test_latents_are_compared_where_there_is_no_vae(pipeline_folder: Path, tmp_path: Path) -> None:
    fora("export", pipeline_folder / "transformer", "--out", tmp_path, "--name", "bare")
    few = ["--num-images", 3, "--steps", 6, "--cache-intervals", 2, "--batch-size", 2, "--backend", "onnxruntime"]
    shown = fora("quality", tmp_path / "bare", *few, "--truth-steps", 20, "--out", tmp_path / "out", "--json")
    assert shown.exit_code == 0, shown.output
    found = json.loads(shown.stdout)
    assert found["notes"][-1].startswith("bare has no VAE, so latents are compared instead of images")
    assert (found["grid"], (tmp_path / "out" / "grid.png").exists()) == ("", False)
    assert {*found["rows"][1]["metrics"]} == {"psnr", "solution_psnr"}
    made = {}
    for row in found["rows"]:
        with np.load(tmp_path / "out" / "quality" / f"{file_name_of(Setting(**row['setting']))}.npz") as content:
            made[row["setting"]["schedule"], row["setting"]["control_of"]] = content["arr_0"].astype(np.float64)
    plain, cached = made["none", None], made["fora:2", None]
    assert plain.shape == (3, 4, 8, 8)
    each = [
        10 * np.log10((one.max() - one.min()) ** 2 / np.mean((one - other) ** 2))
        for one, other in zip(plain, cached, strict=True)
    ]
    (row,) = [one for one in found["rows"] if one["setting"]["schedule"] == "fora:2"]
    assert row["metrics"]["psnr"] == pytest.approx(np.mean(each), abs=1e-6)
    assert "latents are compared" in (tmp_path / "out" / "report.html").read_text()
    refused = fora("quality", tmp_path / "bare", *few, "--reference", "x.npz", "--out", tmp_path / "other")
    assert (refused.exit_code, refused.stderr.count("\n")) == (1, 1)
    assert "--reference compares images, and bare has no VAE" in refused.stderr
