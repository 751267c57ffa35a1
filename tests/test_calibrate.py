"""Calibration: the search and its budget, the file that it writes, and the runs that may use the file."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from diffusers import DDIMScheduler, DiTPipeline

from fora_trt import Pipeline, Schedule, load
from fora_trt.bundle import Bundle
from fora_trt.cli import main
from fora_trt.errors import InputError, RoomError, ScheduleError
from fora_trt.evaluate import calibrate
from fora_trt.evaluate.calibrate import (
    Calibration,
    Wanted,
    _neighbours,
    read_trials,
    trials_file,
    write_trials,
)
from fora_trt.evaluate.solvers import solvers_for
from fora_trt.metrics import latent_psnr
from fora_trt.sampling.conditioning import example_conditioning
from tests.conftest import BundleAt

STEPS = 12


def fora(*arguments: Any) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def calibration_of(
    bundle: Bundle, known: dict[str, float] | None = None, steps: int = STEPS, **wanted: Any
) -> Calibration:
    pipeline = Pipeline(bundle, steps=steps, backend="torch", device="cpu")
    given = example_conditioning(pipeline.manifest, 4)
    return Calibration(pipeline, given, Wanted(**{"images": 4, "full_steps": 5, **wanted}), known)


@pytest.fixture(scope="module")
def done(optimized: dict[str, Bundle]) -> Calibration:
    """A calibration that has searched, and whose result is known."""
    calibration = calibration_of(optimized["fold"])
    assert [*calibration.run()]
    return calibration


def test_the_best_schedule_is_at_least_as_good_as_all_that_were_tried(done: Calibration) -> None:
    found = done.result()
    assert done.best is not None
    assert done.best.schedule.full_steps == len(found.full_steps) == 5
    assert found.full_steps[0] == 0
    known = done.trials.known
    tried = {key.removesuffix(" on image 0") for key in known if key.endswith(" on image 0")}
    assert len(tried) > 15, "a family and moved full steps"
    on_half = {
        what: known[f"{what} on image 0"] + known[f"{what} on image 2"]
        for what in tried
        if f"{what} on image 2" in known
    }
    assert len(on_half) < len(tried), "more images only for what is better on a few"
    best = f"DDIMScheduler, {done.plain.steps}, {done.best.schedule.digest()}"
    assert on_half[best] / 2 > max(on_half.values()) / 2 - 0.5
    by_label = {row.label: row for row in found.compared}
    assert by_label["calibrated"].psnr >= by_label["fora:3"].psnr
    assert {"calibrated", "fora:3", "fora:3,forecast=2", "dense:5,0.3,forecast=2"} < by_label.keys()
    assert [row.psnr for row in found.compared] == sorted((row.psnr for row in found.compared), reverse=True)
    assert len(by_label) == 5, "and the best solver"
    assert found.spent < 10


def test_a_calibration_is_the_same_every_time(done: Calibration, optimized: dict[str, Bundle]) -> None:
    again = calibration_of(optimized["fold"])
    lines = [*again.run()]
    assert len([line for line in lines if "fitted weights" in line]) > 5
    assert done.best is not None
    assert again.best is not None
    assert again.best.schedule == done.best.schedule


def test_without_room_to_observe_weights_are_not_fitted(
    optimized: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise RoomError("the batch does not fit", 32, 16)

    monkeypatch.setattr(calibrate.Trials, "observed", refused)
    calibration = calibration_of(optimized["fold"])
    lines = [*calibration.run()]
    assert "weights are not fitted: the batch does not fit" in lines
    assert not [line for line in lines if line.endswith("fitted weights")]
    assert any("on all images" in line for line in lines)
    assert not calibration.so_far().fitted


def test_what_is_known_is_not_computed_again(
    done: Calibration, optimized: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    done.result()
    resumed = calibration_of(optimized["fold"], dict(done.trials.known))
    monkeypatch.setattr(calibrate.Trials, "_latents", lambda *_: pytest.fail("computed again"))
    assert [*resumed.run()]
    assert resumed.best is not None
    assert done.best is not None
    assert resumed.best.schedule == done.best.schedule
    assert resumed.result() == done.result()


def test_the_number_of_full_steps_follows_from_the_goal(optimized: dict[str, Bundle]) -> None:
    assert calibration_of(optimized["fold"], full_steps=None, speedup=2.5)._full_steps == 4
    assert calibration_of(optimized["fold"], full_steps=None, speedup=4)._full_steps == 3
    calibration = calibration_of(optimized["fold"], full_steps=None, max_loss=40.0)
    lines = [*calibration.run()]
    assert calibration.best is not None
    number = calibration.best.schedule.full_steps
    assert any(line.startswith(f"{number} full steps: trying") for line in lines)
    fewer = Schedule.dense(STEPS, number - 1).with_forecast(2) if number > 2 else None
    few = calibration._few
    assert calibration.trials.psnr(calibration.plain.with_schedule(calibration._dense(0.3)), few) >= 40
    assert fewer is None or calibration.trials.psnr(calibration.plain.with_schedule(fewer), few) < 40


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"full_steps": None}, "give exactly one of --full-steps, --speedup and --max-loss"),
        ({"speedup": 2.0}, "give exactly one of --full-steps, --speedup and --max-loss"),
        ({"full_steps": 12}, "12 full steps is not possible with 12 evaluations of the model; give 2 to 11 full steps"),
        ({"full_steps": None, "speedup": 7.0}, "the speed-up 7 is not possible with 12 evaluations of the model"),
        ({"images": 0}, "the number of images is 0; at least 1 is needed"),
    ],
)
def test_goals_that_are_not_possible_are_refused(
    wanted: dict[str, Any], message: str, optimized: dict[str, Bundle]
) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        calibration_of(optimized["fold"], **wanted)


def test_neighbours_keep_the_first_step_and_the_order() -> None:
    found = _neighbours((0, 3, 4, 9), 10, random.Random(0))
    assert {one[0] for one in found} == {0}
    assert all(max(one) < 10 and len({*one}) == 4 and sorted(one) == [*one] for one in found)
    assert {(0, 2, 4, 9), (0, 3, 5, 9), (0, 3, 4, 8), (0, 2, 3, 8), (0, 2, 3, 9)} <= {*found}
    assert (0, 3, 4, 9) not in found
    assert found == _neighbours((0, 3, 4, 9), 10, random.Random(0))


def test_psnr_of_pixels_has_a_fixed_peak_and_of_latents_their_range() -> None:
    reference = torch.tensor([[0.5, -1.0], [0.0, 1.0]]).view(2, 1, 1, 2)
    off = reference + 0.02
    assert latent_psnr(off.clamp(max=1), reference, pixels=True).mean() == pytest.approx(
        (40 + 10 * np.log10(4 / (0.02**2 / 2))) / 2, abs=1e-4
    )
    assert latent_psnr(100 * off, 100 * reference, pixels=False).mean() == pytest.approx(40, abs=1e-4)
    assert latent_psnr(reference, reference, pixels=True).tolist() == pytest.approx([200, 200])


def test_solvers_take_no_more_evaluations_than_the_full_steps(optimized: dict[str, Bundle]) -> None:
    pipeline = Pipeline(optimized["fold"], backend="torch", device="cpu")
    found = {one.name: one for one in solvers_for(pipeline, 7)}
    assert {"DDIMScheduler", "DDIMScheduler:spacing=trailing", "UniPCMultistepScheduler"} <= found.keys()
    lu = found["DPMSolverMultistepScheduler:order=3,spacing=lu"].scheduler.config
    assert (lu["solver_order"], lu["use_lu_lambdas"]) == (3, True)
    assert {sampling.nfe for sampling in found.values()} == {7}
    assert len({tuple(one.scheduler_step.timesteps.tolist()) for one in found.values()}) >= 3


# -- the command and its file ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def calibrated(optimized: dict[str, Bundle], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a calibration of the tiny DiT, for DDIM with twelve steps."""
    path = tmp_path_factory.mktemp("calibrated") / "own.json"
    command = ["calibrate", optimized["fold"].folder, "--full-steps", 5, "--steps", STEPS, "--num-images", 4]
    made = fora(*command, "--backend", "torch", "-o", path, "--json")
    assert made.exit_code == 0, made.output
    found = json.loads(made.stdout)
    assert found["output"] == str(path)
    assert not found["interrupted"]
    assert not trials_file(path).exists()
    return path


