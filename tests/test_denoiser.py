from collections.abc import Callable, Mapping

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from fora_trt import Denoiser, Schedule, load
from fora_trt.bundle import Bundle
from fora_trt.engines.base import Launch
from fora_trt.engines.memory import content_of
from fora_trt.errors import InputError, ScheduleError
from fora_trt.models.examples import example_inputs
from fora_trt.runtime.table import ALONE, take
from tests.conftest import ON_CPU

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
    denoiser = load(exported, schedule=Schedule.static(steps, interval), backend=backend, device="cpu")
    measured = two_graphs(denoiser, latents, labels)
    with torch.no_grad():
        expected = eager_fora(module, latents, labels, steps, interval)
    for step, (got, want) in enumerate(zip(measured, expected, strict=True)):
        assert (got - want).abs().max() <= 1e-3 * want.abs().max(), f"step {step}"
    if interval > 1:  # the comparison can fail: no caching gives something else
        uncached = two_graphs(load(exported, schedule=Schedule.static(steps, 1), backend=backend), latents, labels)
        assert (measured[-1] - uncached[-1]).abs().max() > 1e-3 * expected[-1].abs().max()


def test_interval_one_is_no_caching(exported: Bundle, module: nn.Module) -> None:
    denoiser = load(exported, schedule=Schedule.static(4, 1), backend="torch", device="cpu")
    for seed in range(4):
        inputs = example_inputs(denoiser.full.inputs.values(), exported.manifest.conditioning, batch=2, seed=seed)
        plain = module(inputs["latents"], inputs["timestep"], inputs["class_labels"]).sample
        torch.testing.assert_close(denoiser(**inputs), plain, atol=1e-5, rtol=1e-5)


def noting(notes: list[str], name: str, bind: Callable[[Mapping[str, Tensor]], Launch]) -> Callable[..., Launch]:
    """`bind` of an engine, whose launches are noted under a name."""

    def bound(tensors: Mapping[str, Tensor]) -> Launch:
        launch = bind(tensors)

        def noted() -> None:
            notes.append(name)
            launch()

        return noted

    return bound


@pytest.fixture
def denoiser(exported: Bundle) -> Denoiser:
    return load(exported, schedule=Schedule.static(6, 3), backend="onnxruntime", device="cpu")


def test_features_stay_where_they_are_and_reuse_reads_that_very_memory(denoiser: Denoiser) -> None:
    features = [name for name in denoiser.reuse.inputs if name.startswith("feature.")]
    assert len(features) == 6
    assert set(features) < set(denoiser.full.outputs)
    inputs = example_inputs(denoiser.full.inputs.values(), denoiser.manifest.conditioning, batch=2)

    denoiser(**inputs)  # step 5: full
    addresses = {name: tensor.data_ptr() for name, tensor in denoiser.buffers.items()}
    contents = {name: denoiser.buffers[name].clone() for name in features}
    denoiser(**inputs)  # step 4: reuse
    assert all(torch.equal(denoiser.buffers[name], contents[name]) for name in features), "reuse wrote a feature"

    for name in features:
        denoiser.buffers[name].zero_()
    bare = denoiser(**inputs).clone()  # step 3: full, writes the zeros over
    assert not any(torch.equal(denoiser.buffers[name], torch.zeros_like(contents[name])) for name in features)
    for name in features:
        denoiser.buffers[name].zero_()
    reused = denoiser(**inputs)  # step 2: reuse, reads zeros through the same addresses
    assert not torch.allclose(reused, bare)
    assert {name: tensor.data_ptr() for name, tensor in denoiser.buffers.items()} == addresses


