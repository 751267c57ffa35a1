import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor, nn

from fora_trt import InputSpec, ModelSpec, Schedule, TensorSpec, load
from fora_trt.bundle import Bundle
from fora_trt.cli import main
from fora_trt.contract import TextSpec
from fora_trt.errors import ExportError, ModelError
from fora_trt.evaluate import compiled_module
from fora_trt.evaluate.eager_fora import EagerFora
from fora_trt.evaluate.verify import compare_with_pytorch, graph_errors
from fora_trt.export.check_sites import check_sites
from fora_trt.models.custom import completed
from fora_trt.models.options import SourceOptions
from fora_trt.pipeline import Pipeline
from fora_trt.runtime.denoiser import Denoiser

CODE = '''
import torch
from torch import nn
from fora_trt import InputSpec, ModelSpec, TensorSpec

class Attention(nn.Module):
    """Puts out a tuple: the result, a constant, and weights that nobody reads."""
    def __init__(self, width):
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
    def forward(self, x, bias=None):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        weights = (q @ k.transpose(1, 2) / 4).softmax(-1)
        return self.out(weights @ v), None, weights

class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(width), Attention(width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width))
        self.gate = nn.Linear(width, 2 * width)
    def forward(self, x, c):
        one, two = self.gate(c)[:, None].chunk(2, dim=-1)
        x = x + one * self.attn(self.norm(x))[0]
        return x + two * self.mlp(x)

class Net(nn.Module):
    """On tokens (B, N, D), not on images."""
    def __init__(self, width=16, depth=2, classes=5):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.spare = Block(width)
        self.times, self.classes = nn.Linear(1, width), nn.Embedding(classes, width)
        self.last = nn.Linear(width, width)
    def forward(self, x, t, y):
        c = self.times(t[:, None] * 3).sin() + self.classes(y)
        for block in self.blocks:
            x = block(x, c)
        return {"prediction": self.last(x)}

INPUTS = (
    TensorSpec("latents", "float32", ("batch", 6, 16)),
    TensorSpec("timestep", "float32", ("batch",)),
    TensorSpec("class_labels", "int64", ("batch",)),
)

def net():
    torch.manual_seed(0)
    return Net()

def make():
    return net(), ModelSpec(
        inputs=INPUTS,
        call=lambda module, inputs: module(*inputs.values())["prediction"],
        conditioning={"class_labels": InputSpec(values=(0, 5)), "timestep": InputSpec(values=(0, 1))},
    )

class Plain(Net):
    def forward(self, x, t, y):
        return super().forward(x, t / 1000, y)["prediction"]

def plain():
    torch.manual_seed(0)
    return Plain()

class Rotated(nn.Module):
    """Attention by PyTorch's own module, on tokens that a table in fp32 has turned."""
    def __init__(self, width):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.out = nn.Linear(width, width)
        self.register_buffer("table", torch.linspace(0, 3, 6 * width).reshape(6, width).cos())
    def forward(self, x):
        x = x * self.table
        x, weights = self.attention(x, x, x)
        mixed = (x.float() @ x.transpose(1, 2)).softmax(-1) @ x
        return self.out(mixed * self.table), weights

def with_unread():
    unread = TensorSpec("unread", "float32", ("batch", 3))
    return plain(), ModelSpec(
        inputs=(*INPUTS[:2], unread, INPUTS[2]),
        call=lambda module, inputs: module(inputs["latents"], inputs["timestep"], inputs["class_labels"]),
        conditioning={"class_labels": InputSpec(values=(0, 5))},
    )

class Turned(Net):
    def __init__(self):
        super().__init__()
        for block in self.blocks:
            block.attn = Rotated(16)
    def forward(self, x, t, y):
        return super().forward(x, t / 1000, y)["prediction"]

class Compiled(Plain):
    """Calls what it has given to torch.compile, as many published networks do."""
    @torch.compile
    def forward(self, x, t, y):
        return super().forward(x, t, y)

def compiled():
    print("a word of its own")
    torch.manual_seed(0)
    return Compiled(), ModelSpec(inputs=INPUTS, conditioning={"class_labels": InputSpec(values=(0, 5))})

def turned():
    import json  # found while the factory runs, as is what lies in this folder
    torch.manual_seed(0)
    return Turned().half(), ModelSpec(inputs=INPUTS, conditioning={"class_labels": InputSpec(values=(0, 5))})

def broken():
    raise RuntimeError("no such file: weights.bin")


def leaving():
    raise SystemExit(3)

number = 3
def text(): return "a module"
'''
RECIPE = """
source = "{source}"
cache = ["blocks.*.attn", "blocks.*.mlp"]
[inputs]
latents = {{ shape = [6, 16] }}
timestep = {{}}
class_labels = {{ dtype = "int64", below = 5 }}
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    name = f"own_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    yield name
    sys.modules.pop(name, None)


def fora(*arguments: Any) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def eager(module: nn.Module, spec: ModelSpec, schedule: Schedule, latents: Tensor, labels: Tensor) -> list[Tensor]:
    """FORA in a few lines of the test's own: predictions along a walk that feeds them back."""
    kept: dict[str, Any] = {}
    full = True
    sites = [f"blocks.{i}.{part}" for i in range(2) for part in ("attn", "mlp")]
    for path in sites:
        site = module.get_submodule(path)

        def forward(*args: Any, path: str = path, original: Any = site.forward) -> Any:
            if full:
                kept[path] = original(*args)
            return kept[path]

        site.forward = forward
    predictions = []
    for step, full in enumerate(schedule.full):  # noqa: B007 # `forward` reads it
        time = torch.full((len(latents),), 1 - step / schedule.steps)
        given = {"latents": latents, "timestep": time, "class_labels": labels}
        predictions.append(spec.call(module, given))
        latents = latents - predictions[-1] / schedule.steps
    return predictions


