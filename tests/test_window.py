"""Buffers and windows on engines that record what they are bound to."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from fora_trt.contract import FULL, REUSE, TensorSpec
from fora_trt.engines.base import Engine, Launch
from fora_trt.errors import InputError
from fora_trt.runtime.buffers import Buffers, Memory
from fora_trt.runtime.window import Window, folded_of

CPU = torch.device("cpu")

LATENTS = TensorSpec("latents", "float32", ("batch", 2, 3))
PREDICTION = TensorSpec("noise_prediction", "float32", ("batch", 2, 3))
FEATURE = TensorSpec("feature.block", "float16", ("batch", 5))
SUM = TensorSpec("folded.0", "float32", ("batch", 4))
SUMS = TensorSpec("window.folded.0", "float32", ("window", "batch", 4))


class Recorder(Engine):
    """Keeps the tensors of every binding; a launch notes which binding ran."""

    def __init__(self, inputs: list[TensorSpec], outputs: list[TensorSpec]) -> None:
        super().__init__(inputs, outputs, CPU)
        self.bound: list[dict[str, Tensor]] = []
        self.ran: list[int] = []
        self.scratch = 0

    def bind(self, tensors: Mapping[str, Tensor]) -> Launch:
        self.bound.append({name: tensors[name] for name in (*self.inputs, *self.outputs)})
        number = len(self.bound) - 1
        return lambda: self.ran.append(number)

    def scratch_address(self) -> int:
        return self.scratch


def engines_that_fold() -> dict[str, Recorder]:
    return {FULL: Recorder([LATENTS], [PREDICTION, SUMS]), REUSE: Recorder([LATENTS, SUM], [PREDICTION])}


@pytest.fixture
def folded() -> Window:
    return Window(engines_that_fold(), Memory(CPU), 3)


@pytest.fixture
def unfolded() -> Window:
    engines = {FULL: Recorder([LATENTS], [PREDICTION, FEATURE]), REUSE: Recorder([LATENTS, FEATURE], [PREDICTION])}
    return Window(engines, Memory(CPU), 0)


def full_of(window: Window) -> Recorder:
    assert isinstance(window.full, Recorder)
    return window.full


def reuse_of(window: Window) -> Recorder:
    assert isinstance(window.reuse, Recorder)
    return window.reuse


def test_buffers_keep_their_memory_for_smaller_batches() -> None:
    buffers = Buffers([LATENTS, SUMS], 3, Memory(CPU), lambda batch: 0)
    buffers.resize(4)
    large = buffers.tensors
    assert {name: tuple(one.shape) for name, one in large.items()} == {
        "latents": (4, 2, 3),
        "window.folded.0": (3, 4, 4),
    }
    assert buffers.have_room(2)
    buffers.resize(2)
    assert {name: one.data_ptr() for name, one in buffers.tensors.items()} == {
        name: one.data_ptr() for name, one in large.items()
    }
    assert not buffers.have_room(5)
    buffers.resize(5)
    assert buffers.tensors["latents"].shape == (5, 2, 3)


def test_a_batch_that_does_not_fit_is_refused_with_one_that_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fora_trt.engines.memory.free_bytes", lambda device: 3 * (24 + 100))
    buffers = Buffers([LATENTS], 0, Memory(CPU), lambda batch: 100 * batch)  # 24 bytes and 100 of scratch a sample
    buffers.resize(3)
    with pytest.raises(InputError, match=r"a batch of 4 .* a batch of 3 fits"):
        buffers.resize(4)


def test_windows_share_memory_that_grows_for_all() -> None:
    windows: list[Window] = []

    def free() -> None:
        for window in windows:
            window.free()

    memory = Memory(CPU, free)
    made = [Window(engines_that_fold(), memory, rows) for rows in (3, 1)]
    windows += made
    large, small = made
    small.prepare(2)
    first = small.generation
    large.prepare(2)
    assert small.tensors == {}, "its memory moved"
    assert small.generation != first, "so captured steps are invalid"
    small.prepare(2)
    settled = [one.generation for one in made]
    for name in ("latents", "window.folded.0"):
        assert small.tensors[name].data_ptr() == large.tensors[name].data_ptr()
    for one in (large, small, large):
        one.prepare(2)
        one.run(0)
        one.run(1)
    assert [one.generation for one in made] == settled, "nothing moves any more"
    small.prepare(9)
    large.prepare(2)
    small.prepare(9)
    assert small.tensors["latents"].data_ptr() == large.tensors["latents"].data_ptr(), "one needs rows, the other batch"


def test_every_offset_of_a_window_reads_its_own_sum(folded: Window) -> None:
    folded.prepare(2)
    for offset in (0, 1, 2, 3, 1):
        folded.run(offset)
    full, reuse = full_of(folded), reuse_of(folded)
    assert full.ran == [0]
    assert reuse.ran == [0, 1, 2, 0]
    sums = full.bound[0]["window.folded.0"]  # (3, 2, 4)
    for offset, bound in enumerate(reuse.bound, start=1):
        assert bound["folded.0"].data_ptr() == sums[offset - 1].data_ptr()
        assert bound["folded.0"].shape == (2, 4)
    assert reuse.bound[0]["latents"].data_ptr() == full.bound[0]["latents"].data_ptr()


def test_without_sums_all_reuse_steps_share_a_binding_and_read_the_features(unfolded: Window) -> None:
    unfolded.prepare(2)
    for offset in (0, 1, 2, 7):
        unfolded.run(offset)
    assert reuse_of(unfolded).ran == [0, 0, 0]
    assert reuse_of(unfolded).bound[0]["feature.block"] is full_of(unfolded).bound[0]["feature.block"]
    assert folded_of(unfolded.full, unfolded.reuse) == []


def test_the_generation_changes_where_captured_steps_are_invalid(folded: Window) -> None:
    folded.prepare(2)
    first = folded.generation
    folded.prepare(2)
    folded.run(0)
    folded.run(1)
    assert folded.generation == first, "nothing moved"
    folded.prepare(4)
    larger = folded.generation
    assert larger != first, "memory moved"
    folded.prepare(2)
    assert folded.generation not in (first, larger), "engines were bound anew"
    before = folded.generation
    full_of(folded).scratch = 4096
    folded.prepare(2)
    assert folded.generation != before, "the scratch memory of an engine moved"
    other = Window(folded.engines, Memory(CPU), 3)
    other.prepare(2)
    assert other.generation != folded.generation, "no two windows have the same"


def test_a_smaller_batch_within_a_window_reads_the_first_rows_of_its_sums(folded: Window) -> None:
    """Guidance that ends within a window: the full step had both halves, the reuse step has the conditional one."""
    folded.prepare(4)
    folded.run(0)
    sums = full_of(folded).bound[-1]["window.folded.0"]  # (3, 4, 4)
    folded.prepare(2)
    folded.run(1)
    read = reuse_of(folded).bound[-1]["folded.0"]
    assert read.shape == (2, 4)
    assert read.data_ptr() == sums[0].data_ptr()
    folded.run(2)
    assert reuse_of(folded).bound[-1]["folded.0"].data_ptr() == sums[1].data_ptr(), "rows of four samples apart"
    folded.run(0)  # a full step of the smaller batch writes sums of two samples
    folded.run(2)
    own = full_of(folded).bound[-1]["window.folded.0"]
    assert own.shape == (3, 2, 4)
    assert reuse_of(folded).bound[-1]["folded.0"].data_ptr() == own[1].data_ptr()


def test_a_window_that_is_freed_holds_no_memory_and_can_be_prepared_again(folded: Window) -> None:
    folded.prepare(2)
    folded.run(1)
    before = folded.generation
    folded.free()
    assert folded.buffers.tensors == {}
    assert folded.generation != before
    folded.prepare(2)
    folded.run(1)
    assert folded.buffers.tensors["latents"].shape == (2, 2, 3)


def test_a_batch_of_nothing_is_refused(folded: Window) -> None:
    with pytest.raises(InputError, match="the batch is 0; at least one latent is needed"):
        folded.prepare(0)


def test_steps_can_be_captured_once_they_are_bound(folded: Window, monkeypatch: pytest.MonkeyPatch) -> None:
    folded.prepare(2)
    folded.run(0)
    folded.run(1)
    assert not folded.can_capture([0, 1]), "these engines cannot"
    for engine in (folded.full, folded.reuse):
        monkeypatch.setattr(engine, "is_capturable", lambda: True)
    assert folded.can_capture([0, 1])
    assert not folded.can_capture([0, 1, 2]), "the step at offset 2 has not run"
    folded.run(2)
    assert folded.can_capture([0, 1, 2])
    assert not folded.can_capture([])
