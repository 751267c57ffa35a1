"""What watching a pipeline finds: inputs, constants, times and slots of its transformers."""

from typing import Any

import pytest
import torch

from fora_trt.call import CallReader, TimeMap
from fora_trt.errors import ModelError, ShapeError
from fora_trt.models.pipelines import empty_from_pipeline
from fora_trt.models.watch import Watched, watch
from tests.tiny_pipelines import PIPELINES, drawn


def found(name: str) -> Watched:
    pipe, given = PIPELINES[name]()
    return watch(pipe, given)["transformer"]


def test_what_grows_with_the_prompts_is_an_input_and_the_rest_a_constant() -> None:
    flux = found("flux_cfg")
    assert {name: tuple(one.shape) for name, one in flux.examples.items()} == {
        "latents": (1, 16, 4),
        "encoder_hidden_states": (1, 6, 32),
        "pooled_projections": (1, 32),
        "guidance": (1,),
        "timestep": (1,),
    }
    assert {name: tuple(one.shape) for name, one in flux.constants.items()} == {"img_ids": (16, 3), "txt_ids": (6, 3)}
    assert flux.output == (1, 16, 4)


@pytest.mark.parametrize(
    ("name", "time", "slots", "samples"),
    [
        ("sd3", TimeMap(), ("0",), 2),  # guidance in one call
        ("flux", TimeMap(1 / 1000), ("cond",), 1),  # embedded guidance
        ("flux_cfg", TimeMap(1 / 1000), ("cond", "uncond"), 1),
        ("lumina2", TimeMap(-1 / 1000, 1.0), ("0", "1"), 1),  # time rises, slots have no names
        ("ltx", TimeMap(), ("cond_uncond",), 2),
    ],
)
def test_times_and_slots(name: str, time: TimeMap, slots: tuple[str, ...], samples: int) -> None:
    one = found(name)
    assert (one.call.time, one.call.slots, one.samples) == (time, slots, samples)


def test_both_transformers_of_a_pipeline_are_watched() -> None:
    pipe, given = PIPELINES["wan22"]()
    assert {name: one.call.component for name, one in watch(pipe, given).items()} == {
        "transformer": "transformer",
        "transformer_2": "transformer_2",
    }


def test_values_in_arguments_are_kept_and_compared() -> None:
    ltx = found("ltx")
    inputs = {**ltx.examples}
    arguments = ltx.call.arguments_of(inputs, ltx.constants)
    assert (arguments["num_frames"], arguments["height"], arguments["width"]) == (2, 4, 4)
    reader = CallReader(ltx.call, ltx.constants)
    again = reader.inputs((), arguments)
    assert {name: one.tolist() for name, one in again.items()} == {name: one.tolist() for name, one in inputs.items()}
    with pytest.raises(ShapeError, match=r"the argument 'num_frames' is 3; the bundle was exported with 2"):
        reader.inputs((), {**arguments, "num_frames": 3})
    with pytest.raises(ShapeError, match=r"the argument 'audio' was not given when the bundle was exported"):
        reader.inputs((), {**arguments, "audio": drawn(1)})


def test_constants_are_compared_at_every_call() -> None:
    flux = found("flux")
    arguments = flux.call.arguments_of(flux.examples, flux.constants)
    reader = CallReader(flux.call, flux.constants)
    reader.inputs((), {**arguments, "img_ids": arguments["img_ids"].half()})
    with pytest.raises(ShapeError, match="'img_ids' has other values"):
        reader.inputs((), {**arguments, "img_ids": arguments["img_ids"] + 1})
    with pytest.raises(ShapeError, match=r"'img_ids' is a tensor of the shape \[4, 3\]; .* the shape \[16, 3\]"):
        reader.inputs((), {**arguments, "img_ids": arguments["img_ids"][:4]})
    positions = arguments["img_ids"].clone()
    for _ in range(2):
        reader.inputs((), {**arguments, "img_ids": positions})
    positions += 1
    with pytest.raises(ShapeError, match="'img_ids' has other values"):
        reader.inputs((), {**arguments, "img_ids": positions})
    with pytest.raises(ShapeError, match="'guidance' is missing"):
        reader.inputs((), {**arguments, "guidance": None})


def test_the_pipeline_is_as_before() -> None:
    pipe, given = PIPELINES["wan"]()
    scheduler, times, own = pipe.scheduler, pipe.scheduler.timesteps.clone(), {*vars(pipe.transformer)}
    weights = {name: one.clone() for name, one in pipe.transformer.state_dict().items()}
    watch(pipe, given)
    assert pipe.scheduler is scheduler
    assert torch.equal(scheduler.timesteps, times)
    assert {*vars(pipe.transformer)} - {"_diffusers_hook"} == own, "diffusers adds its hooks at any call"
    assert all(torch.equal(one, weights[name]) for name, one in pipe.transformer.state_dict().items())


def test_watching_computes_no_values() -> None:
    """A module of any size is watched in the time that its shapes need."""
    pipe, given = PIPELINES["sd3"]()
    calls: list[torch.Tensor] = []
    pipe.transformer.proj_out.register_forward_hook(lambda _, args, output: calls.append(output))
    watch(pipe, given)
    assert calls
    assert not any(type(one) is torch.Tensor for one in calls)


def sentence(pipe: Any, **given: Any) -> str:
    with pytest.raises(ModelError) as caught:
        watch(pipe, given)
    return str(caught.value)


def test_calls_that_no_bundle_can_serve_are_refused() -> None:
    pipe, given = PIPELINES["z_image"]()
    assert "returns a list of samples; a tensor is needed" in sentence(pipe, **given)
    pipe, given = PIPELINES["wan"]()
    shorter = {**given, "negative_prompt_embeds": given["negative_prompt_embeds"][:, :4]}
    assert "encoder_hidden_states of the shape [1, 4, 16] in the slot 'uncond'" in sentence(pipe, **shorter)
    assert "WanPipeline has no argument 'hight'" in sentence(pipe, **given, hight=64)
    assert "give further arguments of the pipeline with --call" in sentence(pipe, prompt_embeds=drawn(1, 6, 7))


def test_weights_that_are_not_there_are_a_sentence() -> None:
    def problem() -> str:
        with pytest.raises(ModelError) as caught:
            empty_from_pipeline(pipe, None, given)
        return str(caught.value)

    pipe, given = PIPELINES["sd3"]()
    weight = pipe.transformer.proj_out.weight
    pipe.transformer.proj_out.weight = torch.nn.Parameter(weight.to(torch.int8), requires_grad=False)
    assert "is quantized: it has weights of torch.int8; load it without quantization" in problem()
    pipe.transformer.proj_out.weight = torch.nn.Parameter(weight.to("meta"))
    assert "is offloaded" in problem()
    pipe.transformer = torch.nn.Identity()
    assert "has no weights; put the original transformer back" in problem()
    with pytest.raises(ModelError, match="has no transformer 'other'; it has transformer"):
        empty_from_pipeline(pipe, "other", given)