def test_full_steps_are_where_the_schedule_says(denoiser: Denoiser, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    for name in ("full", "reuse"):
        engine = getattr(denoiser, name)
        monkeypatch.setattr(engine, "bind", noting(ran, name, engine.bind))
    inputs = example_inputs(denoiser.full.inputs.values(), denoiser.manifest.conditioning, batch=1)
    for _ in range(6):
        denoiser(**inputs)
    assert ran == ["full", "reuse", "full", "reuse", "reuse", "full"]


def test_the_end_of_the_schedule_asks_for_a_reset(denoiser: Denoiser) -> None:
    inputs = example_inputs(denoiser.full.inputs.values(), denoiser.manifest.conditioning, batch=1)
    for _ in range(6):
        denoiser(**inputs)
    with pytest.raises(ScheduleError, match=r"all 6 steps of the schedule are done; call reset\(\)"):
        denoiser(**inputs)
    denoiser.reset()
    denoiser(**inputs)


def test_the_batch_may_change_between_trajectories_only(denoiser: Denoiser) -> None:
    inputs = [example_inputs(denoiser.full.inputs.values(), denoiser.manifest.conditioning, batch) for batch in (2, 3)]
    assert denoiser(**inputs[0]).shape == (2, 8, 8, 8)
    with pytest.raises(ScheduleError, match="the batch became 3 within a trajectory"):
        denoiser(**inputs[1])
    denoiser.reset()
    assert denoiser(**inputs[1]).shape == (3, 8, 8, 8)


def test_memory_grows_and_a_smaller_batch_has_its_first_rows(denoiser: Denoiser) -> None:
    small, large = (
        example_inputs(denoiser.full.inputs.values(), denoiser.manifest.conditioning, batch) for batch in (2, 5)
    )
    before, alone = denoiser.prepare(2), denoiser(**small).clone()
    token = denoiser.prepare(5)
    assert token is not before
    addresses = {name: tensor.data_ptr() for name, tensor in denoiser.buffers.items()}
    denoiser.reset()
    together = denoiser(**large).clone()
    denoiser.reset()
    torch.testing.assert_close(denoiser(**small), alone)
    bound_anew = denoiser.prepare(2)
    assert bound_anew is not token, "captured steps are those of other launches"
    assert denoiser.prepare(2) is bound_anew
    assert {len(tensor) for tensor in denoiser.buffers.values()} == {2}
    assert {name: tensor.data_ptr() for name, tensor in denoiser.buffers.items()} == addresses
    denoiser.reset()
    torch.testing.assert_close(denoiser(**large), together)
    assert {name: tensor.data_ptr() for name, tensor in denoiser.buffers.items()} == addresses
    denoiser.prepare(6)
    assert {name: tensor.data_ptr() for name, tensor in denoiser.buffers.items()} != addresses


def test_the_first_tensor_that_is_not_finite_is_named(denoiser: Denoiser) -> None:
    inputs = example_inputs(denoiser.full.inputs.values(), denoiser.manifest.conditioning, batch=1)
    denoiser(**inputs)
    assert denoiser.first_not_finite() is None
    for name in (
        "noise_prediction",
        "feature.transformer_blocks.1.ff",
        "feature.transformer_blocks.1.attn1",
        "latents",
    ):
        denoiser.buffers[name].view(-1)[-1] = torch.nan
        assert denoiser.first_not_finite() == name


def test_a_bundle_is_loaded_with_a_schedule_or_an_interval(exported: Bundle) -> None:
    for given in ({}, {"schedule": Schedule.static(6, 3), "cache_interval": 3}):
        with pytest.raises(InputError, match=r"takes either schedule=.* or cache_interval=N"):
            load(exported, backend="onnxruntime", device="cpu", **given)  # type: ignore[arg-type] # of either kind
    denoiser = load(exported, cache_interval=3, backend="onnxruntime", device="cpu")
    assert denoiser.schedule.cache_interval == 3
    assert denoiser.schedule.full[:7] == (True, False, False, True, False, False, True)


def test_what_the_graphs_do_not_take_is_named(denoiser: Denoiser) -> None:
    inputs = example_inputs(denoiser.full.inputs.values(), denoiser.manifest.conditioning, batch=2)
    with pytest.raises(InputError, match=r"latents have shape \(2, 4, 16, 16\); this bundle takes \(2, 4, 8, 8\)"):
        denoiser(torch.zeros(2, 4, 16, 16), 3, class_labels=inputs["class_labels"])
    with pytest.raises(InputError, match="'class_labels' is missing"):
        denoiser(inputs["latents"], 3)
    with pytest.raises(InputError, match="takes no 'prompt'"):
        denoiser(**inputs, prompt=inputs["latents"])
    with pytest.raises(InputError, match="'class_labels' holds -1; it takes whole numbers from 0 to 1000"):
        denoiser(inputs["latents"], 3, class_labels=torch.tensor([1, -1]))
    denoiser(inputs["latents"], 3.0, class_labels=inputs["class_labels"])  # nothing was lost by the mistakes


def test_buffers_made_while_sampling_can_be_used_outside(denoiser: Denoiser) -> None:
    inputs = example_inputs(denoiser.full.inputs.values(), denoiser.manifest.conditioning, batch=2)
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
    bundle, schedule = optimized["fold"], Schedule.static(4, 1)
    inputs = example_inputs(bundle.manifest.inputs, bundle.manifest.conditioning, batch=2)
    inputs["timestep"] = torch.full((2,), 500.0)
    predictions = []
    for version, window in (("1.31.1", 1), ("1.32.0", 0)):
        monkeypatch.setattr("onnxruntime.__version__", version)
        denoiser = load(bundle, schedule=schedule, backend="onnxruntime", device="cpu")
        denoiser.reset(timesteps=torch.linspace(500, 200, 4))
        predictions.append(denoiser(**inputs).clone())
        sums = [one for name, one in denoiser.buffers.items() if name.startswith("window.folded")]
        assert [len(one) for one in sums] == [window]
    assert torch.equal(*predictions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_of_any_precision_are_taken(dtype: torch.dtype) -> None:
    rows = torch.randn(5, 3 * ALONE).to(dtype)
    target, index = torch.zeros(2, 3 * ALONE, dtype=dtype), torch.tensor([4, 1])
    take(rows, index, target)
    assert torch.equal(target, rows[index])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32])
def test_the_content_of_a_tensor_is_its_numbers_in_order(dtype: torch.dtype) -> None:
    tensor = torch.arange(6).reshape(2, 3).to(dtype)
    assert content_of(tensor.T) == content_of(tensor.T.contiguous()) != content_of(tensor)
    single = tensor.T[:1, 1:]  # (1, 1), its strides those of the whole
    assert content_of(single) == content_of(single.clone())
    assert len(content_of(tensor)) == tensor.nbytes
