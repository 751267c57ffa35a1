"""The backends `torch` and `torch-compile`: the graphs of a bundle as PyTorch modules, no checkpoint, on any device.

`torch-compile` compiles the full and the reuse graph by inductor, for each batch and window when it is first run. The
conditioning graphs run once before a loop, with another number of rows each time, and are not worth that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fora_trt.bundle import Bundle, GraphRecord
from fora_trt.engines.base import Engine, Launch
from fora_trt.engines.cuda_graphs import Replay
from fora_trt.engines.tf32 import without_tf32
from fora_trt.engines.torch_graph import Shape, TorchGraph
from fora_trt.errors import BackendError, first_line
from fora_trt.models.spec import FULL, REUSE
from fora_trt.quiet import quiet

COMPILED = "torch-compile"

Step = Callable[..., object]


class TorchEngine(Engine):
    """A graph as PyTorch modules over one copy of its weights, a module for each batch and window.

    With `replays` a launch on a GPU is captured as a CUDA graph at its second call.
    """

    def __init__(self, path: Path, record: GraphRecord, device: torch.device, replays: bool = False) -> None:
        super().__init__(record.inputs, record.outputs, device)
        self._graph, self._replays = TorchGraph(path, device), replays

    def bind(self, tensors: Mapping[str, Tensor]) -> Launch:
        shapes = {name: tuple(tensors[name].shape) for name in self.inputs}
        bound = [tensors[name] for name in (*self.inputs, *self.outputs)]
        launch = partial(self._run, self._step_of(shapes), bound, self.device)
        return Replay(launch, self.device) if self._replays else launch

    def is_capturable(self) -> bool:
        return self._replays

    def _step_of(self, shapes: Mapping[str, Shape]) -> Step:
        """What computes the outputs from inputs of these shapes and writes them to the tensors that come after."""
        return self._graph.module(shapes, [*self.outputs], into=True).forward

    @staticmethod
    def _run(step: Step, tensors: Sequence[Any], device: torch.device) -> None:
        with torch.inference_mode(), without_tf32(device):
            step(*tensors)


class TorchCompileEngine(TorchEngine):
    """The same modules, compiled when they first run, which takes a while."""

    def __init__(self, path: Path, record: GraphRecord, device: torch.device) -> None:
        super().__init__(path, record, device, replays=True)
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
    """Compile a step for the shapes that it is first called with; `run_compiled` calls it.

    The first call compiles, and inductor's remarks are silenced for it alone: silencing takes a fifth of a small step.
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
    """Call a compiled step. Raises `BackendError` where it cannot be compiled or run.

    In one mode of autograd always: in another it would be compiled anew, within a capture even.
    """
    try:
        with torch.inference_mode(), without_tf32(device):
            step(*tensors)
    except torch.cuda.OutOfMemoryError:
        raise
    except (RuntimeError, torch._dynamo.exc.FailOnRecompileLimitHit) as error:  # dynamo's others are RuntimeErrors
        raise BackendError(
            f"torch.compile cannot compile or run this model: {first_line(error)}; use --backend torch"
        ) from error


def engines_from_bundle(bundle: Bundle, device: torch.device, _: object, backend: str) -> dict[str, Engine]:
    """An engine for each graph. Raises `BackendError` for a graph with an operator that PyTorch has no function for."""
    engines: dict[str, Engine] = {}
    for name, record in bundle.manifest.graphs.items():
        path, of_a_step = bundle.graph_path(name), name in (FULL, REUSE)
        if backend == COMPILED and of_a_step:
            engines[name] = TorchCompileEngine(path, record, device)
        else:
            engines[name] = TorchEngine(path, record, device, replays=of_a_step)
    return engines
