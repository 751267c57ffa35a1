import json
import math
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

from fora_trt import Schedule, load
from fora_trt.bundle import Bundle
from fora_trt.errors import ForaError, InputError
from fora_trt.evaluate.candidates import candidates_of, controls_of, file_name_of, with_controls
from fora_trt.evaluate.digit_classifier import makes_digits
from fora_trt.evaluate.features import Digits
from fora_trt.evaluate.quality import QualityOptions, measure_quality
from fora_trt.evaluate.report import read_report
from fora_trt.evaluate.results import Quality, Setting
from fora_trt.export.write import bundle_from_model
from fora_trt.models.sources import model_from_source
from fora_trt.runtime.conditioning import conditioning_of_classes
from fora_trt.runtime.images import Decoder
from fora_trt.runtime.sampling import Sampler
from fora_trt.runtime.updates import SchedulerUpdate, update_from_scheduler
from tests.conftest import TINY
from tests.test_cli import fora
from tests.test_metrics import frechet_by_numpy, precision_by_numpy, psnr_by_numpy

CPU = torch.device("cpu")
SHARE = 0.1
SETTINGS = ["no cache", "interval 2", "interval 3", "5 steps, no cache", "4 steps, no cache"]


@pytest.fixture(scope="module")
def pixels(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A small DiT of 8 x 8 grey pixels and ten classes, so that the reader of digits takes it for one of digits."""
    folder = tmp_path_factory.mktemp("pixels")
    torch.manual_seed(0)
    sizes = {"in_channels": 1, "out_channels": 1, "num_embeds_ada_norm": 10}
    transformer = DiTTransformer2DModel(**{**TINY, **sizes})
    for block in transformer.transformer_blocks:
        torch.nn.init.normal_(block.norm1.linear.bias, std=0.5)
    transformer.save_pretrained(folder / "transformer")
    DDIMScheduler(clip_sample=False).save_pretrained(folder / "scheduler")
    index = {"_class_name": "DiTPipeline", "transformer": ["diffusers", "DiTTransformer2DModel"], "vae": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return bundle_from_model(model_from_source(str(folder)), folder / "export" / "pixels")


@pytest.fixture
def pilot(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose reuse steps take a tenth of full ones, always."""
    monkeypatch.setattr("fora_trt.evaluate.rounds.reuse_share_of", lambda *_: SHARE)


def options(**given: Any) -> QualityOptions:
    small = {"images": 10, "steps": (8,), "cache_intervals": (2, 3), "batch_size": 4, "seed": 7, "guidance_scale": 1.5}
    return QualityOptions.model_validate({**small, **given})


def measure(bundle: Bundle, folder: Path, given: QualityOptions | None = None, **more: Any) -> Quality:
    chosen = {"backend": "onnxruntime", "device": CPU, **more}
    conditioning = chosen.pop("conditioning", None) or conditioning_of_classes(bundle.manifest, [0, 3, 7])
    return measure_quality(bundle, given or options(), conditioning, folder, **chosen)


def saved(folder: Path, setting: Setting) -> dict[str, NDArray[Any]]:
    with np.load(folder / "quality" / f"{file_name_of(setting)}.npz", allow_pickle=False) as content:
        return {name: content[name] for name in content.files}


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
    assert [row.setting.control_of for row in found.rows] == [None, None, None, 2, 3]
    assert (found.backend, found.device, found.images, found.features) == ("onnxruntime", "cpu", 10, "digit classifier")
    reader = Digits()

    def features(pictures: NDArray[np.uint8]) -> NDArray[np.float64]:
        return reader.features(torch.from_numpy(pictures)).double().numpy()

    plain = saved(tmp_path / "out", found.rows[0].setting)
    real = features(np.load(tmp_path / "real.npz")["arr_0"])
    assert plain["arr_0"].shape == (10, 8, 8, 1)
    assert plain["arr_1"].tolist() == [0, 3, 7, 0, 3, 7, 0, 3, 7, 0]
    same = []
    for row in found.rows:
        images = saved(tmp_path / "out", row.setting)["arr_0"]
        same.append(str(sum(np.array_equal(*pair) for pair in zip(images, plain["arr_0"], strict=True))))
        each = psnr_by_numpy(images, plain["arr_0"])
        if row is found.rows[0]:
            assert row.psnr is None
            assert row.ssim == 1
        else:
            assert row.psnr == pytest.approx(each[np.isfinite(each)].mean(), rel=1e-7)
            assert row.ssim < 1
        here, there = features(images), features(plain["arr_0"])
        assert row.frechet_distance == pytest.approx(frechet_by_numpy(here, there), rel=1e-3, abs=1e-4)
        assert row.to_reference == pytest.approx(frechet_by_numpy(here, real), rel=1e-3)
        assert row.precision == precision_by_numpy(here, there)
        assert row.recall == precision_by_numpy(there, here)
        read = reader.classes(torch.from_numpy(images)).numpy()
        assert row.as_asked == (read == plain["arr_1"]).mean()
        assert row.lpips is None
    assert any(set(same[1:]) == {"0"} or f"below the first: {', '.join(same[1:])}" in note for note in found.notes)
    assert any("10 images are too few for 64 features" in note for note in found.notes)
    assert any("of a full one: 10.0% at interval 2, 10.0% at interval 3" in note for note in found.notes)
    grid = Image.open(tmp_path / "out" / found.grid)
    assert grid.height == 5 * 68 + 4
    assert grid.width > 8 * 68
    assert not (tmp_path / "out" / "quality" / "parts").exists()


@pytest.mark.usefixtures("pilot")
def test_latent_errors_are_those_of_plain_loops(pixels: Bundle, tmp_path: Path) -> None:
    found = measure(pixels, tmp_path / "out", options(images=2, batch_size=2))
    for row in found.rows[:3]:
        schedule = Schedule.static(8, row.setting.cache_interval)
        each = []
        for image, label in enumerate((0, 3)):
            steps = trajectory(pixels, schedule, label, 7 + image)
            plain = trajectory(pixels, Schedule.static(8, 1), label, 7 + image)
            each.append([float((a - b).norm() / b.norm()) for a, b in zip(steps, plain, strict=True)])
        np.testing.assert_allclose(row.latent_errors, np.mean(each, axis=0), rtol=1e-3, atol=1e-6)
        assert len(row.latent_errors) == 8
    plain_row, two, three, *controls = found.rows
    assert set(plain_row.latent_errors) == {0.0}
    assert two.latent_errors[0] == 0, "the first step is full"
    assert three.latent_errors[-1] > two.latent_errors[-1] > 0
    assert [row.latent_errors for row in controls] == [(), ()]


@pytest.mark.usefixtures("pilot")
def test_pictures_of_a_vae_without_features(exported: Bundle, tmp_path: Path) -> None:
    found = measure(exported, tmp_path / "out", options(images=3, batch_size=2, cache_intervals=(2,)))
    plain, cached, control = found.rows
    images = saved(tmp_path / "out", cached.setting)["arr_0"]
    assert images.shape == (3, 16, 16, 3)
    assert cached.psnr == pytest.approx(psnr_by_numpy(images, saved(tmp_path / "out", plain.setting)["arr_0"]).mean())
    assert (control.frechet_distance, control.precision, control.as_asked, found.features) == (None, None, None, None)
    assert any("tiny does not make the digits" in note and "--inception-weights" in note for note in found.notes)
    assert any(note.startswith("no LPIPS: ") for note in found.notes)

    denoiser = load(exported, schedule=Schedule.static(8, 2), backend="onnxruntime", device="cpu")
    sampler = Sampler(denoiser, update_from_scheduler(DDIMScheduler.from_config(exported.scheduler_config), 8))
    wanted = conditioning_of_classes(exported.manifest, [0, 3])
    latents = sampler(Schedule.static(8, 2), wanted, [7, 8], 1.5).latents
    shown = [np.asarray(one) for one in Decoder(exported.manifest).images(latents, CPU)]
    assert np.array_equal(images[:2], shown), "the images that run makes of the same seeds"


@pytest.mark.parametrize("scheduler", ["ddim", "unipc"])
def test_watching_the_latents_changes_nothing(exported: Bundle, scheduler: str) -> None:
    (candidate, cached) = candidates_of(exported, [scheduler], [10], [3])
    assert isinstance(candidate.update, SchedulerUpdate) == (scheduler == "unipc")
    denoiser = load(exported, schedule=cached.schedule, backend="onnxruntime", device="cpu")
    sampler, wanted = Sampler(denoiser, cached.update), conditioning_of_classes(exported.manifest, [1, 2])
    seen: list[torch.Tensor] = []
    watched = sampler(cached.schedule, wanted, [0, 1], 1.5, observe=lambda latents: seen.append(latents.clone()))
    assert torch.equal(watched.latents, sampler(cached.schedule, wanted, [0, 1], 1.5).latents)
    assert len(seen) == 10
    assert torch.equal(seen[-1], watched.latents)
    for steps in (1, 4):
        few = sampler(cached.schedule, wanted, [0, 1], 1.5, watch=lambda kinds, steps=steps: kinds[:steps])
        assert torch.equal(seen[steps - 1], few.latents)


def test_candidates_are_all_products_each_once(exported: Bundle) -> None:
    found = candidates_of(exported, [None, "DDIMScheduler", "heun"], [8, 12, 8], [1, 2, 3, 2])
    settings = [one.setting for one in found]
    assert [(one.scheduler, one.steps, one.cache_interval) for one in settings] == [
        (name, steps, interval)
        for name in ("DDIMScheduler", "HeunDiscreteScheduler")
        for steps in (8, 12)
        for interval in (1, 2, 3)
    ]
    everything = with_controls(found, controls_of(found, dict.fromkeys((2, 3), SHARE)))
    assert len({file_name_of(one.setting) for one in everything}) == len(everything) == 20


@pytest.mark.parametrize(
    ("scheduler", "steps", "interval", "share", "expected"),
    [
        ("ddim", 50, 3, 0.0, 18),
        ("ddim", 50, 3, 0.12, round(18 + 32 * 0.12)),
        ("ddim", 50, 3, 1.0, 50),
        ("ddim", 2, 2, 0.0, 2),
        ("heun", 50, 3, 0.0, 17),  # 99 calls, 34 of them full; 17 steps make 33 calls
        ("pndm", 20, 5, 0.0, 4),  # fewer it does not admit
    ],
)
def test_a_control_takes_as_long(
    exported: Bundle, scheduler: str, steps: int, interval: int, share: float, expected: int
) -> None:
    plain, cached = candidates_of(exported, [scheduler], [steps], [interval])
    assert controls_of([plain, cached], {interval: share}) == [0, expected]
    control = with_controls([plain, cached], [0, expected])[-1]
    assert control.setting.control_of == interval
    assert control.setting.full_steps == control.update.calls
    setting = cached.setting
    assert (setting.calls is None) == (cached.update.calls == steps)


def test_the_pilot_measures_what_the_controls_follow(pixels: Bundle, tmp_path: Path) -> None:
    found = measure(pixels, tmp_path / "out", options(images=2))
    (note,) = (note for note in found.notes if "in a pilot" in note)
    for interval, row in zip((2, 3), found.rows[-2:], strict=True):
        share = float(note.split(f"% at interval {interval}")[0].split()[-1]) / 100
        assert 0 < share <= 1
        full = Schedule.static(8, interval).full_steps
        assert abs(row.setting.steps - (full + (8 - full) * share)) <= 0.51


@pytest.mark.usefixtures("pilot")
def test_no_caching_alone_has_no_controls(pixels: Bundle, tmp_path: Path) -> None:
    given = options(
        images=2, cache_intervals=(1,), schedulers=("ddim", "dpm-solver++"), steps=(4, 6), keep_images=False
    )
    found = measure(pixels, tmp_path / "out", given)
    assert [(row.setting.scheduler, row.setting.steps) for row in found.rows] == [
        (name, steps) for name in ("DDIMScheduler", "DPMSolverMultistepScheduler") for steps in (4, 6)
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
    with pytest.raises(InputError, match="give --resume to go on with it"):
        measure(pixels, tmp_path / "parts")
    with pytest.raises(InputError, match=r"was made with seed 7 and not 8; resume it with the settings"):
        measure(pixels, tmp_path / "parts", options(seed=8), resume=True)
    with pytest.raises(InputError, match="was made with conditioning '"):
        other = conditioning_of_classes(pixels.manifest, [0, 3, 8])
        measure(pixels, tmp_path / "parts", resume=True, conditioning=other)
    half = tmp_path / "parts" / "quality" / ".ddim-8-steps-no-cache.npz.x1y2z3"
    half.touch()  # of a process that was killed
    resumed = measure(pixels, tmp_path / "parts", resume=True)
    assert not half.exists()
    assert without_times(resumed) == without_times(whole)
    for row in whole.rows:
        one, other_ = saved(tmp_path / "whole", row.setting), saved(tmp_path / "parts", row.setting)
        assert all(np.array_equal(one[name], other_[name]) for name in ("arr_0", "arr_1"))

    monkeypatch.setattr("fora_trt.evaluate.quality.load", lambda *_, **__: pytest.fail("it is complete"))
    assert measure(pixels, tmp_path / "parts", resume=True) == resumed


KILLABLE = """
import sys
import fora_trt.evaluate.rounds as rounds
from fora_trt.cli import main
rounds.reuse_share_of = lambda *_: 0.1
main(sys.argv[1:])
"""


@pytest.mark.usefixtures("pilot")
def test_killed_at_random_and_resumed_it_finds_the_same(pixels: Bundle, tmp_path: Path) -> None:
    command = ["quality", str(pixels.folder), "--num-images", "24", "--steps", "12", "--cache-intervals", "3"]
    command += ["--batch-size", "2", "--resume", "--json", "--out"]
    parts = tmp_path / "parts" / "quality" / "parts"
    for kills in range(2):
        process = subprocess.Popen([sys.executable, "-c", KILLABLE, *command, str(tmp_path / "parts")])
        while process.poll() is None and len(list(parts.glob("*.npz"))) < 3 * (kills + 1):
            time.sleep(0.005)
        time.sleep(random.uniform(0, 0.1))
        assert process.poll() is None, "it was to be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
    found = {name: json.loads(fora(*command, tmp_path / name).stdout) for name in ("whole", "parts")}
    for quality in found.values():
        quality.pop("out")
        for row in quality["rows"]:
            row.pop("seconds_per_image")
    assert found["parts"] == found["whole"]
    for name in ("ddim-12-steps-no-cache", "ddim-12-steps-interval-3"):
        one, other = (np.load(tmp_path / run / "quality" / f"{name}.npz")["arr_0"] for run in found)
        assert np.array_equal(one, other)


def test_the_command_writes_a_report_and_a_table(pixels: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "report"
    out.mkdir()
    (out / "speedup.png").touch()  # of a benchmark
    small = ["--num-images", 12, "--steps", 6, "--cache-intervals", 3, "--out", out]
    shown = fora("quality", pixels.folder, *small)
    assert shown.exit_code == 0, shown.output
    for text in ("12 images on onnxruntime (cpu)", "interval 3", "Fréchet", "as asked", " dB"):
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
    (plain, *_) = Quality.model_validate(
        {k: v for k, v in json.loads(done.stdout).items() if k not in ("out", "bundle")}
    ).rows
    assert saved(tmp_path / "out", plain.setting)["arr_1"].tolist() == [4, 2, 4]


BAD: dict[str, tuple[list[str], int, str]] = {
    "interval over the steps": (["--steps", "4"], 1, "the cache interval 5 is larger than the number of steps 4"),
    "no interval": (["--cache-intervals", "0"], 1, "the cache interval is 0"),
    "no steps": (["--steps", "0"], 1, "the number of steps is 0"),
    "more steps than noise levels": (["--steps", "1001"], 1, "does not admit 1001"),
    "unknown scheduler": (["--schedulers", "ddim,x"], 1, "there is no scheduler 'x'"),
    "one image": (["--num-images", "1"], 2, "1 is not in the range x>=2"),
    "no weights": (["--inception-weights", "none.pth"], 1, "torch-fidelity"),
    "no reference": (["--reference", "none.npz"], 1, "none.npz cannot be read as pictures"),
    "a prompt": (["--prompt", "a cat"], 1, "takes no prompt"),
    "unknown backend": (["--backend", "mxnet"], 1, "no backend 'mxnet'"),
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
    with pytest.raises(InputError, match=r"holds mine.npz already; give --resume"):
        measure(pixels, tmp_path / "out")
    with pytest.raises(InputError, match="nothing to resume"):
        measure(pixels, tmp_path / "out", resume=True)


def test_what_cannot_be_compared_is_a_sentence(pixels: Bundle, exported: Bundle, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the number of images is 1; at least 2"):
        measure(pixels, tmp_path / "out", options(images=1))
    np.savez(tmp_path / "r.npz", arr_0=np.zeros((4, 16, 16, 3), np.uint8))
    with pytest.raises(InputError, match="a reference is compared by features, and tiny does not make the digits"):
        measure(exported, tmp_path / "out", reference=tmp_path / "r.npz")
    with pytest.raises(InputError, match=r"a reference for this bundle is uint8 of shape \[images, 8, 8, 1\]"):
        measure(pixels, tmp_path / "out", reference=tmp_path / "r.npz")
    record = exported.manifest.model.model_copy(update={"vae": None})
    bare = Bundle(exported.folder, exported.manifest.model_copy(update={"model": record}))
    with pytest.raises(InputError, match=r"has no VAE to decode them; name one with --vae FOLDER$"):
        measure(bare, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ForaError):
        measure(pixels, tmp_path / "out", backend="tensorrt")
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file() and path.name != ".lock"]


@pytest.mark.slow
def test_the_error_of_digits_grows_with_the_interval(tmp_path: Path) -> None:
    """On a third of the images of the README, to take a minute and not four; the figures from those that it kept."""
    bundle_from_model(model_from_source("digits"), tmp_path / "digits")
    real = load_digits()
    np.savez(tmp_path / "real.npz", arr_0=np.round(real.images * 255 / 16).astype(np.uint8)[..., None])
    command = ["quality", tmp_path / "digits", "--num-images", 300, "--steps", 15, "--batch-size", 100]
    began = time.perf_counter()
    done = fora(*command, "--reference", tmp_path / "real.npz", "--out", tmp_path / "out")
    print(f"{time.perf_counter() - began:.0f} s\n{done.output}")
    assert done.exit_code == 0
    report = read_report(tmp_path / "out")
    assert report is not None
    assert report.quality is not None
    rows = {
        row.setting.label if row.setting.control_of is None else row.setting.control_of: row
        for row in report.quality.rows
    }
    cached = [rows[f"interval {interval}"] for interval in (2, 3, 5)]
    plain, reader = saved(tmp_path / "out", rows["no cache"].setting), Digits()
    assert plain["arr_0"].shape == (300, 8, 8, 1)
    assert np.bincount(plain["arr_1"]).tolist() == [30] * 10
    last = [row.latent_errors[-1] for row in cached]
    distances = [row.frechet_distance or 0.0 for row in cached]
    ratios = [row.psnr or math.inf for row in cached]
    assert sorted(last) == last
    assert sorted(distances) == distances
    assert sorted(ratios, reverse=True) == ratios
    there = reader.features(torch.from_numpy(plain["arr_0"])).double().numpy()
    for row in cached:
        images = saved(tmp_path / "out", row.setting)["arr_0"]
        each = psnr_by_numpy(images, plain["arr_0"])
        assert row.psnr == pytest.approx(each[np.isfinite(each)].mean(), rel=1e-6)
        here = reader.features(torch.from_numpy(images)).double().numpy()
        assert row.frechet_distance == pytest.approx(frechet_by_numpy(here, there), rel=1e-4)
        assert row.precision == pytest.approx(precision_by_numpy(here, there))
        assert row.recall == pytest.approx(precision_by_numpy(there, here))
        assert row.as_asked is not None
        assert row.as_asked > 0.97
