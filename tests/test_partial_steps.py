"""Partial steps: masks, their graphs, and trajectories like those of hooks that compute some layers and keep others."""

import json
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor

from fora_trt import Pipeline, Schedule
from fora_trt.bundle import Bundle, _check_schedule
from fora_trt.contract import CONDITIONING_GRAPHS, FULL, OPTIMIZATIONS, REUSE, CacheSite, Optimization, partial_name
from fora_trt.engines.tensorrt.library import TENSORRT_RTX, library_from_name
from fora_trt.engines.tensorrt.plan_builder import PlanOptions
from fora_trt.engines.tensorrt.plan_store import build_plans, default_profile, target_of
from fora_trt.errors import BundleError, ExportError, ScheduleError
from fora_trt.evaluate.eager_fora import EagerFora, PlainPredictor
from fora_trt.evaluate.export_check import GraphCheck
from fora_trt.evaluate.unfolded import UnfoldedFora
from fora_trt.evaluate.verify import graph_errors
from fora_trt.export.graphs import partial_from_full
from fora_trt.export.statistics import arithmetic_shares, graph_statistics
from fora_trt.export.write import bundle_from_model
from fora_trt.inspection import inspect_bundle
from fora_trt.masks import by_kind, plan_of
from fora_trt.models.sources import model_from_source
from fora_trt.models.spec import Model
from fora_trt.plan import FULL_STEP, REUSE_STEP, Step, forecast
from fora_trt.published_schedules.learning_to_cache import sites_of
from fora_trt.runtime.accumulate import AccumulatingWindow
from fora_trt.runtime.denoiser import Denoiser
from fora_trt.runtime.forecast import ForecastWindow
from fora_trt.runtime.interface import Predictor
from fora_trt.sampling.conditioning import example_conditioning
from tests.conftest import ON_CPU, TINY, save_transformer
from tests.routers import ddim20_routers, router_file, scores_of
from tests.shared import made_once, one_trace_for_all

CPU = torch.device("cpu")
STEPS, SCALE = 20, 1.5
TOLERANCE = 1e-5
"""Of the latents after every step, relative to the largest value of the reference."""

DEEP = {"num_layers": 28, "num_attention_heads": 2, "attention_head_dim": 4}

SITES = [
    CacheSite(f"blocks.{block}.{name}", kind, ())
    for block in range(3)
    for name, kind in (("attn", "attention"), ("mlp", "feed-forward"))
]
"""Cache sites of a network of three blocks."""

PATHS = [site.module for site in SITES]


def drawn_masks(paths: Sequence[str], seed: int = 3) -> list[set[str]]:
    """What each of `STEPS` steps computes: four masks, everything and nothing, in random order; all at first."""
    generator = random.Random(seed)
    masks = [{*generator.sample(paths, generator.randint(1, len(paths) - 1))} for _ in range(4)]
    drawn = [generator.choice([*masks, {*paths}, set()]) for _ in range(STEPS - 1)]
    assert all(mask in drawn for mask in masks)
    return [{*paths}, *drawn]


class Masked(PlainPredictor):
    """The network with a few lines around each cache site, which share nothing with the package.

    Step k computes the sites in `computed[k]`; the others return what they returned last.
    """

    def __init__(self, model: Model, bundle: Bundle, computed: Sequence[Collection[str]]) -> None:
        self.manifest, self.device = bundle.manifest, CPU
        self._model, self._computed, self._step = model, computed, -1
        for path in {path for one in computed for path in one}:
            module = model.module.get_submodule(path)
            module.forward = self._masked(path, module.forward)

    def _masked(self, path: str, forward: Any) -> Any:
        kept: list[Tensor] = []

        def masked(*args: Any, **kwargs: Any) -> Tensor:
            if path in self._computed[self._step]:
                kept[:] = [forward(*args, **kwargs)]
            return kept[0]

        return masked

    @torch.no_grad()
    def compute(self, step: Step, latents: Tensor, timestep: Tensor | float, **conditioning: Tensor) -> Tensor:
        self._step = (self._step + 1) % len(self._computed)
        given = {"latents": latents, "timestep": torch.as_tensor(timestep).float().expand(len(latents)), **conditioning}
        inputs = {one.name: given[one.name] for one in self._model.spec.inputs}
        return self._model.spec.call(self._model.module, inputs)


