"""Per-layer calibration: errors of reuse and masks against numbers written by hand, the command, and its refusals."""

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from click.testing import CliRunner, Result

from fora_trt import Pipeline, Schedule
from fora_trt.bundle import Bundle
from fora_trt.cli import main
from fora_trt.contract import FULL, REUSE
from fora_trt.errors import BundleError, InputError
from fora_trt.evaluate.calibrate import Trials, Wanted, trials_file
from fora_trt.evaluate.calibrate_layers import Arithmetic, LayerCalibration, advice_of
from fora_trt.evaluate.eager_fora import EagerFora
from fora_trt.evaluate.mask_search import by_squares, by_threshold, cheapest_steps, grouped, merged, within
from fora_trt.evaluate.site_errors import relative_l1
from fora_trt.export.statistics import StepFlops, graph_statistics
from fora_trt.files import write_manifest
from fora_trt.sampling.conditioning import example_conditioning

CPU = torch.device("cpu")
STEPS = 12


def fora(*arguments: Any) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


# -- formulas ----------------------------------------------------------------------------------------------------------


def test_the_error_of_reuse_is_the_relative_l1_difference_averaged_over_samples() -> None:
    features = torch.tensor([[[1.0, -3.0], [4.0, 4.0]], [[2.0, -2.0], [4.0, 4.0]], [[0.0, -5.0], [2.0, 0.0]]])
    found = relative_l1(features)
    # sample 0: |1-2| + |-3+2| = 2 of 4, |1| + |-3+5| = 3 of 5, 2 + 3 = 5 of 5; sample 1: 0 of 8, 6 of 2, 6 of 2
    wanted = [[0, (2 / 4 + 0) / 2, (3 / 5 + 6 / 2) / 2], [0, 0, (5 / 5 + 6 / 2) / 2], [0, 0, 0]]
    assert found == pytest.approx(numpy.array(wanted))


def of_distance(rates: list[float], steps: int) -> Any:
    """Errors that grow with the distance of the steps, at these rates."""
    ahead = numpy.arange(steps)[None] - numpy.arange(steps)[:, None]
    return numpy.array(rates)[:, None, None] * ahead.clip(min=0)


def test_a_site_is_computed_where_the_error_since_it_was_computed_exceeds_the_threshold() -> None:
    found = by_threshold(of_distance([1.0, 0.5, 0.0], 7), 1.2)
    assert [[int(step) for step in column.nonzero()[0]] for column in found.T] == [[0, 2, 4, 6], [0, 3, 6], [0]]


def test_the_cheapest_steps_are_those_of_the_least_sum() -> None:
    errors = of_distance([1.0], 4)[0] ** 2
    # {0}: 1 + 4 + 9; {0, 2}: 1 + 1 and a price; {0, 1, 2, 3}: three more prices than {0}
    assert cheapest_steps(errors, 13.0) == [0]
    assert cheapest_steps(errors, 3.0) == [0, 2]
    assert cheapest_steps(errors, 0.5) == [0, 1, 2, 3]


def test_the_sites_of_a_group_are_computed_together_and_groups_go_by_frequency() -> None:
    errors, costs = of_distance([0.1, 2.0, 0.2, 3.0], 12), numpy.ones(4)
    assert grouped(errors, costs, 2, 1.0) == [[0, 2], [1, 3]]
    found = by_squares(errors, costs, [[0, 2], [1, 3]], 1.0)
    assert (found[:, 0] == found[:, 2]).all()
    assert (found[:, 1] == found[:, 3]).all()
    assert 1 < found[:, 0].sum() < found[:, 1].sum()


def random_masks(seed: int) -> Any:
    masks = numpy.random.default_rng(seed).random((40, 6)) < 0.4
    masks[0] = True
    return masks


def partial_masks(computed: Any) -> int:
    return sum(row.any() and not row.all() for row in numpy.unique(computed, axis=0))


@pytest.mark.parametrize("partial", [0, 1, 3, 6])
@pytest.mark.parametrize("seed", range(3))
def test_merging_drops_no_computed_site_and_keeps_the_limit(seed: int, partial: int) -> None:
    masks = random_masks(seed)
    assert partial_masks(masks) > 6
    found = merged(masks, numpy.arange(1.0, 7.0), partial)
    assert (found | ~masks).all(), "a computed site stays computed"
    assert partial_masks(found) <= partial
    assert not found[~masks.any(1)].any(), "reuse steps stay"
    if partial:
        assert partial_masks(found) > 0


def test_near_masks_are_merged_and_few_are_left_alone() -> None:
    masks = numpy.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]], dtype=bool)
    assert (merged(masks, numpy.ones(4), 3) == masks).all()
    assert merged(masks, numpy.ones(4), 2)[1:].astype(int).tolist() == [
        [1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]
    ]  # fmt: skip
    dear = numpy.array([1.0, 100.0, 1.0, 1.0])  # now the union of the two masks without site 1 is the least
    assert merged(masks, dear, 2)[1:].astype(int).tolist() == [
        [1, 1, 0, 0], [1, 0, 0, 1], [1, 0, 0, 1], [0, 0, 0, 0]
    ]  # fmt: skip


