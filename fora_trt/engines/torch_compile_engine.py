"""The backend `torch-compile`: each step traced whole, compiled by inductor, and on a GPU replayed as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from fora_trt.bundle import Bundle
from fora_trt.engines.base import Engine, Launch
from fora_trt.engines.cuda_graphs import Replay
from fora_trt.engines.torch_engine import TorchEngine, steps_from_bundle
from fora_trt.errors import BackendError, first_line
from fora_trt.export.graphs import TRACED_BATCH, program_from_step
from fora_trt.export.split import Split
from fora_trt.models.examples import example_inputs
from fora_trt.quiet import quiet


class _IntoTargets(nn.Module):
    """Runs a traced step and writes its results where they are wanted, within one compiled function."""

    def __init__(self, step: Callable[..., Sequence[Tensor]]) -> None:
        super().__init__()
        self.step = step

    def forward(self, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        for target, result in zip(targets, self.step(*sources), strict=True):
            target.copy_(result)


class TorchCompileEngine(TorchEngine):
    """A compiled step. It is compiled at the first call for each batch size, which takes a while."""

    def __init__(self, step: Split, bundle: Bundle, graph: str, device: torch.device) -> None:
        super().__init__(step, bundle, graph, device)
        inputs = example_inputs(step.spec.inputs, step.spec.conditioning, TRACED_BATCH)
        features = {one.name: one for one in bundle.manifest.features()}
        inputs |= example_inputs((features[name] for name in step.names if name in features), {}, TRACED_BATCH)
        program = program_from_step(step, {name: value.to(device) for name, value in inputs.items()})
        self._compiled = torch.compile(_IntoTargets(program.module()), fullgraph=True, dynamic=False)

    def bind(self, tensors: Mapping[str, Tensor]) -> Launch:
        return Replay(super().bind(tensors), self.device)

    def is_capturable(self) -> bool:
        return True

    @torch.inference_mode()  # in every call alike: another mode would compile anew, within a capture even
    def _run(self, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        try:
            with quiet("torch._inductor"):
                self._compiled(sources, targets)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = first_line(error)
            raise BackendError(f"torch.compile could not compile this model: {reason}") from error


def engines_from_bundle(bundle: Bundle, device: torch.device, *_: object) -> dict[str, Engine]:
    """Both engines, over one copy of the weights."""
    steps = steps_from_bundle(bundle, device)
    return {name: TorchCompileEngine(step, bundle, name, device) for name, step in steps.items()}
