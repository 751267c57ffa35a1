"""What `Replay` does when a capture fails, on stand-ins for the streams and graphs of torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from fora_trt.engines.cuda_graphs import Replay
from fora_trt.errors import BackendError, InputError

GPU = torch.device("cuda", 0)


class FakeCuda:
    """One current stream, captures and replays; like torch 2.11, a failed capture stays on its stream."""

    def __init__(self) -> None:
        self.current, self.capturing, self.modes = "caller", False, list[str]()

    @contextmanager
    def stream(self, stream: str) -> Iterator[None]:
        caller, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = caller

    @contextmanager
    def graph(self, graph: object, stream: str, capture_error_mode: str) -> Iterator[None]:
        self.current, self.capturing = stream, True
        self.modes.append(capture_error_mode)
        try:
            yield
        except BaseException:
            self.capturing = False
            raise RuntimeError("operation failed due to a previous error during capture") from None
        self.current, self.capturing = "caller", False


class FakeStream(str):
    """A stream that can wait."""

    def __new__(cls, device: torch.device) -> FakeStream:
        return super().__new__(cls, "side")

    def wait_stream(self, other: object) -> None:
        """Nothing runs here that could be waited for."""


class FakeGraph:
    """A graph whose replays are counted."""

    replays = 0

    def replay(self) -> None:
        FakeGraph.replays += 1


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake, caller = FakeCuda(), FakeStream(GPU)
    FakeGraph.replays = 0

    @contextmanager
    def device(_: torch.device) -> Iterator[None]:
        yield

    stand_ins: dict[str, object] = {
        "is_current_stream_capturing": lambda: fake.capturing,
        "current_stream": lambda _: caller,
        "device": device,
        "stream": fake.stream,
        "graph": fake.graph,
        "Stream": FakeStream,
        "CUDAGraph": FakeGraph,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return fake


def failing_when(condition: Callable[[], bool], error: BaseException, done: list[str]) -> Callable[[], None]:
    def work() -> None:
        if condition():
            raise error
        done.append("run")

    return work


def test_the_third_call_is_a_replay(cuda: FakeCuda) -> None:
    done: list[str] = []
    replay = Replay(lambda: done.append("run"), GPU)
    for _ in range(3):
        replay()
    assert len(done) == 2, "once as it is, once to capture"
    assert FakeGraph.replays == 2
    assert cuda.modes == ["thread_local"]
    assert cuda.current == "caller"


def test_a_failed_capture_is_named_and_leaves_the_stream_of_the_caller(cuda: FakeCuda) -> None:
    done: list[str] = []
    error = RuntimeError("operation not permitted when stream is capturing\nCompile with ...")
    replay = Replay(failing_when(lambda: cuda.capturing, error, done), GPU)
    for again in (1, 2):  # a first call runs as it is, the next one captures
        replay()
        with pytest.raises(
            BackendError, match=r"capturing a CUDA graph failed \(RuntimeError: operation not perm.*g\)"
        ):
            replay()
        assert done == ["run"] * again
        assert cuda.current == "caller"
    assert FakeGraph.replays == 0


@pytest.mark.parametrize(
    "error", [InputError("a batch too large"), torch.cuda.OutOfMemoryError("no room"), KeyboardInterrupt()]
)
def test_what_the_work_itself_says_is_kept(cuda: FakeCuda, error: BaseException) -> None:
    replay = Replay(failing_when(lambda: cuda.capturing, error, []), GPU)
    replay()
    with pytest.raises(type(error)) as raised:
        replay()
    assert raised.value is error
    assert cuda.current == "caller"


def test_a_capture_that_cannot_begin_is_named(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    replay = Replay(lambda: done.append("run"), GPU)
    replay()

    def refused(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: invalid argument")

    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "graph", refused)
        with pytest.raises(BackendError, match="CUDA error: invalid argument"):
            replay()
    assert cuda.current == "caller"
    for _ in range(3):
        replay()
    assert FakeGraph.replays == 2, "it can be captured after all"
