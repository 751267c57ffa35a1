"""The backends `torch` and `torch-compile`: the graphs of a bundle as PyTorch modules, no checkpoint, on any device.

`torch-compile` compiles the full and the reuse graph by inductor, for each batch and window when it is first run. The
conditioning graphs run once before a loop, with another number of rows each time, and are not worth that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fora_trt.bundle import Bundle, GraphRecord
from fora_trt.engines.base import Engine, Launch
from fora_trt.engines.cuda_graphs import Replay
from fora_trt.engines.torch_graph import TorchGraph
from fora_trt.errors import BackendError, first_line
from fora_trt.models.spec import FULL, REUSE
from fora_trt.quiet import quiet

COMPILED = "torch-compile"

Run = Callable[..., object]


class TorchEngine(Engine):
    """A graph as PyTorch modules over one copy of its weights, a module for each batch and window.

    With `replays` a launch on a GPU is captured as a CUDA graph at its second call.
    """

    def __init__(self, path: Path, record: GraphRecord, device: torch.device, replays: bool = False) -> None:
        super().__init__(record.inputs, record.outputs, device)
        self._graph, self._replays = TorchGraph(path, device), replays

    def bind(self, tensors: Mapping[str, Tensor]) -> Launch:
        shapes = {name: tuple(tensors[name].shape) for name in self.inputs}
        launch = partial(self._call, self._run_of(shapes), [tensors[name] for name in (*self.inputs, *self.outputs)])
        return Replay(launch, self.device) if self._replays else launch

    def is_capturable(self) -> bool:
        return self._replays

    def _run_of(self, shapes: Mapping[str, tuple[int, ...]]) -> Run:
        return self._graph.module(shapes, [*self.outputs], into=True).forward

    @torch.inference_mode()  # in every call alike: another mode would compile anew, within a capture even
    def _call(self, run: Run, tensors: Sequence[Tensor]) -> None:
        run(*tensors)


class TorchCompileEngine(TorchEngine):
    """The same modules, compiled when they first run, which takes a while."""

    def __init__(self, path: Path, record: GraphRecord, device: torch.device) -> None:
        super().__init__(path, record, device, replays=True)
        self._compiled: dict[object, Run] = {}

    def _run_of(self, shapes: Mapping[str, tuple[int, ...]]) -> Run:
        key = tuple(shapes.items())
        if key not in self._compiled:
            self._compiled[key] = torch.compile(super()._run_of(shapes), fullgraph=True, dynamic=False)
        return self._compiled[key]

    def _call(self, run: Run, tensors: Sequence[Tensor]) -> None:
        try:
            with quiet("torch._inductor"):
                super()._call(run, tensors)
        except torch.cuda.OutOfMemoryError:
            raise
        except (RuntimeError, torch._dynamo.exc.FailOnRecompileLimitHit) as error:  # dynamo's own are RuntimeErrors
            raise BackendError(f"torch.compile cannot compile or run this graph: {first_line(error)}") from error


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
