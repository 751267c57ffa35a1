"""The README says what the committed results say, and names only commands that there are."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.readme_tables import OF_THE_CPU, readme_lines
from fora_trt.cli import main
from fora_trt.evaluate.results import EAGER, NO_CACHE, BenchRow, Report

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def newest(model: str) -> tuple[Report, dict[str, Any]]:
    """The last result of a model on this kind of machine, and what else its file holds."""
    path = max((ROOT / "benchmarks/results").glob(f"{model}_cpu-2-cores_*.json"))
    content = json.loads(path.read_text())
    own = {name: content.pop(name) for name in content.keys() - Report.model_fields.keys()}
    return Report.model_validate(content), own


def row_of(report: Report, backend: str, label: str) -> BenchRow:
    assert report.bench is not None
    return next(row for row in report.bench.rows if (row.backend, row.setting.label) == (backend, label))


@pytest.mark.parametrize("model", OF_THE_CPU)
def test_every_row_of_a_result_stands_in_the_readme(model: str) -> None:
    report, _ = newest(model)
    for measured in report.measured_on.values():
        assert re.fullmatch(r"[0-9a-f]{40}", measured["commit"]), "measured on changes that no commit holds"
    lines = readme_lines(report)
    assert len(lines) > 12
    for line in lines:
        assert line in README, line


def test_figures_in_the_text_are_measured_ones() -> None:
    (digits, own), (small, _), (base, _) = (newest(model) for model in OF_THE_CPU)
    words = " ".join(README.split())
    for report in (digits, small, base):
        row = row_of(report, "onnxruntime", "interval 3")
        assert row.reuse_step_seconds is not None
        assert f"{row.reuse_step_seconds / row.full_step_seconds:.1%}" in words
    for name in ("real", "interval 1", "interval 3", "interval 5"):
        assert f"{own['accuracy'][name]:.1%}" in words
    plain, cached = row_of(small, EAGER, NO_CACHE), row_of(small, "onnxruntime", "interval 3")
    assert f"{plain.seconds / cached.seconds:.1f} times" in words


def test_every_command_and_option_of_the_readme_exists() -> None:
    blocks = "\n".join(re.findall(r"^```$(.*?)^```$", README, re.MULTILINE | re.DOTALL))
    lines = re.findall(r"^fora-trt (\S+)(.*)$", blocks, re.MULTILINE)
    assert len(lines) >= 5
    for name, rest in lines:
        options = {option for parameter in main.commands[name].params for option in parameter.opts}
        assert set(re.findall(r" (--?[a-z][a-z-]*)", rest)) <= options, name
    assert {f"fora-trt {name}" for name in main.commands} <= set(re.findall(r"fora-trt [a-z]+", README))
