import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from fora_trt.bundle import Bundle
from fora_trt.cli import main
from fora_trt.engines.backends import BACKENDS
from fora_trt.errors import InputError
from fora_trt.evaluate.eager_fora import EagerFora
from fora_trt.evaluate.verify import compare_with_pytorch
from fora_trt.pipeline import Pipeline
from fora_trt.runtime.denoiser import Denoiser, load
from fora_trt.sampling.conditioning import Conditioning
from fora_trt.sampling.guidance import Guidance
from fora_trt.sampling.joined import JoinedSampler
from fora_trt.sampling.step_noise import StepNoise
from fora_trt.schedule import Schedule

CODE = """
import torch
from torch import nn

class Generator(nn.Module):
    def __init__(self, gated):
        super().__init__()
        self.gated, self.time, self.code = gated, nn.Linear(1, 16), nn.Linear(5, 16)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.Tanh()) for _ in range(3))
        self.gates = nn.Linear(16, 16)
    def forward(self, x, t, z):
        c, code = self.time(t[:, None] / 1000), self.code(z).tanh()
        gate = self.gates(c + code if self.gated else c)[:, None]
        h = x * (1 + code[:, None])
        for block in self.blocks:
            h = h + gate * block(h)
        return h * (1 + code[:, None])

def made(gated):
    torch.manual_seed(0)
    return Generator(gated)

def plain(): return made(False)
def gated(): return made(True)
"""
RECIPE = """
source = "{source}"
name = "{name}"
cache = ["blocks.*"]
[inputs]
latents = {{ shape = [6, 16] }}
timestep = {{}}
z = {{ shape = [5], drawn = true }}
"""


@pytest.fixture(params=["plain", "gated"])
def bundle(request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bundle]:
    name = f"noisy_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(CODE)
    (tmp_path / "noisy.toml").write_text(RECIPE.format(source=f"{name}:{request.param}", name=request.param))
    monkeypatch.chdir(tmp_path)
    made = fora("export", "noisy.toml", "--out", ".")
    assert made.exit_code == 0, made.output
    yield Bundle.open(tmp_path / request.param, trust_source=True)
    sys.modules.pop(name, None)


def fora(*arguments: Any) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_noise_is_drawn_anew_at_every_step_and_equals_eager_hooks(bundle: Bundle) -> None:
    manifest = bundle.manifest
    assert [(one.name, one.role) for one in manifest.inputs if one.role == "noise"] == [("z", "noise")]
    assert manifest.optimization == ("conditioning" if manifest.name == "gated" else "fold")
    for backend in ("onnxruntime", "torch"):
        pipeline = Pipeline(bundle, steps=12, backend=backend, device="cpu")
        for comparison in compare_with_pytorch(pipeline, ["none", "fora:3", "fora:3,forecast=1"]):
            assert comparison.error.relative < 1e-4, comparison

    pipeline = Pipeline(bundle, steps=12, cache_interval=3, backend="onnxruntime", device="cpu")
    seeds, sampling = [3, 8], pipeline.sampling()
    latents = pipeline.sampler(sampling)(Conditioning(2, {}, None), seeds).latents
    alone = torch.cat([pipeline.sampler(sampling)(Conditioning(1, {}, None), [seed]).latents for seed in seeds])
    assert torch.allclose(latents, alone, rtol=1e-5), "an image depends on its own seed only"

    module = getattr(sys.modules[manifest.model.options.source.split(":")[0]], manifest.name)().eval()
    kept: dict[int, Any] = {}
    full = True
    for number, block in enumerate(module.blocks):

        def forward(x: Any, number: int = number, original: Any = block.forward) -> Any:
            if full:
                kept[number] = original(x)
            return kept[number]

        block.forward = forward
    drawn, scheduler_step = StepNoise(manifest, seeds), sampling.scheduler_step
    scheduler_step.begin(manifest.latents.shape, seeds, torch.device("cpu"))
    codes = []
    with torch.no_grad():
        for full in sampling.schedule.full:  # noqa: B007 # `forward` reads it
            x, z = scheduler_step.model_input(), drawn.next()["z"]
            codes.append(z)
            scheduler_step.advance(module(x, scheduler_step.timestep().expand(2), z))
    want = scheduler_step.latents
    assert all(not torch.equal(one, other) for one, other in itertools.combinations(codes, 2))
    assert (latents - want).abs().max() < 1e-4 * want.abs().max()