def latents_of(pipeline: Pipeline, scale: float) -> Tensor:
    """The latents of two images after each step."""
    seen: list[Tensor] = []
    given = example_conditioning(pipeline.manifest, 2)
    pipeline.sampler(pipeline.sampling())(given, [0, 1], scale, observe=lambda one: seen.append(one.clone()))
    return torch.stack(seen)


def check_equal(got: Tensor, want: Tensor, tolerance: float = TOLERANCE) -> None:
    largest = want.abs().flatten(1).amax(1)
    assert ((got - want).abs().flatten(1).amax(1) / largest).max() < tolerance


Masks = tuple[Bundle, Schedule, list[set[str]]]


def exported_with_masks(run_folder: Path, source: str, level: Optimization) -> Masks:
    """A bundle with the graphs of `drawn_masks`, its schedule and these masks."""

    def make(unfinished: Path) -> None:
        model = model_from_source(source)
        sites = [CacheSite(path, kind, ()) for path, kind in model.sites]
        schedule = Schedule.of_masks(drawn_masks([path for path, _ in model.sites]), sites)
        unfinished.mkdir()
        schedule.to_file(unfinished / "masks.json")
        with one_trace_for_all():
            for one in OPTIMIZATIONS:
                bundle_from_model(
                    model, unfinished / one, optimization=one, check=GraphCheck(),
                    schedule=str(unfinished / "masks.json"),
                )  # fmt: skip

    folder = made_once(run_folder / "export" / "masks" / Path(source).name, make)
    bundle = Bundle.open(folder / level)
    sites = bundle.manifest.cache_sites
    return bundle, Schedule.from_file(folder / "masks.json", sites), drawn_masks([site.module for site in sites])


@pytest.fixture(params=["digits", "dit"])
def source(request: pytest.FixtureRequest, pipeline_folder: Path) -> str:
    return "digits" if request.param == "digits" else str(pipeline_folder)


# -- masks -------------------------------------------------------------------------------------------------------------


def test_a_mask_of_all_sites_is_a_full_step_and_one_of_none_a_reuse_step() -> None:
    plan, masks = plan_of([PATHS, {PATHS[3], PATHS[0]}, (), [*PATHS[:1], PATHS[3]], PATHS[::-1]], SITES)
    name = partial_name([PATHS[3], PATHS[0]])
    assert plan == (FULL_STEP, Step(name), REUSE_STEP, Step(name), FULL_STEP)
    assert masks == {name: (PATHS[0], PATHS[3])}, "one graph for one set of sites, in the order of the network"
    with pytest.raises(ScheduleError, match=r"^the schedule computes blocks\.9\.mlp, which is no cache site of this"):
        plan_of([PATHS, ["blocks.9.mlp"]], SITES)
    for odd in ("blocks.0.mlp", None):
        with pytest.raises(ScheduleError, match=r"^what a step computes is .*; give a collection of module paths$"):
            plan_of([PATHS, odd], SITES)  # type: ignore[list-item]


