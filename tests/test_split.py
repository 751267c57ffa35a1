from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fora_trt.errors import ExportError
from fora_trt.export.split import FullStep, ReuseStep, example_inputs, find_sites
from fora_trt.models import dit
from fora_trt.models.spec import ModelSpec
from tests.conftest import TINY


@pytest.fixture
def spec() -> ModelSpec:
    return dit.spec_from_config(TINY, "fp32", sample_size=8, scale=1.0, pixels=False)


def test_kinds_and_patterns_name_the_same_sites(module: nn.Module, spec: ModelSpec) -> None:
    both = find_sites(module, spec, ["feed-forward", "attention"])
    assert both == [
        (f"transformer_blocks.{i}.{part}", kind)
        for i in range(3)
        for part, kind in (("attn1", "attention"), ("ff", "feed-forward"))
    ]
    assert find_sites(module, spec, ["transformer_blocks.*.attn1", "transformer_blocks.*.ff"]) == both
    assert find_sites(module, spec, ["transformer_blocks.1.ff"]) == [("transformer_blocks.1.ff", "feed-forward")]


def test_a_star_stands_for_one_path_component(module: nn.Module, spec: ModelSpec) -> None:
    with pytest.raises(ExportError, match=r"'transformer_blocks\.\*' matches|'\*\.attn1' matches no module"):
        find_sites(module, spec, ["*.attn1"])


def test_full_step_is_the_module_bit_for_bit(module: nn.Module, spec: ModelSpec) -> None:
    sites = [path for path, _ in find_sites(module, spec, ["attention", "feed-forward"])]
    inputs = example_inputs(spec.inputs, spec.guidance, batch=2)
    features: dict[str, Tensor] = {}
    for path in sites:
        module.get_submodule(path).register_forward_hook(
            lambda _module, _args, output, path=path: features.update({path: output})
        )
    expected = spec.call(module, inputs)
    prediction, *emitted = FullStep(module, spec, sites)(*inputs.values())
    assert torch.equal(prediction, expected)
    assert all(torch.equal(one, features[path]) for one, path in zip(emitted, sites, strict=True))


def test_reuse_step_on_its_own_features_is_the_module_bit_for_bit(module: nn.Module, spec: ModelSpec) -> None:
    sites = [path for path, _ in find_sites(module, spec, ["attention", "feed-forward"])]
    inputs = list(example_inputs(spec.inputs, spec.guidance, batch=2).values())
    prediction, *features = FullStep(module, spec, sites)(*inputs)
    (again,) = ReuseStep(module, spec, sites)(*inputs, *features)
    assert torch.equal(again, prediction)
    assert all("forward" not in vars(one) for one in module.modules()), "a replaced forward was left behind"


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.once, self.twice, self.never, self.pair = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), Pair()

    def forward(self, x: Tensor, **_: Any) -> tuple[Tensor]:
        return (self.pair(self.twice(self.twice(self.once(x))))[0],)


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


@pytest.mark.parametrize(
    ("site", "message"),
    [
        ("twice", "twice is called more than once"),
        ("never", "never is never called"),
        ("pair", "pair puts out tuple"),
    ],
)
def test_a_site_that_cannot_be_cached_is_named(spec: ModelSpec, site: str, message: str) -> None:
    odd = ModelSpec(
        "Twice",
        spec.inputs[:1],
        spec.output,
        lambda module, x: module(x["latents"])[0],
        {},
        spec.latents,
        spec.guidance,
    )
    with pytest.raises(ExportError, match=message):
        FullStep(Twice(), odd, [site])(torch.zeros(2, 4))
