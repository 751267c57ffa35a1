"""Networks whose text and image tokens share a stream: they fold, and their trajectories are those of hooks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fora_trt import ModelSpec, Schedule, TensorSpec, load
from fora_trt.bundle import Bundle
from fora_trt.contract import LATENTS, TIMESTEP
from fora_trt.evaluate.eager_fora import EagerFora
from fora_trt.evaluate.export_check import GraphCheck
from fora_trt.export.write import bundle_from_model
from fora_trt.models.examples import example_inputs
from fora_trt.models.sources import model_from_source
from fora_trt.plan import forecast
from fora_trt.runtime.interface import Predictor
from tests.conftest import ON_CPU

CPU, STEPS, TEXT, IMAGE, WIDTH = torch.device("cpu"), 10, 3, 6, 16


class Block(nn.Module):
    """Adds a feature to a stream of text and image tokens, with a gate, and one to the image tokens, without."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.gate = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mixer = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, text: Tensor, image: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.cat([text, image], dim=1)
        mean = x.mean(1, keepdim=True)
        x = x + self.gate(c)[:, None] * self.mixer(self.norm(x + mean))
        text, image = x[:, :TEXT], x[:, TEXT:]
        return text, image + self.mlp(image)


class Joint(nn.Module):
    """Embeds a guidance scale that it expands to the batch itself."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.context, self.last = nn.Linear(4, WIDTH), nn.Linear(5, WIDTH), nn.Linear(WIDTH, 4)
        self.times, self.scale = nn.Linear(1, WIDTH), nn.Linear(1, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, latents: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        guidance = torch.full((latents.shape[0], 1), 3.5)
        c = (self.times(timestep[:, None] / 1000) + self.scale(guidance).tanh()).sin()
        text, image = self.context(prompt), self.embed(latents)
        for block in self.blocks:
            text, image = block(text, image, c)
        x = self.last(torch.cat([text, image], dim=1)) * 2
        result: Tensor = x[:, TEXT:]
        return result


def joint() -> tuple[nn.Module, ModelSpec]:
    torch.manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {LATENTS: (IMAGE, 4), TIMESTEP: (), "encoder_hidden_states": (TEXT, 5)}
    inputs = tuple(TensorSpec(name, "float32", ("batch", *shape)) for name, shape in shapes.items())
    return Joint(), ModelSpec(inputs=inputs, cache_sites={"mlp": ("blocks.*.mixer", "blocks.*.mlp")})


def exported(source: str, folder: Path) -> Bundle:
    bundle_from_model(model_from_source(source), folder / "streams", check=GraphCheck())
    return Bundle.read(folder / "streams", trust_source=True)


def check_trajectories(bundle: Bundle, backend: str) -> None:
    """Every step of trajectories with the intervals 1 and 3, and forecasts of order 0 and 2."""
    manifest = bundle.manifest
    steps = [example_inputs(manifest.inputs, manifest.conditioning, 2, seed) for seed in range(1, STEPS + 1)]
    given = {name: value for name, value in steps[0].items() if name not in (LATENTS, TIMESTEP)}
    times, reference = torch.linspace(990, 10, STEPS), EagerFora(bundle, CPU)

    def predictions(one: Predictor, interval: int, order: int) -> list[Tensor]:
        run = one.begin(forecast(Schedule.fora(STEPS, interval).plan, order), times, given, [2])
        return [
            run.at(k, 2).predict(run.offsets[k], step[LATENTS], times[k], **given).clone()
            for k, step in enumerate(steps)
        ]

    denoiser = load(bundle, schedule=Schedule.fora(STEPS, 3), backend=backend, device="cpu")
    for interval, order in ((1, 0), (3, 0), (3, 2)):
        pairs = zip(*(predictions(one, interval, order) for one in (denoiser, reference)), strict=True)
        errors = [((got - wanted).abs().max() / wanted.abs().max()).item() for got, wanted in pairs]
        assert max(errors) < 1e-5, (interval, order, errors)


def check_folded(bundle: Bundle) -> None:
    """A reuse step reads the latents, one sum of image tokens, and the modulation of the last layer."""
    assert bundle.manifest.optimization == "fold"
    assert bundle.manifest.can_forecast
    read = bundle.manifest.graphs["reuse"].inputs
    assert [one.role for one in read if one.role != "hoisted"] == ["latents", "sum"]


def test_a_stream_of_text_and_image_is_one_sum_of_image_tokens(tmp_path: Path) -> None:
    bundle = exported(f"{__name__}:joint", tmp_path)
    check_folded(bundle)
    assert [one.shape for one in bundle.manifest.graphs["reuse"].inputs if one.role == "sum"] == [("batch", 6, WIDTH)]
    for backend in ON_CPU:
        check_trajectories(bundle, backend)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["flux", "flux2", "auraflow", "cogvideox_5b", "hunyuan_video"])
def test_transformers_with_joint_streams_fold(kind: str, tmp_path: Path) -> None:
    bundle = exported(f"tests.tiny_transformers:{kind}", tmp_path)
    check_folded(bundle)
    check_trajectories(bundle, "onnxruntime")