def test_each_kind_of_site_has_an_interval_of_its_own() -> None:
    masks = by_kind(7, {"attention": 2, "feed-forward": 3}, SITES)
    assert [("a" if PATHS[0] in one else "") + ("m" if PATHS[1] in one else "") for one in masks] == [
        "am", "", "a", "m", "a", "", "am",
    ]  # fmt: skip
    assert all(one in ({*PATHS}, set(), {*PATHS[::2]}, {*PATHS[1::2]}) for one in masks)
    assert by_kind(4, {"attention": 9}, SITES)[1:] == [{*PATHS[1::2]}] * 2 + [{*PATHS}]
    text = Schedule.from_text("attention:2,feed-forward:3", 7, SITES)
    assert text.plan == plan_of(masks, SITES)[0]
    assert (text.full_steps, text.partial_steps, text.caches) == (2, 3, True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("attention:2,wings:3", "there is no schedule 'attention:2,wings:3'; give none, fora:N, "),
        ("attention:0", "'attention:0' in the schedule 'attention:0' is no interval from 1 to 8"),
        ("attention:9", "'attention:9' in the schedule 'attention:9' is no interval from 1 to 8"),
        ("attention:2,attention:3", "'attention:3' in the schedule 'attention:2,attention:3' gives the interval of"),
        ("attention:2.5", "there is no schedule 'attention:2.5'; give none, fora:N, "),
        ("l2c:", "the schedule 'l2c:' has not the form l2c:FILE[,threshold=T]"),
        ("l2c:x.pt,treshold=0.2", "the schedule 'l2c:x.pt,treshold=0.2' has not the form l2c:FILE[,threshold=T]"),
        ("l2c:x.pt,threshold=7", "the threshold in the schedule 'l2c:x.pt,threshold=7' is not between 0 and 1"),
        ("l2c:x.pt,threshold=nan", "the threshold in the schedule 'l2c:x.pt,threshold=nan' is not between 0 and 1"),
        ("l2c:nowhere.pt", "the router cannot be read: "),
        ("l2c:nowhere.pt,threshold=high", "'high' in the schedule 'l2c:nowhere.pt,threshold=high' is not a number"),
    ],
)
def test_text_forms_that_are_wrong(text: str, message: str) -> None:
    with pytest.raises(ScheduleError) as raised:
        Schedule.from_text(text, 8, SITES)
    assert str(raised.value).startswith(message)


def test_a_per_layer_schedule_needs_a_model() -> None:
    with pytest.raises(ScheduleError, match=r"^there is no schedule 'attention:2'; give .*, KIND:N,KIND:N,\.\.\., or "):
        Schedule.from_text("attention:2", 8)
    with pytest.raises(ScheduleError, match=r"^the schedule l2c:x\.pt says which layers of a model are computed; give"):
        Schedule.from_text("l2c:x.pt", 8)


def test_a_schedule_file_names_the_mask_of_each_step(tmp_path: Path) -> None:
    made = Schedule.of_masks([PATHS, PATHS[:2], (), PATHS[:1], PATHS[:2]], SITES)
    made.to_file(tmp_path / "made.json")
    for sites in (None, SITES):
        read = Schedule.from_file(tmp_path / "made.json", sites)
        assert (read.plan, read.masks) == (made.plan, made.masks)
    own = {"format_version": 1, "steps": ["full", "early", [1.0]], "masks": {"early": PATHS[2::-1], "unused": ["x"]}}
    (tmp_path / "own.json").write_text(json.dumps(own))
    read = Schedule.from_file(tmp_path / "own.json", SITES)
    assert (read.plan, read.masks) == plan_of([PATHS, PATHS[:3], ()], SITES), "names and order are the user's"
    own["masks"] = {"early": PATHS[::-1]}
    (tmp_path / "own.json").write_text(json.dumps(own))
    assert Schedule.from_file(tmp_path / "own.json", SITES).full == (True, True, False), "a mask of all sites"
    assert made.digest() != Schedule.of_masks([PATHS, PATHS[:2], (), PATHS[1:2], PATHS[:2]], SITES).digest()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"steps": ["full", "late"]},
            "step 1 is 'late'; expected 'full', a list of weights such as [1.0], or the name",
        ),
        (
            {"masks": {"early": []}},
            "the mask 'early' is []; expected a list of module paths, not empty",
        ),
        (
            {"masks": {"full": ["blocks.0.attn"]}},
            "'masks' must be an object with a list of module paths by name",
        ),
        ({"masks": ["early"]}, "'masks' must be an object with a list of module paths by name"),
        ({"masks": {"early": "blocks.0.attn"}}, "the mask 'early' is 'blocks.0.attn'; expected a list of module paths"),
        (
            {"masks": {"early": ["blocks.7.attn"]}},
            "the schedule computes blocks.7.attn, which is no cache site of this",
        ),
        ({"steps": ["early", "full"]}, "a schedule must begin with a full step"),
    ],
)
def test_files_with_wrong_masks(tmp_path: Path, change: Mapping[str, Any], message: str) -> None:
    good = {"format_version": 1, "steps": ["full", "early"], "masks": {"early": ["blocks.0.attn"]}}
    (tmp_path / "wrong.json").write_text(json.dumps({**good, **change}))
    with pytest.raises(ScheduleError) as raised:
        Schedule.from_file(tmp_path / "wrong.json", SITES)
    assert f"wrong.json is invalid: {message}" in str(raised.value)


