"""Bundles of diffusers pipelines are served by the pipeline itself; no Ray here."""

import asyncio
import re
from functools import wraps
from pathlib import Path
from threading import Event
from typing import Any

import numpy
import pytest
from diffusers import AuraFlowPipeline

from fora_trt.bundle import Bundle
from fora_trt.diffusers_pipeline import DiffusersPipeline
from fora_trt.errors import BusyError, InputError
from fora_trt.pipeline import PipelineConfig
from fora_trt.schedule import Schedule
from fora_trt.serve.api import ApiError, Wanted
from fora_trt.serve.replica import OneByOne, maker_of
from fora_trt.serve.requests import Served
from fora_trt.serve.whole import pipeline_of
from tests.test_pipeline_folders import STEPS, auraflow, bundle  # noqa: F401 # fixtures


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("schedules") / "calibrated.json"
    Schedule.from_text("dense:3", STEPS).to_file(path)
    return path


@pytest.fixture(scope="module")
def served(bundle: Bundle, named: Path) -> Served:  # noqa: F811
    return Served("auraflow", PipelineConfig(bundle.folder, backend="onnxruntime"), (named,), max_batch_size=2)


@pytest.fixture(scope="module")
def maker(served: Served) -> OneByOne:
    made = maker_of(served)
    assert isinstance(made, OneByOne)
    return made


def asked(maker: OneByOne, seed: int = 3, **fields: Any) -> Any:
    return asyncio.run(maker.make(Wanted(**{"prompt": "a fox", "num_inference_steps": STEPS, **fields}), seed))


def test_images_are_those_of_the_pipeline_in_every_schedule(maker: OneByOne, auraflow: Path) -> None:  # noqa: F811
    pipe = AuraFlowPipeline.from_pretrained(auraflow)
    pipe.set_progress_bar_config(disable=True)

    for schedule, full in (("none", STEPS), ("fora:3", 3), ("none", STEPS), ("calibrated", 3), (None, 4)):
        done = asked(maker, n=3, schedule=schedule)
        assert [one.full_steps for one in done.made] == [full] * 3, schedule
        if schedule == "none":
            for seeds, made in (((3, 4), done.made[:2]), ((5,), done.made[2:])):
                expected = DiffusersPipeline(maker.whole.pipeline.bundle, schedule="none", backend="onnxruntime")(
                    ["a fox"], steps=STEPS, seed=seeds[0], num_images=len(seeds)
                ).pictures
                for one, picture in zip(made, expected, strict=True):
                    assert numpy.array_equal(one.picture, numpy.asarray(picture[0]))
    assert maker.counts().pictures == 15
    assert maker.counts().batches == {2: 2 * STEPS + 10, 1: 2 * STEPS + 10}


def test_arguments_reach_the_pipeline(maker: OneByOne, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    call = AuraFlowPipeline.__call__

    @wraps(call)
    def recording(self: Any, *args: Any, **given: Any) -> Any:
        seen.append(given)
        return call(self, *args, **given)

    monkeypatch.setattr(AuraFlowPipeline, "__call__", recording)
    done = asked(maker, negative_prompt="a dog", guidance_scale=7.0)
    assert {name: seen[0][name] for name in ("prompt", "negative_prompt", "guidance_scale", "num_inference_steps")} == {
        "prompt": "a fox",
        "negative_prompt": "a dog",
        "guidance_scale": 7.0,
        "num_inference_steps": STEPS,
    }
    assert (done.settings["guidance_scale"], done.settings["schedule"]) == (7.0, "fora:2")


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"prompt": None}, "prompt", "needs prompt"),
        ({"class_label": 3}, "class_label", "has no classes"),
        ({"size": "32x16"}, "size", "makes images of 16x16"),
        ({"schedule": "/etc/passwd"}, "schedule", "there is no such schedule"),
        ({"schedule": "fora:99"}, "schedule", ""),
        ({"schedule": "calibrated", "num_inference_steps": 4}, "schedule", "does not fit|for 6 model evaluations"),
    ],
)
def test_a_value_that_does_not_fit_is_named(maker: OneByOne, fields: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(ApiError) as refused:
        asked(maker, **fields)
    assert (refused.value.status, refused.value.param) == (422, param)
    assert "/" not in refused.value.message.replace("/etc/passwd", "/")
    assert re.search(message, refused.value.message)


def test_work_ends_when_nobody_waits(maker: OneByOne) -> None:
    gone = Event()
    gone.set()
    with pytest.raises(BusyError, match="nobody waits"):
        maker.whole.make(Wanted(prompt="a fox"), 0, gone)


def test_what_makes_no_images_or_has_no_effect_is_refused_before_anything_is_loaded(served: Served) -> None:
    config = PipelineConfig(served.pipeline.bundle, backend="onnxruntime", scheduler="ddim")
    with pytest.raises(InputError, match="--scheduler has no effect"):
        pipeline_of(Served("auraflow", config))
