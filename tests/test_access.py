"""One denoiser in two threads, and in a forked process."""

import multiprocessing
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection

import pytest
import torch

from fora_trt import Denoiser, Pipeline, Schedule, load
from fora_trt.bundle import Bundle
from fora_trt.errors import BusyError
from fora_trt.runtime.access import Access
from tests.conftest import ON_CPU


def in_a_thread(work: Callable[[], object]) -> BaseException | None:
    """What another thread raises."""
    found: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "it hangs"
    return found[0] if found else None


def loaded(bundle: Bundle, backend: str = "onnxruntime") -> Denoiser:
    denoiser = load(bundle, schedule=Schedule.fora(4, 2), backend=backend, device="cpu")
    denoiser.reset(timesteps=torch.tensor([700.0, 500.0, 300.0, 100.0]))
    return denoiser


def step(denoiser: Denoiser, time: float) -> torch.Tensor:
    return denoiser(torch.zeros(1, 4, 8, 8), torch.tensor(time), class_labels=torch.tensor([3]))


def test_a_second_thread_in_the_middle_is_refused() -> None:
    access = Access()
    with access.alone(), access.alone():  # the same thread may

        def enter() -> None:
            with access.alone():
                pass

        refused = in_a_thread(enter)
    assert isinstance(refused, BusyError)
    assert str(refused).startswith("another thread is using this denoiser; load one for each thread")
    assert in_a_thread(enter) is None


def test_a_trajectory_stays_in_its_thread(exported: Bundle) -> None:
    denoiser = loaded(exported)
    first = step(denoiser, 700.0).clone()
    refused = in_a_thread(lambda: step(denoiser, 500.0))
    assert isinstance(refused, BusyError)
    assert "another thread has run step 1 of a trajectory on this denoiser" in str(refused)
    for time in (500.0, 300.0, 100.0):  # it goes on as if nothing had happened
        step(denoiser, time)
    again: list[torch.Tensor] = []

    def anew() -> None:
        denoiser.reset(timesteps=torch.tensor([700.0, 500.0, 300.0, 100.0]))
        again.append(step(denoiser, 700.0).clone())

    assert in_a_thread(anew) is None
    assert torch.equal(again[0], first)


def test_threads_that_call_a_pipeline_wait_for_each_other(exported: Bundle) -> None:
    pipeline = Pipeline(exported, cache_interval=2, steps=6, backend="onnxruntime", device="cpu")
    alone = [pipeline(class_labels=[k], seed=k).latents for k in range(4)]
    found: dict[int, torch.Tensor] = {}
    threads = [
        threading.Thread(target=lambda k=k: found.update({k: pipeline(class_labels=[k], seed=k).latents}), daemon=True)
        for k in range(4)
    ]
    for one in threads:
        one.start()
    for one in threads:
        one.join(20)
    assert [torch.equal(found[k], alone[k]) for k in range(4)] == [True] * 4


@pytest.mark.parametrize("backend", ON_CPU)
def test_a_forked_process_gets_a_sentence(exported: Bundle, backend: str) -> None:
    denoiser = loaded(exported, backend)
    pipeline = Pipeline(exported, cache_interval=2, steps=4, backend=backend, device="cpu")
    for time in (700.0, 500.0, 300.0, 100.0):
        step(denoiser, time)
    pipeline(class_labels=[3])
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    child = context.Process(target=_in_a_fork, args=(there, denoiser, pipeline), daemon=True)
    child.start()
    assert here.poll(20), "it hangs"
    refused = here.recv()
    child.join(5)
    started = f"the engines of this denoiser were started in process {multiprocessing.current_process().pid}, before"
    assert [one.startswith(started) for one in refused] == [True] * 3


def _in_a_fork(there: Connection, denoiser: Denoiser, pipeline: Pipeline) -> None:
    said = []
    for work in (denoiser.reset, lambda: step(denoiser, 700.0), lambda: pipeline(class_labels=[3])):
        try:
            work()
        except BusyError as error:  # noqa: PERF203 # each call is to be refused
            said.append(str(error))
    there.send(said)
