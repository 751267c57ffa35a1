import pytest
from torch import nn

from fora_trt.bundle import GraphRecord
from fora_trt.contract import Role, TensorSpec, in_window, out_of_window
from fora_trt.errors import ModelError
from fora_trt.models.custom import completed
from fora_trt.models.spec import ModelSpec


@pytest.mark.parametrize(
    ("name", "role"),
    [("latents", "latents"), ("timestep", "timestep"), ("noise_prediction", "prediction"), ("text", "conditioning")],
)
def test_names_that_all_models_have_say_the_role(name: str, role: Role) -> None:
    spec = TensorSpec(name, "float32", ("batch",))
    assert spec.role == role
    assert spec == TensorSpec(name, "float32", ("batch",), role)
    record = GraphRecord(file="full.onnx", inputs=(spec,), outputs=(TensorSpec("f", "float32", ("batch",), "feature"),))
    assert GraphRecord.model_validate_json(record.model_dump_json()) == record


def test_a_tensor_of_a_window_is_the_same_tensor_for_more_steps() -> None:
    gates = TensorSpec("conditioning.0", "float16", ("batch", 6, 8), "hoisted")
    ahead = TensorSpec("window.conditioning.0", "float16", ("window", "batch", 6, 8), "hoisted")
    assert in_window(gates) == ahead
    assert out_of_window(ahead) == gates
    assert (gates.is_of_window, ahead.is_of_window) == (False, True)
    assert ahead.sized(2, window=3) == (3, 2, 6, 8)
    assert ahead.in_onnx == ("window.conditioning.0", "float16", ("window", "batch", 6, 8))


def test_an_input_of_a_model_has_the_role_of_an_input() -> None:
    inputs = (
        TensorSpec("latents", "float32", ("batch", 4)),
        TensorSpec("timestep", "float32", ("batch",)),
        TensorSpec("extra", "float32", ("batch", 4), "feature"),
    )
    with pytest.raises(
        ModelError, match="the input 'extra' of 'mine' has the role 'feature'; give it one of the roles "
    ):
        completed(nn.Identity(), ModelSpec(inputs=inputs), "mine")