def test_the_work_of_a_schedule_counts_partial_steps_by_their_share() -> None:
    schedule = Schedule.of_masks([PATHS, PATHS[:2], (), PATHS[:1], PATHS], SITES)
    first, second = schedule.masks
    assert schedule.work({first: 0.5, second: 0.25}) == 2.75
    assert schedule.ideal_speedup({first: 0.5, second: 0.25}) == 5 / 2.75
    with pytest.raises(KeyError):
        schedule.work()
    assert Schedule.fora(9, 3).ideal_speedup() == 9 / 4


def test_a_forecast_reads_the_last_steps_that_compute_anything() -> None:
    some = Step(partial_name(PATHS[:1]))
    plan = forecast((FULL_STEP, some, REUSE_STEP, some, REUSE_STEP), 1)
    assert [step.weights for step in plan] == [(), (), (2.0, -1.0), (), (1.5, -0.5)]


# -- routers of Learning-to-Cache --------------------------------------------------------------------------------------


def test_every_second_step_from_the_last_consults_its_router(tmp_path: Path) -> None:
    routers = [{0, 3}, {1}, set(), {2}, {5}, {4}]
    path = router_file(tmp_path / "router.pt", [scores_of(one) for one in routers])
    schedule = Schedule.from_text(f"l2c:{path}", 6, SITES)
    everything = {*range(6)}
    computed = [everything, {5}, everything, set(), everything, {0, 3}]
    assert schedule.plan == plan_of([[PATHS[layer] for layer in one] for one in computed], SITES)[0]
    assert Schedule.from_text(f"l2c:{path},threshold=0.9", 6, SITES).partial_steps == 0, "sigmoid(1) is 0.73"
    with pytest.raises(ScheduleError, match=r"is for 6 model evaluations, but this trajectory has 8"):
        Schedule.from_text(f"l2c:{path}", 8, SITES)


def test_layer_2k_is_the_attention_of_block_k() -> None:
    shuffled = sorted(SITES, key=lambda site: site.kind)  # all attentions before all MLPs
    assert sites_of([[0, 3]], shuffled) == [{"blocks.0.attn", "blocks.1.mlp"}]
    with pytest.raises(ScheduleError, match="this one has 3 cache sites of the kind attention and 2 of the kind feed"):
        sites_of([[0]], SITES[:-1])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {}}, "contains no 'routers'; give the file of a router of Learning-to-Cache"),
        (
            {"routers": {"0.prob": torch.ones(6)}},
            "has routers for 1 steps; the first step must be one without a router",
        ),
        ({"routers": {"1.prob": torch.ones(6)}}, "has no vector of finite numbers '0.prob' among its 1 routers"),
        ({"routers": {"0.prob": torch.full((6,), float("nan"))}}, "has no vector of finite numbers '0.prob'"),
        ({"routers": dict.fromkeys(("0.prob", "1.prob"), torch.ones(56))}, "for 56 layers; this network has 6 cache s"),
    ],
)
def test_files_that_are_no_routers(tmp_path: Path, content: Mapping[str, Any], message: str) -> None:
    torch.save(content, tmp_path / "odd.pt")
    with pytest.raises(ScheduleError) as raised:
        Schedule.from_text(f"l2c:{tmp_path / 'odd.pt'}", 2, SITES)
    assert message in str(raised.value)


