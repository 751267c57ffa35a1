from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from fora_trt import Denoiser, Schedule, load
from fora_trt.bundle import Bundle
from fora_trt.contract import OPTIMIZATIONS, Optimization
from fora_trt.engines.base import Engine, Launch
from fora_trt.engines.memory import content_of
from fora_trt.errors import InputError, ScheduleError
from fora_trt.models.examples import example_inputs
from fora_trt.pipeline import Pipeline
from fora_trt.sampling.conditioning import conditioning_of_classes
from tests.conftest import ON_CPU, BundleAt

SITES = [f"transformer_blocks.{i}.{part}" for i in range(3) for part in ("attn1", "ff")]


def eager_fora(module: nn.Module, latents: Tensor, labels: Tensor, steps: int, interval: int) -> list[Tensor]:
    """FORA in ten lines, written from the paper alone: the latents after every step."""
    cache: dict[str, Tensor] = {}
    scheduler, trajectory = DDIMScheduler(clip_sample=False), []
    for path in [name for name, _ in module.named_modules() if name.endswith((".attn1", ".ff"))]:
        site = module.get_submodule(path)
        original = site.forward
        site.forward = lambda *a, path=path, original=original, **k: (
            cache.setdefault(path, original(*a, **k)) if path not in cache else cache[path]
        )
    scheduler.set_timesteps(steps)
    for number, t in zip(range(steps - 1, -1, -1), scheduler.timesteps, strict=True):
        if number == steps - 1 or number % interval == 0:
            cache.clear()
        output = module(latents, t.expand(len(latents)), labels).sample[:, : latents.shape[1]]
        latents = scheduler.step(output, t, latents).prev_sample
        trajectory.append(latents)
    return trajectory


def two_graphs(denoiser: Denoiser, latents: Tensor, labels: Tensor) -> list[Tensor]:
    scheduler, trajectory = DDIMScheduler(clip_sample=False), []
    scheduler.set_timesteps(denoiser.schedule.steps)
    denoiser.reset(timesteps=scheduler.timesteps)
    for t in scheduler.timesteps:
        output = denoiser(latents, t, class_labels=labels)[:, : latents.shape[1]]
        latents = scheduler.step(output, t, latents).prev_sample
        trajectory.append(latents)
    return trajectory


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize(("steps", "interval"), [(50, 1), (50, 2), (50, 3), (20, 5), (7, 7)])
def test_trajectories_equal_an_independent_eager_fora(
    exported: Bundle, module: nn.Module, backend: str, steps: int, interval: int
) -> None:
    generator = torch.Generator().manual_seed(5)
    latents, labels = torch.randn(3, 4, 8, 8, generator=generator), torch.tensor([1, 999, 1000])
    denoiser = load(exported, schedule=Schedule.fora(steps, interval), backend=backend, device="cpu")
    measured = two_graphs(denoiser, latents, labels)
    with torch.no_grad():
        expected = eager_fora(module, latents, labels, steps, interval)
    for step, (got, want) in enumerate(zip(measured, expected, strict=True)):
        assert (got - want).abs().max() <= 1e-3 * want.abs().max(), f"step {step}"
    if interval > 1:  # the comparison can fail: no caching gives something else
        uncached = two_graphs(load(exported, schedule=Schedule.fora(steps, 1), backend=backend), latents, labels)
        assert (measured[-1] - uncached[-1]).abs().max() > 1e-3 * expected[-1].abs().max()


def inputs_for(denoiser: Denoiser, batch: int, seed: int = 0) -> dict[str, Tensor]:
    return example_inputs(denoiser.engines["full"].inputs.values(), denoiser.manifest.conditioning, batch, seed)


def test_interval_one_is_no_caching(exported: Bundle, module: nn.Module) -> None:
    denoiser = load(exported, schedule=Schedule.fora(4, 1), backend="torch", device="cpu")
    for seed in range(4):
        inputs = inputs_for(denoiser, 2, seed)
        plain = module(inputs["latents"], inputs["timestep"], inputs["class_labels"]).sample
        torch.testing.assert_close(denoiser(**inputs), plain, atol=1e-5, rtol=1e-5)


def buffers_of(denoiser: Denoiser) -> dict[str, Tensor]:
    """The tensors that its engines are bound to."""
    assert denoiser.window is not None
    return denoiser.window.buffers.tensors


def addresses_of(denoiser: Denoiser) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in buffers_of(denoiser).items()}


def noting(notes: list[str], name: str, bind: Callable[[Mapping[str, Tensor]], Launch]) -> Callable[..., Launch]:
    """`bind` of an engine, whose launches are noted under a name."""

    def bound(tensors: Mapping[str, Tensor]) -> Launch:
        launch = bind(tensors)

        def noted() -> None:
            notes.append(name)
            launch()

        return noted

    return bound