def test_a_factory_and_two_patterns_give_eager_fora(package: str, tmp_path: Path) -> None:
    made = fora(
        "export",
        f"{package}:make",
        "--cache",
        "blocks.*.attn",
        "--cache",
        "blocks.*.mlp",
        "--name",
        "own",
        "--out",
        tmp_path,
    )
    assert made.exit_code == 0, made.output
    bundle = Bundle.open(tmp_path / "own", trust_source=True)
    sites = {site.module: [one.name for one in site.features] for site in bundle.manifest.cache_sites}
    assert sites["blocks.0.attn"] == ["feature.blocks.0.attn.0"], "the weights, which nobody reads, are no feature"
    assert sites["blocks.1.mlp"] == ["feature.blocks.1.mlp"]
    for backend in ("onnxruntime", "torch"):
        pipeline = Pipeline(bundle, steps=10, backend=backend, device="cpu")
        for comparison in compare_with_pytorch(pipeline, ["none", "fora:3", "even:4,forecast=1", "fora:2,forecast=3"]):
            assert comparison.error.relative < 1e-4, comparison

    module, spec = sys.modules[package].make()
    schedule = Schedule.fora(9, 3)
    latents, labels = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 4])
    denoiser = load(bundle, schedule=schedule, backend="onnxruntime", device="cpu")
    with torch.no_grad():
        expected = eager(module.eval(), spec, schedule, latents, labels)
    denoiser.reset(timesteps=torch.tensor([1000 * (1 - step / schedule.steps) for step in range(schedule.steps)]))
    for step, want in enumerate(expected):
        got = denoiser(latents, 1000 * (1 - step / schedule.steps), class_labels=labels).clone()
        assert (got - want).abs().max() < 1e-4
        latents = latents - want / schedule.steps