@pytest.mark.parametrize("budget", [3.0, 9.5, 17.0])
def test_the_budget_is_met_after_merging(budget: float) -> None:
    errors, costs = of_distance([0.1, 0.7, 0.9, 1.7, 2.3], 30), numpy.array([0.1, 0.2, 0.1, 0.4, 0.2])

    def arithmetic(masks: Any) -> float:
        return float((masks @ costs).sum())

    found = within(budget, arithmetic, lambda value: merged(by_threshold(errors, value), costs, 3))
    assert 0.6 * budget < arithmetic(found) <= budget
    assert partial_masks(found) <= 3


def test_the_advice_follows_the_measurement() -> None:
    psnr = {"per-layer": 40.0, "fora:3": 37.0, "dense:18,forecast=2": 60.0}
    told = advice_of(psnr, ["fora:3", "dense:18,forecast=2"])
    assert told is not None
    assert "dense:18,forecast=2 reaches 60.0 dB" in told
    assert "40.0 dB" in told
    assert advice_of({**psnr, "per-layer": 61.0}, ["fora:3", "dense:18,forecast=2"]) is None


# -- arithmetic --------------------------------------------------------------------------------------------------------


def test_the_arithmetic_of_a_step_is_that_of_its_graph(optimized: dict[str, Bundle], exported: Bundle) -> None:
    for bundle in (exported, *optimized.values()):
        path = bundle.graph_path(FULL)
        features = [one.name for one in bundle.manifest.features()]
        count = StepFlops.of(path)
        assert count.reading([]) == graph_statistics(path).flops
        if bundle.manifest.optimization != "none":  # else the reuse graph computes less of the modulation
            assert count.reading(features) == graph_statistics(bundle.graph_path(REUSE)).flops
        with pytest.raises(BundleError, match=r"does not compute feature\.x under this name"):
            count.reading(["feature.x"])


def test_a_site_costs_its_matrix_products(optimized: dict[str, Bundle]) -> None:
    """The tiny DiT has 16 tokens of 16 channels; its MLP is 4 times as wide."""
    found = Arithmetic(optimized["fold"])
    mlp = 2 * 2 * 16 * 16 * 64
    attention = 2 * 16 * 16 * (3 * 16 + 16) + 2 * 2 * 16 * 16 * 16
    kinds = [site.kind for site in optimized["fold"].manifest.cache_sites]
    wanted = [(attention if kind == "attention" else mlp) / found.full for kind in kinds]
    assert found.costs == pytest.approx(wanted)
    assert found.of_schedule(Schedule.fora(50, 3)) == pytest.approx(found.of_number(18, 50))
    assert found.of_number(18, 50) == pytest.approx(18 + 32 * found.reuse / found.full)


# -- the search --------------------------------------------------------------------------------------------------------


def calibration_of(bundle: Bundle, most_graphs: int = 8, **wanted: Any) -> LayerCalibration:
    pipeline = Pipeline(bundle, steps=STEPS).over(EagerFora(bundle, CPU))
    given = example_conditioning(pipeline.manifest, 4)
    return LayerCalibration(pipeline, given, Wanted(**{"images": 4, "full_steps": 5, **wanted}), most_graphs)


@pytest.mark.parametrize("most_graphs", [2, 3, 8])
def test_every_schedule_that_is_tried_has_the_arithmetic_and_the_graphs(
    most_graphs: int, optimized: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Schedule] = []
    psnr = Trials.psnr

    def kept(self: Trials, sampling: Any, images: Any) -> float:
        tried.append(sampling.schedule)
        return psnr(self, sampling, images)

    monkeypatch.setattr(Trials, "psnr", kept)
    calibration = calibration_of(optimized["fold"], most_graphs)
    lines = [*calibration.run()]
    assert lines[0] == "observing the errors of reuse"
    budget = calibration._arithmetic.of_number(5, STEPS)
    assert len({one.digest() for one in tried}) > 5
    for schedule in tried:
        assert calibration._arithmetic.of_schedule(schedule) <= budget
        assert len(schedule.masks) + 2 <= most_graphs
    assert calibration.best is not None
    assert any(one.masks for one in tried) == (most_graphs > 2)


def test_the_least_arithmetic_that_reaches_a_psnr(optimized: dict[str, Bundle]) -> None:
    calibration = calibration_of(optimized["fold"], full_steps=None, max_loss=40.0)
    assert [*calibration.run()]
    number, few = calibration._full_steps, calibration._few
    assert calibration._measured(calibration._with_number(number), few).psnr >= 40
    assert number == 2 or calibration._measured(calibration._with_number(number - 1), few).psnr < 40


