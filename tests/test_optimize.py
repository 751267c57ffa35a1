"""What is taken out of the loop: the graphs that come of it, and that they compute the same."""

import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx.parser
import onnx_ir as ir
import pytest
import torch
from click.testing import CliRunner
from diffusers import DiTPipeline
from onnx_ir.passes.common import ShapeInferencePass
from torch import Tensor, nn

from fora_trt import InputSpec, ModelSpec, Schedule, TensorSpec, load
from fora_trt.bundle import Bundle, GraphError
from fora_trt.cli import main
from fora_trt.evaluate.verify import compare_with_pytorch
from fora_trt.export.hoist import GraphWriter, Numbering, early_part
from fora_trt.export.write import bundle_from_model
from fora_trt.models.sources import model_from_source
from fora_trt.runtime import table
from fora_trt.runtime.conditioning import conditioning_of_classes, example_conditioning
from fora_trt.runtime.denoiser import Denoiser
from fora_trt.runtime.sampling import Guidance, Sampler
from fora_trt.runtime.schedulers import scheduler_from_config
from fora_trt.runtime.updates import update_from_scheduler
from tests.test_denoiser import noting

CPU = torch.device("cpu")
LEVELS = ("conditioning", "fold")
LABELS = [3, 999, 3]


@pytest.fixture(scope="module")
def bundles(exported: Bundle, optimized: dict[str, Bundle]) -> dict[str, Bundle]:
    return {"none": exported, **optimized}


def sampler_of(bundle: Bundle, steps: int, scheduler: str | None = None) -> Sampler:
    denoiser = load(bundle, cache_interval=1, backend="onnxruntime", device="cpu")
    chosen = scheduler_from_config(bundle.scheduler_config, scheduler, bundle.manifest.latents.learned_sigma)
    return Sampler(denoiser, update_from_scheduler(chosen, steps))


def latents(sampler: Sampler, schedule: Schedule, guidance: Guidance | float = 2.0) -> Tensor:
    given = conditioning_of_classes(sampler.denoiser.manifest, LABELS)
    return sampler(schedule, given, range(len(LABELS)), guidance).latents


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
    plain = latents(sampler_of(bundles["none"], 50), Schedule.static(50, interval))
    for level in LEVELS:
        got = latents(sampler_of(bundles[level], 50), Schedule.static(50, interval))
        assert GraphError.between(got, plain).relative < 1e-5
    assert GraphError.between(latents(sampler_of(bundles["none"], 50), Schedule.static(50, 1)), plain).relative > 1e-3


@pytest.mark.slow
def test_digits_are_the_same_at_every_level(tmp_path: Path) -> None:
    model = model_from_source("digits")
    made = {level: bundle_from_model(model, tmp_path / level, optimization=level) for level in ("none", *LEVELS)}
    assert [bundle.manifest.optimization for bundle in made.values()] == ["none", *LEVELS]
    samplers = {level: sampler_of(bundle, 50) for level, bundle in made.items()}
    given = example_conditioning(made["none"].manifest, 4)
    for interval in (2, 3, 5):
        schedule = Schedule.static(50, interval)
        ended = {level: sampler(schedule, given, range(4), 1.5).latents for level, sampler in samplers.items()}
        for level in LEVELS:
            error = (ended[level] - ended["none"]).abs().max().item()
            print(f"{level} at interval {interval}: {error:.1e}")
            assert error < 1e-4


@pytest.mark.parametrize("scheduler", ["ddpm", "heun", "pndm"])
def test_schedulers_with_other_timesteps_and_more_calls(scheduler: str, bundles: dict[str, Bundle]) -> None:
    samplers = {level: sampler_of(bundle, 12, scheduler) for level, bundle in bundles.items()}
    schedule = Schedule.static(samplers["none"].update.calls, 3)
    plain = latents(samplers["none"], schedule)
    for level in LEVELS:
        assert GraphError.between(latents(samplers[level], schedule), plain).relative < 1e-5


@pytest.mark.parametrize("guidance", [1.0, Guidance(2.0, 0, 6), Guidance(2.0, 4, 9), Guidance(2.0, 2, None)])
def test_guidance_on_some_steps_changes_the_batch_within_windows(
    guidance: Guidance | float, bundles: dict[str, Bundle]
) -> None:
    schedule = Schedule.static(12, 4)
    plain = latents(sampler_of(bundles["none"], 12), schedule, guidance)
    for level in LEVELS:
        sampler = sampler_of(bundles[level], 12)
        latents(sampler, Schedule.static(12, 6), 2.0)  # leaves other tensors behind
        assert GraphError.between(latents(sampler, schedule, guidance), plain).relative < 1e-5


@pytest.mark.parametrize("level", LEVELS)
def test_verify_compares_every_graph(level: str, optimized: dict[str, Bundle]) -> None:
    for backend in ("onnxruntime", "torch"):
        for comparison in compare_with_pytorch(optimized[level], backend, CPU, 10, (1, 3)):
            assert comparison.error.relative < 1e-5, comparison


