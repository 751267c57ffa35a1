"""The command `run`: makes a few images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fora_trt.cli.options import (
    AS_JSON,
    BUNDLE,
    CALL,
    CONDITIONING,
    NEGATIVE_PROMPT,
    SEED,
    Numbers,
    SamplingOptions,
    refuse_given,
    sampling_options,
    with_room,
)
from fora_trt.cli.run_pipeline import is_of_pipeline, run_pipeline, without_pipeline
from fora_trt.cli.terminal import print_json, watched
from fora_trt.errors import InputError
from fora_trt.presets import doubt_of

if TYPE_CHECKING:
    from PIL.Image import Image

    from fora_trt.pipeline import Pipeline, PipelineOutput


@click.command()
@BUNDLE
@click.option("--class-labels", type=Numbers(), help="Class labels, one per image.")
@click.option("--prompt", multiple=True, help="Prompt; repeatable for more images.")
@NEGATIVE_PROMPT
@CONDITIONING
@click.option("--num-images", type=click.IntRange(min=1), help="Images per prompt, or of an unconditional model.")
@click.option("--height", type=click.IntRange(min=1), help="Image height; must be the exported one.")
@click.option("--width", type=click.IntRange(min=1), help="Image width; must be the exported one.")
@SEED
@sampling_options
@CALL
@click.option(
    "--pipeline",
    "pipeline_folder",
    help="Folder of the diffusers pipeline, for a bundle that was exported from a pipeline in memory.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="A .png file for a grid, or a folder for single images; .webp or .gif for a video.",
)
@click.option("--latents-out", type=click.Path(path_type=Path), help="Write the latents to this .npy file.")
@click.option("--force", is_flag=True, help="Write over existing files, and over the images in a folder.")
@AS_JSON
def run(
    bundle: Path,
    height: int | None,
    width: int | None,
    sampling: SamplingOptions,
    output: Path | None,
    latents_out: Path | None,
    force: bool,
    as_json: bool,
    **wanted: Any,
) -> None:
    """Make images with the two engines of a bundle.

    Without -o and --latents-out, a grid is written to NAME.png in the current folder, or the latents to NAME.npy if
    the model has no VAE; if it exists, to NAME-2.png and so on. A PNG carries the settings as text.

    \b
    Examples:
      fora-trt run export/digits --class-labels 3,7,7 -o digits.png
      fora-trt run export/digits --class-labels 0,1,2 --scheduler dpm-solver++ --steps 20 -o folder/
      fora-trt run export/stable-diffusion-3-medium-diffusers --prompt "a lighthouse" --steps 28
      fora-trt run export/dit-xl-2-256 --class-labels 207 --schedule fora:5 --json
    """
    if is_of_pipeline(bundle):
        run_pipeline(bundle, sampling, wanted, output, latents_out, force, as_json)
        return
    without_pipeline(wanted)
    pipeline = sampling.pipeline(bundle)
    from fora_trt.images.decode import check_image_size
    from fora_trt.images.save import check_new, save_images, save_latents, writable_file, writable_images
    from fora_trt.report.environment import versions

    check_image_size(pipeline.manifest, height, width)
    if output is None and latents_out is None:
        refuse_given("without -o and --latents-out, a new file is written", "force")
        output, latents_out = _new_file(pipeline)
    if output is None:
        refuse_given("only latents are written; give -o for images", "vae")
    for path in filter(None, (output, latents_out)):
        check_new(path, force)
    if output is not None:
        with _or_latents(pipeline):
            pipeline.decoder  # noqa: B018 # raises for a missing VAE before anything is computed
        writable_images(output)
    if latents_out is not None:
        writable_file(latents_out)
    made = with_room(pipeline, lambda: pipeline(**wanted, watch=watched("denoising")))
    figures = {**_figures(bundle, pipeline, made), **_inputs(wanted), "versions": versions()}
    if latents_out is not None:
        save_latents(made.latents, latents_out)
    if output is not None:
        save_images(_images_of(made, output, latents_out), output, figures, _each(made, wanted))
    if doubt := doubt_of(made.sampling.schedule, made.guidance.scale, made.sampling.scheduler_step.adds_noise):
        click.echo(doubt, err=True)
    _tell(figures, {"output": output, "latents_out": latents_out}, pipeline.backend.compiles, as_json)


def _tell(figures: dict[str, Any], written: dict[str, Path | None], compiles: bool, as_json: bool) -> None:
    """Print what was made and where it was written."""
    if as_json:
        print_json({**figures, **written})
        return
    click.echo(_sentence(figures, compiles))
    for path in filter(None, written.values()):
        click.echo(f"wrote {path}")


def _new_file(pipeline: Pipeline) -> tuple[Path | None, Path | None]:
    """Where images go if no file is named, or the latents of a model without a VAE."""
    from fora_trt.images.save import free_name

    manifest = pipeline.manifest
    if pipeline.can_decode:
        return free_name(Path(f"{manifest.name}.png")), None
    click.echo(f"{manifest.name} has no VAE, so its latents are written; --vae FOLDER decodes them", err=True)
    return None, free_name(Path(f"{manifest.name}.npy"))


def _images_of(made: PipelineOutput, output: Path, latents_out: Path | None) -> list[Image]:
    """The decoded images; if that fails, the latents are written before the error is raised."""
    from fora_trt.images.save import free_name, save_latents

    try:
        return made.images
    except Exception as error:
        kept = latents_out or free_name(output.with_suffix(".npy"))
        if latents_out is None:
            save_latents(made.latents, kept)
        if isinstance(error, InputError | RuntimeError):  # such as a VAE that does not fit the memory
            raise InputError(f"{error}; the latents are in {kept}") from error
        click.echo(f"the latents are in {kept}", err=True)
        raise


def _inputs(wanted: dict[str, Any]) -> dict[str, Any]:
    """Seed and inputs that were given, as values for JSON."""
    given = {name: value for name, value in wanted.items() if value not in (None, "", ())}
    return {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}


def _each(made: PipelineOutput, wanted: dict[str, Any]) -> list[dict[str, Any]]:
    """What differs from image to image: its number, seed, and label or prompt."""
    from fora_trt.images.save import about_image

    images, seed = len(made.latents), wanted["seed"]
    labels = wanted["class_labels"] or [None] * images
    prompts = [one for one in wanted["prompt"] or [None] for _ in range(images // max(1, len(wanted["prompt"])))]
    return [about_image(k, seed, *inputs) for k, inputs in enumerate(zip(labels, prompts, strict=True))]


@contextmanager
def _or_latents(pipeline: Pipeline) -> Iterator[None]:
    """Add to a decoding error that latents can be written instead of images."""
    try:
        yield
    except InputError as error:
        if pipeline.manifest.latents.pixels:
            raise
        raise InputError(f"{error}; or write the latents with --latents-out FILE.npy") from error


def _figures(bundle: Path, pipeline: Pipeline, made: PipelineOutput) -> dict[str, Any]:
    """Settings and times, as values for JSON."""
    from fora_trt.export.statistics import arithmetic_shares

    schedule, trajectory, images = made.sampling.schedule, made.trajectory, len(made.latents)
    shares = arithmetic_shares(pipeline.bundle) if schedule.masks else {}
    return {
        "bundle": str(bundle),
        "weights_sha256": pipeline.manifest.model.weights_sha256,
        "vae": pipeline.config.vae,
        "backend": pipeline.backend.name,
        "device": str(pipeline.device),
        "scheduler": made.sampling.name,
        "images": images,
        "batch_size": made.batch_size,
        "guidance_scale": made.guidance.scale,
        "guidance_interval": pipeline.config.guidance_interval,
        "steps": schedule.steps,
        "full_steps": made.full_steps,
        "schedule": schedule.text,
        "partial_steps": schedule.partial_steps,
        "ideal_speedup": schedule.ideal_speedup(shares),
        "seconds": trajectory.seconds,
        "seconds_per_image": trajectory.seconds / images,
        **trajectory.median_milliseconds(),
    }


def _sentence(figures: dict[str, Any], compiles: bool) -> str:
    where = f"{figures['backend']} ({figures['device']}){', compilation included' if compiles else ''}"
    partial = f" and {figures['partial_steps']} partial" if figures["partial_steps"] else ""
    steps = f"{figures['steps']} steps, {figures['full_steps']} of them full{partial}, {figures['scheduler']}"
    return f"{figures['images']} images in {figures['seconds']:.2f} s on {where}: {steps}"
