"""The command `sample`: makes a large set of images for evaluation."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from fora_trt.cli.options import (
    AS_JSON,
    BUNDLE,
    CONDITIONING,
    NEGATIVE_PROMPT,
    PARALLEL,
    SEED,
    SamplingOptions,
    refuse_given,
    resumed,
    sampling_options,
    with_room,
    workers_of,
)
from fora_trt.cli.terminal import print_json, watched
from fora_trt.presets import doubt_of

if TYPE_CHECKING:
    from fora_trt.bundle import Manifest
    from fora_trt.pipeline import Pipeline


@click.command()
@BUNDLE
@click.option("--num-images", type=click.IntRange(min=1), default=50_000, help="Number of images.")
@click.option(
    "--labels",
    type=click.Choice(["balanced", "drawn"]),
    default="balanced",
    help="Class labels: cycle through all classes, or draw them at random.",
)
@click.option(
    "--prompts",
    "prompts_file",
    type=click.Path(path_type=Path),
    help="Text file with one prompt per line; the images cycle through them.",
)
@NEGATIVE_PROMPT
@CONDITIONING
@SEED
@sampling_options
@PARALLEL
@click.option(
    "--format",
    "layout",
    type=click.Choice(["npz", "png"]),
    default="npz",
    help="One .npz archive, or one .png file per image.",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the images.")
@click.option("--resume", is_flag=True, help="Continue an interrupted run.")
@AS_JSON
def sample(
    bundle: Path,
    num_images: int,
    labels: str,
    prompts_file: Path | None,
    negative_prompt: str,
    conditioning: Path | None,
    seed: int,
    sampling: SamplingOptions,
    parallel: dict[str, Any],
    layout: Literal["npz", "png"],
    out: Path,
    resume: bool,
    as_json: bool,
) -> None:
    """Make a large set of images for evaluation, in the layout of the ADM evaluator.

    Image k has the seed SEED + k. A run interrupted at any moment, even by kill -9, continues with --resume; the images
    are the same, bit for bit, as without the interruption, and with any --workers. `samples.npz` contains the images
    `arr_0` (N, H, W, 3) and, for a class-conditional model, the labels `arr_1`. A model without a VAE makes
    `latents.npz`, with the latents (N, C, H, W) as `arr_0`. The settings are in settings.json, and in the text of every
    PNG file.

    \b
    Examples:
      fora-trt sample export/digits --num-images 2000 --out samples/
      fora-trt sample export/dit-xl-2-256 --labels drawn --guidance-scale 1.5 --out samples/ --resume
    """
    pipeline = sampling.pipeline(bundle)
    from fora_trt.evaluate.sample_set import SampleSet
    from fora_trt.sampling.request import lines_of

    prompts = lines_of(prompts_file) if prompts_file else ()
    if prompts and conditioning is not None:
        raise click.UsageError("--prompts and --prompt-embeds exclude each other; give one of them")
    without_classes = prompts or conditioning is not None or pipeline.manifest.guidance is None
    if without_classes:
        refuse_given("these images have no class labels", "labels")
    if negative_prompt and not prompts:
        refuse_given("it needs --prompts; a file has the tensor negative_prompt_embeds", "negative_prompt")
    classes = None if without_classes else _classes(pipeline.manifest, labels, num_images, seed)
    given = pipeline.conditioning(classes, prompts, negative_prompt, conditioning)
    if not pipeline.can_decode:
        click.echo(f"{pipeline.manifest.name} has no VAE, so latents are written; --vae FOLDER decodes them", err=True)
    resumed(pipeline, out, resume)
    steps, workers = pipeline.sampling(), workers_of(pipeline, parallel)
    if doubt := doubt_of(steps.schedule, pipeline.guidance(given, steps).scale, steps.scheduler_step.adds_noise):
        click.echo(doubt, err=True)
    began = time.perf_counter()

    def make() -> tuple[SampleSet, Path]:
        images = SampleSet.of(out, pipeline, steps, given, num_images, seed, layout, prompts, workers)
        return images, images.make(resume, watched("sampling"), watched("denoising"))

    images, made = with_room(pipeline, make)
    seconds = time.perf_counter() - began
    if as_json:
        print_json({"output": made, "seconds": seconds, **images.settings.model_dump(mode="json")})
    else:
        click.echo(f"wrote {made}: {num_images} {_what(pipeline)} ({seconds:.1f} s in this call)")


def _classes(manifest: Manifest, labels: str, num_images: int, seed: int) -> list[int]:
    """One class label per image."""
    from fora_trt.sampling.conditioning import balanced_labels, drawn_labels

    return balanced_labels(manifest, num_images) if labels == "balanced" else drawn_labels(manifest, num_images, seed)


def _what(pipeline: Pipeline) -> str:
    """What the pipeline makes."""
    return "images" if pipeline.can_decode else "latents"