def test_a_file_says_what_it_was_made_from_and_runs(
    calibrated: Path, optimized: dict[str, Bundle], tmp_path: Path
) -> None:
    schedule = Schedule.from_file(calibrated)
    assert schedule.full_steps == 5
    assert schedule.made_from["model"]["name"] == "tiny"
    assert schedule.made_from["scheduler"] == "DDIMScheduler"
    assert len(schedule.made_from["timesteps"]) == STEPS
    assert {row["label"] for row in schedule.made_from["compared"]} > {"calibrated", "fora:3"}
    common = [optimized["fold"].folder, "--steps", STEPS, "--schedule", calibrated]
    run = fora("run", *common, "--class-labels", "1,2", "--latents-out", tmp_path / "a.npy", "--json")
    assert run.exit_code == 0, run.output
    assert json.loads(run.stdout)["full_steps"] == 5
    verified = fora("verify", *common, "--cache-intervals", 2, "--backend", "torch")
    assert verified.exit_code == 0, verified.output
    assert "own.json" in verified.stdout
    measured = fora(
        "quality",
        optimized["fold"].folder,
        "--steps",
        STEPS,
        "--schedule",
        calibrated,
        "--cache-intervals",
        3,
        "--num-images",
        2,
        "--out",
        tmp_path / "report",
    )
    assert measured.exit_code == 0, measured.output