def note_binding(notes: list[Engine], engine: Engine, tensors: Mapping[str, Tensor]) -> Launch:
    notes.append(engine)
    return type(engine).bind(engine, tensors)


@pytest.fixture
def denoiser(exported: Bundle) -> Denoiser:
    return load(exported, schedule=Schedule.fora(6, 3), backend="onnxruntime", device="cpu")


def test_features_stay_where_they_are_and_reuse_reads_that_very_memory(denoiser: Denoiser) -> None:
    features = [name for name in denoiser.engines["reuse"].inputs if name.startswith("feature.")]
    assert len(features) == 6
    assert set(features) < set(denoiser.engines["full"].outputs)
    inputs = inputs_for(denoiser, 2)

    denoiser(**inputs)  # step 5: full
    addresses, buffers = addresses_of(denoiser), buffers_of(denoiser)
    contents = {name: buffers[name].clone() for name in features}
    denoiser(**inputs)  # step 4: reuse
    assert all(torch.equal(buffers[name], contents[name]) for name in features), "reuse wrote a feature"

    for name in features:
        buffers[name].zero_()
    bare = denoiser(**inputs).clone()  # step 3: full, writes the zeros over
    assert not any(torch.equal(buffers[name], torch.zeros_like(contents[name])) for name in features)
    for name in features:
        buffers[name].zero_()
    reused = denoiser(**inputs)  # step 2: reuse, reads zeros through the same addresses
    assert not torch.allclose(reused, bare)
    assert addresses_of(denoiser) == addresses


