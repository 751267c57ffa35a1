"""Runs diffusers' own tests of its pipelines twice: with the plain transformers, and with the drop-in in their place.

    python -m benchmarks.diffusers_tests cpu-2-cores CHECKOUT WORK

CHECKOUT is a folder with the `tests` of diffusers, best at the tag of the installed version; the packages
`parameterized` and `requests_mock` have to be installed. WORK keeps the exported bundles, the reports of pytest, and
random text encoders in place of those of the hub. A test is "not applicable" if it passes with the plain transformer
and the drop-in refuses it for one of `REFUSALS`, or it reads files of weights. The command writes
benchmarks/results/diffusers-tests_<hardware>_<date>.json and prints the table of docs/pipelines.md. Its exit status is
1 if a test fails in any other way.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import wraps
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import click

from benchmarks.readme_tables import write_content

BUNDLES = "FORA_TRT_BUNDLES_OF_TESTS"
"""Environment variable with the folder of bundles; the plugin does nothing without it."""

FILES = (
    "dit/test_dit.py",
    "pixart_alpha/test_pixart.py",
    "pixart_sigma/test_pixart.py",
    "stable_diffusion_3/test_pipeline_stable_diffusion_3.py",
    "flux/test_pipeline_flux.py",
    "ltx/test_ltx.py",
    "wan/test_wan.py",
    "wan/test_wan_22.py",
)

REFUSALS = re.compile(
    r'(failed on setup with ")?fora_trt\.errors\.'
    r".*(runs engines, which have no|call the pipeline as at the export)"
)
"""How pytest reports a refusal for a known reason: a change of layers, or another size; others are mistakes."""

OF_WEIGHTS = {
    "test_serialization_with_variants": "looks for the variant in the names of files of weights, which a bundle lacks"
}
"""Tests that read the files of weights, and why they are not applicable."""

KINDS = ("passed", "not applicable", "broken", "fails with both", "not run")

PER_CALL = ("generator", "num_inference_steps", "output_type")
"""Arguments of a test's call that no size of the graphs follows from."""


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Give all collected test classes the drop-in among their components."""
    if BUNDLES not in os.environ:
        return
    for kind in {item.cls for item in items if hasattr(item.cls, "get_dummy_components")}:
        if not hasattr(kind.get_dummy_components, "__wrapped__"):
            kind.get_dummy_components = with_drop_ins(kind.get_dummy_components, Path(os.environ[BUNDLES]))


def with_drop_ins(make: Callable[..., dict[str, Any]], folder: Path) -> Callable[..., dict[str, Any]]:
    """`get_dummy_components` with each transformer replaced by our drop-in, at the size of `get_dummy_inputs`."""
    import torch

    import fora_trt
    from fora_trt.bundle import Bundle
    from fora_trt.diffusers_pipeline import attach

    @wraps(make)
    def get_dummy_components(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        components = make(self, *args, **kwargs)
        with torch.random.fork_rng():
            pipe = self.pipeline_class(**components)
            inputs = _inputs_of(self)
            bundle = folder / _digest(pipe, inputs) / "tested"
            if not bundle.is_dir():
                training = {one: part.training for one, part in components.items() if isinstance(part, torch.nn.Module)}
                for one in training:
                    components[one].eval()
                given = {one: value for one, value in inputs.items() if one not in PER_CALL}
                fora_trt.export(pipe, bundle, **given)
                for one, before in training.items():
                    components[one].train(before)
            ours = attach(pipe, Bundle.open(bundle), schedule="none", device="cpu")
        for drop_in in ours.values():
            drop_in.follow(components["scheduler"])
        return {**components, **ours}

    return get_dummy_components


def _inputs_of(test: Any) -> dict[str, Any]:
    """The arguments of the test's call; older test classes want a device."""
    try:
        return dict(test.get_dummy_inputs())
    except TypeError:
        return dict(test.get_dummy_inputs("cpu"))


def _digest(pipe: Any, inputs: dict[str, Any]) -> str:
    """Tells pipelines apart whose bundles differ: by class, call, configuration and weights of the transformers."""
    from fora_trt.models.watch import transformers_of

    found = hashlib.sha256(f"{type(pipe).__name__} { ({**inputs, 'generator': None}) }".encode())
    for name, module in transformers_of(pipe).items():
        found.update(f"{name} {module.config}".encode())
        for one in module.state_dict().values():
            found.update(one.float().numpy().tobytes())
    return found.hexdigest()[:16]