# -- graphs and trajectories -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", OPTIMIZATIONS)
def test_trajectories_are_those_of_hooks(run_folder: Path, source: str, level: Optimization) -> None:
    bundle, schedule, masks = exported_with_masks(run_folder, source, level)
    assert len(bundle.manifest.partial_graphs) == 4
    reference = Masked(model_from_source(source), bundle, masks)
    for backend in ON_CPU:
        pipeline = Pipeline(bundle, backend=backend, steps=STEPS, schedule=schedule)
        for scale in (1.0, SCALE):
            want = latents_of(pipeline.over(reference), scale)
            check_equal(latents_of(pipeline, scale), want)
            if backend == "torch":
                check_equal(latents_of(pipeline.over(EagerFora(bundle, CPU)), scale), want)
                check_equal(latents_of(pipeline.over(UnfoldedFora(bundle, CPU)), scale), want)
    plain = latents_of(replace_schedule(pipeline, "none"), SCALE)
    assert (plain - want).abs().max() > 0.01 * want.abs().max(), "the masks change what is made"


def replace_schedule(pipeline: Pipeline, schedule: str) -> Pipeline:
    pipeline.config = replace(pipeline.config, schedule=schedule)
    return pipeline


@pytest.mark.slow
def test_compiled_graphs_too(run_folder: Path, source: str) -> None:
    bundle, schedule, masks = exported_with_masks(run_folder, source, "fold")
    pipeline = Pipeline(bundle, backend="torch-compile", steps=STEPS, schedule=schedule)
    want = latents_of(pipeline.over(Masked(model_from_source(source), bundle, masks)), SCALE)
    check_equal(latents_of(pipeline, SCALE), want)


@pytest.mark.parametrize("order", [1, 2])
def test_forecasts_after_partial_steps(run_folder: Path, order: int) -> None:
    """Both kinds of windows: ONNX Runtime accumulates sums, PyTorch does not."""
    bundle, schedule, _ = exported_with_masks(run_folder, "digits", "fold")
    windows = []
    for backend in ON_CPU:
        pipeline = Pipeline(bundle, backend=backend, steps=STEPS, schedule=schedule.with_forecast(order))
        check_equal(latents_of(pipeline, SCALE), latents_of(pipeline.over(EagerFora(bundle, CPU)), SCALE), 1e-4)
        denoiser = pipeline.denoiser
        assert isinstance(denoiser, Denoiser)
        windows.append(type(denoiser.window))
    assert windows == [AccumulatingWindow, ForecastWindow]


def test_a_bundle_that_does_not_fold_is_not_exported_with_such_a_forecast(tmp_path: Path) -> None:
    with one_trace_for_all(), pytest.raises(ScheduleError, match="which needs folded sums, and the level of x is cond"):
        bundle_from_model(
            model_from_source("digits"), tmp_path / "x", schedule="attention:2,feed-forward:3,forecast=1",
            check=GraphCheck(), optimization="conditioning",
        )  # fmt: skip
    assert not [*tmp_path.iterdir()]


def test_a_bundle_that_does_not_fold_cannot_forecast_between_partial_steps(run_folder: Path) -> None:
    bundle, schedule, _ = exported_with_masks(run_folder, "digits", "none")
    denoiser = Pipeline(bundle, backend="torch").denoiser
    assert isinstance(denoiser, Denoiser)
    with pytest.raises(ScheduleError, match=r"^none cannot forecast between partial steps: it does not fold sums; exp"):
        denoiser.layout_of(schedule.with_forecast(1).plan)


