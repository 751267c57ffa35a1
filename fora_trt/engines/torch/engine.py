"""Engines of the backends `torch` and `torch-compile`: PyTorch modules made from the graphs, without the checkpoint.

`torch-compile` compiles the full and the reuse graph with Inductor at the first run of each batch and window size. The
conditioning graphs are not compiled: they run once per trajectory, with varying numbers of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fora_trt.bundle import Bundle, GraphRecord
from fora_trt.contract import CONDITIONING_GRAPHS
from fora_trt.engines.base import Engine, Launch
from fora_trt.engines.cuda_graphs import Replay
from fora_trt.engines.tf32 import without_tf32
from fora_trt.engines.torch.graph import HALF, Shape, Stored, TorchGraph
from fora_trt.errors import BackendError, first_line
from fora_trt.quiet import quiet

Step = Callable[..., object]


class TorchEngine(Engine):
    """Runs a graph as PyTorch modules, one module per batch and window size, with shared weights.

    Engines that are given the same `stored` also share weights; see `TorchGraph`. With `replays`, the second call of a
    launch on a GPU is captured as a CUDA graph. With `widened`, arithmetic is in fp32 whatever the precision of the
    graph.
    """

    def __init__(
        self,
        path: Path,
        record: GraphRecord,
        device: torch.device,
        replays: bool = False,
        widened: bool = False,
        stored: Stored | None = None,
    ) -> None:
        super().__init__(record.inputs, record.outputs, device)
        self._graph, self._replays, self._widened = TorchGraph(path, device, widened, stored), replays, widened
        self.any_window = device.type == "cpu"

    def bind(self, tensors: Mapping[str, Tensor]) -> Launch:
        shapes = {name: tuple(tensors[name].shape) for name in self.inputs}
        bound = [tensors[name] for name in (*self.inputs, *self.outputs)]
        launch = partial(self._run, self._step_of(shapes), bound, self.device)
        return Replay(launch, self.device) if self._replays else launch

    def is_capturable(self) -> bool:
        return self._replays

    def _step_of(self, shapes: Mapping[str, Shape]) -> Step:
        """A function of input tensors of these shapes, followed by output tensors to which it writes the results."""
        step: Step = self._graph.module(shapes, [*self.outputs], into=True).forward
        return self._widening(step) if self._widened else step

    def _widening(self, step: Step) -> Step:
        """The step with its inputs in half precision cast to fp32."""
        count = len(self.inputs)

        def run(*tensors: Tensor) -> object:
            inputs = [one.float() if one.dtype in HALF else one for one in tensors[:count]]
            return step(*inputs, *tensors[count:])

        return run

    @staticmethod
    def _run(step: Step, tensors: Sequence[Any], device: torch.device) -> None:
        try:
            with torch.inference_mode(), without_tf32(device):
                step(*tensors)
        except IndexError as error:  # shapes were checked before, numbers of rows that a Gather reads could not be
            raise BackendError(f"a graph cannot be run: {first_line(error)}; export the bundle again") from error


class TorchCompileEngine(TorchEngine):
    """A `TorchEngine` whose modules are compiled at their first run."""

    def __init__(self, path: Path, record: GraphRecord, device: torch.device, stored: Stored | None = None) -> None:
        super().__init__(path, record, device, replays=True, stored=stored)
        self.any_window = False  # each number of rows is compiled on its own
        self._compiled: dict[object, Step] = {}

    def _step_of(self, shapes: Mapping[str, Shape]) -> Step:
        key = tuple(shapes.items())
        if key not in self._compiled:
            self._compiled[key] = compiled(super()._step_of(shapes))
        return self._compiled[key]

    @staticmethod
    def _run(step: Step, tensors: Sequence[Any], device: torch.device) -> None:
        run_compiled(step, tensors, device)


def compiled(step: Step) -> Step:
    """Compile a step at its first call, for the shapes of this call; `run_compiled` calls it.

    Messages of Inductor are hidden only in the first call, because hiding them takes a fifth of the time of a small
    step.
    """
    call: Step = torch.compile(step, fullgraph=True, dynamic=False)
    is_compiled = False

    def run(*tensors: Any) -> None:
        nonlocal is_compiled
        if is_compiled:
            call(*tensors)
        else:
            with quiet("torch._inductor"):
                call(*tensors)
            is_compiled = True

    return run


def run_compiled(step: Step, tensors: Sequence[Any], device: torch.device) -> None:
    """Call a compiled step. Raises `BackendError` if it cannot be compiled or run.

    All calls use inference mode, because a change of the autograd mode would compile the step again, even during a
    CUDA graph capture.
    """
    try:
        with torch.inference_mode(), without_tf32(device):
            step(*tensors)
    except torch.cuda.OutOfMemoryError:
        raise
    except (
        RuntimeError,
        torch._dynamo.exc.FailOnRecompileLimitHit,
    ) as error:  # dynamo's other errors are RuntimeErrors
        raise BackendError(
            f"torch.compile cannot compile or run this model: {first_line(error)}; use --backend torch"
        ) from error


def widened_engines(bundle: Bundle, device: torch.device) -> dict[str, Engine]:
    """An engine for each graph, with all arithmetic in fp32. Raises `BackendError` as `engines_from_bundle`."""
    graphs, stored = bundle.manifest.graphs.items(), Stored()
    return {
        name: TorchEngine(bundle.graph_path(name), record, device, widened=True, stored=stored)
        for name, record in graphs
    }


def engines_from_bundle(bundle: Bundle, device: torch.device, compiled: bool) -> dict[str, Engine]:
    """An engine for each graph. Raises `BackendError` for a graph with an unsupported operator."""
    engines, stored = dict[str, Engine](), Stored()
    for name, record in bundle.manifest.graphs.items():
        path, of_a_step = bundle.graph_path(name), name not in CONDITIONING_GRAPHS
        if compiled and of_a_step:
            engines[name] = TorchCompileEngine(path, record, device, stored)
        else:
            engines[name] = TorchEngine(path, record, device, replays=of_a_step, stored=stored)
    return engines
