"""Networks whose inputs, features and guards are not the usual ones: right at the highest level, or not written."""

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from fora_trt.bundle import Bundle, GraphError
from fora_trt.cli import main
from fora_trt.engines.backends import BACKENDS
from fora_trt.evaluate.export_check import GraphCheck
from fora_trt.evaluate.verify import compare_with_pytorch
from fora_trt.models.sources import model_from_source
from fora_trt.pipeline import Pipeline
from tests.conftest import ON_CPU, BundleAt

CODE = """
import torch
from torch import nn
from fora_trt import InputSpec, ModelSpec, TensorSpec

WIDTH = 8

class Site(nn.Sequential):
    def __init__(self, kind):
        super().__init__(nn.Linear(WIDTH, WIDTH), nn.GELU())
        self.kind = kind
    def forward(self, z):
        f = super().forward(z)
        return {
            "doubles": lambda: f.double(),
            "mixed": lambda: (f, (f * 3).long(), f > 0),
            "integers": lambda: (f * 100).round().to(torch.int32),
            "transposed": lambda: f.transpose(1, 2),
            "alias": lambda: z,
            "complex": lambda: torch.fft.fft(f),
            "unsigned": lambda: (f.sigmoid() * 255).to(torch.uint16),
            "half_guard": lambda: f / (f.abs() * 0 + 1e-8) * 1e-8,
        }.get(self.kind, lambda: f)()

class Block(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.norm, self.gate, self.attn = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), Site(kind)

class Net(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.embed, self.out = kind, nn.Linear(4, WIDTH), nn.Linear(WIDTH, 4)
        self.time, self.label = nn.Linear(1, WIDTH), nn.Embedding(11, WIDTH)
        self.blocks = nn.ModuleList(Block(kind) for _ in range(2))
    def forward(self, x, t, y, more=None):
        kind = self.kind
        h = self.embed(x.float().flatten(2).transpose(1, 2))
        c = self.time(t[:, None].float() / 1000) + self.label(y.long())
        if kind == "everything":
            c = (c.double() * (1 + t.double()[:, None].mul(0.01).sin())).float()
        if kind == "gate":
            c = c * more.float()[:, None]
        if kind == "bytes":
            c = c + more.float() / 255
        for k, block in enumerate(self.blocks):
            z = block.norm(h)
            if kind in ("late", "everything"):
                z = z.masked_fill((t > 300 + 400 * k)[:, None, None], 0.5)
            if kind in ("null", "everything"):
                z = torch.where(((y == 10) & (t > 500))[:, None, None], z * 0.5, z)
            if kind in ("guard", "everything"):
                z = z / (z.abs().mul(1e-20) + 1e-12).add(1e-9).sqrt() * 1e-4 * (1 + 4e-6)
            if kind in ("mask", "everything"):
                z = torch.where(more[:, :, None], z, z * 0.1)
            f = block.attn(z)
            if kind == "mixed":
                f = torch.where(f[2], f[0], f[1].float())
            if kind in ("integers", "doubles"):
                f = f.float() * 0.01
            if kind == "transposed":
                f = f.transpose(1, 2)
            if kind == "complex":
                f = f.real
            if kind == "unsigned":
                f = f.float()
            if kind == "later":
                f = f.masked_fill((t > 300 + 400 * k)[:, None, None], 0)
            if kind == "in_place":
                f.mul_(2)
            gate = block.gate(c)[:, None]
            if kind == "zero" and k:
                gate = gate * 0
            if kind == "dead" and k:
                dead = h + gate * f
                continue
            h = h + gate * f
        out = self.out(h).transpose(1, 2).reshape(x.shape)
        return out.double() if kind == "wide" else out * float("nan") if kind == "nan" else out

def made(kind, labels="int64", time="float32", latents="float32", more=None, **conditioning):
    torch.manual_seed(0)
    inputs = [TensorSpec("latents", latents, ("batch", 4, 4, 4)), TensorSpec("timestep", time, ("batch",))]
    inputs += [TensorSpec("class_labels", labels, ("batch",)), *([more] if more else [])]
    conditioning["class_labels"] = InputSpec(values=(0, 11))
    return Net(kind), ModelSpec(inputs=tuple(inputs), conditioning=conditioning)

MASK = TensorSpec("mask", "bool", ("batch", 16))

def everything(): return made("everything", "int32", "int32", more=MASK)
def mask(): return made("mask", more=MASK, mask=InputSpec(values=(0, 2)))
def gate(): return made("gate", more=TensorSpec("on", "bool", ("batch",)))
def nan_weights():
    net, spec = made("")
    net.blocks[1].attn[0].weight.data[2, 3] = float("nan")
    return net, spec
LEVELS = TensorSpec("levels", "uint8", ("batch", 8))
def bytes(): return made("bytes", "uint8", "float64", more=LEVELS, levels=InputSpec(values=(0, 256)))
def int32_labels(): return made("", "int32")
def latents64(): return made("wide", "int16", latents="float64")
for kind in (
    "late null guard doubles mixed integers transposed alias complex unsigned later in_place zero dead half_guard nan"
).split():
    vars()[kind] = lambda kind=kind: made(kind)
"""


