"""Work on fixed addresses, captured once as a CUDA graph and replayed. Where there is no GPU it just runs."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fora_trt.errors import BackendError, ForaError, first_line


class Replay:
    """Calls `work`: the first time as it is, the second time while capturing it, from then on as a CUDA graph.

    The first call is the warm-up that libraries want before a capture. Nothing runs twice, so `work` may have effects.
    Every tensor that `work` touches must stay where it is; call `forget` when one moves. Inside a capture of someone
    else's `work` becomes a part of that larger graph. `capturable` is asked before the capture.

    A capture that fails raises `BackendError`, or what `work` raised if that is a `ForaError` or a lack of memory. The
    caller's stream is current then, nothing of the capture is kept, and the next call is a first one.
    """

    def __init__(
        self, work: Callable[[], None], device: torch.device, capturable: Callable[[], bool] = lambda: True
    ) -> None:
        self._work = work
        self._device = device
        self._capturable = capturable
        self._stream: torch.cuda.Stream | None = None
        self.forget()

    def forget(self) -> None:
        """Drop what was captured; the next call is a first one."""
        self._graph: torch.cuda.CUDAGraph | None = None
        self._warm = False

    def __call__(self) -> None:
        if self._device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            self._work()
            return
        with torch.cuda.device(self._device):
            if self._graph is None and self._warm:
                self._capture()
            if self._graph is not None:
                self._graph.replay()
            else:
                self._run_beside()

    def _run_beside(self) -> None:
        """Run on a stream of its own, in the order of the caller's; the default stream can neither be captured nor
        used without waiting for all others.
        """
        caller = torch.cuda.current_stream(self._device)
        self._stream = self._stream or torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call] # torch does not
        self._stream.wait_stream(caller)
        with torch.cuda.stream(self._stream):
            self._work()
        caller.wait_stream(self._stream)
        self._warm = True

    def _capture(self) -> None:
        # the outer context makes the caller's stream current again: torch leaves that of a failed capture
        with torch.cuda.stream(self._stream):
            if not self._capturable():
                return
            try:
                self._graph = self._captured()
            except BaseException:
                self.forget()
                self._stream = None  # it may still be capturing
                raise

    def _captured(self) -> torch.cuda.CUDAGraph:
        graph, failure = torch.cuda.CUDAGraph(), None
        try:
            # other threads may go on with what a capture forbids, such as allocating
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                try:
                    self._work()
                except BaseException as error:
                    failure = error
                    raise
        except BaseException as error:
            reason = failure or error  # ending a capture that failed fails too, with less to say
            if isinstance(reason, ForaError | torch.cuda.OutOfMemoryError) or not isinstance(reason, Exception):
                raise reason from None
            raise BackendError(
                f"capturing a CUDA graph failed ({type(reason).__name__}: {first_line(reason)}); nothing of it was run"
            ) from reason
        return graph
