"""Batches of images that many threads ask for: each is that of a pipeline call, and none is lost."""

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future, wait
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from fora_trt import Pipeline
from fora_trt.contract import FULL
from fora_trt.engines.threads import torch_threads
from fora_trt.errors import BackendError, BusyError, RoomError
from fora_trt.pipeline import PipelineOutput
from fora_trt.runtime.denoiser import Denoiser
from fora_trt.sampling.joined import JoinedSampler
from fora_trt.sampling.loop import Sampler
from fora_trt.sampling.scheduler_step import drawn
from fora_trt.serve.batches import Batches, Image, Made
from tests.conftest import BundleAt

STEPS = 8
LONG = 20.0
"""Seconds that nothing here takes."""


@pytest.fixture(scope="module")
def pipeline(bundle_at: BundleAt) -> Pipeline:
    return Pipeline(bundle_at("fold", "fp32"), backend="onnxruntime", steps=STEPS)


@pytest.fixture(params=[False, True], ids=["together", "joined"])
def batches(request: pytest.FixtureRequest, pipeline: Pipeline) -> Iterator[Batches]:
    made = Batches(pipeline, 4, 0.05, request.param)
    yield made
    made.stop()


def settings(
    pipeline: Pipeline, schedule: str = "fora:3", scheduler: str | None = None, scale: float = 2.0
) -> Pipeline:
    return Pipeline(
        pipeline.bundle,
        backend="onnxruntime",
        steps=STEPS,
        schedule=schedule,
        scheduler=scheduler,
        guidance_scale=scale,
    )


def image(of: Pipeline, label: int, seed: int) -> Image:
    given = of.conditioning([label])
    return Image(of.sampling(), given, seed, of.guidance(given, of.sampling()))


def some(of: Pipeline, count: int) -> list[Image]:
    return [image(of, k, k) for k in range(count)]


def levels(made: PipelineOutput) -> numpy.ndarray:
    return numpy.asarray(made.images[0])


def pictures(futures: Sequence[Future[Made]]) -> list[numpy.ndarray]:
    return [numpy.squeeze(one.result(LONG).picture) for one in futures]


