"""Every pipeline of `tests/tiny_pipelines.py`: what its export reaches, and how exact the drop-in is in the pipeline.

    python -m benchmarks.pipelines cpu-2-cores

The pipelines are tiny, with random weights and without text encoders. The reference is the same pipeline with hooks on
its transformers. The command writes benchmarks/results/pipelines_<hardware>_<date>.json and prints the table of
docs/pipelines.md.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
from torch import Tensor

import fora_trt
from benchmarks.readme_tables import write_content
from fora_trt.bundle import Bundle
from fora_trt.contract import FULL, REUSE
from fora_trt.diffusers_pipeline import attach
from fora_trt.errors import ForaError
from fora_trt.evaluate.verify import compare_with_pytorch
from fora_trt.export.statistics import graph_statistics
from fora_trt.models.watch import transformers_of
from fora_trt.pipeline import Pipeline
from tests.hooked_pipelines import hooked, latents_of
from tests.tiny_pipelines import PIPELINES

STEPS = 8
SCHEDULES = ("none", "fora:3", "fora:1,forecast=2", "fora:3,forecast=2")
SIZES = ("height", "width", "num_frames", "video_length", "max_sequence_length", "audio_end_in_s", "true_cfg_scale")
"""Arguments that a person chooses at the export; prompts and masks stand in for text encoders here."""


@dataclass(frozen=True)
class Outcome:
    """What the export of a pipeline reached; `refused` is the sentence for one that does not go through.

    `reuse_share` is the share of the FLOPs of a full step in a reuse step, `errors` the largest difference of the final
    latents for each schedule, relative to their largest value, and `verified` the largest error that `verify` finds.
    """

    name: str
    pipeline: str
    transformers: tuple[str, ...]
    arguments: tuple[str, ...]
    seconds: float
    refused: str | None = None
    level: str | None = None
    slots: tuple[str, ...] = ()
    sites: int = 0
    reuse_share: float | None = None
    errors: Mapping[str, float] | None = None
    verified: float | None = None


def outcome_of(name: str, folder: Path) -> Outcome:
    """Export a pipeline and compare."""
    pipe, given = PIPELINES[name]()
    modules = transformers_of(pipe)
    kinds = tuple(type(one).__name__ for one in modules.values())
    outcome = Outcome(name, type(pipe).__name__, kinds, tuple(one for one in SIZES if one in given), 0.0)
    began = time.perf_counter()
    try:
        first = fora_trt.export(pipe, folder / name, **given)
    except ForaError as error:
        return replace(outcome, seconds=time.perf_counter() - began, refused=str(error))
    seconds = time.perf_counter() - began
    spec: Any = first.manifest.pipeline
    bundles = {one: Bundle.open(folder / other) for one, other in spec.siblings(name).items()}
    errors = {}
    for schedule in SCHEDULES:
        want = hooked(pipe, given, bundles, schedule, STEPS)
        attach(pipe, first, schedule=schedule, device="cpu")
        errors[schedule] = _relative(latents_of(pipe, given, STEPS), want)
        for component, module in modules.items():
            setattr(pipe, component, module)
    full, reuse = (graph_statistics(first.graph_path(graph)).flops for graph in (FULL, REUSE))
    return replace(
        outcome,
        seconds=seconds,
        level=first.manifest.optimization,
        slots=spec.call.slots,
        sites=len(first.manifest.cache_sites),
        reuse_share=reuse / full,
        errors=errors,
        verified=max(map(_verified, bundles.values())),
    )


def _verified(bundle: Bundle) -> float:
    """The largest relative error that `verify` finds, of graphs and of trajectories."""
    pipeline = Pipeline(bundle, steps=STEPS, backend="onnxruntime", device="cpu")
    return max(one.error.relative for one in compare_with_pytorch(pipeline, SCHEDULES))


def _relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


def table_of(outcomes: list[dict[str, Any]]) -> Iterator[str]:
    """The lines of the table."""
    told = (
        "calls a step",
        "what the export must be told",
        "level",
        "FLOPs of a reuse step",
        "largest error",
        "`verify`",
    )
    yield f"| pipeline | {' | '.join(told)} |"
    yield "| --- | --- | --- | --- | --: | --: | --: |"
    for one in outcomes:
        said = ", ".join(f"`{name}`" for name in one["arguments"]) or "nothing"
        what = f"| {one['name']}: `{one['pipeline']}`"
        if one["refused"]:
            yield f"{what} | | | refused after {one['seconds']:.0f} s | | | |"
            continue
        slots, errors = ", ".join(one["slots"]), (max(one["errors"].values()), one["verified"])
        shown = " | ".join(f"{error:.1e}" for error in errors)
        yield f"{what} | {slots} | {said} | `{one['level']}` | {one['reuse_share']:.1%} | {shown} |"


@click.command()
@click.argument("hardware")
def main(hardware: str) -> None:
    """Compare all pipelines; HARDWARE names the machine in the file name."""
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        for name in PIPELINES:
            outcomes.append(asdict(outcome_of(name, Path(folder))))
            click.echo(f"{name}: {outcomes[-1]['refused'] or outcomes[-1]['errors']}", err=True)
    write_content(f"pipelines_{hardware}", {"steps": STEPS, "outcomes": outcomes})
    click.echo("\n".join(table_of(json.loads(json.dumps(outcomes)))))


if __name__ == "__main__":
    main()
