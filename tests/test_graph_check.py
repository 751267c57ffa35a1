"""The list of operators: all that an export can write, and a bundle that has others is not written."""

from __future__ import annotations

import re
from pathlib import Path

import onnx
import onnxscript
import pytest

from fora_trt import graph_check
from fora_trt.bundle import Bundle
from fora_trt.engines.torch.operators import OPERATORS as IN_TORCH
from fora_trt.errors import ExportError
from fora_trt.export import write
from fora_trt.graph_check import OPERATORS

LEFT_OUT = {
    "sequences": "ConcatFromSequence SequenceAt SequenceConstruct SequenceEmpty SequenceInsert SequenceMap "
    "SplitToSequence",
    "control flow": "If Loop Scan",
    "random numbers": "Bernoulli Multinomial RandomNormal RandomNormalLike RandomUniform RandomUniformLike",
    "detection": "MaxRoiPool NonMaxSuppression RoiAlign",
    "losses": "NegativeLogLikelihoodLoss SoftmaxCrossEntropyLoss",
    "text": "RegexFullMatch StringConcat StringNormalizer StringSplit TfIdfVectorizer",
}


def test_the_list_has_what_the_exporter_of_pytorch_writes() -> None:
    """Read off the source of its translations of functions."""
    sources = (Path(onnxscript.__file__).parent / "function_libs" / "torch_lib" / "ops").glob("*.py")
    named = {name for source in sources for name in re.findall(r"\bop\.([A-Z]\w+)\(", source.read_text())}
    standard = {schema.name for schema in onnx.defs.get_all_schemas() if not schema.domain}
    left_out = {name for names in LEFT_OUT.values() for name in names.split()}
    assert len(named & OPERATORS) > 100
    assert (named & standard) - OPERATORS <= left_out
    assert not OPERATORS & left_out
    assert not OPERATORS - standard


def test_the_list_has_what_the_torch_backends_run() -> None:
    assert IN_TORCH.keys() - OPERATORS == {"WeightedSum"}  # no file has it; engines fuse it


def test_a_bundle_that_could_not_be_opened_again_is_not_written(
    exported: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An export checks the folder in this way before it is renamed; a failure removes it."""
    monkeypatch.setattr(graph_check, "OPERATORS", OPERATORS - {"Attention", "Gelu"})
    said = r"could not be opened again, so it was not written: named/full\.onnx contains the operator (Attention|Gelu)"
    with pytest.raises(ExportError, match=said):
        write._check_that_it_opens(exported.folder, Path("named"))
