import pytest
import torch
from torch import Tensor, nn

from fora_trt.contract import TensorSpec
from fora_trt.errors import ExportError
from fora_trt.export.split import steps_of_module
from fora_trt.models.architectures import ARCHITECTURES, PipelineParts
from fora_trt.models.examples import example_inputs
from fora_trt.models.options import SourceOptions
from fora_trt.models.sites import find_sites
from fora_trt.models.spec import ModelSpec
from tests.conftest import TINY


@pytest.fixture
def spec() -> ModelSpec:
    return ARCHITECTURES["DiT"].described(TINY, SourceOptions(source="tiny"), PipelineParts())


def test_kinds_and_patterns_name_the_same_sites(module: nn.Module, spec: ModelSpec) -> None:
    both = find_sites(module, spec.cache_sites, ["feed-forward", "attention"])
    assert both == [
        (f"transformer_blocks.{i}.{part}", kind)
        for i in range(3)
        for part, kind in (("attn1", "attention"), ("ff", "feed-forward"))
    ]
    assert find_sites(module, spec.cache_sites, ["transformer_blocks.*.attn1", "transformer_blocks.*.ff"]) == both
    assert find_sites(module, spec.cache_sites, ["transformer_blocks.1.ff"]) == [
        ("transformer_blocks.1.ff", "feed-forward")
    ]


def test_a_star_stands_for_one_path_component(module: nn.Module, spec: ModelSpec) -> None:
    with pytest.raises(ExportError, match=r"'transformer_blocks\.\*' matches|'\*\.attn1' matches no module"):
        find_sites(module, spec.cache_sites, ["*.attn1"])


def test_a_pattern_that_matches_nothing_is_answered_with_patterns_that_do() -> None:
    def layer() -> nn.Module:
        return nn.ModuleDict({"norm": nn.LayerNorm(4), "self_attention": nn.Linear(4, 4)})

    embedder = nn.ModuleDict({f"part{k}": nn.Linear(4, 4) for k in range(20)})
    network = nn.ModuleDict({"embedder": embedder, "layers": nn.ModuleList([layer(), layer()])})
    with pytest.raises(
        ExportError, match=r"such as layers\.\*\.self_attention, in .* contains layers\.\*\.norm, layers"
    ):
        find_sites(network, {}, ["blocks.*.attn"])


def test_full_step_is_the_module_bit_for_bit(module: nn.Module, spec: ModelSpec) -> None:
    sites = [path for path, _ in find_sites(module, spec.cache_sites, ["attention", "feed-forward"])]
    inputs = example_inputs(spec.inputs, spec.conditioning, batch=2)
    features: dict[str, Tensor] = {}
    for path in sites:
        module.get_submodule(path).register_forward_hook(
            lambda _module, _args, output, path=path: features.update({path: output})
        )
    expected = spec.call(module, inputs)
    full, _ = steps_of_module(module, spec, sites)
    prediction, *emitted = full(*inputs.values())
    assert torch.equal(prediction, expected)
    assert all(torch.equal(one, features[path]) for one, path in zip(emitted, sites, strict=True))
    assert full.features == [f"feature.{path}" for path in sites]


def test_reuse_step_on_its_own_features_is_the_module_bit_for_bit(module: nn.Module, spec: ModelSpec) -> None:
    sites = [path for path, _ in find_sites(module, spec.cache_sites, ["attention", "feed-forward"])]
    inputs = list(example_inputs(spec.inputs, spec.conditioning, batch=2).values())
    full, reuse = steps_of_module(module, spec, sites)
    prediction, *features = full(*inputs)
    reuse.features = full.features
    (again,) = reuse(*inputs, *features)
    assert torch.equal(again, prediction)
    assert all("forward" not in vars(one) for one in module.modules()), "a replaced forward was left behind"


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.once, self.twice, self.never = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.pair, self.wrapped, self.bare = Pair(), Wrapped(), Bare()

    def forward(self, x: Tensor) -> tuple[Tensor]:
        first, scale, second = self.pair(self.twice(self.twice(self.once(x))))
        self.wrapped(x)
        self.bare(x)
        return (first - scale * second,)


class Pair(nn.Module):
    """Two tensors, and beside them a number that is the same at every step."""

    def forward(self, x: Tensor) -> tuple[Tensor, float, Tensor]:
        return x.sin(), 0.5, x.cos()


class Wrapped(nn.Module):
    """No tensor, tuple, list or dictionary."""

    def forward(self, x: Tensor) -> slice:
        return slice(x)


class Bare(nn.Module):
    def forward(self, x: Tensor) -> tuple[None, int]:
        return None, 1


TWICE = ModelSpec(inputs=(TensorSpec("latents", "float32", ("batch", 4)),))


@pytest.mark.parametrize(
    ("site", "message"),
    [
        ("twice", "twice is called more than once"),
        ("wrapped", "wrapped outputs an object of type slice; only tensors, alone or in tuples"),
        ("bare", "bare outputs no tensor"),
    ],
)
def test_a_site_that_cannot_be_cached_is_named(site: str, message: str) -> None:
    full, _ = steps_of_module(Twice(), TWICE, [site])
    with pytest.raises(ExportError, match=message):
        full(torch.zeros(2, 4))


def test_a_site_that_is_never_called_has_no_feature() -> None:
    full, reuse = steps_of_module(Twice(), TWICE, ["once", "never"])
    prediction, *features = full(torch.ones(2, 4))
    assert full.features == ["feature.once"]
    assert full.outputs["never"].features == []
    reuse.features = full.features
    (again,) = reuse(torch.zeros(2, 4), *features)
    assert torch.equal(again, prediction)


def test_a_site_may_put_out_several_tensors() -> None:
    module = Twice()
    full, reuse = steps_of_module(module, TWICE, ["once", "pair"])
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    prediction, *features = full(x)
    assert torch.equal(prediction, module(x)[0])
    assert full.features == ["feature.once", "feature.pair.0", "feature.pair.1"]
    reuse.features = full.features
    (again,) = reuse(x.neg(), *features)
    assert torch.equal(again, prediction), "nothing but the features is read"
    (other,) = reuse(x, *features[:2], features[2] + 1)
    torch.testing.assert_close(other, prediction - 0.5)
