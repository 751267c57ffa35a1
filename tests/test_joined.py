"""Images that join and leave a batch at window boundaries are those that are made alone, bit for bit on a CPU."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fora_trt import Pipeline
from fora_trt.bundle import Bundle
from fora_trt.contract import OPTIMIZATIONS, Optimization
from fora_trt.errors import BackendError
from fora_trt.runtime import joined_conditioning
from fora_trt.runtime.denoiser import Denoiser
from fora_trt.runtime.joined import Sizes, Track
from fora_trt.runtime.joined_conditioning import JoinedConditioning
from fora_trt.runtime.layout import Layout
from fora_trt.sampling.guidance import Guidance
from fora_trt.sampling.joined import JoinedSampler, Member, check_finite
from fora_trt.schedule import Schedule
from tests.conftest import BundleAt

PLAIN = ("none", "fora:3", "fora:2")
FORECASTS = ("dense:5,0.3,forecast=2", "fora:4,forecast=1", "dense:4,forecast=3", "full:0,1,2,7,forecast=2")
MOST = 8
"""Samples of a batch: images, and those of guidance."""


class Asked:
    """An image with settings of its own."""

    def __init__(self, bundle: Bundle, schedule: str, steps: int, scheduler: str, scale: float, seed: int) -> None:
        self.bundle, self.schedule, self.steps, self.scheduler = bundle, schedule, steps, scheduler
        self.scale, self.seed, self.label = scale, seed, seed % 7

    def pipeline(self, backend: str) -> Pipeline:
        return Pipeline(
            self.bundle,
            schedule=self.schedule,
            steps=self.steps,
            scheduler=self.scheduler,
            guidance_scale=self.scale,
            backend=backend,
        )

    def alone(self, backend: str) -> Tensor:
        return self.pipeline(backend)(class_labels=[self.label], seed=self.seed).latents[0]

    def member(self, sampler: JoinedSampler, backend: str) -> Member:
        pipeline = self.pipeline(backend)
        sampling, given = pipeline.sampling(), pipeline.conditioning([self.label])
        assert sampler.takes(sampling.scheduler_step, sampling.schedule, Guidance(self.scale))
        return sampler.member(sampling.scheduler_step, sampling.schedule, given, self.seed, Guidance(self.scale))


def some(bundle: Bundle, schedules: Sequence[str], count: int, seed: int) -> list[Asked]:
    chosen = random.Random(seed)
    return [
        Asked(
            bundle,
            chosen.choice(schedules),
            chosen.choice([9, 12]),
            chosen.choice(["ddim", "ddpm", "dpm-solver++", "euler"]),
            chosen.choice([1.0, 2.0, 3.5]),
            number,
        )
        for number in range(count)
    ]


def joined(bundle: Bundle, asked: Sequence[Asked], backend: str, seed: int = 0) -> tuple[list[Tensor], int]:
    """The latents of all, which join at random; and the largest number of images of a window."""
    chosen = random.Random(seed)
    denoiser = Pipeline(bundle, backend=backend).start(MOST)
    assert isinstance(denoiser, Denoiser)
    sampler = JoinedSampler(denoiser, MOST)
    members = [one.member(sampler, backend) for one in asked]
    waiting, found, most = [*members], {}, 0
    while waiting or sampler.members:
        joining: list[Member] = []
        while waiting and sampler.fits(waiting[0], joining=joining) and chosen.random() < 0.7:
            joining.append(waiting.pop(0))
        sampler.change(joining=joining)
        if sampler.members:
            most = max(most, len(sampler.members))
            for done in sampler.window()[1]:
                assert done.latents is not None
                found[done.number] = done.latents
    return [found[one.number] for one in members], most


@pytest.mark.parametrize("level", OPTIMIZATIONS)
def test_images_that_join_are_those_made_alone_bit_for_bit_on_onnx_runtime(
    bundle_at: BundleAt, level: Optimization
) -> None:
    bundle = bundle_at(level, "fp32")
    schedules = (*PLAIN, *FORECASTS) if bundle.manifest.can_forecast else PLAIN
    for seed in range(2):
        asked = some(bundle, schedules, 12, seed)
        found, most = joined(bundle, asked, "onnxruntime", seed)
        assert most >= 3
        for one, latents in zip(asked, found, strict=True):
            assert torch.equal(latents, one.alone("onnxruntime")), (one.schedule, one.steps, one.scheduler, one.scale)


def test_rows_of_conditioning_move_along_and_are_computed_when_they_are_needed(
    bundle_at: BundleAt, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = bundle_at("fold", "fp32")
    computed: list[tuple[str, int]] = []
    compute = JoinedConditioning._compute

    def counted(self: JoinedConditioning, engine: Any, inputs: Any, wanted: Any) -> Any:
        computed.append(("full" if engine is self._full_engine else "all", len(wanted)))
        return compute(self, engine, inputs, wanted)

    monkeypatch.setattr(JoinedConditioning, "_compute", counted)
    asked = [Asked(bundle, schedule, 9, "ddim", 2.0, 3) for schedule in ("fora:3", "fora:3,forecast=1", "none")]
    alone = [one.alone("onnxruntime") for one in asked]
    found = joined(bundle, asked, "onnxruntime")[0]
    assert all(map(torch.equal, alone, found))
    samples, full_steps = 2 * 3, sum(sum(Schedule.from_text(one.schedule, 9).full) for one in asked)
    rows = {which: sum(count for kind, count in computed if kind == which) for which in ("all", "full")}
    assert rows == {"all": samples * 9, "full": 2 * full_steps}
    assert len(computed) <= 2 * 3, "once for each image that joins"

    computed.clear()
    monkeypatch.setattr(joined_conditioning, "MOST_BYTES", 1)
    found = joined(bundle, asked, "onnxruntime")[0]
    assert all(map(torch.equal, alone, found))
    assert len(computed) > 2 * 3 and max(count for _, count in computed) < samples * 9 / 2, "a window at a time"


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_images_that_join_are_close_to_those_made_alone_on_torch(bundle_at: BundleAt, precision: str) -> None:
    """Its matrix products depend on the size of the batch."""
    bundle = bundle_at("fold", precision)
    asked = some(bundle, (*PLAIN, *FORECASTS), 8, 0)
    tolerance = 1e-4 if precision == "fp32" else 3e-2
    for one, latents in zip(asked, joined(bundle, asked, "torch")[0], strict=True):
        alone = one.alone("torch")
        assert (latents - alone).abs().max() <= tolerance * alone.abs().max()


def test_an_image_with_larger_windows_waits_until_no_other_is_left(bundle_at: BundleAt) -> None:
    bundle = bundle_at("fold", "fp32")
    denoiser = Pipeline(bundle, backend="onnxruntime").start(MOST)
    assert isinstance(denoiser, Denoiser)
    sampler = JoinedSampler(denoiser, MOST)
    short, other, long = (
        Asked(bundle, schedule, 6, "ddim", 1.0, 0).member(sampler, "onnxruntime")
        for schedule in ("fora:2", "none", "fora:5")
    )
    assert sampler.fits(short)
    sampler.change(joining=[short])
    assert sampler.fits(other)
    assert not sampler.fits(long)
    sampler.change(leaving=[short])
    assert sampler.fits(long)
    sampler.change(joining=[long, other])
    while sampler.members:
        sampler.window()
        sampler.change()
    assert long.latents is not None
    again = Asked(bundle, "fora:5", 6, "ddim", 1.0, 0).member(sampler, "onnxruntime")
    sampler.change(joining=[short])
    assert sampler.fits(again), "what was allocated stays"


def test_a_batch_has_places_for_so_many_samples(bundle_at: BundleAt) -> None:
    bundle = bundle_at("fold", "fp32")
    denoiser = Pipeline(bundle, backend="onnxruntime").start(MOST)
    assert isinstance(denoiser, Denoiser)
    sampler = JoinedSampler(denoiser, 3)
    guided, other = (Asked(bundle, "none", 3, "ddim", 2.0, 0).member(sampler, "onnxruntime") for _ in range(2))
    alone = Asked(bundle, "none", 3, "ddim", 1.0, 0).member(sampler, "onnxruntime")
    assert sampler.fits(alone, joining=[guided])
    assert not sampler.fits(other, joining=[guided])
    sampler.change(joining=[guided])
    assert not sampler.fits(other)
    assert sampler.fits(other, leaving=[guided])


def test_an_image_that_is_not_finite_leaves_the_others_alone(bundle_at: BundleAt) -> None:
    bundle = bundle_at("fold", "fp32")
    denoiser = Pipeline(bundle, backend="onnxruntime").start(MOST)
    assert isinstance(denoiser, Denoiser)
    sampler = JoinedSampler(denoiser, MOST)
    forecast = FORECASTS[0]
    sick, good = (Asked(bundle, forecast, 9, "ddim", 2.0, seed) for seed in (1, 2))
    members = [one.member(sampler, "onnxruntime") for one in (sick, good, good)]
    members[0].rows[:] = float("inf")
    sampler.change(joining=members[:2])
    sampler.window()
    sampler.change(leaving=members[:1], joining=members[2:])  # the last one gets its place
    while sampler.members:
        sampler.window()
        sampler.change()
    for member in members[1:]:
        assert member.latents is not None
        check_finite(bundle.manifest, member.latents)
        assert torch.equal(member.latents, good.alone("onnxruntime"))
    with pytest.raises(BackendError, match="are not finite in fp32"):
        check_finite(bundle.manifest, torch.tensor([1.0, float("nan")]))


def test_guidance_on_some_steps_and_schedulers_that_are_called_cannot_join(bundle_at: BundleAt) -> None:
    pipeline = Pipeline(bundle_at("fold", "fp32"), backend="onnxruntime", steps=6)
    step, fora = pipeline.sampling().scheduler_step, Schedule.fora(6, 3)
    assert JoinedSampler.takes(step, fora, Guidance(2.0))
    assert JoinedSampler.takes(step, fora, Guidance(1.0, 2, 4)), "it guides no step"
    assert not JoinedSampler.takes(step, fora, Guidance(2.0, 1, None))
    assert not JoinedSampler.takes(step, fora, Guidance(2.0, 0, 3))
    every = {site.module for site in pipeline.manifest.cache_sites}
    some = {site.module for site in pipeline.manifest.cache_sites[:3]}
    partial = Schedule.of_masks([every, some], pipeline.manifest.cache_sites)
    assert not JoinedSampler.takes(step, partial, Guidance(2.0))
    called = Pipeline(bundle_at("fold", "fp32"), backend="onnxruntime", steps=6, scheduler="pndm").sampling()
    assert not JoinedSampler.takes(called.scheduler_step, fora, Guidance(2.0))


def test_tracks_go_from_window_to_window() -> None:
    track = Track(Layout.of(Schedule.from_text("fora:3,forecast=1", 9).plan))
    seen = []
    while not track.done:
        seen.append((track.step, track.length, track.steps[: track.length], track.window))
        assert track.steps[track.length :] == [
            one for one in track.layout.readers[track.step] if one not in track.steps[: track.length]
        ]
        track.step += track.length
    assert [one[0] for one in seen] == [k for k, full in enumerate(Schedule.from_text("fora:3", 9).full) if full]
    assert sum(one[1] for one in seen) == 9
    assert [one[3] for one in seen] == [*range(len(seen))]


def test_sizes_hold_smaller_ones() -> None:
    assert Sizes(3, 2, 3).holds(Sizes(2, 2, 1))
    assert not Sizes(3, 1, 3).holds(Sizes(2, 2, 1))
    assert Sizes(3, 1, 2).joined(Sizes(1, 2, 3)) == Sizes(3, 2, 3)
