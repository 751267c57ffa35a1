"""The README says what the committed results say, and names only commands that there are."""

import json
import re
from pathlib import Path

import pytest

from fora_trt.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def newest(model: str) -> dict:  # type: ignore[type-arg]
    result: dict = json.loads(max((ROOT / "benchmarks/results").glob(f"{model}_cpu-2-cores_*.json")).read_text())  # type: ignore[type-arg]
    return result


@pytest.mark.parametrize("model", ["digits", "dit-s-2"])
def test_every_row_of_a_result_stands_in_the_readme(model: str) -> None:
    result = newest(model)
    assert re.fullmatch(r"[0-9a-f]{40}", result["measured_on"]["commit"]), "measured on changes that no commit holds"
    for row in result["rows"]:
        shown = (
            f"| {row['setting']} | {row['full_steps']} of {row['steps']} | {row['seconds']:.2f} s "
            f"| {row['speedup']:.2f}x | {row['ideal']:.2f}x |"
        )
        assert shown in README, shown


def test_shares_and_accuracies_in_the_text_are_measured_ones() -> None:
    small, digits = newest("dit-s-2"), newest("digits")
    share = {
        result["model"]: row["reuse_step_ms"] / row["full_step_ms"]
        for result in (small, digits)
        for row in result["rows"]
        if row["setting"] == "interval 3"
    }
    words = " ".join(README.split())
    assert f"{share['dit-s-2']:.1%} (digits: {share['digits']:.0%}, whose layers are small)" in words
    for name in ("interval 1", "interval 3", "interval 5"):
        assert f"{digits['accuracy'][name]:.1%}" in words


def test_every_command_and_option_of_the_readme_exists() -> None:
    blocks = "\n".join(re.findall(r"^```$(.*?)^```$", README, re.MULTILINE | re.DOTALL))
    lines = re.findall(r"^fora-trt (\S+)(.*)$", blocks, re.MULTILINE)
    assert len(lines) >= 5
    for name, rest in lines:
        options = {option for parameter in main.commands[name].params for option in parameter.opts}
        assert set(re.findall(r" (--?[a-z][a-z-]*)", rest)) <= options, name
    assert {f"fora-trt {name}" for name in main.commands} <= set(re.findall(r"fora-trt [a-z]+", README))
