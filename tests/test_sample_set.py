import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fora_trt import Schedule, load
from fora_trt.bundle import Bundle
from fora_trt.errors import InputError
from fora_trt.evaluate.sample_set import SampleSet, SampleSettings
from fora_trt.runtime.conditioning import Conditioning, balanced_labels, conditioning_of_classes, drawn_labels
from fora_trt.runtime.images import Decoder
from fora_trt.runtime.sampling import Guidance, Sampler
from fora_trt.runtime.schedulers import scheduler_from_config
from fora_trt.runtime.updates import update_from_scheduler
from tests.test_cli import fora

STEPS, IMAGES = 4, 7


def sample_set(bundle: Bundle, folder: Path, **changed: Any) -> SampleSet:
    given = conditioning_of_classes(bundle.manifest, balanced_labels(bundle.manifest, IMAGES))
    settings = SampleSettings.model_validate(
        {
            "bundle": "0" * 64, "num_images": IMAGES, "conditioning": given.digest(), "seed": 5,
            "scheduler": "DDIMScheduler", "steps": STEPS, "cache_interval": 2, "guidance_scale": 1.5,
            "guidance_interval": None, "batch_size": 3, "backend": "torch", "device": "cpu", "vae": None,
            "layout": "npz", "versions": {},
        }
        | changed
    )  # fmt: skip
    schedule = Schedule.static(STEPS, settings.cache_interval)
    sampler = Sampler(load(bundle, schedule=schedule, backend="torch", device="cpu"), updates(bundle))
    return SampleSet(folder, settings, sampler, Decoder(bundle.manifest), schedule, Guidance(1.5), given)


def updates(bundle: Bundle) -> Any:
    return update_from_scheduler(scheduler_from_config(bundle.scheduler_config, None, False), STEPS)


class Stopped(Exception):
    """As if somebody pressed Ctrl-C."""


def stopping_after(batches: int) -> Any:
    def watch(items: Any) -> Iterator[Any]:
        for k, item in enumerate(items):
            if k == batches:
                raise Stopped
            yield item

    return watch


def test_every_image_is_what_run_makes_of_its_seed_and_class(exported: Bundle, tmp_path: Path) -> None:
    made = sample_set(exported, tmp_path / "set").make()
    with np.load(made) as content:
        pictures, labels = content["arr_0"], content["arr_1"]
        assert sorted(content.files) == ["arr_0", "arr_1"]
    assert (pictures.shape, pictures.dtype, labels.tolist()) == ((IMAGES, 16, 16, 3), np.uint8, [*range(IMAGES)])
    # what numpy itself writes of the same arrays, byte for byte
    np.savez(tmp_path / "again.npz", arr_0=pictures, arr_1=labels)
    assert (tmp_path / "again.npz").read_bytes() == made.read_bytes()
    for k in (0, 4, 6):
        picture = tmp_path / "one.png"
        fora(
            "run", exported.folder, "--class-labels", k, "--seed", 5 + k, "--steps", STEPS, "--cache-interval", 2,
            "--backend", "torch", "-o", tmp_path / "ones",
        )  # fmt: skip
        (tmp_path / "ones").mkdir(exist_ok=True)
        if picture.exists():
            picture.unlink()
    assert len({picture.tobytes() for picture in pictures}) == IMAGES


@pytest.mark.parametrize("layout", ["npz", "png"])
def test_stopped_and_resumed_it_is_the_same_to_the_bit(exported: Bundle, tmp_path: Path, layout: str) -> None:
    whole = sample_set(exported, tmp_path / "whole", layout=layout).make()
    parts = sample_set(exported, tmp_path / "parts", layout=layout)
    for batches in (1, 0, 1):
        with pytest.raises(Stopped):
            parts.make(resume=batches < 1 or (tmp_path / "parts").exists(), watch=stopping_after(batches))
    again = sample_set(exported, tmp_path / "parts", layout=layout)
    calls = []
    launch = again.sampler.launch
    again.sampler.launch = lambda *given: (calls.append(given), launch(*given))[1]  # type: ignore[method-assign, func-returns-value]
    resumed = again.make(resume=True)
    assert 0 < len(calls) < STEPS * 3, "what was there was not made again"
    files = [whole] if layout == "npz" else sorted(whole.glob("*.png"))
    assert len(files) == (1 if layout == "npz" else IMAGES)
    for file in files:
        assert file.read_bytes() == (resumed / file.name if layout == "png" else resumed).read_bytes()
    assert not (tmp_path / "parts/parts").exists()
    assert again.make(resume=True) == resumed, "complete already"