def test_a_file_is_for_its_steps_its_scheduler_and_its_model(
    calibrated: Path, optimized: dict[str, Bundle], pixels: Bundle, bundle_at: BundleAt
) -> None:
    common = ["run", optimized["fold"].folder, "--class-labels", 1, "--schedule", calibrated, "--backend", "torch"]
    for options, message in (
        (["--steps", 10], "is for 12 model evaluations, but this trajectory has 10"),
        (["--steps", STEPS, "--scheduler", "dpm-solver++"], "was calibrated for DDIMScheduler with the timesteps"),
        (["--steps", STEPS, "--timestep-spacing", "trailing"], "but this trajectory takes DDIMScheduler with"),
        (["--steps", STEPS, "--forecast", 2], "has weights of its own; give the file without a forecast order"),
    ):
        refused = fora(*common, *options)
        assert refused.exit_code == 1
        assert message in " ".join(refused.stderr.split())
    other = fora("run", pixels.folder, "--class-labels", 1, "--steps", STEPS, "--schedule", calibrated)
    assert other.exit_code == 1
    assert "was calibrated for tiny" in other.stderr
    half = Pipeline(bundle_at("fold", "fp16"), steps=STEPS, schedule=str(calibrated), backend="torch", device="cpu")
    assert half(class_labels=[1]).full_steps == 5, "the same model in another precision"
    with pytest.raises(ScheduleError, match=r"was calibrated for tiny \(from .*\), not for this model"):
        load(pixels, schedule=Schedule.from_file(calibrated), backend="torch", device="cpu")
    by_name = load(pixels, schedule=str(calibrated), backend="torch", device="cpu")
    with pytest.raises(ScheduleError, match="was calibrated for tiny"):
        by_name(torch.zeros(1, 1, 8, 8), 999.0, class_labels=torch.tensor([1]))


def test_a_file_works_in_a_diffusers_pipeline_with_its_scheduler(
    calibrated: Path, optimized: dict[str, Bundle], pipeline_folder: Path
) -> None:
    pipe = DiTPipeline.from_pretrained(pipeline_folder)
    pipe.set_progress_bar_config(disable=True)
    denoiser = load(optimized["fold"], schedule=str(calibrated), backend="torch", device="cpu")
    pipe.transformer = denoiser.as_transformer(pipe.scheduler)
    pipe(class_labels=[1], num_inference_steps=STEPS)
    assert denoiser.schedule.full_steps == 5
    with pytest.raises(ScheduleError, match="is for 12 model evaluations, but this trajectory has 9"):
        pipe(class_labels=[1], num_inference_steps=9)
    pipe.scheduler = DDIMScheduler(timestep_spacing="trailing")
    pipe.transformer = denoiser.as_transformer(pipe.scheduler)
    with pytest.raises(ScheduleError, match="was calibrated for DDIMScheduler with the timesteps"):
        pipe(class_labels=[1], num_inference_steps=STEPS)