def test_images_of_all_settings_are_those_of_pipeline_calls(pipeline: Pipeline, batches: Batches) -> None:
    of = [
        settings(pipeline),
        settings(pipeline, "dense:4,forecast=2"),
        settings(pipeline, scheduler="ddpm"),
        settings(pipeline, scheduler="pndm"),
        settings(pipeline, scale=1.0),
    ]
    asked = [(of[k % len(of)], k % 7, 50 + k) for k in range(15)]
    futures: list[Future[Made]] = []
    lock = threading.Lock()

    def ask(some: Sequence[tuple[Pipeline, int, int]]) -> None:
        for one in some:
            future = batches.submit(image(*one))
            with lock:
                futures.append(future)
                order.append(one)
            time.sleep(0.01)

    order: list[tuple[Pipeline, int, int]] = []
    threads = [threading.Thread(target=ask, args=(asked[k::3],)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (one, label, seed), found in zip(order, pictures(futures), strict=True):
        assert numpy.array_equal(found, levels(one(class_labels=[label], seed=seed)))
    counts = batches.counts()
    assert counts.pictures == 15
    assert (counts.waiting, counts.running) == (0, 0)
    assert sum(images * steps for images, steps in counts.batches.items()) == sum(
        future.result().full_steps for future in futures
    )
    assert counts.full_seconds > 0 < counts.reuse_seconds


def test_images_of_one_setting_share_a_batch(
    pipeline: Pipeline, batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow(monkeypatch)
    images = some(settings(pipeline), 8)
    pictures([*map(batches.submit, images)])
    assert max(batches.counts().batches) == 4


def test_the_first_image_of_a_batch_waits_for_others_only_so_long(pipeline: Pipeline) -> None:
    images = some(settings(pipeline), 4)
    batches = Batches(pipeline, 4, 4.0, join=False)
    began = time.monotonic()
    pictures([batches.submit(images[0])])
    assert 4.0 < time.monotonic() - began < LONG
    began = time.monotonic()
    pictures([*map(batches.submit, images)])
    batches.stop()
    assert time.monotonic() - began < 4.0, "four are enough"


def slow(monkeypatch: pytest.MonkeyPatch, seconds: float = 0.1) -> threading.Event:
    """Steps and windows that take so long; the event is set when the first begins."""
    begun = threading.Event()
    step, window = Sampler._step, JoinedSampler.window

    def slow_step(self: Sampler, at: object) -> None:
        begun.set()
        time.sleep(seconds)
        step(self, at)  # type: ignore[arg-type]

    def slow_window(self: JoinedSampler) -> object:
        begun.set()
        time.sleep(seconds)
        return window(self)

    monkeypatch.setattr(Sampler, "_step", slow_step)
    monkeypatch.setattr(JoinedSampler, "window", slow_window)
    return begun


def test_an_image_that_nobody_wants_any_more_frees_its_place(
    pipeline: Pipeline, batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = slow(monkeypatch)
    of = settings(pipeline, "none")
    images = some(of, 7)
    futures = [*map(batches.submit, images[:4])]
    assert begun.wait(LONG)
    waiting = batches.submit(images[5])
    for one in (*futures, waiting):
        assert one.cancel()
    after = batches.submit(images[6])
    assert numpy.array_equal(pictures([after])[0], levels(of(class_labels=[6], seed=6)))
    assert batches.counts().pictures == 1
    with pytest.raises(CancelledError):
        futures[0].result(0)


def test_images_join_and_leave_while_others_run(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = slow(monkeypatch)
    batches = Batches(pipeline, 4, 0.0, join=True)
    long, short = settings(pipeline, "full:0,4,5,6,7"), settings(pipeline, "fora:4")
    images = image(long, 1, 1), image(short, 2, 2)
    first = batches.submit(images[0])
    assert begun.wait(LONG)
    second = batches.submit(images[1])
    assert second.result(LONG)
    assert not first.done(), "it has more windows to compute"
    assert numpy.array_equal(pictures([first])[0], levels(long(class_labels=[1], seed=1)))
    assert numpy.array_equal(pictures([second])[0], levels(short(class_labels=[2], seed=2)))
    batches.stop()
    assert set(batches.counts().batches) == {1, 2}


def test_torch_computes_in_one_thread_beside_an_engine_with_threads_of_its_own(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, denoiser = {}, pipeline.denoiser
    assert isinstance(denoiser, Denoiser)
    levels = pipeline.decoder.levels
    window = JoinedSampler.window

    def counted(self: JoinedSampler) -> Any:
        seen["window"] = torch.get_num_threads()
        return window(self)

    def decoded(latents: Tensor, device: torch.device) -> Tensor:
        seen["decoder"] = torch.get_num_threads()
        return levels(latents, device)

    monkeypatch.setattr(JoinedSampler, "window", counted)
    monkeypatch.setattr(pipeline.decoder, "levels", decoded)
    with torch_threads(2):
        for has_threads in (False, True):
            monkeypatch.setattr(denoiser.engines[FULL], "has_threads", has_threads)
            batches = Batches(pipeline, 2, 0.0, join=True)
            batches.submit(image(pipeline, 0, 0)).result(LONG)
            batches.stop()
            assert seen == {"window": 1 if has_threads else 2, "decoder": 2}
        assert torch.get_num_threads() == 2


def test_stop_answers_what_was_asked_for(pipeline: Pipeline, batches: Batches) -> None:
    futures = [batches.submit(image(settings(pipeline), k, k)) for k in range(6)]
    batches.stop()
    assert all(one.done() for one in futures)
    pictures(futures)
    with pytest.raises(BusyError, match="being stopped"):
        batches.submit(image(settings(pipeline), 0, 0))


def test_a_failure_reaches_all_that_it_concerns_and_nobody_else(
    pipeline: Pipeline, batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise BackendError("the engine is broken")

    of = settings(pipeline)
    with monkeypatch.context() as broken:
        broken.setattr(Sampler, "__call__", failing)
        broken.setattr(JoinedSampler, "window", failing)
        futures = [batches.submit(image(of, k, k)) for k in range(3)]
        wait(futures, LONG)
    for one in futures:
        with pytest.raises(BackendError, match="is broken"):
            one.result(0)
    assert numpy.array_equal(pictures([batches.submit(image(of, 3, 3))])[0], levels(of(class_labels=[3], seed=3)))
    assert batches.counts().running == 0


def test_a_process_whose_images_all_fail_does_not_work(
    pipeline: Pipeline, batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise RuntimeError("device-side assert")

    images = some(settings(pipeline), 4)
    with monkeypatch.context() as broken:
        broken.setattr(Sampler, "__call__", failing)
        broken.setattr(JoinedSampler, "window", failing)
        for k in range(3):
            assert batches.works
            wait([batches.submit(images[k])], LONG)
    assert not batches.works
    pictures([batches.submit(images[3])])
    assert batches.works
    batches.stop()
    assert not batches.works


def test_an_image_that_is_not_finite_fails_alone(
    pipeline: Pipeline, batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = settings(pipeline)
    bad, good = image(of, 1, 1), image(of, 2, 2)

    def overflowing(shape: tuple[int, ...], generators: Sequence[torch.Generator]) -> Tensor:
        noise = drawn(shape, generators)
        for k, generator in enumerate(generators):
            if generator.initial_seed() == 1:
                noise[k] = torch.inf
        return noise

    with monkeypatch.context() as changed:
        for place in ("sampling.joined", "sampling.scheduler_step"):
            changed.setattr(f"fora_trt.{place}.drawn", overflowing)
        failing, _ = futures = [batches.submit(bad), batches.submit(good)]
        wait(futures, LONG)
    with pytest.raises(BackendError, match="not finite"):
        failing.result(0)
    assert numpy.array_equal(pictures(futures[1:])[0], levels(of(class_labels=[2], seed=2)))


def test_a_batch_that_does_not_fit_the_memory_is_made_in_parts(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    call = Sampler.__call__

    def limited(self: Sampler, given: object, seeds: Sequence[int], *more: object) -> object:
        sizes.append(len(seeds))
        if len(seeds) > 2:
            raise RoomError("too large", 2 * len(seeds), 4)
        return call(self, given, seeds, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(Sampler, "__call__", limited)
    images = some(settings(pipeline), 4)
    batches = Batches(pipeline, 4, 2.0, join=False)
    for _ in range(2):
        pictures([*map(batches.submit, images)])
    batches.stop()
    assert sizes == [4, 2, 2, 2, 2]
