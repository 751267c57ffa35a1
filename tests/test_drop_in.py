"""The drop-in in pipelines of diffusers, against hooks on the real transformers inside the same pipeline."""

import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from click.testing import CliRunner
from diffusers import FlowMatchHeunDiscreteScheduler, WanTransformer3DModel
from torch import Tensor

import fora_trt
from fora_trt.bundle import Bundle
from fora_trt.cli import main
from fora_trt.contract import REUSE
from fora_trt.diffusers_pipeline import attach, bundles_of
from fora_trt.errors import ExportError, InputError, ModelError, NotOfEnginesError, ShapeError, SourceError
from fora_trt.evaluate.source_module import model_from_bundle
from fora_trt.models.watch import transformers_of
from fora_trt.runtime.transformer import DenoiserTransformer
from fora_trt.schedule import Schedule
from tests.hooked_pipelines import hooked, latents_of
from tests.test_tiny_transformers import HEAVY
from tests.tiny_pipelines import PIPELINES, drawn, ones

STEPS = 8
SCHEDULES = ("none", "fora:3", "fora:1,forecast=2", "fora:3,forecast=2")

FAST = ("flux_cfg", "wan22", "sd3")
"""Two calls a step, two transformers, and guidance in one call."""

REFUSED = {
    "z_image": (ModelError, "returns a list of samples"),
    "lumina2": (ExportError, "makes the size of the batch a constant|has shape"),
    "mochi": (ExportError, "makes the size of the batch a constant"),
}
"""Pipelines whose transformer takes samples one by one."""


