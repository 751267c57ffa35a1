"""The conditioning path, computed before the loop."""

import pytest
import torch

from fora_trt.bundle import Bundle
from fora_trt.runtime import precomputed
from fora_trt.runtime.precomputed import ALONE, take
from tests.test_optimize import denoiser_of, latents, pipeline_of


def test_what_is_equal_is_computed_once_for_all_steps(
    optimized: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = pipeline_of(optimized["fold"], 20)
    computed = denoiser_of(pipeline).precomputed
    assert computed is not None and computed.full_engine is not None
    whole = latents(pipeline, "fora:4")
    assert computed._distinct == 3, "two classes and the null class, of six samples"
    assert [engine for engine, _ in computed.launches] == [computed.engine, computed.full_engine]
    rows = {name: len(one) for name, one in computed.rows.items()}
    assert {rows.pop(name) for name in computed.full_engine.outputs} == {6 * 3}
    assert set(rows.values()) == {20 * 3}

    monkeypatch.setattr(precomputed, "MOST_BYTES", 1)
    pipeline = pipeline_of(optimized["fold"], 20)
    assert torch.equal(latents(pipeline, "fora:4"), whole), "a window at a time"
    computed = denoiser_of(pipeline).precomputed
    assert computed is not None and computed.full_engine is not None
    assert len(computed.launches) == 2 * (20 // 4 + 1)
    computed.engine.most_rows = computed.full_engine.most_rows = 2
    assert torch.equal(latents(pipeline, "fora:4"), whole), "two rows at a time"


def test_launches_of_a_trajectory_can_be_run_again(
    optimized: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A benchmark times engines by running them again; a launch knows addresses, not tensors."""
    monkeypatch.setattr(precomputed, "MOST_BYTES", 1)
    pipeline = pipeline_of(optimized["fold"], 20)
    for schedule in ("fora:2", "fora:4"):  # the longer window needs more rows
        latents(pipeline, schedule)
    window, computed = denoiser_of(pipeline).window, denoiser_of(pipeline).precomputed
    assert window is not None and computed is not None
    wanted = {name: rows.clone() for name, rows in computed.rows.items()}
    shapes = {name: tensor.sized(12) for name, tensor in computed.engine.inputs.items()}
    reused = [torch.full(shape, 2**40) for shape in shapes.values() for _ in range(1000)]  # takes freed memory
    for rows in computed.rows.values():
        rows.zero_()
    for _, launch in computed.launches:
        launch()
    for launch in window.launches().values():
        launch()
    assert all(torch.equal(rows, wanted[name]) for name, rows in computed.rows.items())
    assert reused[0][0] == 2**40, "launches wrote to tensors of others"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_of_any_precision_are_taken(dtype: torch.dtype) -> None:
    rows = torch.randn(5, 3 * ALONE).to(dtype)
    target, index = torch.zeros(2, 3 * ALONE, dtype=dtype), torch.tensor([4, 1])
    take(rows, index, target)
    assert torch.equal(target, rows[index])