def test_what_is_equal_is_computed_once_for_all_steps(
    optimized: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = sampler_of(optimized["fold"], 20)
    assert isinstance(sampler.denoiser, Denoiser)
    computed = sampler.denoiser.table
    assert computed is not None
    whole = latents(sampler, Schedule.static(20, 4))
    assert computed.distinct == 3, "two classes and the null class, of six samples"
    assert [engine for engine, _ in computed.launches] == [computed.engine, computed.full_engine]
    rows = {name: len(one) for name, one in computed.rows.items()}
    assert {rows.pop(name) for name in computed.of_full_steps} == {6 * 3}
    assert set(rows.values()) == {20 * 3}

    monkeypatch.setattr(table, "MOST_BYTES", 1)
    sampler = sampler_of(optimized["fold"], 20)
    assert isinstance(sampler.denoiser, Denoiser)
    assert torch.equal(latents(sampler, Schedule.static(20, 4)), whole), "a window at a time"
    computed = sampler.denoiser.table
    assert computed is not None
    assert len(computed.launches) == 2 * (20 // 4 + 1)
    computed.engine.most_rows = 2
    assert computed.full_engine is not None
    computed.full_engine.most_rows = 2
    assert torch.equal(latents(sampler, Schedule.static(20, 4)), whole), "two rows at a time"


def test_launches_of_a_trajectory_can_be_run_again(
    optimized: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A benchmark times engines by running them again; a launch knows addresses, not tensors."""
    monkeypatch.setattr(table, "MOST_BYTES", 1)
    sampler = sampler_of(optimized["fold"], 20)
    denoiser = sampler.denoiser
    assert isinstance(denoiser, Denoiser) and denoiser.table is not None
    for interval in (2, 4):  # the longer window needs more rows
        latents(sampler, Schedule.static(20, interval))
    wanted = {name: rows.clone() for name, rows in denoiser.table.rows.items()}
    shapes = {name: tensor.sized(12) for name, tensor in denoiser.table.engine.inputs.items()}
    reused = [torch.full(shape, 2**40) for shape in shapes.values() for _ in range(1000)]  # takes freed memory
    for rows in denoiser.table.rows.values():
        rows.zero_()
    for _, launch in denoiser.table.launches:
        launch()
    for launch in denoiser.engine_launches().values():
        launch()
    assert all(torch.equal(rows, wanted[name]) for name, rows in denoiser.table.rows.items())
    assert reused[0][0] == 2**40, "launches wrote to tensors of others"


def test_tensors_stay_where_they_are_from_trajectory_to_trajectory(optimized: dict[str, Bundle]) -> None:
    sampler = sampler_of(optimized["fold"], 12)
    denoiser = sampler.denoiser
    assert isinstance(denoiser, Denoiser)
    first = latents(sampler, Schedule.static(12, 4))
    memory, addresses = denoiser.prepare(6), {name: one.data_ptr() for name, one in denoiser.buffers.items()}
    assert torch.equal(latents(sampler, Schedule.static(12, 4)), first)
    assert denoiser.prepare(6) is memory, "what was captured stays valid"
    assert {name: one.data_ptr() for name, one in denoiser.buffers.items()} == addresses
    for interval in (1, 3):
        latents(sampler, Schedule.static(12, interval))
        assert denoiser.prepare(6) is not memory, "another window is bound in other shapes"
    assert torch.equal(latents(sampler, Schedule.static(12, 4)), first), (
        "a longer one again, in the memory that is there"
    )


def test_memory_for_features_is_the_length_of_the_window(bundles: dict[str, Bundle]) -> None:
    def kept(level: str) -> dict[str, tuple[int, ...]]:
        sampler = sampler_of(bundles[level], 9)
        latents(sampler, Schedule.static(9, 3))
        assert isinstance(sampler.denoiser, Denoiser)
        outputs = sampler.denoiser.full.outputs
        return {name: tuple(sampler.denoiser.buffers[name].shape) for name in outputs if name != "noise_prediction"}

    assert len(kept("none")) == 6
    assert kept("fold") == {"window.folded.0": (2, 6, 16, 16)}


def test_longer_windows_than_engines_admit_become_full_steps(
    optimized: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = sampler_of(optimized["fold"], 12)
    assert isinstance(sampler.denoiser, Denoiser)
    flags = tuple(k % 4 in (0, 3) for k in range(12))
    wanted = latents(sampler, Schedule(flags))
    sampler.denoiser.full.longest_window = 2
    with pytest.warns(UserWarning, match="windows of more than 2 reuse steps .* 6 of 12 steps are full instead of 3"):
        got = latents(sampler, Schedule(tuple(k % 4 == 0 for k in range(12))))
    assert torch.equal(got, wanted)

    schedule = Schedule(tuple(k % 4 == 0 for k in range(8)))
    denoiser = load(optimized["fold"], schedule=schedule, backend="onnxruntime", device="cpu")
    denoiser.full.longest_window = 2
    ran: list[str] = []
    for name, engine in (("full", denoiser.full), ("reuse", denoiser.reuse)):
        monkeypatch.setattr(engine, "bind", noting(ran, name, engine.bind))
    denoiser.reset(timesteps=torch.linspace(900, 100, 8))
    with pytest.warns(UserWarning, match="4 of 8 steps are full instead of 2"):
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
    schedule = Schedule.static(7, 3)
    plain = stepped(bundles["none"], schedule, lambda k: LABELS, None)
    for level, timesteps in (("conditioning", None), ("fold", torch.linspace(900, 100, 7))):
        got = stepped(bundles[level], schedule, lambda k: LABELS, timesteps)
        torch.testing.assert_close(torch.stack(got), torch.stack(plain), rtol=1e-5, atol=1e-5)


def test_steps_that_were_not_foreseen_are_full_and_say_so(bundles: dict[str, Bundle]) -> None:
    schedule, uncached = Schedule.static(7, 3), Schedule.static(7, 1)
    with pytest.warns(UserWarning, match="a full step is taken in place of a reuse step"):
        got = stepped(bundles["fold"], schedule, lambda k: LABELS, None)
    torch.testing.assert_close(got, stepped(bundles["none"], uncached, lambda k: LABELS, None), rtol=1e-5, atol=1e-5)

    def changing(k: int) -> list[int]:
        return LABELS if k < 2 else [1, 2, 4]  # within a window

    flags = Schedule(tuple(full or k == 2 for k, full in enumerate(schedule.full)))
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


@pytest.mark.filterwarnings("error:a full step")
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


@pytest.mark.filterwarnings("error:a full step")
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
    shown = CliRunner().invoke(main, ["inspect", str(tmp_path / "tiny")]).stdout
    assert "optimized: fold" in shown
    wrong = CliRunner().invoke(main, [*command, "--optimize", "all"])
    assert wrong.exit_code == 2
    assert "'none', 'conditioning', 'fold'" in wrong.stderr


class Mixed(nn.Module):
    """Two layers on tokens; `how` the timestep acts on what they put out, and whether the first is read again."""

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
        ("skip", "fold", [("window", "batch", 4, 8), ("window", "batch", 1, 8)]),
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
    bundle = bundle_from_model(model, tmp_path / "own", report=told.append)
    assert bundle.manifest.optimization == reached
    assert (f"Mixed admits no more than --optimize {reached}" in told) == (reached != "fold")
    if folded is not None:
        assert [one.shape for one in bundle.manifest.graphs["full"].outputs[1:]] == folded
    for comparison in compare_with_pytorch(bundle, "onnxruntime", CPU):
        assert comparison.error.relative < 1e-5, comparison


def test_graphs_that_compute_something_else_are_not_kept(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = iter([1e-3, math.inf, 1e-7])

    def measured(*_: object) -> dict[str, GraphError]:
        return {"full": GraphError(1.0, next(errors)), "reuse": GraphError(0.0, 0.0)}

    monkeypatch.setattr("fora_trt.export.write.measure_errors", measured)
    told: list[str] = []
    bundle = bundle_from_model(model_from_source(str(pipeline_folder)), tmp_path / "b", report=told.append)
    assert bundle.manifest.optimization == "none"
    assert sorted(path.name for path in bundle.folder.glob("*.onnx")) == ["full.onnx", "reuse.onnx"]
    assert "the optimized graphs differ from PyTorch by 1.0e-03; trying conditioning instead" in told
    Bundle.open(bundle.folder)


# What is early, on a graph written by hand: `late` arrives late.


SMALL = """
<ir_version: 10, opset_import: ["" : 20]>
small (float[batch, 4] late, float[batch, 4] early) => (float[batch, 4] result)
<int64[1] one = {1}, int64[3] fifty = {1, 50, 1}, float[1] two = {2.0}>
{
    doubled = Mul(early, two)
    again = Mul(early, two)
    standing = Unsqueeze(doubled, one)
    wide = Expand(standing, fifty)
    sum = Add(late, wide)
    mean = ReduceMean <keepdims: int = 0> (sum, one)
    added = Add(mean, again)
    sizes = Shape(early)
    result = Reshape(added, sizes)
}
"""


def small_graph() -> ir.Graph:
    model: ir.Model = ir.from_proto(onnx.parser.parse_model(SMALL))
    ShapeInferencePass()(model)
    return model.graph


def test_what_is_small_and_has_a_row_for_every_sample_is_early() -> None:
    graph = small_graph()
    part = early_part(graph, {"late"})
    assert [node.op_type for node in part.nodes] == ["Mul", "Mul", "Unsqueeze"], "neither Expand nor Shape"
    assert sorted(len(value.shape or ()) for value in part.boundary) == [2, 3]


def test_equal_values_of_several_graphs_are_computed_once() -> None:
    numbering = Numbering()
    writer = GraphWriter(numbering)
    for graph in (small_graph(), small_graph()):
        writer.add(early_part(graph, {"late"}).nodes)
    assert [node.op_type for node in writer.nodes] == ["Mul", "Unsqueeze"]
