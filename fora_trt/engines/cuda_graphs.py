"""Capture work on fixed addresses once as a CUDA graph and replay it; on a CPU the work runs directly."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fora_trt.errors import BackendError, ForaError, first_line


class Replay:
    """Runs `work` directly in the first call, captures it as a CUDA graph in the second, and replays it from then on.

    The first call is the warm-up that libraries need before a capture. Each call runs `work` once, so `work` may have
    side effects. All tensors that `work` uses must keep their addresses; call `forget` when an address changes. If the
    caller is capturing a CUDA graph, `work` becomes part of that graph. `capturable` is called before a capture; while
    it returns False, `work` runs directly.

    A failed capture raises `BackendError`, or the exception of `work` if that is a `ForaError` or an out-of-memory
    error. Then the caller's stream is current again, the capture is discarded, and the next call counts as the first.
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
        """Discard the captured graph; the next call counts as the first."""
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
                self._run_on_side_stream()

    def _run_on_side_stream(self) -> None:
        """Run on a separate stream, ordered with the caller's stream.

        The default stream cannot be captured, and work on it waits for all other streams.
        """
        caller = torch.cuda.current_stream(self._device)
        self._stream = self._stream or torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call] # torch does not
        self._stream.wait_stream(caller)
        with torch.cuda.stream(self._stream):
            self._work()
        caller.wait_stream(self._stream)
        self._warm = True

    def _capture(self) -> None:
        # the outer context restores the caller's stream, which torch does not do after a failed capture
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
            # thread_local: other threads may still do what a capture forbids, such as allocating memory
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                try:
                    self._work()
                except BaseException as error:
                    failure = error
                    raise
        except BaseException as error:
            reason = failure or error  # ending a failed capture raises another, less informative error
            if isinstance(reason, ForaError | torch.cuda.OutOfMemoryError) or not isinstance(reason, Exception):
                raise reason from None
            raise BackendError(
                f"capturing a CUDA graph failed ({type(reason).__name__}: {first_line(reason)}); the captured work did "
                "not run; use another --backend"
            ) from reason
        return graph
