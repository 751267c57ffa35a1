"""What is taken out of the loop: the graphs that come of it, and that they compute the same."""

import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from click.testing import CliRunner
from diffusers import DiTPipeline
from torch import Tensor, nn

from fora_trt import Denoiser, InputSpec, ModelSpec, Schedule, TensorSpec, load
from fora_trt.bundle import Bundle, GraphError, GraphRecord
from fora_trt.cli import main
from fora_trt.contract import Optimization, Role
from fora_trt.errors import ExportError, ScheduleError
from fora_trt.evaluate.export_check import GraphCheck
from fora_trt.evaluate.verify import compare_with_pytorch
from fora_trt.export.check import Measured
from fora_trt.export.optimize import pooled_inputs
from fora_trt.export.traced import TracedModel
from fora_trt.export.write import bundle_from_model
from fora_trt.models.sources import model_from_source
from fora_trt.models.spec import Model
from fora_trt.pipeline import Pipeline
from fora_trt.sampling.conditioning import conditioning_of_classes, example_conditioning
from fora_trt.sampling.guidance import Guidance
from fora_trt.sampling.loop import Sampler
from fora_trt.sampling.schedulers import scheduler_from_config
from tests.shared import traced_once
from tests.test_denoiser import noting

LEVELS: tuple[Optimization, ...] = ("conditioning", "fold")
LABELS = [3, 999, 3]


def test_inputs_of_one_vector_per_sample_are_hoisted_and_latents_and_prompt_tokens_are_not() -> None:
    shapes = {"timestep": (), "pooled": (9,), "token": (1, 9), "latents": (9,), "prompt": (3, 9), "image": (1, 4, 4)}
    floats = [TensorSpec(name, "float32", ("batch", *shape)) for name, shape in shapes.items()]
    integers = [TensorSpec("label", "int64", ("batch",)), TensorSpec("mask", "int64", ("batch", 3))]
    assert pooled_inputs([*floats, *integers]) == ["timestep", "pooled", "token", "label"]


@pytest.fixture(scope="module")
def bundles(exported: Bundle, optimized: dict[str, Bundle]) -> dict[str, Bundle]:
    return {"none": exported, **optimized}


def pipeline_of(
    bundle: Bundle, steps: int = 50, scheduler: str | None = None, backend: str = "onnxruntime"
) -> Pipeline:
    return Pipeline(bundle, steps=steps, scheduler=scheduler, backend=backend, device="cpu")


def denoiser_of(pipeline: Pipeline) -> Denoiser:
    assert isinstance(pipeline.denoiser, Denoiser)
    return pipeline.denoiser


def sampler_of(pipeline: Pipeline, schedule: Schedule | str) -> Sampler:
    return pipeline.sampler(pipeline.sampling(schedule=schedule))


def latents_by(sampler: Sampler, guidance: Guidance | float = 2.0) -> Tensor:
    given = conditioning_of_classes(sampler.denoiser.manifest, LABELS)
    return sampler(given, range(len(LABELS)), guidance).latents


def latents(pipeline: Pipeline, schedule: Schedule | str, guidance: Guidance | float = 2.0) -> Tensor:
    return latents_by(sampler_of(pipeline, schedule), guidance)


def graph_of(bundle: Bundle, name: str) -> ir.Graph:
    return ir.load(bundle.graph_path(name)).graph


def kinds(graph: ir.Graph) -> list[str]:
    return [node.op_type for node in graph]


def test_what_the_timestep_decides_is_computed_before_the_loop(optimized: dict[str, Bundle]) -> None:
    for bundle in optimized.values():
        graphs = bundle.manifest.graphs
        assert [*graphs] == ["conditioning", "full_conditioning", "full", "reuse"]
        assert [one.name for one in graphs["conditioning"].inputs] == ["timestep", "class_labels"]
        for name in ("full", "reuse"):
            assert "Gemm" not in kinds(graph_of(bundle, name)), "every projection of the conditioning is gone"
            assert not {"timestep", "class_labels"} & {one.name for one in graphs[name].inputs}
        # gates of three adaLN projections and all of the last one's, two layers of each of three embedders
        assert kinds(graph_of(bundle, "conditioning")).count("Gemm") == 3 + 1 + 3 * 2
        assert kinds(graph_of(bundle, "full_conditioning")).count("Gemm") == 3, "shifts and scales"
        for name in ("conditioning", "full_conditioning"):
            assert len(graphs[name].outputs) <= 3, "equal shapes with equal readers are stacked"
        passed = {one.name for one in graphs["conditioning"].outputs}
        assert {one.name for one in graphs["full_conditioning"].inputs} < passed


