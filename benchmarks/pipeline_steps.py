"""The time of a reuse step as a share of a full one, for pipelines with transformers of 12 blocks.

    python -m benchmarks.pipeline_steps cpu-2-cores

The transformers have a depth of 12 blocks, a width of 256, 256 tokens of an image or a video, and random weights;
everything else is as in `tests/tiny_pipelines.py`. A full step takes at least 100 ms of one core, so that the overhead
of a call does not decide. The command writes benchmarks/results/pipeline-steps_<hardware>_<date>.json and prints the
table of docs/pipelines.md.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

import fora_trt
from benchmarks.readme_tables import write_content
from fora_trt.bundle import Bundle
from fora_trt.pipeline import Pipeline
from fora_trt.sampling.conditioning import example_conditioning
from fora_trt.sampling.loop import Trajectory
from tests.tiny_pipelines import PIPELINES, TinyPipeline, prompts
from tests.tiny_transformers import alive

STEPS, SCHEDULE, REPEATS = 12, "fora:3", 5
HEADS, HEAD_WIDTH, TEXT_LENGTH = 4, 64, 64
WIDTH = HEADS * HEAD_WIDTH
HEADED = {"num_attention_heads": HEADS, "attention_head_dim": HEAD_WIDTH}


@dataclass(frozen=True)
class Wide:
    """How a tiny pipeline grows: its blocks in words, its transformer's configuration, arguments of its call.

    `text` is the width of its prompt embeddings.
    """

    blocks: str
    config: Mapping[str, Any]
    text: int
    arguments: Mapping[str, Any]


SQUARE = {"height": 256, "width": 256}
DOUBLE_AND_SINGLE = {**HEADED, "num_layers": 6, "num_single_layers": 6}
WIDER = {
    "sd3": Wide(
        "12 joint", {**HEADED, "num_layers": 12, "caption_projection_dim": WIDTH, "pos_embed_max_size": 16}, 32, SQUARE
    ),
    "flux": Wide("6 double, 6 single", {**DOUBLE_AND_SINGLE, "axes_dims_rope": (16, 24, 24)}, 32, SQUARE),
    "flux2": Wide("6 double, 6 single", {**DOUBLE_AND_SINGLE, "axes_dims_rope": (16, 16, 16, 16)}, 32, SQUARE),
    "wan": Wide("12", {**HEADED, "num_layers": 12, "ffn_dim": 4 * WIDTH}, 16, {"height": 256, "width": 128}),
    "ltx": Wide("12", {**HEADED, "num_layers": 12, "cross_attention_dim": WIDTH}, 16, {"height": 256, "width": 512}),
}
"""The pipelines by their name in `tests/tiny_pipelines.py`."""


@dataclass(frozen=True)
class StepTimes:
    """The median time of a step in seconds, and the times of the fastest and the slowest of `count` steps."""

    median: float
    fastest: float
    slowest: float
    count: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> StepTimes:
        """Those of steps that were timed."""
        return cls(statistics.median(seconds), min(seconds), max(seconds), len(seconds))


@dataclass(frozen=True)
class Timed:
    """A pipeline, the level of its graphs, and the times of its steps."""

    name: str
    pipeline: str
    blocks: str
    parameters: int
    level: str
    full: StepTimes
    reuse: StepTimes


def widened(name: str) -> TinyPipeline:
    """The pipeline and the arguments of its call with one prompt."""
    wide = WIDER[name]
    pipe, given = PIPELINES[name]()
    tiny = pipe.transformer
    transformer = alive(type(tiny).from_config({**tiny.config, **wide.config}))
    pipe.register_modules(transformer=transformer)
    mask, negative = "prompt_attention_mask" in given, "negative_prompt_embeds" in given
    return pipe, {**given, **prompts(TEXT_LENGTH, wide.text, mask, negative), **wide.arguments}


def timed(name: str, folder: Path) -> Timed:
    """Export a pipeline and time its steps. Raises `click.ClickException` for a level other than `fold`."""
    pipe, given = widened(name)
    parameters = sum(one.numel() for one in pipe.transformer.parameters())
    bundle = fora_trt.export(pipe, folder / name, **given)
    level = bundle.manifest.optimization
    if level != "fold":
        raise click.ClickException(f"{name} is exported at level {level}; the steps of level fold are timed")
    times = times_of(bundle)
    return Timed(
        name=name,
        pipeline=type(pipe).__name__,
        blocks=WIDER[name].blocks,
        parameters=parameters,
        level=level,
        full=StepTimes.of(times.full_seconds),
        reuse=StepTimes.of(times.reuse_seconds),
    )


def times_of(bundle: Bundle) -> Trajectory:
    """The steps of `REPEATS` trajectories after a warm-up; full and reuse steps alternate within each."""
    pipeline = Pipeline(bundle.folder, steps=STEPS, schedule=SCHEDULE, backend="onnxruntime", device="cpu")
    sampler, given = pipeline.sampler(pipeline.sampling()), example_conditioning(bundle.manifest, 1)
    sampler(given, range(1))
    return Trajectory.joined([sampler(given, range(1)) for _ in range(REPEATS)])


def table_of(outcomes: list[dict[str, Any]]) -> Iterator[str]:
    """The lines of the table."""
    yield "| pipeline | blocks | parameters | level | full step | reuse step | share |"
    yield "| --- | --- | --: | --- | --: | --: | --: |"
    for one in outcomes:
        full, reuse = one["full"]["median"], one["reuse"]["median"]
        yield (
            f"| {one['name']}: `{one['pipeline']}` | {one['blocks']} | {one['parameters'] / 1e6:.0f} million | "
            f"`{one['level']}` | {full * 1e3:.0f} ms | {reuse * 1e3:.2f} ms | {reuse / full:.2%} |"
        )


@click.command()
@click.argument("hardware")
def main(hardware: str) -> None:
    """Time the steps of all pipelines; HARDWARE names the machine in the file name."""
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        for name in WIDER:
            click.echo(f"{name}: exporting and timing", err=True)
            outcomes.append(asdict(timed(name, Path(folder))))
    result = {"width": WIDTH, "steps": STEPS, "schedule": SCHEDULE, "outcomes": outcomes}
    write_content(f"pipeline-steps_{hardware}", result)
    click.echo("\n".join(table_of(outcomes)))


if __name__ == "__main__":
    main()