def test_a_recipe_says_the_inputs_of_a_module_without_a_spec(package: str, tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text(RECIPE.format(source=f"{package}:plain"))
    made = fora("export", "own.toml", "--name", "own", "--out", tmp_path)
    assert made.exit_code == 0, made.output
    assert fora("verify", tmp_path / "own", "--steps", 6, "--device", "cpu", "--trust-source").exit_code == 0
    run = fora("run", tmp_path / "own", "--class-labels", "0,4", "--steps", 4, "--latents-out", tmp_path / "a.npy")
    assert run.exit_code == 0, run.output
    assert "there is no class 5" in fora("run", tmp_path / "own", "--class-labels", "5").stderr
    assert "--guidance-scale 1" in fora("run", tmp_path / "own", "--class-labels", "1", "--guidance-scale", 2).stderr
    pictures = fora("run", tmp_path / "own", "--class-labels", "1", "-o", "a.png").stderr
    assert "has none; name one with --vae FOLDER; or write the latents with --latents-out FILE.npy" in pictures


@pytest.mark.parametrize("precision", ["fp32", "fp16", pytest.param("bf16", marks=pytest.mark.slow)])
def test_tables_in_fp32_and_pytorchs_own_attention_fit_any_precision(
    precision: str, package: str, tmp_path: Path
) -> None:
    made = fora(
        "export", f"{package}:turned", "--cache", "blocks.*.attn,blocks.*.mlp", "--precision", precision,
        "--name", "own", "--out", tmp_path,
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    bundle = Bundle.open(tmp_path / "own", trust_source=True)
    admitted = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 5e-2}[precision]
    backend = "torch" if precision == "bf16" else "onnxruntime"
    pipeline = Pipeline(bundle, steps=10, backend=backend, device="cpu")
    for comparison in compare_with_pytorch(pipeline, ["none", "fora:3"]):
        assert comparison.error.relative < admitted, comparison
    if precision != "fp32":
        assert bundle.manifest.trajectory_error is not None
        assert all(error.relative < admitted for error in bundle.manifest.trajectory_error.errors.values())


def test_a_module_with_compiled_functions_needs_no_compiler_and_may_print(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, str(tmp_path / "no-compiler")))
    made = fora(
        "export", f"{package}:compiled", "--cache", "blocks.*.attn,blocks.*.mlp", "--name", "own", "--json",
        "--out", tmp_path,
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["bundle"] == str(tmp_path / "own"), "nothing else is on this output"
    assert "a word of its own" in made.stderr
    bundle = Bundle.open(tmp_path / "own", trust_source=True)
    pipeline = Pipeline(bundle, steps=10, backend="onnxruntime", device="cpu")
    for comparison in compare_with_pytorch(pipeline, ["none", "fora:3"]):
        assert comparison.error.relative < 1e-4, comparison


def test_the_references_in_pytorch_get_inputs_that_no_graph_reads(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = "blocks.*.attn,blocks.*.mlp"
    made = fora("export", f"{package}:with_unread", "--cache", sites, "--name", "own", "--out", tmp_path)
    assert made.exit_code == 0, made.output
    bundle = Bundle.open(tmp_path / "own", trust_source=True)
    assert [one.name for one in bundle.manifest.inputs] == ["latents", "timestep", "class_labels"]
    monkeypatch.setattr(compiled_module, "compiled", lambda step: step)
    cpu = torch.device("cpu")
    denoiser = Denoiser(compiled_module.compiled_engines(bundle, cpu), bundle.manifest, "compiled")
    for batch in (1, 3):
        for graph, error in graph_errors(denoiser, EagerFora(bundle, cpu), batch):
            assert error.relative < 1e-5, graph


BRANCHES = """
import torch
from torch import nn

class Branches(nn.Module):
    def __init__(self, merges):
        super().__init__()
        self.merges, self.merged = merges, None
        self.three = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
    def forward(self, x):
        return self.merged(x) if self.merged is not None else sum(one(x) for one in self.three)
    def switch_to_deploy(self):
        if self.merged is not None:
            return
        if self.merges == "fails":
            raise RuntimeError("no")
        self.merged = nn.Linear(16, 16)
        self.merged.weight.data = sum(one.weight.data for one in self.three)
        self.merged.bias.data = sum(one.bias.data for one in self.three) + (self.merges == "other")
        del self.three

class Net(nn.Module):
    def __init__(self, merges):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(Branches(merges), nn.GELU()) for _ in range(2))
    def forward(self, x, t):
        for block in self.blocks:
            x = x + block(x) * t[:, None, None] / 1000
        return x

def right(): return Net("right")
def other(): return Net("other")
def fails(): return Net("fails")
def merged():
    net = Net("right")
    [block[0].switch_to_deploy() for block in net.blocks]
    return net
"""


@pytest.mark.parametrize("way", ["right", "other", "fails", "merged"])
def test_branches_that_are_not_merged_are_said_to_be(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"branches_{way}.py").write_text(BRANCHES)
    recipe = f'source = "branches_{way}:{way}"\n[inputs]\nlatents = {{ shape = [6, 16] }}\ntimestep = {{}}\n'
    (tmp_path / "own.toml").write_text(recipe)
    made = fora("export", "own.toml", "--cache", "blocks.*", "--out", tmp_path, "--name", "own", "--json")
    assert made.exit_code == 0, made.output
    notes = json.loads(made.stdout)["notes"]
    assert bool(notes) == (way == "right"), notes
    if way == "right":
        assert notes[0].startswith(
            "2 modules are exported with branches for training, such as Branches, which takes 3.0"
        )
        assert "call switch_to_deploy() of each in the factory" in made.stderr


def test_sites_nobody_reads_are_passed_over_with_a_word(package: str, tmp_path: Path) -> None:
    made = fora(
        "export", f"{package}:make", "--cache", "*.attn,blocks.*.attn,spare.mlp", "--name", "own", "--out", tmp_path
    )
    assert made.exit_code == 0, made.output
    assert "ignoring 2 cache sites that the model never called, such as spare.attn" in made.stderr
    assert "the model never called 1 of its modules when it was traced, such as spare; their weights" in made.stderr
    assert "The trace fixes the branch of every condition in Python" in made.stderr


@pytest.mark.parametrize(
    ("source", "cache", "message"),
    [
        (
            "nowhere.at:all",
            "a",
            "cannot be imported: there is no module 'nowhere' in the current folder or among the installed packages",
        ),
        ("{}:none", "a", "has no attribute 'none'"),
        ("{}:number", "a", "is an object of type int, which is not callable"),
        ("{}:text", "a", "returned an object of type str; a factory returns a torch.nn.Module"),
        ("{}:broken", "a", "failed: RuntimeError: no such file: weights.bin"),
        ("{}:leaving", "a", "failed: SystemExit: 3"),
        ("{}:net", "a", "are unknown; a factory returns"),
        (
            "{}:make",
            "layers.*",
            "the cache pattern 'layers.*' matches no module of Net; give a pattern such as blocks.*.attn",
        ),
        ("{}:make", "", "no cache sites are given for Net"),
        ("{}:make", "blocks.*,blocks.*.attn", "the cache site blocks.0.attn is inside the cache site blocks.0"),
        ("{}:make", "blocks.*", "the reuse graph does not depend on the latents if blocks.0, blocks.1 are cached"),
        ("{}:make", "spare.attn", "the model never calls any of the cache sites, such as spare.attn; the trace fixes"),
    ],
)
def test_what_cannot_be_exported_is_named(source: str, cache: str, message: str, package: str, tmp_path: Path) -> None:
    refused = fora("export", source.format(package), "--cache", cache, "--out", tmp_path)
    assert refused.exit_code == 1
    assert message in refused.stderr, refused.stderr
    assert "Traceback" not in refused.output


def test_inputs_that_the_module_does_not_take_are_named(package: str, tmp_path: Path) -> None:
    recipe = RECIPE.format(source=f"{package}:plain")

    def refused(old: str, new: str) -> str:
        (tmp_path / "own.toml").write_text(recipe.replace(old, new))
        return fora("export", "own.toml", "--out", tmp_path).stderr

    wrong = refused("shape = [6, 16]", "shape = [6, 15]")
    assert "cannot be called with the inputs latents [2, 6, 15] float32, timestep [2] float32" in wrong
    assert "'latents' and 'timestep' are needed" in refused("timestep = {}", "time = {}")
    assert "has no upper bound; give `below` in the recipe" in refused(", below = 5", "")
    assert "is not one of float32, float16" in refused('"int64"', '"complex64"')
    assert "'class_labels' of" in (range_ := refused('"int64", below = 5', '"int8", below = 500'))
    assert "has values from 0 to 499, which int8 does not hold" in range_
    assert "'timestep' of" in (range_ := refused("timestep = {}", 'timestep = { dtype = "uint8" }'))
    assert "has values from 0 to 999, which uint8 does not hold" in range_
    assert "latents are noise, so give float32" in refused("shape = [6, 16]", 'shape = [6, 16], dtype = "int64"')
    assert "cannot be called" in refused("timestep = {}", "timestep = {}\nmore = {}")


class Wayward(nn.Module):
    """A network with a site that cannot be cached, of the kind that `way` says."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.site, self.other, self.calls = way, nn.Identity(), nn.Identity(), 0
        self.kept: Any = 0
        self.site.forward = getattr(self, way)  # type: ignore[method-assign]

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        left = x.clone()
        y = self.site(left)
        if self.way == "twice":
            y = self.site(y)
        if self.way == "keeps":
            self.kept = left = left + self.kept
        if self.way == "alternates":
            self.calls += 1
            left = left * (self.calls % 2)
        if self.way == "dropped":
            left = nn.functional.dropout(left)
        if self.way == "passes":
            left = left + self.kept
        if self.way == "interleaves":
            y = y[: len(x)] + y[len(x) :]
        result: Tensor = self.other(y.sum(1, keepdim=True) + left)
        return result

    def twice(self, x: Tensor) -> Tensor:
        return x

    keeps = alternates = dropped = twice

    def passes(self, x: Tensor) -> Tensor:
        self.kept = x * 2
        return x

    def counts(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls

    def draws(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)

    def selects(self, x: Tensor) -> Tensor:
        return x[:, : int(x.argmax(1).max()) + 1]

    def in_place(self, x: Tensor) -> Tensor:
        return x.mul_(2) * 1

    def interleaves(self, x: Tensor) -> Tensor:
        return torch.cat([x, x * 2])

    def whole(self, x: Tensor) -> Tensor:
        return x.mean(0, keepdim=True)


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("twice", "site is called more than once in one step"),
        (
            "counts",
            "output of the cache site site differs between calls with the same inputs, because the module keeps state "
            r"between calls \(it sets calls\), so it cannot be cached; give --exclude site",
        ),
        ("draws", "site differs between calls with the same inputs, because the module draws random numbers, so"),
        ("keeps", r"Wayward keeps state between calls \(it sets kept\), so its prediction differs between calls"),
        ("alternates", r"Wayward keeps state between calls \(it sets calls\), so its prediction differs between calls"),
        ("dropped", "Wayward draws random numbers, so its prediction differs between calls with the same inputs; a"),
        ("selects", r"the output of the cache site site has shape \[2, \d+\], but .* for .*; only the first dimension"),
        ("in_place", "site has side effects: it changes its input in place"),
        ("passes", r"site has side effects \(it sets kept\): it changes .* reads, .*; give --exclude site"),
        ("interleaves", "site does not have the values of each sample in one block along its first dimension"),
        (
            "whole",
            r"the output of the cache site site has shape \[1, 9\] for a batch of 2; "
            "the first dimension of a cached output must be the batch",
        ),
    ],
)
def test_a_site_that_cannot_be_cached_is_found_and_named(way: str, message: str) -> None:
    inputs = (TensorSpec("latents", "float32", ("batch", 9)), TensorSpec("timestep", "float32", ("batch",)))
    spec = ModelSpec(inputs=inputs, conditioning={"latents": InputSpec()}, architecture="Wayward")
    with pytest.raises(ExportError, match=message):
        check_sites(Wayward(way), spec, ["site"])


class Plain(nn.Module):
    """A network with a site that can be cached; its class keeps the sizes of the batches of all calls."""

    batches: ClassVar[list[int]] = []

    def __init__(self) -> None:
        super().__init__()
        self.site = nn.Linear(9, 9)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.batches.append(len(x))
        result: Tensor = x + self.site(x) * t[:, None]
        return result


def test_the_check_of_cache_sites_evaluates_few_samples() -> None:
    inputs = (TensorSpec("latents", "float32", ("batch", 9)), TensorSpec("timestep", "float32", ("batch",)))
    module = Plain()
    check_sites(module, ModelSpec(inputs=inputs), ["site"])
    assert module.batches == [2, 2, 1, 2], "full steps, of which the last has another batch, and a reuse step"


@pytest.mark.parametrize(
    ("given", "text", "usual"), [(None, False, 1.5), (None, True, 4.5), (7, True, 7.0), (0, False, 0)]
)
def test_the_usual_guidance_scale_is_the_specs_or_that_of_classes_or_text(
    given: float | None, text: bool, usual: float
) -> None:
    inputs = (TensorSpec("latents", "float32", ("batch", 9)), TensorSpec("timestep", "float32", ("batch",)))
    told = TextSpec(8, "PixArtSigmaPipeline", None) if text else None
    spec = ModelSpec(inputs, call=lambda module, given: given["latents"] * 2, text=told, guidance_scale=given)
    assert completed(nn.Identity(), spec, "here:make").guidance_scale == usual


@pytest.mark.parametrize("scale", [float("nan"), -1.0, "much"])
def test_a_guidance_scale_that_is_none_is_named(scale: Any) -> None:
    inputs = (TensorSpec("latents", "float32", ("batch", 9)), TensorSpec("timestep", "float32", ("batch",)))
    with pytest.raises(
        ModelError, match=r"the guidance_scale of 'here:make' is .*; a finite number of at least 0 is needed"
    ):
        completed(nn.Identity(), ModelSpec(inputs, guidance_scale=scale), "here:make")


def test_options_of_a_source_survive_a_manifest() -> None:
    options = SourceOptions.model_validate(
        {"source": "a:b", "image_size": 512, "inputs": {"latents": {"shape": [4, 8]}, "timestep": {}}}
    )
    assert options.image_size == (512, 512)
    assert SourceOptions.model_validate_json(options.model_dump_json()) == options