def test_the_manifest_says_what_every_tensor_is(bundles: dict[str, Bundle]) -> None:
    def roles_of(graph: GraphRecord) -> list[list[Role]]:
        return [[one.role for one in edges] for edges in (graph.inputs, graph.outputs)]

    roles = {
        level: {name: roles_of(graph) for name, graph in bundle.manifest.graphs.items()}
        for level, bundle in bundles.items()
    }
    given, predicted, features = ["latents", "timestep", "conditioning"], ["prediction"], ["feature"] * 6
    assert roles["none"] == {"full": [given, predicted + features], "reuse": [given + features, predicted]}
    assert roles["conditioning"]["conditioning"][0] == roles["fold"]["conditioning"][0] == given[1:]
    for level in LEVELS:
        passed = [role for name in ("conditioning", "full_conditioning") for role in roles[level][name][1]]
        assert {*passed, *roles[level]["full_conditioning"][0]} == {"hoisted"}
    assert roles["conditioning"]["full"][1] == predicted + features
    assert {*roles["conditioning"]["reuse"][0]} == {"latents", "feature", "hoisted"}
    assert {*roles["fold"]["full"][0]} == {"latents", "hoisted"}
    assert roles["fold"]["full"][1] == ["prediction", "sum"]
    assert roles["fold"]["reuse"] == [["latents", "sum", "hoisted"], predicted]


def test_no_weight_is_in_two_graphs(optimized: dict[str, Bundle], exported: Bundle) -> None:
    """Of the projections each graph has its part, of the embedders one graph has all."""

    def numbers(bundle: Bundle) -> int:
        graphs = [graph_of(bundle, name) for name in bundle.manifest.graphs if name != "reuse"]
        constants = [one.const_value for graph in graphs for one in graph.initializers.values() if one.const_value]
        return sum(one.size for one in constants if len(one.shape) == 2)

    assert numbers(optimized["conditioning"]) == numbers(exported)


def test_the_sum_of_the_features_is_all_that_a_folded_reuse_step_reads(optimized: dict[str, Bundle]) -> None:
    manifest = optimized["fold"].manifest
    assert [(one.name, one.shape) for one in manifest.graphs["full"].outputs[1:]] == [
        ("window.folded.0", ("window", "batch", 16, 16))
    ]
    assert [one.name for one in manifest.graphs["reuse"].inputs] == ["latents", "folded.0", "conditioning.1"]
    assert [one.name for one in optimized["conditioning"].manifest.graphs["full"].outputs[1:]] == [
        feature.name for feature in manifest.features()
    ]
    nodes = kinds(graph_of(optimized["fold"], "full"))
    last = max(k for k, kind in enumerate(nodes) if kind == "Attention")
    assert nodes[:last].count("Mul") > 2 * 2, "a feature is added up when it was computed, not at the end"


@pytest.mark.parametrize("interval", [2, 3, 5])
def test_all_levels_give_the_same_latents(interval: int, bundles: dict[str, Bundle]) -> None:
    plain = latents(pipeline_of(bundles["none"]), f"fora:{interval}")
    for level in LEVELS:
        got = latents(pipeline_of(bundles[level]), f"fora:{interval}")
        assert GraphError.between(got, plain).relative < 1e-5
    assert GraphError.between(latents(pipeline_of(bundles["none"]), "none"), plain).relative > 1e-3


@pytest.mark.slow
def test_digits_are_the_same_at_every_level(digits_by_level: dict[Optimization, Bundle]) -> None:
    assert [bundle.manifest.optimization for bundle in digits_by_level.values()] == ["none", *LEVELS]
    pipelines = {level: pipeline_of(bundle) for level, bundle in digits_by_level.items()}
    given = example_conditioning(digits_by_level["none"].manifest, 4)
    for interval in (2, 3, 5):
        samplers = {level: sampler_of(pipeline, f"fora:{interval}") for level, pipeline in pipelines.items()}
        ended = {level: sampler(given, range(4), 1.5).latents for level, sampler in samplers.items()}
        for level in LEVELS:
            error = (ended[level] - ended["none"]).abs().max().item()
            print(f"{level} at interval {interval}: {error:.1e}")
            assert error < 1e-4