def test_images_that_join_draw_the_noise_of_images_alone(bundle: Bundle) -> None:
    pipeline = Pipeline(bundle, steps=6, cache_interval=3, backend="torch", device="cpu")
    sampling, given = pipeline.sampling(), Conditioning(1, {}, None)
    want = [pipeline.sampler(sampling)(given, [seed]).latents[0] for seed in (1, 2)]
    joined = JoinedSampler(
        Denoiser(BACKENDS["torch"].engines(bundle, torch.device("cpu")), bundle.manifest, "torch"), 4
    )
    if joined.problem is not None:
        pytest.skip(joined.problem)
    members = [joined.member(sampling.scheduler_step, sampling.schedule, given, seed, Guidance(1.0)) for seed in (1, 2)]
    joined.change(joining=members[:1])
    joined.window()
    joined.change(joining=members[1:])
    while joined.members:
        joined.window()
        joined.change()
    for member, latents in zip(members, want, strict=True):
        assert member.latents is not None
        assert (member.latents - latents).abs().max() < 1e-5 * latents.abs().max()


def test_the_commands_take_a_bundle_with_noise(bundle: Bundle) -> None:
    name = bundle.manifest.name
    verified = fora("verify", name, "--steps", 6, "--device", "cpu", "--trust-source", "--cache-intervals", 3)
    assert verified.exit_code == 0, verified.output
    runs = [fora("run", name, "--steps", 6, "--seed", 5, "--latents-out", f"{k}.npy") for k in range(2)]
    assert all(one.exit_code == 0 for one in runs), runs[0].output
    assert np.array_equal(np.load("0.npy"), np.load("1.npy"))
    sampled = fora("sample", name, "--num-images", 3, "--batch-size", 2, "--steps", 4, "--out", "set")
    assert sampled.exit_code == 0, sampled.output
    compared = fora("quality", name, "--num-images", 4, "--steps", 4, "--cache-intervals", 2, "--out", "report")
    assert compared.exit_code == 0, compared.output


def test_a_step_by_step_call_takes_the_noise_of_its_step(bundle: Bundle) -> None:
    times, codes = torch.tensor([900.0, 600.0, 300.0, 0.0]), torch.randn(4, 2, 5)
    latents, eager = torch.randn(2, 6, 16), EagerFora(bundle, torch.device("cpu"))
    denoiser = load(bundle, schedule=Schedule.fora(4, 2), backend="torch", device="cpu")
    denoiser.reset(timesteps=times)
    with pytest.raises(InputError, match="input 'z' is missing"):
        denoiser(latents, 900.0)
    run = eager.begin(denoiser.schedule.plan, times, {}, [2])
    for step, code in enumerate(codes):
        got = denoiser(latents, times[step], z=code)
        want = run.at(step, 2).predict(run.offsets[step], latents, times[step], z=code)
        assert (got - want).abs().max() < 1e-5, step
    assert (denoiser.taken.full, denoiser.taken.reuse) == (3, 1)


def test_drawn_inputs_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "noisy_checked.py").write_text(CODE)
    recipe = RECIPE.format(source="noisy_checked:plain", name="n")
    for old, new, message in (
        (
            "shape = [5], drawn",
            'shape = [5], dtype = "int64", below = 3, drawn',
            "is drawn at every step and has the dtype int64; it is noise",
        ),
        ("timestep = {}", "timestep = { drawn = true }", "'timestep' follows from the scheduler"),
    ):
        (tmp_path / "noisy.toml").write_text(recipe.replace(old, new))
        refused = fora("export", "noisy.toml", "--out", ".")
        assert refused.exit_code == 1
        assert message in refused.stderr, refused.stderr