@pytest.fixture
def networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    name = f"networks_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    yield name
    sys.modules.pop(name, None)


def export(source: str, *options: str) -> Result:
    return CliRunner().invoke(
        main, ["export", source, "--cache", "blocks.*.attn", "--name", "odd", "--out", ".", *options]
    )


def worst(bundle: Bundle, schedules: list[str]) -> float:
    """The largest error on the backends that work on a CPU, of graphs and of trajectories."""
    pipelines = [Pipeline(bundle, steps=6, backend=backend, device="cpu") for backend in ON_CPU]
    return max(one.error.relative for pipeline in pipelines for one in compare_with_pytorch(pipeline, schedules))


def test_masks_guards_and_dtypes_pass_between_graphs_at_the_highest_level(networks: str) -> None:
    made = export(f"{networks}:everything")
    assert made.exit_code == 0, made.output
    bundle = Bundle.open("odd", trust_source=True)
    assert bundle.manifest.optimization == "fold"
    assert {one.dtype for one in bundle.manifest.graphs["conditioning"].outputs} == {"float32", "bool"}
    assert bundle.manifest.measured_on == "onnxruntime (cpu)"
    assert "relative to PyTorch in fp32, on onnxruntime (cpu): full graph" in made.stdout
    assert worst(bundle, ["fora:3,forecast=2"]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "level", "forecasts"),
    [
        ("late", "fold", True),
        ("null", "fold", True),
        ("guard", "fold", True),
        ("mask", "fold", True),
        ("int32_labels", "fold", True),
        ("gate", "fold", True),
        ("bytes", "conditioning", True),
        ("latents64", "fold", True),
        ("doubles", "fold", True),
        ("mixed", "fold", False),
        ("integers", "fold", False),
        ("transposed", "fold", True),
        ("alias", "fold", True),
        ("later", "conditioning", True),
        ("zero", "fold", True),
        ("dead", "fold", True),
    ],
)
def test_each_kind_is_right(kind: str, level: str, forecasts: bool, networks: str) -> None:
    made = export(f"{networks}:{kind}")
    assert made.exit_code == 0, made.output
    bundle = Bundle.open("odd", trust_source=True)
    assert (bundle.manifest.optimization, bundle.manifest.can_forecast) == (level, forecasts)
    assert worst(bundle, ["fora:3", *(["fora:3,forecast=2"] if forecasts else [])]) < 1e-5
    assert ("ignoring 1 cache sites" in made.stderr) == (kind == "dead")