@dataclass
class Exported:
    """A pipeline, the arguments of a call, and the bundles of its transformers by component."""

    pipe: Any
    given: dict[str, Any]
    bundles: dict[str, Bundle]

    def drop_ins(self, schedule: str) -> dict[str, DenoiserTransformer]:
        first = next(iter(self.bundles.values()))
        return attach(self.pipe, first, schedule=schedule, device="cpu")

    def latents(self, schedule: str, **more: Any) -> tuple[Tensor, dict[str, DenoiserTransformer]]:
        """The latents with the drop-in, which is taken out again."""
        before = transformers_of(self.pipe)
        ours = self.drop_ins(schedule)
        try:
            return latents_of(self.pipe, {**self.given, **more}, STEPS), ours
        finally:
            for name, module in before.items():
                setattr(self.pipe, name, module)

    def expected(self, schedule: str) -> Tensor:
        return hooked(self.pipe, self.given, self.bundles, schedule, STEPS)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Exports a pipeline by name, once."""
    made: dict[str, Exported] = {}

    def of(name: str) -> Exported:
        if name not in made:
            pipe, given = PIPELINES[name]()
            bundle = fora_trt.export(pipe, tmp_path_factory.mktemp(name) / name, **given)
            spec = bundle.manifest.pipeline
            assert spec is not None
            folders = spec.siblings(name)
            made[name] = Exported(
                pipe, given, {one: Bundle.open(bundle.folder.with_name(folder)) for one, folder in folders.items()}
            )
        return made[name]

    return of


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", FAST)
def test_latents_are_those_of_hooks(name: str, schedule: str, exported: Any) -> None:
    one = exported(name)
    got, _ = one.latents(schedule)
    assert relative(got, one.expected(schedule)) < 1e-5


@pytest.mark.parametrize(("name", "slots"), [("flux_cfg", 2), ("sd3", 1)])
def test_full_and_reuse_calls_are_as_the_schedule_says(name: str, slots: int, exported: Any) -> None:
    _, ours = exported(name).latents("fora:3")
    schedule = Schedule.fora(STEPS, 3)
    transformer = ours["transformer"]
    assert (transformer.full_steps, transformer.reuse_steps) == (
        slots * schedule.full_steps,
        slots * (STEPS - schedule.full_steps),
    )


def test_a_pipeline_in_memory_is_no_reference_later(exported: Any) -> None:
    (bundle,) = exported("sd3").bundles.values()
    message = r"needs the pipeline that .*/sd3 was exported from, which was in memory; save it with save_pretrained\(\)"
    with pytest.raises(SourceError, match=message):
        model_from_bundle(bundle)


def test_each_transformer_caches_its_own_part_of_the_steps(exported: Any) -> None:
    _, ours = exported("wan22").latents("fora:3")
    taken = {name: (one.full_steps, one.reuse_steps) for name, one in ours.items()}
    assert sum(map(sum, taken.values())) == 2 * STEPS, "two calls a step"
    assert all(full and reuse for full, reuse in taken.values()), taken


def test_slots_do_not_see_each_other(exported: Any) -> None:
    """What one prompt caches is not read with the other, in whatever order they are called."""
    one = exported("flux_cfg")
    bundle = one.bundles["transformer"]
    call = bundle.manifest.pipeline.call
    texts = {"a": torch.randn(1, 6, 32), "b": torch.randn(1, 6, 32)}
    one.pipe.scheduler.set_timesteps(STEPS, mu=0.5)
    noise = torch.randn(STEPS, 1, 16, 4)

    def run(order: Mapping[int, str]) -> dict[str, list[Tensor]]:
        transformer = fora_trt.load(bundle, schedule="fora:3", device="cpu").as_transformer(one.pipe.scheduler)
        found: dict[str, list[Tensor]] = {"a": [], "b": []}
        for step, time in enumerate(one.pipe.scheduler.timesteps):
            for slot in order[step % len(order)]:
                inputs = {"latents": noise[step], "timestep": time.expand(1), "encoder_hidden_states": texts[slot]}
                inputs |= {"pooled_projections": torch.ones(1, 32), "guidance": torch.ones(1)}
                arguments = call.arguments_of(inputs, bundle.constants)
                with transformer.cache_context(slot):
                    found[slot].append(transformer(**arguments, return_dict=False)[0])
        return found

    alone = {slot: run({0: slot})[slot] for slot in "ab"}
    both = run({0: "ab", 1: "ba"})
    assert not torch.equal(torch.stack(alone["a"]), torch.stack(alone["b"]))
    for slot in "ab":
        assert torch.equal(torch.stack(both[slot]), torch.stack(alone[slot]))


def test_calls_without_names_are_told_apart_by_their_order(exported: Any) -> None:
    one = exported("flux_cfg")
    named, _ = one.latents("fora:3")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(DenoiserTransformer, "_context", property(lambda _: None, lambda _, __: None), raising=False)
        got, ours = one.latents("fora:3")
    assert {*ours["transformer"]._slots} == {"0", "1"}
    assert torch.equal(got, named)


def test_the_result_belongs_to_the_caller(exported: Any) -> None:
    one = exported("sd3")
    before = one.pipe.transformer
    transformer = one.drop_ins("none")["transformer"]
    one.pipe.transformer = before
    call, bundle = transformer._call, one.bundles["transformer"]
    assert call is not None
    inputs = {spec.name: torch.randn(spec.sized(2)) for spec in bundle.manifest.inputs}
    first = transformer(**call.arguments_of({**inputs, "timestep": torch.tensor([900.0] * 2)}, {}), return_dict=False)[
        0
    ]
    kept = first.clone()
    transformer(**call.arguments_of({**inputs, "timestep": torch.tensor([800.0] * 2)}, {}))
    assert torch.equal(first, kept)


def test_what_was_not_exported_is_refused_by_name(exported: Any) -> None:
    one = exported("flux_cfg")
    with pytest.raises(ShapeError, match="'img_ids' is a tensor of the shape"):
        one.latents("fora:3", height=128)
    with pytest.raises(ShapeError, match="controlnet_block_samples"):
        transformer = fora_trt.load(one.bundles["transformer"], schedule="none", device="cpu").as_transformer()
        assert transformer._call is not None
        arguments = transformer._call.arguments_of(
            {spec.name: torch.zeros(spec.sized(1)) for spec in one.bundles["transformer"].manifest.inputs},
            one.bundles["transformer"].constants,
        )
        transformer(**{**arguments, "controlnet_block_samples": [torch.zeros(1)]})
    with pytest.raises(ShapeError, match="'joint_attention_kwargs' has 'scale', which was not given when"):
        transformer(**{**arguments, "joint_attention_kwargs": {"scale": 0.5}})


def test_timesteps_of_tokens_may_be_equal(exported: Any) -> None:
    """Wan 2.2 5B gives a timestep for each token; without an image they are equal."""
    one = exported("wan22")
    bundle, pipe = one.bundles["transformer"], one.pipe
    pipe.scheduler.set_timesteps(STEPS)
    transformer = fora_trt.load(bundle, schedule="none", device="cpu").as_transformer(pipe)
    inputs = {spec.name: torch.randn(spec.sized(1)) for spec in bundle.manifest.inputs}
    times = pipe.scheduler.timesteps[:1]
    arguments = bundle.manifest.pipeline.call.arguments_of({**inputs, "timestep": times}, bundle.constants)
    want = transformer(**arguments).sample
    transformer = fora_trt.load(bundle, schedule="none", device="cpu").as_transformer(pipe)
    assert torch.equal(transformer(**{**arguments, "timestep": times.expand(1, 3)}).sample, want)
    with pytest.raises(InputError, match=r"timestep has shape \[1, 3\]"):
        transformer(**{**arguments, "timestep": torch.tensor([[0.0, 1.0, 1.0]])})


def test_prompts_may_be_shorter_than_the_text_length(exported: Any) -> None:
    """The pipeline gives as many tokens as the longest prompt has, and no mask for prompts of one length."""
    one = exported("qwen_image")
    call = one.bundles["transformer"].manifest.pipeline.call
    assert call.padded == {"encoder_hidden_states": 8}

    def with_tokens(count: int) -> dict[str, Any]:
        texts = {"prompt_embeds": drawn(1, count, 16, seed=1), "prompt_embeds_mask": ones(1, count)}
        return {**one.given, **texts}

    for count in (3, 8):  # the negative prompt has 6
        got, _ = one.latents("none", **with_tokens(count))
        assert relative(got, latents_of(one.pipe, with_tokens(count), STEPS)) < 1e-5
    two = {
        "prompt_embeds": drawn(2, 5, 16, seed=3),
        "prompt_embeds_mask": torch.tensor([[1] * 5, [1] * 2 + [0] * 3]),
        "negative_prompt_embeds": drawn(2, 6, 16, seed=4),
        "negative_prompt_embeds_mask": ones(2, 6),
    }
    got, ours = one.latents("fora:3", **two)
    assert relative(got, hooked(one.pipe, {**one.given, **two}, one.bundles, "fora:3", STEPS)) < 1e-5
    assert ours["transformer"].reuse_steps > 0
    with pytest.raises(ShapeError, match="has 9 tokens; the bundle was exported for at most 8; call the pipeline"):
        one.latents("none", **{**with_tokens(9), "max_sequence_length": 9})


@pytest.mark.parametrize("schedule", ["even:4", "full:0,1,4", "dense:every=3,forecast=1"])
def test_schedules_that_need_the_number_of_steps_get_it_from_the_pipeline(schedule: str, exported: Any) -> None:
    one = exported("flux_cfg")
    got, ours = one.latents(schedule)
    assert relative(got, one.expected(schedule)) < 1e-5
    assert ours["transformer"].full_steps == 2 * Schedule.from_text(schedule, STEPS).full_steps


def test_several_images_of_a_prompt_may_share_what_is_given_for_each_prompt(exported: Any) -> None:
    """Qwen-Image gives the shape of the image once for each prompt."""
    one = exported("qwen_image")
    more = {"num_images_per_prompt": 2}
    got, _ = one.latents("none", **more)
    assert relative(got, latents_of(one.pipe, {**one.given, **more}, STEPS)) < 1e-5


def test_a_bundle_of_another_transformer_is_refused(exported: Any) -> None:
    bundle = exported("sd3").bundles["transformer"]
    pipe, _ = PIPELINES["sd35"]()
    with pytest.raises(InputError, match=r"exported from a SD3Transformer2DModel with .*; that of the pipeline has"):
        attach(pipe, bundle, schedule="none", device="cpu")
    with pytest.raises(InputError, match="from a SD3Transformer2DModel; the pipeline has a FluxTransformer2DModel"):
        attach(exported("flux_cfg").pipe, bundle, schedule="none", device="cpu")


def test_each_transformer_gets_its_own_bundle(exported: Any, tmp_path: Path) -> None:
    first, second = exported("wan22").bundles.values()
    for bundle in (first, second):
        shutil.copytree(bundle.folder, tmp_path / bundle.folder.name)
    copied = Bundle.open(tmp_path / first.folder.name)
    assert {name: one.manifest for name, one in bundles_of(copied).items()} == {
        "transformer": first.manifest,
        "transformer_2": second.manifest,
    }
    beside = tmp_path / second.folder.name
    shutil.rmtree(beside)
    with pytest.raises(InputError, match="-transformer_2 with the transformer_2 is missing; copy it there"):
        bundles_of(copied)
    shutil.copytree(first.folder, beside)
    with pytest.raises(InputError, match="with the transformer_2 is the bundle of something else"):
        bundles_of(copied)
    model = first.manifest.model
    alone = model.model_copy(update={"options": model.options.model_copy(update={"component": "transformer"})})
    assert [*bundles_of(replace(first, manifest=first.manifest.model_copy(update={"model": alone})))] == ["transformer"]
    renamed = second.manifest.model_copy(update={"name": "second"})
    assert [*bundles_of(replace(second, manifest=renamed))] == ["transformer_2"]


def test_a_replaced_scheduler_is_followed(exported: Any) -> None:
    one = exported("sd3")
    before = one.pipe.scheduler
    one.pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    try:
        want = latents_of(one.pipe, one.given, STEPS)
        with warnings.catch_warnings():
            warnings.simplefilter("error", fora_trt.errors.ForaWarning)
            got, ours = one.latents("none")
        assert relative(got, want) < 1e-5
        _, ours = one.latents("fora:3")
        assert ours["transformer"].reuse_steps > ours["transformer"].full_steps
        assert {*ours["transformer"]._slots} == {"0"}, "a repeated timestep of Heun's method is a step"
    finally:
        one.pipe.scheduler = before


def test_it_passes_for_the_transformer_of_its_pipeline(exported: Any, tmp_path: Path) -> None:
    one = exported("wan22")
    want, before = one.expected("fora:3"), transformers_of(one.pipe)
    ours = one.drop_ins("fora:3")
    for name, module in before.items():
        setattr(one.pipe, name, module)
    transformer = ours["transformer"]
    assert isinstance(transformer, WanTransformer3DModel)
    assert isinstance(transformer, DenoiserTransformer)
    assert transformer.config.patch_size == (1, 2, 2) or list(transformer.config.patch_size) == [1, 2, 2]
    plain, given = PIPELINES["wan22"]()
    plain.save_pretrained(tmp_path / "wan")
    loaded = type(plain).from_pretrained(tmp_path / "wan", **ours, vae=None, text_encoder=None, tokenizer=None)
    for drop_in in ours.values():
        drop_in.follow(loaded)
    loaded.set_progress_bar_config(disable=True)
    assert relative(latents_of(loaded.to("cpu"), given, STEPS), want) < 1e-5
    assert not hasattr(transformer, "enable_cache")
    with pytest.raises(NotOfEnginesError, match=r"have no enable_cache: .* the original WanTransformer3DModel back"):
        transformer.enable_cache(None)
    assert loaded.to(torch.float16).transformer.dtype == torch.float16


def test_a_saved_pipeline_has_the_bundles_and_their_schedule(exported: Any, tmp_path: Path) -> None:
    one = exported("wan22")
    want, before = one.expected("fora:3"), transformers_of(one.pipe)
    try:
        one.drop_ins("fora:3")
        one.pipe.save_pretrained(tmp_path / "wan")
        one.pipe.save_pretrained(tmp_path / "wan")  # replaces what it wrote
        plain = type(one.pipe)(**{**one.pipe.components, **before})
        plain.save_pretrained(tmp_path / "plain")
        with pytest.raises(InputError, match="plain/transformer exists and is not a bundle, so it is not replaced"):
            one.pipe.save_pretrained(tmp_path / "plain")
    finally:
        for name, module in before.items():
            setattr(one.pipe, name, module)
    absent = {"vae": None, "text_encoder": None, "tokenizer": None}
    loaded = type(one.pipe).from_pretrained(tmp_path / "wan", **absent)
    loaded.set_progress_bar_config(disable=True)
    for name in before:
        getattr(loaded, name).follow(loaded)
    assert relative(latents_of(loaded.to("cpu"), one.given, STEPS), want) < 1e-5
    assert loaded.transformer.reuse_steps > 0
    half = type(one.pipe).from_pretrained(tmp_path / "wan", torch_dtype=torch.float16, **absent)
    assert half.transformer_2.dtype == torch.float16
    by_count = fora_trt.load(one.bundles["transformer"], schedule=Schedule.fora(STEPS, 3), device="cpu")
    by_count.as_transformer().save_pretrained(tmp_path / "by_count")
    saved = Schedule.from_text(str(Bundle.open(tmp_path / "by_count").schedule), STEPS)
    assert saved.plan == Schedule.fora(STEPS, 3).plan


@pytest.mark.parametrize("name", REFUSED)
def test_a_batch_that_cannot_be_symbolic_is_refused_before_the_trace(name: str, tmp_path: Path) -> None:
    pipe, given = PIPELINES[name]()
    kind, message = REFUSED[name]
    stages: list[str] = []
    with pytest.raises(kind, match=message):
        fora_trt.export(pipe, tmp_path / name, report=stages.append, **given)
    assert "tracing the full graph" not in stages
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PIPELINES if name not in (*FAST, *REFUSED)])
def test_latents_of_all_pipelines_are_those_of_hooks(name: str, exported: Any) -> None:
    """And no attention or MLP is left in a reuse step, at the highest level."""
    one = exported(name)
    for schedule in SCHEDULES:
        got, _ = one.latents(schedule)
        assert relative(got, one.expected(schedule)) < 1e-5, schedule
    for bundle in one.bundles.values():
        assert bundle.manifest.optimization == ("conditioning" if name == "latte" else "fold")
        operators = {node.op_type for node in ir.load(bundle.graph_path(REUSE)).graph}
        assert name == "hunyuan_dit" or not operators & HEAVY
        done = CliRunner().invoke(main, ["verify", str(bundle.folder), "--steps", "4", "--cache-intervals", "1,3"])
        assert done.exit_code == 0, done.output


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_a_fused_lora_changes_the_bundle_as_it_changes_the_pipeline(name: str, tmp_path: Path) -> None:
    from peft import LoraConfig

    pipe, given = PIPELINES[name]()
    before = latents_of(pipe, given, STEPS)
    torch.manual_seed(5)
    adapted = ["to_q", "to_k", "to_v", "to_out.0"]
    pipe.transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=adapted))
    pipe.fuse_lora(components=["transformer"])
    want = latents_of(pipe, given, STEPS)
    assert relative(before, want) > 1e-3
    attach(pipe, fora_trt.export(pipe, tmp_path / name, **given), schedule="none", device="cpu")
    assert relative(latents_of(pipe, given, STEPS), want) < 1e-5
