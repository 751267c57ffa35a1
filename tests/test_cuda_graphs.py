"""What `Replay` does when a capture fails, on stand-ins for the streams and graphs of torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fora_trt.engines.cuda_graphs import Replay
from fora_trt.errors import BackendError, InputError
from tests.tensorrt_standin import Cuda, Recorder

GPU = torch.device("cuda", 0)


class Rig:
    """The streams and graphs of torch on stand-ins, with every call of them."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.recorder = Recorder(rtx=False)
        self.cuda = Cuda(self.recorder, patch)
        self.caller = self.cuda.current

    @property
    def replays(self) -> int:
        return len(self.recorder.named("CUDAGraph.replay"))


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Rig:
    return Rig(monkeypatch)


def failing_when(condition: Callable[[], bool], error: BaseException, done: list[str]) -> Callable[[], None]:
    def work() -> None:
        if condition():
            raise error
        done.append("run")

    return work


def test_the_third_call_is_a_replay(rig: Rig) -> None:
    done: list[str] = []
    replay = Replay(lambda: done.append("run"), GPU)
    for _ in range(3):
        replay()
    assert len(done) == 2, "once as it is, once to capture"
    assert rig.replays == 2
    assert rig.recorder.named("torch.cuda.graph") == [("thread_local",)]
    assert rig.cuda.current is rig.caller


def test_a_failed_capture_is_named_and_leaves_the_stream_of_the_caller(rig: Rig) -> None:
    done: list[str] = []
    error = RuntimeError("operation not permitted when stream is capturing\nCompile with ...")
    replay = Replay(failing_when(lambda: rig.cuda.capturing, error, done), GPU)
    for again in (1, 2):  # a first call runs as it is, the next one captures
        replay()
        with pytest.raises(
            BackendError, match=r"capturing a CUDA graph failed \(RuntimeError: operation not perm.*g\)"
        ):
            replay()
        assert done == ["run"] * again
        assert rig.cuda.current is rig.caller
    assert rig.replays == 0


@pytest.mark.parametrize(
    "error", [InputError("a batch too large"), torch.cuda.OutOfMemoryError("no room"), KeyboardInterrupt()]
)
def test_what_the_work_itself_says_is_kept(rig: Rig, error: BaseException) -> None:
    replay = Replay(failing_when(lambda: rig.cuda.capturing, error, []), GPU)
    replay()
    with pytest.raises(type(error)) as raised:
        replay()
    assert raised.value is error
    assert rig.cuda.current is rig.caller


def test_a_capture_that_cannot_begin_is_named(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    replay = Replay(lambda: done.append("run"), GPU)
    replay()

    def refused(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: invalid argument")

    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "graph", refused)
        with pytest.raises(BackendError, match="CUDA error: invalid argument"):
            replay()
    assert rig.cuda.current is rig.caller
    for _ in range(3):
        replay()
    assert rig.replays == 2, "it can be captured after all"