@pytest.mark.slow
def test_integer_features_are_not_extrapolated(networks: str) -> None:
    assert export(f"{networks}:integers", "--optimize", "conditioning").exit_code == 0
    assert worst(Bundle.open("odd", trust_source=True), ["fora:3,forecast=2"]) < 1e-5


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (
            "complex",
            (),
            "blocks.0.attn outputs a tensor of dtype complex64, and graphs pass only float32, float16",
        ),
        ("unsigned", (), "the cache site blocks.0.attn outputs a tensor of dtype uint16"),
        ("in_place", (), "or its output is changed in place, so it cannot be cached"),
        (
            "nan",
            (),
            "Net itself predicts values that are not finite, in PyTorch and fp32, for example inputs (first in Net)",
        ),
        (
            "nan_weights",
            (),
            "for example inputs (first in blocks.1.attn.0, whose weight is not finite); check its weights",
        ),
        pytest.param(
            "half_guard",
            ("--precision", "fp16", "--optimize", "none"),
            "the graph lacks it; export it with --precision bf16 or fp32",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_is_not_right_is_not_written(
    kind: str, options: tuple[str, ...], message: str, networks: str, tmp_path: Path
) -> None:
    refused = export(f"{networks}:{kind}", *options)
    assert refused.exit_code == 1
    assert message in refused.stderr, refused.stderr
    assert not (tmp_path / "odd").exists()


@pytest.mark.slow
def test_graphs_without_their_guards_name_the_first_node(
    networks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fora_trt.export.traced.near_neutral_hidden", lambda model: nullcontext())
    refused = export(f"{networks}:guard", "--optimize", "none")
    assert refused.exit_code == 1
    assert "odd is not written: its full graph differs from PyTorch by" in refused.stderr
    assert "on onnxruntime (cpu), and the tolerance in fp32 is 1e-04; the first node that differs is" in refused.stderr
    assert "(Sqrt) in Net, which in PyTorch reads 'add" in refused.stderr
    assert not (tmp_path / "odd").exists()


def test_a_bundle_of_doubles_is_not_for_tensorrt(exported: Bundle) -> None:
    full = exported.manifest.graphs["full"]
    wide = full.model_copy(update={"inputs": (*full.inputs[:-1], replace(full.inputs[-1], dtype="float64"))})
    manifest = exported.manifest.model_copy(update={"graphs": {"full": wide}})
    for name in ("tensorrt", "tensorrt-rtx"):
        assert BACKENDS[name].refusal(exported.manifest, "cuda") is None
        message = f"{name} does not support float64, the dtype of 'class_labels' in the graphs of tiny"
        assert message in str(BACKENDS[name].refusal(manifest, "cuda"))
        assert "runs on NVIDIA GPUs" in str(BACKENDS[name].refusal(exported.manifest, "cpu"))


def test_short_memory_is_measured_on_torch(exported: Bundle, pipeline_folder: Path) -> None:
    model = model_from_source(str(pipeline_folder))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("fora_trt.evaluate.export_check.free_bytes", lambda device: 1000)
        measured = GraphCheck().measure(model, exported)
    assert measured.where == "torch (cpu)"
    assert 0 < measured.errors["reuse"].relative < 1e-5


@pytest.mark.slow
def test_half_precision_is_rounded_where_that_is_quick(
    bundle_at: BundleAt, pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, bundle = model_from_source(str(pipeline_folder), "fp16"), bundle_at("fold", "fp16")
    rounded = GraphCheck().measure(model, bundle)
    assert rounded.where == "onnxruntime and torch (cpu)"
    monkeypatch.setattr("fora_trt.evaluate.export_check.LONGEST", 0)
    monkeypatch.setattr("fora_trt.evaluate.export_check.free_bytes", lambda device: 1000)
    in_fp32 = GraphCheck().measure(model, bundle)
    assert in_fp32.where == "torch in fp32 arithmetic (cpu)"
    assert 1e-4 < rounded.errors["full"].relative < 1e-2
    assert in_fp32.errors["full"].relative < 1e-3


def test_nothing_against_nothing_is_no_error() -> None:
    zeros = torch.zeros(3)
    assert GraphError.between(zeros, zeros) == GraphError(0.0, 0.0)
    assert GraphError.between(zeros + 1, zeros).relative == float("inf")
    assert GraphError.between(zeros * float("nan"), zeros).relative == float("inf")
