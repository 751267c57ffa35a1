from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fora_trt.errors import ExportError
from fora_trt.export.complex_pairs import rewrite_complex

TABLE = torch.polar(torch.ones(5, 4), torch.linspace(0, 3, 20).reshape(5, 4))


def rotated(x: Tensor) -> Tensor:
    """Rotary embedding on x (B, 5, 8)."""
    return torch.view_as_real(torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * TABLE).flatten(2)


def from_a_table(x: Tensor) -> Tensor:
    """Frequencies that are looked up, split, padded with zeros and joined."""
    first, second = TABLE[torch.tensor([3, 1, 0, 4, 2])].split_with_sizes([1, 3], dim=-1)
    padded = torch.zeros(5, 4, dtype=torch.complex64)
    padded[:4] = torch.cat([second, first], dim=-1)[1:]
    return rotated(x) + torch.view_as_real(padded[None]).flatten(2)


def arithmetic(x: Tensor) -> Tensor:
    z = torch.complex(x, x * 2)
    w = 1 - (z + x) / 3 - z.conj() * 2 + torch.exp(z * 1j + 2j)
    w = torch.where(x > 0, w, -w) + x.to(torch.complex64)
    return w.abs() + w.real * z.imag + torch.polar(x.abs(), x).real.sum(-1, keepdim=True)


class Net(nn.Module):
    def __init__(self, of: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.of = of

    def forward(self, x: Tensor) -> Tensor:
        return self.of(x)


def program_of(of: Callable[[Tensor], Tensor]) -> torch.export.ExportedProgram:
    batch = {0: torch.export.Dim("batch")}
    return torch.export.export(Net(of), (torch.randn(2, 5, 8),), dynamic_shapes=(batch,), strict=False)


@pytest.mark.parametrize("of", [rotated, from_a_table, arithmetic])
def test_pairs_of_real_numbers_compute_the_same(of: Callable[[Tensor], Tensor]) -> None:
    program, x = program_of(of), torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    rewrite_complex(program, "Net")
    computed = [node for node in program.graph.nodes if node.op == "call_function"]
    assert not any(one.meta["val"].is_complex() for one in computed if isinstance(one.meta["val"], Tensor))
    torch.testing.assert_close(program.module()(x), of(x))
    decomposed = program.run_decompositions()
    torch.testing.assert_close(decomposed.module()(x), of(x))


def test_an_operator_without_a_real_form_is_named() -> None:
    with pytest.raises(ExportError, match="Net computes log of complex numbers, which ONNX does not have"):
        rewrite_complex(program_of(lambda x: torch.complex(x, x).log().real), "Net")