def test_guidance_may_begin_within_a_window(run_folder: Path) -> None:
    bundle, schedule, _ = exported_with_masks(run_folder, "digits", "fold")
    settings: dict[str, Any] = {"steps": STEPS, "schedule": schedule, "guidance_scale": SCALE}
    pipeline = Pipeline(bundle, backend="onnxruntime", guidance_interval=(4, 11), **settings)
    made = pipeline(class_labels=[3, 5])
    reference: Predictor = EagerFora(bundle, CPU)
    check_equal(made.latents[None], pipeline.over(reference)(class_labels=[3, 5]).latents[None])


def test_weights_are_stored_once(run_folder: Path, digits: Bundle) -> None:
    bundle, _, _ = exported_with_masks(run_folder, "digits", "fold")
    stored = {file: (bundle.folder / file).stat().st_size for file in bundle.manifest.files}
    data = sum(size for file, size in stored.items() if file.endswith(".data"))
    plain = sum((digits.folder / file).stat().st_size for file in digits.manifest.files if file.endswith(".data"))
    assert data <= 1.05 * plain
    assert "full.onnx.data" in stored
    for name in bundle.manifest.partial_graphs:
        assert f"{name}.onnx.data" not in stored
        places = {
            entry.value
            for tensor in onnx.load(bundle.graph_path(name), load_external_data=False).graph.initializer
            for entry in tensor.external_data
            if entry.key == "location"
        }
        assert places == {"full.onnx.data"}
        assert stored[f"{name}.onnx"] < 0.05 * data, "graphs contain no weights"


def test_partial_graphs_compute_their_sites_alone(run_folder: Path) -> None:
    bundle, schedule, _ = exported_with_masks(run_folder, "digits", "fold")
    manifest, shares = bundle.manifest, arithmetic_shares(bundle)
    full = graph_statistics(bundle.graph_path(FULL)).flops
    attentions = {site.module for site in manifest.cache_sites if site.kind == "attention"}
    assert schedule.masks == manifest.partial_graphs
    shown = inspect_bundle(bundle)
    assert shown["sites"] == {site.module: site.kind for site in manifest.cache_sites}
    for name, found in shown["partial_graphs"].items():
        assert (found["computed"], found["arithmetic_kept"]) == (manifest.partial_graphs[name], shares[name])
        assert sum(found["kinds"].values()) == len(found["computed"])
    for name, computed in manifest.partial_graphs.items():
        nodes = onnx.load(bundle.graph_path(name), load_external_data=False).graph.node
        assert sum(node.op_type == "Attention" for node in nodes) == len(attentions & {*computed})
        assert shares[name] == graph_statistics(bundle.graph_path(name)).flops / full
        assert shares[REUSE] < shares[name] < 1
    partial = sum(shares[step.graph] for step in schedule.plan if step.is_partial)
    assert schedule.ideal_speedup(shares) == pytest.approx(STEPS / (schedule.full_steps + partial))


def test_verify_compares_a_step_of_each_graph(run_folder: Path) -> None:
    bundle, _, _ = exported_with_masks(run_folder, "digits", "fold")
    pipeline = Pipeline(bundle, backend="torch")
    denoiser = pipeline.denoiser
    assert isinstance(denoiser, Denoiser)
    errors = dict(graph_errors(denoiser, EagerFora(bundle, CPU), 2))
    assert [*errors] == [FULL, *bundle.manifest.partial_graphs, REUSE]
    assert all(error.relative < TOLERANCE for error in errors.values())