def test_fewer_than_two_graphs_are_refused(optimized: dict[str, Bundle]) -> None:
    with pytest.raises(InputError, match="the number of graphs is 1; the full and the reuse graph are 2 already"):
        calibration_of(optimized["fold"], 1)


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_writes_a_schedule_and_says_how_to_export_it(digits: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "layers.json"
    command = ["calibrate", digits.folder, "--per-layer", "--full-steps", 6, "--steps", 16, "--num-images", 4]
    command += ["--max-graphs", 4, "-o", path]
    made = fora(*command, "--json")
    assert made.exit_code == 0, made.output
    found = json.loads(made.stdout)
    schedule = Schedule.from_file(path, digits.manifest.cache_sites)
    assert found["graphs"] == len(schedule.masks) + 2 <= 4
    assert schedule.masks
    rows = {row["label"]: row for row in found["compared"]}
    assert {"per-layer", "per-layer, SmoothCache's rule", "fora:3", "dense:6,0.3,forecast=2"} < rows.keys()
    assert len(rows) == 6, "and the best solver"
    assert rows["per-layer"]["arithmetic"] == found["arithmetic"] <= rows["dense:6,0.3,forecast=2"]["arithmetic"]
    best = max(row["psnr"] for label, row in rows.items() if label.startswith(("fora", "dense")))
    assert (best > rows["per-layer"]["psnr"]) == ("advice" in found)
    assert schedule.made_from["model"]["name"] == "digits"
    assert schedule.made_from["rule"] == found["rule"]
    assert not trials_file(path).exists()
    assert fora(*command).exit_code == 1, "the file exists"
    again = fora(*command, "--force")
    assert again.exit_code == 0, again.output
    assert f"fora-trt export digits --name digits-layers --schedule {path} --force" in again.stdout
    assert ("full and reuse steps alone are better here" in again.stdout) == ("advice" in found)
    assert Schedule.from_file(path, digits.manifest.cache_sites) == schedule


def test_ctrl_c_keeps_the_best_so_far_or_writes_nothing(
    optimized: dict[str, Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents_of = Trials._latents
    command = ["calibrate", optimized["fold"].folder, "--per-layer", "--full-steps", 5, "--steps", STEPS]
    command += ["--num-images", 4, "-o", tmp_path / "own.json"]
    for calls, written in ((0, False), (6, True)):
        computed: list[int] = []

        def interrupted(
            self: Trials, sampling: Any, images: Any, calls: int = calls, computed: list[int] = computed
        ) -> torch.Tensor:
            if len(computed) == calls:
                raise KeyboardInterrupt
            computed.append(len(images))
            return latents_of(self, sampling, images)

        monkeypatch.setattr(Trials, "_latents", interrupted)
        stopped = fora(*command)
        assert stopped.exit_code != 0
        assert (tmp_path / "own.json").exists() == written
    assert Schedule.from_file(tmp_path / "own.json").made_from["interrupted"]
    monkeypatch.setattr(Trials, "_latents", latents_of)
    other = fora(*command, "--max-graphs", 3)
    assert "is of an interrupted calibration with another max_graphs (8 instead of 3)" in " ".join(other.stderr.split())
    assert fora(*command).exit_code == 0
    assert not Schedule.from_file(tmp_path / "own.json").made_from["interrupted"]


MISTAKES: dict[str, tuple[list[object], int, str]] = {
    "graphs of no layers": (["--max-graphs", 4], 2, "--max-graphs has no effect: only --per-layer finds partial steps"),
    "one graph": (["--per-layer", "--max-graphs", 1], 2, "1 is not in the range x>=2"),
    "workers": (["--per-layer", "--workers", 2], 2, "--workers has no effect: with --per-layer the trials run in this"),
    "a backend": (["--per-layer", "--backend", "torch"], 2, "--backend has no effect: with --per-layer the trials run"),
    "trust alone": (["--trust-source"], 2, "--trust-source has no effect: the trials run the graphs of the bundle"),
    "trust of no factory": (["--per-layer", "--trust-source"], 1, "is no factory"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_a_sentence_and_writes_nothing(mistake: str, exported: Bundle, tmp_path: Path) -> None:
    options, status, message = MISTAKES[mistake]
    refused = fora("calibrate", exported.folder, "-o", tmp_path / "own.json", "--full-steps", 5, *options)
    assert refused.exit_code == status, refused.output
    assert message in " ".join(refused.stderr.split())
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no-such-checkpoint", "the PyTorch reference needs the checkpoint that"),
        ("my_package.model:make", "if you know the code and the bundle, give --trust-source"),
    ],
)
def test_a_source_that_cannot_be_had_is_a_sentence(
    source: str, message: str, bundle_copy: Path, tmp_path: Path
) -> None:
    manifest = Bundle.read(bundle_copy).manifest
    options = manifest.model.options.model_copy(update={"source": source})
    model = manifest.model.model_copy(update={"options": options})
    write_manifest(bundle_copy, manifest.model_copy(update={"model": model}))
    refused = fora("calibrate", bundle_copy, "--per-layer", "--full-steps", 5, "-o", tmp_path / "own.json")
    assert refused.exit_code == 1
    assert message in " ".join(refused.stderr.split())
    assert not (tmp_path / "own.json").exists()