def test_ctrl_c_keeps_the_best_so_far_and_the_same_command_goes_on(
    calibrated: Path, optimized: dict[str, Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[int] = []
    latents_of = calibrate.Trials._latents

    def interrupted(self: Any, sampling: Any, images: Any) -> torch.Tensor:
        computed.append(len(images))
        if len(computed) == 9:
            raise KeyboardInterrupt
        return latents_of(self, sampling, images)

    path = tmp_path / "own.json"
    command = ["calibrate", optimized["fold"].folder, "--full-steps", 5, "--steps", STEPS, "--num-images", 4]
    command += ["--backend", "torch", "-o", path]
    monkeypatch.setattr(calibrate.Trials, "_latents", interrupted)
    stopped = fora(*command)
    assert stopped.exit_code == 130
    assert "the best schedule so far; the same command goes on from here" in stopped.stderr
    assert Schedule.from_file(path).full_steps == 5
    assert Schedule.from_file(path).made_from["interrupted"]
    other = fora(*command, "--seed", 1)
    assert other.exit_code == 1
    assert "own.json.trials is of an interrupted calibration with another seed (0 instead of 1)" in other.stderr
    resumed = fora(*command)
    assert resumed.exit_code == 0, resumed.output
    assert Schedule.from_file(path) == Schedule.from_file(calibrated)
    assert Schedule.from_file(path).made_from == Schedule.from_file(calibrated).made_from
    assert not trials_file(path).exists()


def test_damaged_trials_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "own.json.trials"
    write_trials(path, {"seed": 0}, {"a": 1.0})
    assert read_trials(path, {"seed": 0}) == {"a": 1.0}
    assert read_trials(tmp_path / "none", {}) == {}
    for content in ("{", "[]", '{"settings": {}}', '{"settings": 1, "trials": {}}'):
        path.write_text(content)
        with pytest.raises(InputError, match=r"own\.json\.trials cannot be read; remove it to begin anew"):
            read_trials(path, {"seed": 0})


MISTAKES: dict[str, tuple[list[object], int, str]] = {
    "no goal": ([], 1, "give exactly one of --full-steps, --speedup and --max-loss"),
    "two goals": (["--full-steps", 5, "--speedup", 2], 1, "give exactly one of --full-steps"),
    "too many full steps": (["--full-steps", 50], 1, "50 full steps is not possible with 50 evaluations"),
    "no suffix": (["--full-steps", 5, "-o", "own"], 2, "own does not end in .json"),
    "no folder": (["--full-steps", 5, "-o", "no/such/own.json"], 1, "no/such"),
    "unknown scheduler": (["--full-steps", 5, "--scheduler", "x"], 1, "there is no scheduler 'x'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_a_sentence_and_writes_nothing(
    mistake: str, exported: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options, status, message = MISTAKES[mistake]
    refused = fora("calibrate", exported.folder, "-o", "own.json", *options)
    assert refused.exit_code == status, refused.output
    assert message in " ".join(refused.stderr.split())
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_digits_with_eleven_full_steps_are_far_better_than_fora(digits: Bundle, tmp_path: Path) -> None:
    made = fora("calibrate", digits.folder, "--full-steps", 11, "-o", tmp_path / "eleven.json", "--json")
    assert made.exit_code == 0, made.output
    found = json.loads(made.stdout)
    print(found)
    by_label = {row["label"]: row["psnr"] for row in found["compared"]}
    assert by_label["calibrated"] > 47
    assert by_label["fora:5"] < 35
    assert max(value for label, value in by_label.items() if "fora" not in label and "dense" not in label) >= 47
    assert found["spent"] < 10