@pytest.mark.parametrize("scheduler", ["ddpm", "heun", "pndm"])
def test_schedulers_with_other_timesteps_and_more_calls(scheduler: str, bundles: dict[str, Bundle]) -> None:
    pipelines = {level: pipeline_of(bundle, 12, scheduler) for level, bundle in bundles.items()}
    schedule = Schedule.fora(pipelines["none"].sampling(schedule="none").nfe, 3)
    plain = latents(pipelines["none"], schedule)
    for level in LEVELS:
        assert GraphError.between(latents(pipelines[level], schedule), plain).relative < 1e-5


@pytest.mark.parametrize("guidance", [1.0, Guidance(2.0, 0, 6), Guidance(2.0, 4, 9), Guidance(2.0, 2, None)])
def test_guidance_on_some_steps_changes_the_batch_within_windows(
    guidance: Guidance | float, bundles: dict[str, Bundle]
) -> None:
    plain = latents(pipeline_of(bundles["none"], 12), "fora:4", guidance)
    for level in LEVELS:
        pipeline = pipeline_of(bundles[level], 12)
        sampler = sampler_of(pipeline, "fora:4")
        for other in (sampler_of(pipeline, "fora:6"), sampler):
            latents_by(other, 2.0)  # leaves other tensors behind
        assert GraphError.between(latents_by(sampler, guidance), plain).relative < 1e-5


@pytest.mark.parametrize("level", LEVELS)
def test_verify_compares_every_graph(level: str, optimized: dict[str, Bundle]) -> None:
    for backend in ("onnxruntime", "torch"):
        pipeline = pipeline_of(optimized[level], 10, backend=backend)
        for comparison in compare_with_pytorch(pipeline, ["none", "fora:3"]):
            assert comparison.error.relative < 1e-5, comparison


def test_tensors_stay_where_they_are_from_trajectory_to_trajectory(optimized: dict[str, Bundle]) -> None:
    pipeline = pipeline_of(optimized["fold"], 12)
    given = conditioning_of_classes(pipeline.manifest, LABELS)

    def generation(schedule: str) -> object:
        return sampler_of(pipeline, schedule).begin(given, range(len(LABELS)), Guidance(2.0)).run.generation

    def addresses() -> dict[str, int]:
        window = denoiser_of(pipeline).window
        assert window is not None
        return {name: one.data_ptr() for name, one in window.buffers.tensors.items()}

    first = latents(pipeline, "fora:4")
    captured, before = generation("fora:4"), addresses()
    assert torch.equal(latents(pipeline, "fora:4"), first)
    assert generation("fora:4") == captured, "what was captured stays valid"
    assert addresses() == before
    for schedule in ("none", "fora:3"):
        latents(pipeline, schedule)
        assert generation(schedule) != captured, "another window is bound in other shapes"
        assert {*addresses().values()} & {*before.values()}, "in the memory of the longer one"
    assert torch.equal(latents(pipeline, "fora:4"), first), "a longer one again, in the memory that is there"
    assert addresses() == before

    each = {schedule: generation(schedule) for schedule in ("none", "fora:3", "fora:4")}
    assert len({*each.values()}) == 3
    for schedule, known in each.items():
        latents(pipeline, schedule)
        assert generation(schedule) == known, "of a length that was there before, what was captured stays valid"


def test_memory_for_features_is_the_length_of_the_window(bundles: dict[str, Bundle]) -> None:
    def kept(level: str) -> dict[str, tuple[int, ...]]:
        pipeline = pipeline_of(bundles[level], 9)
        latents(pipeline, "fora:3")
        window = denoiser_of(pipeline).window
        assert window is not None
        outputs = [name for name in window.full.outputs if name != "noise_prediction"]
        return {name: tuple(window.buffers.tensors[name].shape) for name in outputs}

    assert len(kept("none")) == 6
    assert kept("fold") == {"window.folded.0": (2, 6, 16, 16)}


