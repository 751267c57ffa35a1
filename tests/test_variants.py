"""Variants: other networks for some timesteps, in one bundle and one trajectory."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fora_trt import Pipeline, Schedule, load
from fora_trt.bundle import Bundle
from fora_trt.errors import BundleError, ExportError, InputError, ScheduleError
from fora_trt.exporting import export
from fora_trt.models.options import problem_of_ranges
from fora_trt.models.recipes import read_recipe
from fora_trt.models.sources import model_from_source
from fora_trt.plan import offsets_of
from fora_trt.runtime.variants import networks_of
from fora_trt.sampling.conditioning import example_conditioning
from fora_trt.serve.triton import TritonConfig, write_model
from tests.conftest import ON_CPU, TINY, save_transformer
from tests.shared import made_once, one_trace_for_all
from tests.test_cli import fora

STEPS = 12
RANGES = ((600.0, 1001.0), (0.0, 200.0))
"""The first steps run the first of the other networks, the last steps the second."""

TOLERANCE = 1e-5


@pytest.fixture(scope="session")
def sources(run_folder: Path, pipeline_folder: Path) -> list[str]:
    """A usual network of three blocks, one of two, and one of four that are wider."""

    def saved(name: str, **sizes: int) -> str:
        def make(folder: Path) -> None:
            save_transformer(folder, {**TINY, **sizes})
            index = {"_class_name": "DiTPipeline", "transformer": ["diffusers", "DiTTransformer2DModel"]}
            parts = {"vae": [None, None], "scheduler": ["diffusers", "DDIMScheduler"]}
            (folder / "model_index.json").write_text(json.dumps({**index, **parts}))

        return str(made_once(run_folder / "checkpoints" / name, make))

    return [
        saved("usual-dit"),
        saved("shallow-dit", num_layers=2),
        saved("wide-dit", num_layers=4, attention_head_dim=16),
    ]


def recipe_of(sources: Sequence[str]) -> dict[str, Any]:
    return {"variants": [{"source": one, "timesteps": range} for one, range in zip(sources[1:], RANGES, strict=True)]}


@pytest.fixture(scope="session")
def bundle(run_folder: Path, sources: list[str]) -> Bundle:
    def make(unfinished: Path) -> None:
        with one_trace_for_all():
            export(sources[0], unfinished / "three", **recipe_of(sources))

    return Bundle.open(made_once(run_folder / "export" / "variants", make) / "three")


class Switching:
    """The networks with a few lines around each cache site; each step runs that of its timestep.

    Every third step of a network computes its sites, counted from its first one; the others return what they kept.
    """

    def __init__(self, sources: Sequence[str], full: Sequence[bool]) -> None:
        self.models = [model_from_source(one) for one in sources]
        self.full, self.step = full, 0
        for model in self.models:
            for path, _ in model.sites:
                module = model.module.get_submodule(path)
                module.forward = self._cached(module.forward)

    def _cached(self, forward: Any) -> Any:
        kept: list[Tensor] = []

        def cached(*args: Any, **kwargs: Any) -> Tensor:
            if self.full[self.step]:
                kept[:] = [forward(*args, **kwargs)]
            return kept[0]

        return cached

    @torch.no_grad()
    def latents(self, pipeline: Pipeline) -> Tensor:
        """The latents of two images after each step, without guidance."""
        sampling = pipeline.sampling()
        scheduler_step = sampling.scheduler_step
        given = example_conditioning(pipeline.manifest, 2).conditional
        scheduler_step.begin(pipeline.manifest.latents.shape, [0, 1], torch.device("cpu"))
        seen = []
        for self.step in range(STEPS):
            scaled, timestep = scheduler_step.model_input(), scheduler_step.timestep()
            model = self.models[number_of(float(timestep))]
            times = torch.as_tensor(timestep).float().expand(2)
            inputs: Mapping[str, Tensor] = {"latents": scaled, "timestep": times, **given}
            prediction = model.spec.call(model.module, {one.name: inputs[one.name] for one in model.spec.inputs})
            scheduler_step.advance(prediction[:, : pipeline.manifest.latents.channels].float())
            seen.append(scheduler_step.latents.clone())
        return torch.stack(seen)


def number_of(timestep: float) -> int:
    return next((k for k, (low, high) in enumerate(RANGES, 1) if low <= timestep < high), 0)


def latents_of(pipeline: Pipeline, scale: float = 1.0) -> Tensor:
    seen: list[Tensor] = []
    given = example_conditioning(pipeline.manifest, 2)
    pipeline.sampler(pipeline.sampling())(given, [0, 1], scale, observe=lambda one: seen.append(one.clone()))
    return torch.stack(seen)


def check_equal(got: Tensor, want: Tensor) -> None:
    largest = want.abs().flatten(1).amax(1)
    assert ((got - want).abs().flatten(1).amax(1) / largest).max() < TOLERANCE


# -- in a trajectory ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("schedule", ["none", "fora:3", "full:0,7"])
def test_each_step_runs_the_network_of_its_timestep(
    bundle: Bundle, sources: list[str], backend: str, schedule: str
) -> None:
    pipeline = Pipeline(bundle, backend=backend, steps=STEPS, schedule=schedule)
    sampling = pipeline.sampling()
    numbers = [number_of(one) for one in sampling.scheduler_step.timesteps.tolist()]
    assert [*dict.fromkeys(numbers)] == [1, 0, 2]
    switches = [k for k in range(1, STEPS) if numbers[k] != numbers[k - 1]]
    full = [one or k in switches for k, one in enumerate(sampling.schedule.full)]
    check_equal(latents_of(pipeline), Switching(sources, full).latents(pipeline))
    made = pipeline(class_labels=[1, 2], num_images=None)
    assert made.full_steps == sum(full)
    offsets = offsets_of(Schedule.from_flags(full).plan)
    run = pipeline.denoiser.begin(sampling.schedule.plan, sampling.scheduler_step.timesteps, given_of(pipeline), [2])
    assert run.offsets == offsets


def given_of(pipeline: Pipeline) -> Mapping[str, Tensor]:
    return example_conditioning(pipeline.manifest, 2).conditional


def test_forecasts_guidance_and_the_references(bundle: Bundle) -> None:
    """A forecast begins anew with each network; the references switch as the engines do."""
    from fora_trt.evaluate.unfolded import reference_from_bundle

    for backend in ON_CPU:
        pipeline = Pipeline(bundle, backend=backend, steps=STEPS, schedule="even:8,forecast=2")
        reference, name = reference_from_bundle(bundle, torch.device("cpu"))
        assert name == "PyTorch"
        assert len(networks_of(reference)) == len(networks_of(pipeline.denoiser)) == 3
        check_equal(latents_of(pipeline, 1.5), latents_of(pipeline.over(reference), 1.5))
        interval = Pipeline(
            bundle, backend=backend, steps=STEPS, schedule="fora:3", guidance_interval=(2, 9), guidance_scale=2.0
        )
        made = [one(class_labels=[3]).latents for one in (interval, interval.over(reference))]
        check_equal(made[0][None], made[1][None])


def test_batches_and_schedules_alternate(bundle: Bundle) -> None:
    pipeline = Pipeline(bundle, backend="onnxruntime", steps=STEPS, batch_size=2)
    whole = pipeline(class_labels=[1, 2, 3]).latents
    for label in (1, 3, 2):
        alone = Pipeline(bundle, backend="onnxruntime", steps=STEPS)(class_labels=[label], seed=label - 1).latents
        assert torch.allclose(alone[0], whole[label - 1], atol=1e-5)
    again = pipeline(class_labels=[1, 2, 3]).latents
    assert torch.equal(again, whole)


def test_a_scheduler_that_returns_to_a_range_is_refused(bundle: Bundle) -> None:
    pipeline = Pipeline(bundle, backend="torch", steps=STEPS)
    plan, given = Schedule.none(4).plan, given_of(pipeline)
    with pytest.raises(InputError, match="leave a range of three and return to it; give another scheduler"):
        pipeline.denoiser.begin(plan, torch.tensor([700.0, 300.0, 700.0, 100.0]), given, [2])
    with pytest.raises(InputError, match="needs one timestep for all samples of a step"):
        pipeline.denoiser.begin(plan, torch.tensor([[700.0, 300.0]] * 4), given, [2])


# -- in the bundle -----------------------------------------------------------------------------------------------------


def test_the_bundle_holds_a_bundle_for_each(bundle: Bundle, tmp_path: Path) -> None:
    assert [(one.timesteps, one.folder) for one in bundle.manifest.variants] == [
        (RANGES[0], "three-variant-1"), (RANGES[1], "three-variant-2"),
    ]  # fmt: skip
    for _, other in bundle.variants:
        assert Bundle.open(other.folder).manifest == other.manifest
        assert other.manifest.measured_error is not None
    bundle.copy(tmp_path / "copy", "fora:2")
    copied = Bundle.open(tmp_path / "copy")
    assert torch.equal(
        *(
            Pipeline(one, backend="torch", steps=6, schedule="none")(class_labels=[1]).latents
            for one in (bundle, copied)
        )
    )


@pytest.mark.parametrize("harm", ["missing", "other", "altered", "link"])
def test_a_variant_that_was_changed_is_refused(bundle: Bundle, tmp_path: Path, harm: str) -> None:
    folder = Path(shutil.copytree(bundle.folder, tmp_path / "three"))
    first, second = (folder / one.folder for one in bundle.manifest.variants)
    if harm == "altered":
        with (first / "full.onnx").open("r+b") as file:
            file.write(b"x")
    else:
        shutil.rmtree(first)
    if harm == "other":
        shutil.copytree(second, first)
    if harm == "link":
        first.symlink_to(bundle.folder / first.name)
    with pytest.raises(
        BundleError, match="full.onnx was altered" if harm == "altered" else "is not the bundle that the"
    ):
        Bundle.open(folder)


def test_networks_that_do_not_fit_together_are_not_written(
    sources: list[str], run_folder: Path, tmp_path: Path
) -> None:
    def make(folder: Path) -> None:
        save_transformer(folder, {**TINY, "sample_size": 16})
        index = {"_class_name": "DiTPipeline", "transformer": ["diffusers", "DiTTransformer2DModel"]}
        (folder / "model_index.json").write_text(json.dumps(index))

    larger = str(made_once(run_folder / "checkpoints" / "larger-dit", make))
    with (
        one_trace_for_all(),
        pytest.raises(ExportError, match=r"^the variant .* takes 'latents', which odd does"),
    ):
        export(sources[0], tmp_path / "odd", variants=[{"source": larger, "timesteps": (0, 500)}])
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("ranges", "problem"),
    [
        ([(0, 500), (500, 1000)], None),
        ([(500, 500)], "the range of timesteps 500 to 500 does not rise"),
        ([(500, 900), (0, 501)], "two ranges of timesteps overlap from 500 to 501"),
    ],
)
def test_ranges(ranges: list[tuple[float, float]], problem: str | None) -> None:
    assert problem_of_ranges(ranges) == problem


def test_a_recipe_names_them(sources: list[str], tmp_path: Path) -> None:
    parts = [
        f'[[variants]]\nsource = "{one}"\ntimesteps = {[*range]}'
        for one, range in zip(sources[1:], RANGES, strict=True)
    ]
    path = tmp_path / "three.toml"
    path.write_text("\n".join([f'source = "{sources[0]}"', *parts]))
    assert [one.timesteps for one in read_recipe(path).variants] == [*RANGES]
    made = fora("export", path, "--out", tmp_path, "--name", "three")
    assert made.exit_code == 0, made.output
    verified = fora("verify", tmp_path / "three", "--steps", 6, "--backend", "torch", "--json")
    assert verified.exit_code == 0, verified.output
    compared = [one["what"] for one in json.loads(verified.stdout)["comparisons"]]
    assert {"full graph", "full graph of variant 1", "reuse graph of variant 2"} <= {*compared}
    shown = json.loads(fora("inspect", tmp_path / "three", "--json").stdout)["variants"]
    assert [tuple(one["timesteps"]) for one in shown] == [*RANGES]
    assert shown[0]["arithmetic"] < 1 < shown[1]["arithmetic"]
    assert "three-variant-1" in fora("inspect", tmp_path / "three").stdout
    path.write_text(path.read_text().replace("1001.0", "100.0"))
    refused = fora("export", path, "--out", tmp_path, "--name", "other")
    assert refused.exit_code == 1
    assert "is invalid at 'variants': Value error, the range of timesteps 600 to 100 does not rise" in refused.stderr


def test_what_takes_one_network_says_so(bundle: Bundle, tmp_path: Path) -> None:
    message = "three has other networks for some timesteps, which bench does not take"
    commands: list[list[Any]] = [["bench"], ["calibrate", "--full-steps", 3, "-o", tmp_path / "x.json"]]
    for command, *options in commands:
        done = fora(command, bundle.folder, *options)
        assert done.exit_code == 1
        assert message.replace("bench", command) in " ".join(done.stderr.split())
    with pytest.raises(InputError, match="which load does not take"):
        load(bundle, cache_interval=3)
    with pytest.raises(InputError, match="which Triton's model does not take"):
        write_model(TritonConfig(bundle.folder), tmp_path)
    pipeline = Pipeline(bundle, backend="torch", steps=STEPS, schedule="attention:2,feed-forward:3")
    with pytest.raises(ScheduleError, match="a schedule with partial steps is for the layers of one"):
        pipeline.sampling()
    assert not [*tmp_path.iterdir()]


def test_the_server_takes_one_network(bundle: Bundle) -> None:
    pytest.importorskip("ray")
    from fora_trt.serve.application import ServeConfig
    from fora_trt.serve.server import check

    with pytest.raises(InputError, match="which serve does not take"):
        check(ServeConfig(bundles=(bundle.folder,)))


def test_sample_and_quality_take_them(bundle: Bundle, tmp_path: Path) -> None:
    common = [bundle.folder, "--num-images", 2, "--steps", 6, "--backend", "torch"]
    sampled = fora("sample", *common, "--out", tmp_path / "set")
    assert sampled.exit_code == 0, sampled.output
    measured = fora("quality", *common, "--cache-intervals", 2, "--out", tmp_path / "report")
    assert measured.exit_code == 0, measured.output


def test_a_pickled_pipeline_has_them(bundle: Bundle) -> None:
    import pickle

    pipeline = Pipeline(bundle, backend="torch", steps=6)
    made = pipeline(class_labels=[1]).latents
    assert torch.equal(pickle.loads(pickle.dumps(pipeline))(class_labels=[1]).latents, made)
