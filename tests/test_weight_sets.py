from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from fora_trt.errors import ModelError
from fora_trt.models.checkpoint import content_of_file
from fora_trt.models.weight_sets import chosen, is_averaged, sets_in

NAMES = ("x_embedder.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.attn.qkv.bias", "final_layer.linear.weight")


def weights(value: float) -> dict[str, Tensor]:
    return {name: torch.full((2, k + 1), value) for k, name in enumerate(NAMES)}


RAW, AVERAGE = weights(1.0), weights(2.0)


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": one for name, one in tensors.items()}


def within(wrapper: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("blocks.0.", f"blocks.0.{wrapper}."): one for name, one in tensors.items()}


def flat(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace(".", ""): one for name, one in tensors.items()}


class Network(nn.Module):
    """A module whose state dict has `NAMES`."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, one in tensors.items():
            *path, last = name.split(".")
            owner: nn.Module = self
            for part in path:
                if part not in dict(owner.named_children()):
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            owner.register_parameter(last, nn.Parameter(one.clone()))


def accepts(tensors: Mapping[str, Tensor]) -> bool:
    return NAMES[0] in tensors and NAMES[-1] in tensors


def taken(content: object, wanted: str | None = None) -> tuple[float, str | None]:
    """The value of the chosen weights, and the note."""
    sets, unreadable = sets_in(content, accepts)
    choice = chosen(sets, unreadable, wanted, "a.pt")
    (tensors,) = [one.tensors for one in sets if one.key == choice.key]
    assert {*tensors} >= {*NAMES}
    return tensors[NAMES[1]].mean().item(), choice.note


MOMENTUM = {"state": {0: {"exp_avg": torch.ones(2, 4), "exp_avg_sq": torch.ones(2, 4)}}, "param_groups": [{"lr": 1}]}

AVERAGED: dict[str, Any] = {
    "train.py of DiT and SiT": {"model": RAW, "ema": AVERAGE, "opt": MOMENTUM},
    "model_ema": {"model": RAW, "model_ema": AVERAGE, "epoch": 3},
    "PixArt": {"state_dict": RAW, "state_dict_ema": AVERAGE, "optimizer": MOMENTUM},
    "params_ema": {"params": RAW, "params_ema": AVERAGE},
    "distributed": {"model": under("module.", RAW), "ema": under("module.", AVERAGE)},
    "compiled": {"model": under("_orig_mod.", RAW), "ema": under("_orig_mod.", AVERAGE)},
    "compiled and distributed": {"model": RAW, "ema": under("module._orig_mod.", AVERAGE)},
    "compiled blocks": {"model": within("_orig_mod", RAW), "ema": within("_orig_mod", AVERAGE)},
    "FSDP": {"model": RAW, "ema": under("_fsdp_wrapped_module.", within("_fsdp_wrapped_module", AVERAGE))},
    "checkpointed": {"model": RAW, "ema": within("_checkpoint_wrapped_module", AVERAGE)},
    "Lightning": {"state_dict": {**under("model.", RAW), **under("ema_model.", AVERAGE)}, "epoch": 1},
    "Lightning's callback": {"state_dict": under("net.", RAW), "callbacks": {"EMA": {"ema_state_dict": AVERAGE}}},
    "ema-pytorch": {"ema": {**under("online_model.", RAW), **under("ema_model.", AVERAGE), "step": torch.tensor(3)}},
    "DeepSpeed": {"module": RAW, "ema_module": AVERAGE, "param_shapes": [{"w": torch.Size([2])}]},
    "AveragedModel": {"n_averaged": torch.tensor(7), **under("module.", AVERAGE)},
    "AveragedModel within": {"model": RAW, "swa_model": {"n_averaged": torch.tensor(7), **under("module.", AVERAGE)}},
    "one file": {**RAW, **under("ema.", AVERAGE)},
    "latent diffusion": {
        "state_dict": {
            **under("model.diffusion_model.", RAW),
            **{f"model_ema.diffusion_model{name}": one for name, one in flat(AVERAGE).items()},
            "model_ema.decay": torch.tensor(0.99),
            "model_ema.num_updates": torch.tensor(5),
        }
    },
    "a list": {"model": RAW, "ema": {"decay": 0.99, "shadow_params": [*AVERAGE.values()]}},
    "a list in the optimizer": {"state_dict": RAW, "optimizer_states": [{"opt": MOMENTUM, "ema": [*AVERAGE.values()]}]},
    "EMA of a loss beside": {"model": RAW, "ema": AVERAGE, "loss_ema": {"a": torch.ones(2)}},
    "an object": {"model": Network(RAW), "ema": AveragedModel(Network(AVERAGE))},
}


@pytest.mark.parametrize("kind", AVERAGED)
def test_averaged_weights_are_taken_wherever_they_are(kind: str, tmp_path: Path) -> None:
    torch.save(AVERAGED[kind], tmp_path / "a.pt")
    value, note = taken(content_of_file(tmp_path / "a.pt"))
    assert value == 2.0
    assert note is not None
    assert "; averaged)" in note


@pytest.mark.parametrize("kind", [kind for kind in AVERAGED if kind != "AveragedModel"])
def test_raw_weights_are_taken_if_they_are_asked_for(kind: str, tmp_path: Path) -> None:
    torch.save(AVERAGED[kind], tmp_path / "a.pt")
    assert taken(content_of_file(tmp_path / "a.pt"), "raw")[0] == 1.0
    assert taken(content_of_file(tmp_path / "a.pt"), "ema")[0] == 2.0


@pytest.mark.parametrize(
    ("content", "note"),
    [
        (RAW, None),
        ({"model": RAW, "opt": MOMENTUM}, "weights of a.pt ('model'; not averaged)"),
        ({"state_dict": under("model.", RAW)}, "weights of a.pt ('state_dict.model'; not averaged)"),
        ({"model": RAW, "loss_ema": {"value": torch.ones(3)}}, "weights of a.pt ('model'; not averaged)"),
        ({"non_ema": RAW}, "weights of a.pt ('non_ema'; not averaged)"),
    ],
)
def test_a_single_set_of_raw_weights_is_taken(content: object, note: str | None) -> None:
    assert taken(content) == (1.0, note)


def test_a_set_is_chosen_by_its_name() -> None:
    several = {"model": RAW, "ema_0.999": AVERAGE, "ema_0.9999": weights(3.0)}
    assert taken(several, "ema_0.9999")[0] == 3.0
    assert taken({"state_dict": under("model.", RAW), "ema": AVERAGE}, "state_dict")[0] == 1.0
    with pytest.raises(
        ModelError, match=r"several sets of weights: 'model', 'ema_0.999', .*; choose one with --weights"
    ):
        taken(several)
    with pytest.raises(ModelError, match=r"contains no 'best'; it contains 'model', 'ema_0.999'"):
        taken(several, "best")
    with pytest.raises(ModelError, match="contains no averaged weights; it contains 'model'; leave --weights out"):
        taken({"model": RAW}, "ema")


def test_raw_weights_are_never_taken_in_silence_where_averages_are_unreadable() -> None:
    unreadable = {"model": RAW, "ema": {"flat_param": torch.ones(500)}}
    with pytest.raises(
        ModelError, match=r"keeps averaged weights at 'ema' in a form that cannot be read.*--weights raw"
    ):
        taken(unreadable)
    assert taken(unreadable, "raw")[0] == 1.0
    fewer = {"model": RAW, "ema": {"shadow_params": [*AVERAGE.values()][::-1]}}
    with pytest.raises(ModelError, match=r"at 'ema.shadow_params'"):
        taken(fewer)


def test_prefixes_in_a_safetensors_file_are_sets_too(tmp_path: Path) -> None:
    save_file({**under("model.", RAW), **under("model_ema.", AVERAGE)}, tmp_path / "a.safetensors")
    assert taken(content_of_file(tmp_path / "a.safetensors"))[0] == 2.0


@pytest.mark.parametrize(
    "name", ["ema", "EMA", "model_ema", "ema_model", "modelEMA", "g_ema", "net-ema", "avg_model", "swa"]
)
def test_names_of_averages(name: str) -> None:
    assert is_averaged(name)
    assert is_averaged(f"state.{name}.state_dict")


@pytest.mark.parametrize(
    "name", ["", "model", "non_ema", "ema.online_model", "exp_avg", "state_dict", "embedder", "no-ema"]
)
def test_names_of_raw_weights(name: str) -> None:
    assert not is_averaged(name)
