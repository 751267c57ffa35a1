"""No small number that keeps a division or a root finite may be lost on the way to the graphs."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor, nn
from torch.nn import functional

from fora_trt import ModelSpec, TensorSpec
from fora_trt.contract import FULL, REUSE
from fora_trt.export.traced import traced_from_model
from fora_trt.models.assembly import EmptyModel, model_from_empty
from fora_trt.models.custom import completed
from fora_trt.models.options import SourceOptions

INPUTS = (TensorSpec("latents", "float32", ("batch", 3, 8)), TensorSpec("timestep", "float32", ("batch",)))

SMALL = 1e-15


class Guarded(nn.Module):
    """A network that divides by zeros of its latents and features, behind guards of all kinds."""

    small: Tensor
    many: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.site, self.time = nn.Linear(8, 8, bias=False), nn.Linear(1, 8)
        self.register_buffer("small", torch.tensor(SMALL))
        self.register_buffer("many", torch.full((8,), SMALL))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        gate = self.time(t[:, None] / 1000)[:, None]
        features: Tensor = self.site(self.guarded(x))
        result: Tensor = x + gate * features + self.guarded(x.roll(1, -1)) + self.guarded(gate * 0)
        return result

    def guarded(self, x: Tensor) -> Tensor:
        return torch.stack([getattr(self, kind)(x) for kind in KINDS]).sum(0)

    def added(self, x: Tensor) -> Tensor:
        return x / (x.abs() + SMALL)

    def subtracted(self, x: Tensor) -> Tensor:
        return x / (-x.abs() - 1e-9)

    def from_the_left(self, x: Tensor) -> Tensor:
        return x / (1e-10 + x.abs().sum(-1, keepdim=True))

    def buffer(self, x: Tensor) -> Tensor:
        return x / (x.abs() + self.small)

    def buffer_of_many(self, x: Tensor) -> Tensor:
        return x / (x.abs() + self.many)

    def computed(self, x: Tensor) -> Tensor:
        return x / (x.abs() + self.small * 2 + torch.finfo(torch.float32).tiny)

    def in_place(self, x: Tensor) -> Tensor:
        return x / x.abs().add_(1e-8)

    def root(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-20)

    def in_double(self, x: Tensor) -> Tensor:
        return (x.double() / (x.double().abs() + 1e-30)).float()

    def clamped(self, x: Tensor) -> Tensor:
        return x / x.abs().clamp(min=1e-12)

    def clipped_twice(self, x: Tensor) -> Tensor:
        return x / x.relu().clamp(min=1e-12).clamp(max=5.0)

    def maximum(self, x: Tensor) -> Tensor:
        return x / torch.maximum(x.abs(), self.small)

    def normalized(self, x: Tensor) -> Tensor:
        return functional.normalize(x, dim=-1, eps=1e-12)

    def layer_norm(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, (8,), eps=1e-12)

    def rms_norm(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, (8,), eps=1e-12)

    def scaled(self, x: Tensor) -> Tensor:
        """A factor near 1, and a divisor near 1."""
        return (x * (1 + 1e-6)) / (1 - 1e-6) * 1e6 - x * 1e6


KINDS = [name for name in vars(Guarded) if not name.startswith("_") and name not in ("forward", "guarded")]


def test_all_guards_are_in_the_graphs() -> None:
    torch.manual_seed(0)
    module = Guarded().eval()
    spec = completed(module, ModelSpec(inputs=INPUTS), "guards:make")
    empty = EmptyModel("guards", module, spec, lambda dtypes: None)
    model = model_from_empty(empty, SourceOptions(source="guards:make", cache=("site",)), "fp32")
    graphs = traced_from_model(model, 23, report=lambda stage: None).graphs("none").graphs
    x = torch.randn(2, 3, 8)
    x[0], x[1, 0, :4] = 0, 0
    time = torch.tensor([0.0, 500.0])
    with torch.no_grad():
        expected, feature = module(x, time), module.site(module.guarded(x))
    assert expected.isfinite().all()
    given = {"latents": x.numpy(), "timestep": time.numpy(), "feature.site": feature.numpy()}
    for name in (FULL, REUSE):
        proto = ir.to_proto(graphs[name].onnx).SerializeToString()
        session = onnxruntime.InferenceSession(proto, providers=["CPUExecutionProvider"])
        (got, *_) = session.run(None, {one.name: given[one.name] for one in session.get_inputs()})
        np.testing.assert_allclose(got, expected.numpy(), rtol=1e-4, atol=1e-4, err_msg=name)
