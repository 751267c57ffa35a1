import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fora_trt import InputSpec, ModelSpec, TensorSpec
from fora_trt.errors import ExportError
from fora_trt.export.check_batch import check_symbolic_batch
from fora_trt.export.split import steps_of_module
from fora_trt.export.traced import program_from_step
from fora_trt.models.examples import example_inputs

INPUTS = (
    TensorSpec("latents", "float32", ("batch", 3, 8)),
    TensorSpec("timestep", "float32", ("batch",)),
    TensorSpec("encoder_attention_mask", "int64", ("batch", 6)),
)
SPEC = ModelSpec(inputs=INPUTS, architecture="Net")
CONSTANT = (
    r"Net makes the size of the batch a constant at .*tests/test_check_batch\.py:\d+; compute on the batch as a whole"
)
READS = r"Net reads values of a tensor.*, so its shapes or its path depend on its inputs; give .* in `call`"


class Net(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.table, self.cached = way, nn.Linear(8, 8), torch.zeros(1)

    def forward(self, x: Tensor, t: Tensor, mask: Tensor) -> Any:
        return getattr(self, self.way)(x, mask)

    def whole(self, x: Tensor, mask: Tensor) -> Any:
        self.cached = functional.pad(x, (1, 1))
        return self.table(x) + x.new_ones(x.shape[0], 1, 1) * mask.sum(1)[:, None, None]

    def loops(self, x: Tensor, mask: Tensor) -> Tensor:
        return torch.stack([self.table(x[k]) for k in range(x.shape[0])])

    def takes_lists(self, x: Tensor, mask: Tensor) -> Tensor:
        return torch.stack([self.table(one) for one in x.unbind(0)])

    def counts(self, x: Tensor, mask: Tensor) -> Any:
        return self.table(x) * len(x)

    def halves(self, x: Tensor, mask: Tensor) -> Any:
        rows = x.repeat_interleave(4, 0)
        return self.table(rows.view(int(rows.shape[0] / (6 * 6 / 3 / 3)), 4, 3, 8).sum(1))

    def compares(self, x: Tensor, mask: Tensor) -> Any:
        return self.table(x) if x.shape[0] > 4 else x

    def rounds(self, x: Tensor, mask: Tensor) -> Any:
        return self.table(x) * math.sqrt(int(x.shape[0] * 0.5))

    def divides(self, x: Tensor, mask: Tensor) -> Any:
        return self.table(x) * divmod(x.shape[0], 2)[0]

    def reads_lengths(self, x: Tensor, mask: Tensor) -> Any:
        return self.table(x)[:, : mask.sum(1).max().item()]

    def branches(self, x: Tensor, mask: Tensor) -> Any:
        return self.table(x) if mask.any() else x


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("loops", CONSTANT),
        ("takes_lists", CONSTANT),
        ("counts", CONSTANT),
        ("halves", CONSTANT),
        ("reads_lengths", READS),
        ("branches", READS),
    ],
)
def test_a_module_that_cannot_be_traced_is_refused_with_the_line(way: str, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        check_symbolic_batch(Net(way), SPEC)


@pytest.mark.parametrize(
    ("way", "message"),
    [
        (
            "compares",
            r"Net computes with the size of the batch in Python at .*tests/test_check_batch\.py:{}, which fits",
        ),
        ("rounds", r"Net computes with the size of the batch in Python at .*tests/test_check_batch\.py:{}, which fits"),
        ("divides", r"Net cannot be traced with a symbolic batch dimension at .*/test_check_batch\.py:{}: unsupported"),
    ],
)
def test_a_module_that_fails_in_the_trace_is_refused_with_the_line(way: str, message: str) -> None:
    net = Net(way)
    check_symbolic_batch(net, SPEC)  # does not see it
    step, _ = steps_of_module(net, SPEC, ["table"])
    line = inspect.getsourcelines(getattr(Net, way))[1] + 1
    with pytest.raises(ExportError, match=message.format(line)):
        program_from_step(step, example_inputs(INPUTS, {"encoder_attention_mask": InputSpec((0, 2))}, 2))


def test_a_module_that_computes_on_the_batch_is_not_refused_and_not_changed() -> None:
    net = Net("whole")
    before = net.cached
    check_symbolic_batch(net, SPEC)
    assert net.cached is before