def test_a_partial_graph_that_is_wrong_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check runs the partial graphs: those that compute one site more differ, and nothing is left."""
    monkeypatch.setattr(
        "fora_trt.export.traced.partial_from_full",
        lambda full, name, features: partial_from_full(full, name, {*sorted(features)[1:]}),
    )
    with one_trace_for_all(), pytest.raises(ExportError, match=r"its partial-\w{10} graph differs from PyTorch by"):
        bundle_from_model(
            model_from_source("digits"), tmp_path / "wrong", schedule="attention:2,feed-forward:3", check=GraphCheck()
        )
    assert not (tmp_path / "wrong").exists()


# -- Learning-to-Cache as a whole --------------------------------------------------------------------------------------


class ReferenceRule(PlainPredictor):
    """Their rule: an odd step computes all layers; an even one those that its router names, the others as before it.

    Steps are counted from the last one, 19 to 0.
    """

    def __init__(self, model: Model, bundle: Bundle, routers: Sequence[Tensor]) -> None:
        self.manifest, self.device = bundle.manifest, CPU
        self._model, self._step = model, 20
        self._active = [{*torch.nonzero(torch.sigmoid(one) > 0.1).flatten().tolist()} for one in routers]
        for block, layer in enumerate(model.module.get_submodule("transformer_blocks").children()):
            attention, mlp = layer.get_submodule("attn1"), layer.get_submodule("ff")
            for number, module in ((2 * block, attention), (2 * block + 1, mlp)):
                module.forward = self._reusing(number, module.forward)

    def _reusing(self, number: int, forward: Any) -> Any:
        cache: dict[str, Tensor] = {}

        def reusing(*args: Any, **kwargs: Any) -> Tensor:
            if self._step % 2 == 1 or number in self._active[self._step]:
                cache["latest"] = forward(*args, **kwargs)
            return cache["latest"]

        return reusing

    @torch.no_grad()
    def compute(self, step: Step, latents: Tensor, timestep: Tensor | float, **conditioning: Tensor) -> Tensor:
        self._step = (self._step or 20) - 1
        times = torch.as_tensor(timestep).expand(len(latents))
        inputs = {"latents": latents, "timestep": times, **conditioning}
        return self._model.spec.call(self._model.module, inputs)


@pytest.mark.slow
def test_a_router_of_the_published_form_has_seven_graphs(run_folder: Path, tmp_path: Path) -> None:
    """28 blocks, as DiT-XL/2 has."""
    folder = made_once(run_folder / "checkpoints" / "deep-dit", lambda one: save_transformer(one, {**TINY, **DEEP}))
    routers = ddim20_routers(56)
    file = router_file(tmp_path / "DDIM20_router.pt", routers)
    bundle = bundle_from_model(
        model_from_source(str(folder)), tmp_path / "deep", schedule=f"l2c:{file}", check=GraphCheck()
    )
    assert (len({*bundle.manifest.graphs} - {*CONDITIONING_GRAPHS}), len(bundle.manifest.partial_graphs)) == (7, 5)
    reopened = Bundle.open(tmp_path / "deep", trust_source=True)
    file.unlink()  # the bundle has what it said
    for backend in ON_CPU:
        pipeline = Pipeline(reopened, backend=backend, steps=20)
        schedule = pipeline.sampling().schedule
        assert (schedule.full_steps, schedule.partial_steps) == (11, 7)
        reference = ReferenceRule(model_from_source(str(folder)), bundle, routers)
        for scale in (1.0, SCALE):
            check_equal(latents_of(pipeline, scale), latents_of(pipeline.over(reference), scale))


@pytest.mark.slow
def test_tensorrt_rtx_builds_all_graphs_of_a_router(dit_s_router: Bundle, tmp_path: Path) -> None:
    target = target_of(library_from_name(TENSORRT_RTX), None)
    plans, _ = build_plans(dit_s_router, target, PlanOptions(profiles=(default_profile(2),)), tmp_path / "engines")
    assert plans.manifest.plans.keys() == dit_s_router.manifest.graphs.keys()
    assert len(plans.manifest.plans) == 9, "two graphs of the conditioning, seven of steps"
    sizes = {name: plans.manifest.files[one.file].size for name, one in plans.manifest.plans.items()}
    partial = {name: len(computed) for name, computed in dit_s_router.manifest.partial_graphs.items()}
    assert [*sorted(partial, key=partial.__getitem__)] == [*sorted(partial, key=sizes.__getitem__)]
    assert all(sizes["reuse"] < sizes[name] < sizes["full"] for name in partial)


# -- bundles -----------------------------------------------------------------------------------------------------------


def test_a_schedule_whose_graphs_are_not_in_the_bundle_is_refused(run_folder: Path, digits: Bundle) -> None:
    _, schedule, _ = exported_with_masks(run_folder, "digits", "fold")
    wanted = {
        schedule: r"has 4 kinds of partial steps without a graph in digits; .* --schedule \S+masks\.json --force$",
        "attention:2,feed-forward:3": r"has 2 kinds of .* --name digits --schedule attention:2,feed-forward:3 --fo",
        "attention:2": "^the schedule has a kind of partial step without a graph in digits; export it with the ",
    }
    for given, message in wanted.items():
        pipeline = Pipeline(digits, steps=STEPS, schedule=given)
        with pytest.raises(ScheduleError, match=message):
            pipeline.sampling()
    denoiser = Pipeline(digits, backend="torch").denoiser
    assert isinstance(denoiser, Denoiser)
    with pytest.raises(ScheduleError, match=r"--name digits --schedule SCHEDULE --force$"):
        denoiser.layout_of(schedule.plan)


def test_a_copy_takes_only_schedules_whose_graphs_there_are(run_folder: Path, digits: Bundle, tmp_path: Path) -> None:
    target = tmp_path / "copy"
    with pytest.raises(ScheduleError, match="has a kind of partial step without a graph in digits; export it with the"):
        digits.copy(target, "attention:2")
    assert not target.exists()
    bundle, schedule, _ = exported_with_masks(run_folder, "digits", "fold")
    bundle.copy(target, "fora:4")
    assert Bundle.open(target).schedule == "fora:4"
    bundle.copy(target, schedule)
    assert Pipeline(Bundle.open(target), steps=STEPS).sampling().schedule == schedule


def test_a_bundle_uses_the_schedule_that_it_was_exported_with(run_folder: Path) -> None:
    bundle, schedule, _ = exported_with_masks(run_folder, "digits", "fold")
    made = Pipeline(bundle, backend="onnxruntime", steps=STEPS)(class_labels=[1])
    assert made.sampling.schedule.plan == schedule.plan
    assert {*made.trajectory.of_graphs} == {FULL, REUSE, *schedule.masks}
    assert made.trajectory.median_milliseconds().keys() == {f"{graph}_step_ms" for graph in made.trajectory.of_graphs}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda graphs, sites: graphs | {"partial-0123456789": sites[:2]}, "does not exist, or has not the name of"),
        (
            lambda graphs, sites: graphs | {partial_name(sites): sites},
            "does not exist, or has not the name of its cache sites",
        ),
        (lambda graphs, sites: {}, "there is a graph 'partial-"),
    ],
)
def test_manifests_whose_partial_graphs_do_not_fit(run_folder: Path, change: Any, message: str) -> None:
    bundle, _, _ = exported_with_masks(run_folder, "digits", "fold")
    content = bundle.manifest.model_dump(mode="json")
    every = [one["module"] for one in content["cache_sites"]]
    content["partial_graphs"] = change(dict(bundle.manifest.partial_graphs), every)
    with pytest.raises(ValueError, match=message):
        type(bundle.manifest).model_validate(content)


def test_a_manifest_cannot_name_a_router(run_folder: Path, tmp_path: Path) -> None:
    """A bundle of others makes no file be read."""
    bundle, _, _ = exported_with_masks(run_folder, "digits", "fold")
    named = bundle.manifest.model_copy(update={"schedule": "l2c:/etc/passwd"})
    with pytest.raises(BundleError, match=r"'l2c:/etc/passwd' is a file; only schedule\.json of the bundle is read"):
        _check_schedule(tmp_path, named, "export it again")