def test_full_steps_are_where_the_schedule_says(denoiser: Denoiser, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    for name in ("full", "reuse"):
        engine = denoiser.engines[name]
        monkeypatch.setattr(engine, "bind", noting(ran, name, engine.bind))
    inputs = inputs_for(denoiser, 1)
    for _ in range(6):
        denoiser(**inputs)
    assert ran == ["full", "reuse", "full", "reuse", "reuse", "full"]


def test_the_end_of_the_schedule_asks_for_a_reset(denoiser: Denoiser) -> None:
    inputs = inputs_for(denoiser, 1)
    for _ in range(6):
        denoiser(**inputs)
    with pytest.raises(ScheduleError, match=r"all 6 steps of the schedule are done; call reset\(\)"):
        denoiser(**inputs)
    denoiser.reset()
    denoiser(**inputs)


def test_the_batch_may_change_between_trajectories_only(denoiser: Denoiser) -> None:
    inputs = [inputs_for(denoiser, batch) for batch in (2, 3)]
    assert denoiser(**inputs[0]).shape == (2, 8, 8, 8)
    with pytest.raises(ScheduleError, match="the batch size changed to 3 within a trajectory"):
        denoiser(**inputs[1])
    denoiser.reset()
    assert denoiser(**inputs[1]).shape == (3, 8, 8, 8)


def test_memory_grows_and_a_smaller_batch_has_its_first_rows(denoiser: Denoiser) -> None:
    small, large = (inputs_for(denoiser, batch) for batch in (2, 5))

    def generation_at(batch: int) -> object:
        """What a trajectory of this batch finds: captured steps of another generation are invalid."""
        return denoiser.begin(denoiser.schedule.plan, torch.zeros(6), {}, [batch]).generation

    before, alone = generation_at(2), denoiser(**small).clone()
    grown = generation_at(5)
    assert grown != before
    addresses = addresses_of(denoiser)
    denoiser.reset()
    together = denoiser(**large).clone()
    denoiser.reset()
    torch.testing.assert_close(denoiser(**small), alone)
    bound_anew = generation_at(2)
    assert bound_anew != grown, "captured steps are those of other launches"
    assert generation_at(2) == bound_anew
    assert {len(tensor) for tensor in buffers_of(denoiser).values()} == {2}
    assert addresses_of(denoiser) == addresses
    denoiser.reset()
    torch.testing.assert_close(denoiser(**large), together)
    assert addresses_of(denoiser) == addresses
    generation_at(6)
    assert addresses_of(denoiser) != addresses


def test_the_first_tensor_that_is_not_finite_is_named(denoiser: Denoiser) -> None:
    inputs = inputs_for(denoiser, 1)
    denoiser(**inputs)
    assert denoiser.first_not_finite() is None
    for name in (
        "noise_prediction",
        "feature.transformer_blocks.1.ff",
        "feature.transformer_blocks.1.attn1",
        "latents",
    ):
        buffers_of(denoiser)[name].view(-1)[-1] = torch.nan
        assert denoiser.first_not_finite() == name


def test_a_bundle_is_loaded_with_a_schedule_or_an_interval(exported: Bundle) -> None:
    for given in ({}, {"schedule": Schedule.fora(6, 3), "cache_interval": 3}):
        with pytest.raises(
            InputError, match=r"exactly one of schedule and cache_interval is needed; .* or cache_interval=3"
        ):
            load(exported, backend="onnxruntime", device="cpu", **given)  # type: ignore[arg-type] # of either kind
    on_cpu = partial(load, exported, backend="onnxruntime", device="cpu")
    for denoiser in (on_cpu(cache_interval=3), on_cpu(schedule="fora:3")):
        assert denoiser.schedule.text == "fora:3"
        assert denoiser.schedule.full[:7] == (True, False, False, True, False, False, True)


def test_what_the_graphs_do_not_take_is_named(denoiser: Denoiser) -> None:
    inputs = inputs_for(denoiser, 2)
    with pytest.raises(InputError, match=r"latents have shape \[2, 4, 16, 16\]; tiny takes \[2, 4, 8, 8\]"):
        denoiser(torch.zeros(2, 4, 16, 16), 3, class_labels=inputs["class_labels"])
    with pytest.raises(InputError, match="'class_labels' is missing"):
        denoiser(inputs["latents"], 3)
    with pytest.raises(InputError, match="unknown input 'prompt'; tiny takes class_labels"):
        denoiser(**inputs, prompt=inputs["latents"])
    with pytest.raises(InputError, match="'class_labels' contains -1; valid values are integers from 0 to 1000"):
        denoiser(inputs["latents"], 3, class_labels=torch.tensor([1, -1]))
    denoiser(inputs["latents"], 3.0, class_labels=inputs["class_labels"])  # nothing was lost by the mistakes


def test_buffers_made_while_sampling_can_be_used_outside(denoiser: Denoiser) -> None:
    inputs = inputs_for(denoiser, 2)
    with torch.inference_mode():
        denoiser(**inputs)
    inputs["latents"].requires_grad_()
    prediction = denoiser(**inputs)
    assert not prediction.requires_grad
    prediction.mul_(2)


def test_a_runtime_without_empty_tensors_gets_a_window_of_one(
    optimized: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime before 1.32 cannot sum empty tensors; the sum of a step that never comes changes nothing."""
    bundle, schedule = optimized["fold"], Schedule.fora(4, 1)
    inputs = example_inputs(bundle.manifest.inputs, bundle.manifest.conditioning, batch=2)
    inputs["timestep"] = torch.full((2,), 500.0)
    predictions = []
    for version, window in (("1.31.1", 1), ("1.32.0", 0)):
        monkeypatch.setattr("onnxruntime.__version__", version)
        denoiser = load(bundle, schedule=schedule, backend="onnxruntime", device="cpu")
        denoiser.reset(timesteps=torch.linspace(500, 200, 4))
        predictions.append(denoiser(**inputs).clone())
        sums = [one for name, one in buffers_of(denoiser).items() if name.startswith("window.folded")]
        assert [len(one) for one in sums] == [window]
    assert torch.equal(*predictions)


def test_each_length_of_windows_is_bound_once(optimized: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    """Schedules alternate: what was captured of windows of one length outlives a trajectory with those of another."""
    bundle, steps = optimized["fold"], 6
    denoiser = load(bundle, schedule="none", backend="onnxruntime", device="cpu")
    bound: list[Engine] = []
    for name in ("full", "reuse"):
        monkeypatch.setattr(denoiser.engines[name], "bind", partial(note_binding, bound, denoiser.engines[name]))
    inputs = example_inputs(bundle.manifest.inputs, bundle.manifest.conditioning, batch=2)
    latents, labels = inputs["latents"], inputs["class_labels"]
    timesteps = torch.linspace(900, 100, steps)
    found: dict[int, list[tuple[object, dict[str, int], Tensor]]] = {1: [], 2: []}
    for round_ in range(4):
        for interval, told in found.items():
            before = len(bound)
            run = denoiser.begin(Schedule.fora(steps, interval).plan, timesteps, {"class_labels": labels}, [2])
            for step, offset in enumerate(run.offsets):
                made = run.at(step, 2).predict(offset, latents, timesteps[step], class_labels=labels)
            told.append((run.generation, addresses_of(denoiser), made.clone()))
            # the longer windows need more memory, so the shorter ones are bound a second time
            assert (len(bound) > before) == (round_ == 0 or (round_, interval) == (1, 1))
    for told in found.values():
        generations, addresses, predictions = zip(*told[1:], strict=True)
        assert len({*generations}) == 1, "coming back to a length, its captured steps are valid"
        assert addresses[0] == addresses[1] == addresses[2]
        assert torch.equal(predictions[0], predictions[1]) and torch.equal(predictions[0], predictions[2])
    (short, of_short, _), (long, of_long, _) = found[1][-1], found[2][-1]
    assert short != long
    assert {*of_short.values()} & {*of_long.values()}, "all lengths are in the same memory"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32])
def test_the_content_of_a_tensor_is_its_numbers_in_order(dtype: torch.dtype) -> None:
    tensor = torch.arange(6).reshape(2, 3).to(dtype)
    assert content_of(tensor.T) == content_of(tensor.T.contiguous()) != content_of(tensor)
    single = tensor.T[:1, 1:]  # (1, 1), its strides those of the whole
    assert content_of(single) == content_of(single.clone())
    assert len(content_of(tensor)) == tensor.nbytes


def test_other_windows_are_freed_where_memory_is_short(
    optimized: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samplers may still hold steps of them."""
    pipeline = Pipeline(optimized["fold"], steps=6, backend="torch", device="cpu")
    given = conditioning_of_classes(pipeline.manifest, [1, 2])
    samplers = {text: pipeline.sampler(pipeline.sampling(schedule=text)) for text in ("none", "fora:2", "fora:3")}
    first = samplers["none"](given, [0, 1], 1.5).latents
    samplers["fora:2"](given, [0, 1], 1.5)
    denoiser = pipeline.denoiser
    assert isinstance(denoiser, Denoiser) and denoiser.window is not None
    old = denoiser.window
    rooms = iter([0])  # not enough for the next window, until the others are freed
    monkeypatch.setattr("fora_trt.engines.memory.free_bytes", lambda device: next(rooms, 2**40))
    samplers["fora:3"](given, [0, 1], 1.5)
    assert old.buffers.tensors == {}
    assert torch.equal(samplers["none"](given, [0, 1], 1.5).latents, first)


@pytest.mark.parametrize("level", OPTIMIZATIONS)
def test_a_trajectory_ends_where_another_begins(bundle_at: BundleAt, level: Optimization) -> None:
    """Both use the same buffers, so going on with the first would read what the second wrote."""
    denoiser = load(bundle_at(level, "fp32"), schedule="fora:2", backend="torch", device="cpu")
    plan, timesteps, labels = Schedule.fora(3, 3).plan, torch.tensor([500.0, 400.0, 300.0]), torch.tensor([1, 2])
    first, second = (denoiser.begin(plan, timesteps, {"class_labels": labels}, [2]) for _ in range(2))
    with pytest.raises(InputError, match="another trajectory has begun on this denoiser"):
        first.at(0, 2)
    latents = torch.randn(2, *denoiser.manifest.latents.shape, generator=torch.Generator().manual_seed(0))
    for step, offset in enumerate([0, 1, 0]):
        made = second.at(step, 2).predict(offset, latents, timesteps[step], class_labels=labels)
        assert made.isfinite().all()


def test_a_folded_denoiser_called_while_sampling_can_be_called_outside(optimized: dict[str, Bundle]) -> None:
    denoiser = load(optimized["fold"], schedule=Schedule.fora(4, 2), backend="torch", device="cpu")
    inputs = example_inputs(denoiser.manifest.inputs, denoiser.manifest.conditioning, batch=2)
    inputs["timestep"] = torch.tensor(500.0)
    timesteps = torch.tensor([500.0, 400, 300, 200])
    denoiser.reset(timesteps=timesteps)
    with torch.inference_mode():
        expected = denoiser(**inputs).clone()
    denoiser.reset(timesteps=timesteps)
    assert torch.equal(denoiser(**inputs), expected)


def test_a_schedule_of_a_file_is_loaded_by_its_name(exported: Bundle, tmp_path: Path) -> None:
    Schedule.from_flags([True, False, True]).to_file(tmp_path / "own.json")
    denoiser = load(exported, schedule=str(tmp_path / "own.json"), backend="torch", device="cpu")
    assert denoiser.schedule.full == (True, False, True)


@pytest.mark.parametrize("batches", [(3, 2), (2, 3)])
def test_a_batch_that_changes_at_a_full_step_begins_a_run_of_its_own(
    optimized: dict[str, Bundle], batches: tuple[int, int]
) -> None:
    """The timesteps were announced, and one row of conditioning stands for all samples."""
    timesteps = torch.tensor([800.0, 600, 400, 200])
    label = torch.tensor([5])

    def predictions(denoiser: Denoiser, sizes: list[int]) -> list[Tensor]:
        denoiser.reset(timesteps=timesteps)
        noise = [torch.randn(size, 4, 8, 8, generator=torch.Generator().manual_seed(size)) for size in sizes]
        return [denoiser(x, t, class_labels=label).clone() for x, t in zip(noise, timesteps, strict=False)]

    denoiser = load(optimized["fold"], schedule=Schedule.from_flags([True, False] * 2), backend="torch", device="cpu")
    first, second = batches
    changing = predictions(denoiser, [first, first, second, second])
    alone = predictions(denoiser, [second] * 4)
    for got, expected in zip(changing[2:], alone[2:], strict=True):
        torch.testing.assert_close(got, expected)