def test_longer_windows_than_engines_admit_become_full_steps(
    optimized: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = pipeline_of(optimized["fold"], 12)
    wanted = latents(pipeline, Schedule.from_flags(k % 4 in (0, 3) for k in range(12)))
    denoiser_of(pipeline).engines["full"].longest_window = 2
    message = "the plans support sums for at most 2 reuse steps per full step: 6 of 12 steps run in full instead of 3"
    with pytest.warns(UserWarning, match=message):
        got = latents(pipeline, Schedule.from_flags(k % 4 == 0 for k in range(12)))
    assert torch.equal(got, wanted)

    schedule = Schedule.from_flags(k % 4 == 0 for k in range(8))
    denoiser = load(optimized["fold"], schedule=schedule, backend="onnxruntime", device="cpu")
    denoiser.engines["full"].longest_window = 2
    ran: list[str] = []
    for name in ("full", "reuse"):
        engine = denoiser.engines[name]
        monkeypatch.setattr(engine, "bind", noting(ran, name, engine.bind))
    denoiser.reset(timesteps=torch.linspace(900, 100, 8))
    with pytest.warns(UserWarning, match="4 of 8 steps run in full instead of 2"):
        for t in torch.linspace(900, 100, 8):
            denoiser(torch.randn(1, 4, 8, 8), t, class_labels=torch.tensor([1]))
    assert ran == ["full", "reuse", "reuse", "full"] * 2


def stepped(
    bundle: Bundle, schedule: Schedule, labels: Callable[[int], list[int]], timesteps: Tensor | None
) -> list[Tensor]:
    denoiser = load(bundle, schedule=schedule, backend="onnxruntime", device="cpu")
    denoiser.reset(timesteps=timesteps)
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(schedule.steps, 3, 4, 8, 8, generator=generator)
    times = torch.linspace(900, 100, schedule.steps)
    return [denoiser(noise[k], times[k], class_labels=torch.tensor(labels(k))).clone() for k in range(schedule.steps)]


@pytest.mark.filterwarnings("error")
def test_called_step_by_step_with_timesteps_that_were_said(bundles: dict[str, Bundle]) -> None:
    schedule = Schedule.fora(7, 3)
    plain = stepped(bundles["none"], schedule, lambda k: LABELS, None)
    for level, timesteps in (("conditioning", None), ("fold", torch.linspace(900, 100, 7))):
        got = stepped(bundles[level], schedule, lambda k: LABELS, timesteps)
        torch.testing.assert_close(torch.stack(got), torch.stack(plain), rtol=1e-5, atol=1e-5)


def test_steps_that_were_not_foreseen_are_full_and_say_so(bundles: dict[str, Bundle]) -> None:
    schedule, uncached = Schedule.fora(7, 3), Schedule.fora(7, 1)
    with pytest.warns(
        UserWarning, match="running a full step instead of a reuse step: this timestep was not announced"
    ):
        got = stepped(bundles["fold"], schedule, lambda k: LABELS, None)
    torch.testing.assert_close(got, stepped(bundles["none"], uncached, lambda k: LABELS, None), rtol=1e-5, atol=1e-5)

    def changing(k: int) -> list[int]:
        return LABELS if k < 2 else [1, 2, 4]  # within a window

    flags = Schedule.from_flags(full or k == 2 for k, full in enumerate(schedule.full))
    with pytest.warns(UserWarning, match="keep the conditioning"):
        got = stepped(bundles["fold"], schedule, changing, torch.linspace(900, 100, 7))
    torch.testing.assert_close(got, stepped(bundles["none"], flags, changing, None), rtol=1e-5, atol=1e-5)


def test_samples_may_have_timesteps_of_their_own(bundles: dict[str, Bundle]) -> None:
    inputs = {"latents": torch.randn(3, 4, 8, 8), "timestep": torch.tensor([9.0, 500.0, 9.0])}
    results = []
    for bundle in bundles.values():
        denoiser = load(bundle, cache_interval=1, backend="onnxruntime", device="cpu")
        results.append(denoiser(**inputs, class_labels=torch.tensor(LABELS)).clone())
    for got in results[1:]:
        torch.testing.assert_close(got, results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("error:running a full step")
def test_a_pipeline_says_its_timesteps(bundles: dict[str, Bundle], pipeline_folder: Path) -> None:
    pictures = []
    for bundle in bundles.values():
        pipe = DiTPipeline.from_pretrained(pipeline_folder)
        pipe.set_progress_bar_config(disable=True)
        denoiser = load(bundle, cache_interval=3, backend="onnxruntime", device="cpu")
        for scheduler in (None, pipe.scheduler):
            pipe.transformer = denoiser.as_transformer(scheduler)
            generator = torch.Generator().manual_seed(0)
            made = pipe(class_labels=[1, 7], num_inference_steps=10, generator=generator, output_type="np").images
            pictures.append(torch.from_numpy(made))
    for picture in pictures[1:]:
        torch.testing.assert_close(picture, pictures[0], rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("error:running a full step")
@pytest.mark.parametrize("name", ["ddim", "heun"])
def test_with_the_scheduler_at_hand_a_copy_of_a_timestep_is_enough(name: str, optimized: dict[str, Bundle]) -> None:
    """What some pipelines pass on a GPU; Heun has timesteps that come twice."""
    bundle = optimized["fold"]
    scheduler: Any = scheduler_from_config(bundle.scheduler_config, name, learned_sigma=False)
    noise, labels = torch.randn(3, 4, 8, 8), torch.tensor(LABELS)
    results = []
    for copies in (False, True):
        denoiser = load(bundle, cache_interval=3, backend="onnxruntime", device="cpu")
        transformer = denoiser.as_transformer(scheduler if copies else None)
        for steps in (7, 4):
            scheduler.set_timesteps(steps)
            for t in scheduler.timesteps:
                passed = t.clone() if copies else t
                results.append(transformer(noise, passed, class_labels=labels).sample.clone())
    half = len(results) // 2
    torch.testing.assert_close(results[:half], results[half:])


@pytest.mark.usefixtures("one_trace")
def test_the_command_says_how_far_it_went(pipeline_folder: Path, tmp_path: Path) -> None:
    command = ["export", str(pipeline_folder), "--out", str(tmp_path), "--name", "tiny", "--force"]
    read, kept = {}, {}
    for level in ("none", *LEVELS):
        assert CliRunner().invoke(main, [*command, "--optimize", level]).exit_code == 0
        found = json.loads(CliRunner().invoke(main, ["inspect", str(tmp_path / "tiny"), "--json"]).stdout)
        assert found["optimization"] == level
        read[level], kept[level] = found["graphs"]["reuse"]["read_bytes"], found["cache_intervals"]["3"]
    assert read["fold"] < read["conditioning"] < read["none"]
    assert kept["fold"]["kept_bytes_per_sample"] == 2 * 16 * 16 * 4
    assert kept["none"]["kept_bytes_per_sample"] == 6 * 16 * 16 * 4
    assert kept["fold"]["forecast_bytes_per_sample"] == {
        "1": 2 * (4 * 16 * 16 * 4),  # two full steps, each with the sums of two windows of two reuse steps
        "2": 3 * (6 * 16 * 16 * 4),
        "3": 4 * (8 * 16 * 16 * 4),
    }
    assert kept["none"]["forecast_bytes_per_sample"]["2"] == 3 * kept["none"]["kept_bytes_per_sample"]
    shown = CliRunner().invoke(main, ["inspect", str(tmp_path / "tiny")]).stdout
    assert "optimization: fold" in shown
    wrong = CliRunner().invoke(main, [*command, "--optimize", "all"])
    assert wrong.exit_code == 2
    assert "'none', 'conditioning', 'fold'" in wrong.stderr


class Mixed(nn.Module):
    """Two layers on tokens; `how` the timestep acts on their output, and whether the first is read again."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(2))
        self.norm, self.skip, self.last = nn.LayerNorm(8), nn.Linear(16, 8), nn.Linear(8, 8)
        self.time = nn.Linear(1, 64)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        c = (self.time(t[:, None] / 1000)).tanh()  # (B, 64)
        begin = x
        for layer in self.layers:
            y = layer(self.norm(x))
            if self.how == "matrix":
                y = y @ c.view(-1, 8, 8)
            elif self.how in ("gate", "skip"):
                y = c[:, None, :8] * y
            elif self.how == "norm":
                y = c[:, None, :8] * self.norm(y)
            x = x + y
        if self.how == "skip":
            x = self.skip(torch.cat([x, begin + 1], dim=-1)) + c[:, None, 8:16]
        result: Tensor = self.last(x)
        return result


@pytest.mark.parametrize(
    ("how", "reached", "folded"),
    [
        ("gate", "fold", [("window", "batch", 4, 8)]),
        ("norm", "fold", [("window", "batch", 4, 8)]),
        ("skip", "fold", [("window", "batch", 4, 8)]),
        ("matrix", "conditioning", None),  # a product of matrices does not take a window at once
        ("nothing", "none", None),  # the timestep changes nothing
    ],
)
def test_a_network_never_seen_goes_as_far_as_it_can(
    how: str, reached: str, folded: list[tuple[int | str, ...]] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    module = Mixed(how)
    inputs = (TensorSpec("latents", "float32", ("batch", 4, 8)), TensorSpec("timestep", "float32", ("batch",)))
    spec = ModelSpec(inputs=inputs, cache_sites={"layer": ("layers.*",)}, conditioning={"timestep": InputSpec()})
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / f"net_{how}.py").write_text("made = None\ndef make():\n    return made\n")
    vars(importlib.import_module(f"net_{how}"))["made"] = (module, spec)
    told: list[str] = []
    model = model_from_source(f"net_{how}:make")
    bundle = bundle_from_model(model, tmp_path / "own", report=told.append, check=GraphCheck())
    assert bundle.manifest.optimization == reached
    assert (f"Mixed supports --optimize {reached} at most" in told) == (reached != "fold")
    if folded is not None:
        assert [one.shape for one in bundle.manifest.graphs["full"].outputs[1:]] == folded
    for comparison in compare_with_pytorch(pipeline_of(bundle), ["fora:2", "fora:3", "fora:5"]):
        assert comparison.error.relative < 1e-5, comparison
    assert bundle.manifest.can_forecast == (how != "norm"), "a norm is not linear in the features"
    if how == "norm":
        with pytest.raises(ScheduleError, match=r"cannot forecast: .* export it with --optimize conditioning"):
            [*compare_with_pytorch(pipeline_of(bundle), ["fora:3,forecast=2"])]
        vars(importlib.import_module(f"net_{how}"))["made"] = (Mixed(how), spec)  # the first one has hooks by now
        again = model_from_source(f"net_{how}:make")
        bundle = bundle_from_model(again, tmp_path / "conditioning", optimization="conditioning", check=GraphCheck())
    (*_, forecast) = compare_with_pytorch(pipeline_of(bundle), ["fora:3,forecast=2"])
    assert forecast.error.relative < 1e-5, forecast


def test_graphs_that_compute_something_else_are_not_kept(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lower levels are made from the same trace."""
    errors, traces = iter([1e-3, math.inf, 1e-7]), list[TracedModel]()

    def trace(*given: Any) -> TracedModel:
        traces.append(traced_once(*given))
        return traces[-1]

    class Checked(GraphCheck):
        def measure(self, model: Model, bundle: Bundle) -> Measured:
            return Measured({"full": GraphError(1.0, next(errors)), "reuse": GraphError(0.0, 0.0)}, "a backend")

        def locate(self, model: Model, bundle: Bundle, graph: str) -> str:
            return f"a node of the {graph} graph"

    monkeypatch.setattr("fora_trt.export.write.traced_from_model", trace)
    told: list[str] = []
    bundle = bundle_from_model(
        model_from_source(str(pipeline_folder)), tmp_path / "b", report=told.append, check=Checked()
    )
    assert len(traces) == 1
    assert bundle.manifest.optimization == "none"
    assert sorted(path.name for path in bundle.folder.glob("*.onnx")) == ["full.onnx", "reuse.onnx"]
    assert "the optimized graphs differ from PyTorch by 1.0e-03; trying conditioning instead" in told
    Bundle.open(bundle.folder)

    errors = iter([1e-3, 1e-3, 2e-3])
    message = (
        r"^c is not written: its full graph differs from PyTorch by 2\.0e-03 of the largest value on a backend, and "
        r"the tolerance in fp32 is 1e-04; a node of the full graph$"
    )
    with pytest.raises(ExportError, match=message):
        bundle_from_model(model_from_source(str(pipeline_folder)), tmp_path / "c", check=Checked())
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