def make_text_models(folder: Path) -> None:
    """Write random text encoders and tokenizers of single characters under the names that the tests load."""
    import torch
    from transformers import CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

    torch.manual_seed(0)
    characters = [chr(code) for code in range(33, 127)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *((one, -3.0) for one in characters)]
    t5 = folder / "hf-internal-testing" / "tiny-random-t5"
    T5Tokenizer(vocab=pieces, extra_ids=0).save_pretrained(t5)
    config = T5Config(vocab_size=1103, d_model=32, d_kv=8, d_ff=37, num_layers=5, num_heads=4)
    T5EncoderModel(config).save_pretrained(t5)
    names = ["<|startoftext|>", "!", "<|endoftext|>", *characters[1:], *(f"{one}</w>" for one in characters)]
    clip = CLIPTokenizer(vocab={one: k for k, one in enumerate(names)}, merges=[], model_max_length=77)
    clip.save_pretrained(folder / "hf-internal-testing" / "tiny-random-clip")


def outcomes(checkout: Path, work: Path, bundles: Path | None) -> dict[tuple[str, str], str]:
    """The outcome of each test by its file and name: "passed", "skipped", or the message of its failure."""
    report = work / ("drop-in.xml" if bundles else "plain.xml")
    ours = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join([ours, *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    if bundles:
        variables[BUNDLES] = str(bundles)
    tests = [str(checkout / "tests" / "pipelines" / one) for one in FILES]
    options = [
        "-q",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        "-p",
        "benchmarks.diffusers_tests",
        "-o",
        "junit_logging=no",
    ]
    command = [sys.executable, "-m", "pytest", *options, f"--rootdir={checkout}", f"--junitxml={report}", *tests]
    with (report.with_suffix(".log")).open("w") as log:  # from_pretrained finds the text models in the current folder
        subprocess.run(command, cwd=work / "text", env=variables, stdout=log, stderr=log, check=False)
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):  # noqa: S314 - pytest has just written it
        problem = next((one for one in case if one.tag in ("failure", "error", "skipped")), None)
        said = "passed" if problem is None else problem.get("message", "")
        said = "skipped" if problem is not None and problem.tag == "skipped" else said
        names = case.get("classname", "").split(".")
        found[".".join(names[2:-1]), f"{names[-1]}::{case.get('name')}"] = said
    return found


@dataclass(frozen=True)
class Group:
    """Tests of one file with the same outcome, and for those that do not pass with the drop-in the message."""

    file: str
    kind: str
    reason: str
    tests: list[str]


def groups_of(plain: Mapping[tuple[str, str], str], drop_in: Mapping[tuple[str, str], str]) -> list[Group]:
    """Compare the outcomes of both variants."""
    found: defaultdict[tuple[str, str, str], list[str]] = defaultdict(list)
    for (file, name), before in plain.items():
        after, reason = drop_in.get((file, name), "was not run"), ""
        kind = "not run" if before == "skipped" else "fails with both" if before != "passed" else after
        if kind not in KINDS:
            reason = OF_WEIGHTS.get(name.rpartition("::")[2], after.partition("\n")[0])
            kind = "not applicable" if REFUSALS.match(reason) or reason in OF_WEIGHTS.values() else "broken"
        found[file, kind, reason].append(name)
    return [Group(*key, tests) for key, tests in found.items()]


def table_of(groups: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The table of docs/pipelines.md, line by line."""
    yield "| tests of diffusers | " + " | ".join(KINDS) + " |"
    yield "| --- |" + " ---: |" * len(KINDS)
    for file in dict.fromkeys(one["file"] for one in groups):
        counts = Counter(dict.fromkeys(KINDS, 0))
        for one in groups:
            counts[one["kind"]] += len(one["tests"]) if one["file"] == file else 0
        yield f"| `{file}` | " + " | ".join(str(counts[one]) for one in KINDS) + " |"


@click.command()
@click.argument("hardware")
@click.argument("checkout", type=click.Path(path_type=Path, exists=True, resolve_path=True))
@click.argument("work", type=click.Path(path_type=Path, resolve_path=True))
def main(hardware: str, checkout: Path, work: Path) -> None:
    """Run both variants of the tests in CHECKOUT; HARDWARE names the machine in the file name of the result."""
    (work / "bundles").mkdir(parents=True, exist_ok=True)
    if not (work / "text").is_dir():
        make_text_models(work / "text")
    plain = outcomes(checkout, work, None)
    groups = [asdict(one) for one in groups_of(plain, outcomes(checkout, work, work / "bundles"))]
    write_content(f"diffusers-tests_{hardware}", {"groups": groups})
    click.echo("\n".join(table_of(groups)))
    for one in groups:
        if one["kind"] == "broken":
            click.echo(f"{one['file']}: {one['reason']}: {', '.join(one['tests'])}", err=True)
    sys.exit(int(any(one["kind"] == "broken" for one in groups)))


if __name__ == "__main__":
    main()
