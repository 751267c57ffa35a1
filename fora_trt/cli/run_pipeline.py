"""The command `run` for bundles that were exported from a diffusers pipeline, which makes the images or videos."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fora_trt.cli.options import WITHOUT_PLANS, SamplingOptions, is_given, refuse_given
from fora_trt.cli.terminal import bar, print_json, say, watched
from fora_trt.errors import BundleError, InputError

if TYPE_CHECKING:
    from fora_trt.diffusers_pipeline import DiffusersPipeline, Result

ITS_OWN = (
    *("class_labels", "guidance_interval", "scheduler", "timestep_spacing", "vae", "batch_size"),
    *("height", "width"),
)
"""Options of `run` that such a bundle does not take: the pipeline has its own loop, and the sizes are fixed."""


def is_of_pipeline(bundle: Path) -> bool:
    """Whether a bundle was exported from a pipeline that was watched; False for what is no bundle."""
    from fora_trt.bundle import Bundle

    try:
        return Bundle.read(bundle).manifest.pipeline is not None
    except BundleError:
        return False  # the command says so


def without_pipeline(wanted: dict[str, Any]) -> None:
    """Refuse and drop the options that only `run_pipeline` takes."""
    refuse_given("only bundles that were exported from a watched pipeline take them", "call", "pipeline_folder")
    del wanted["call"], wanted["pipeline_folder"]


def run_pipeline(
    folder: Path,
    sampling: SamplingOptions,
    wanted: dict[str, Any],
    output: Path | None,
    latents_out: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Make images or videos with the pipeline of a bundle, and write them."""
    from fora_trt.bundle import Bundle
    from fora_trt.diffusers_pipeline import DiffusersPipeline
    from fora_trt.images.save import check_new, writable_file
    from fora_trt.report.environment import versions

    bundle = Bundle.open(folder)
    spec = bundle.manifest.pipeline
    assert spec is not None
    refuse_given(f"{spec.name} has its own loop, and the sizes are those of the export", *ITS_OWN)
    if latents_out is not None and output is not None:
        raise InputError("a pipeline returns either images or latents; give -o or --latents-out")
    context = click.get_current_context()
    pipeline = DiffusersPipeline(
        bundle,
        schedule=sampling.schedule,
        backend=sampling.backend,
        device=sampling.device,
        engines=sampling.engines,
        where=wanted.pop("pipeline_folder"),
        report=say,
        progress=context.with_resource(bar()),
    )
    if not pipeline.backend.builds:
        refuse_given(WITHOUT_PLANS.format(pipeline.backend.name), "engines")
    for path in filter(None, (output, latents_out)):
        check_new(path, force)
        if path.suffix:
            writable_file(path)
    if output is not None and not pipeline.decodes:
        raise InputError(f"{spec.name} has no VAE, so it makes no images; give --latents-out FILE.npy for its latents")
    steps = sampling.steps if is_given("steps") else bundle.scheduled_steps or sampling.steps
    result = pipeline(
        wanted["prompt"],
        steps=steps,
        seed=wanted["seed"],
        num_images=wanted["num_images"] or 1,
        latents=latents_out is not None,
        arguments=_arguments(wanted, sampling),
        watch=watched("denoising"),
    )
    figures = {**_figures(folder, pipeline, sampling, result, steps), "seed": wanted["seed"], "versions": versions()}
    written = _write(result, bundle.manifest.name, output, latents_out, figures)
    if as_json:
        print_json({**figures, "output": written})
        return
    partial = f", {result.partial_steps} partial" if result.partial_steps else ""
    made = f"{figures['results']} {'result' if figures['results'] == 1 else 'results'}"
    click.echo(
        f"{made} in {result.seconds:.2f} s on {figures['backend']} ({figures['device']}): "
        f"{steps} steps, {result.full_steps} full{partial} and {result.reuse_steps} reuse calls of the transformer"
    )
    click.echo(f"wrote {written}")


def _arguments(wanted: dict[str, Any], sampling: SamplingOptions) -> dict[str, Any]:
    """Arguments of the pipeline besides prompts, steps and seed."""
    from fora_trt.sampling.conditioning import tensors_of_file

    given: dict[str, Any] = {}
    if wanted["conditioning"] is not None:
        given |= tensors_of_file(Path(wanted["conditioning"]))
    if is_given("negative_prompt"):
        given["negative_prompt"] = wanted["negative_prompt"]
    if sampling.guidance_scale is not None:
        given["guidance_scale"] = sampling.guidance_scale
    further = dict(wanted["call"])
    if twice := further.keys() & {*given, *(("prompt",) if wanted["prompt"] else ())}:
        raise InputError(
            f"the argument {min(twice)!r} of the pipeline is given by --call and by another option; give one"
        )
    return given | further


def _figures(
    folder: Path, pipeline: DiffusersPipeline, sampling: SamplingOptions, result: Result, steps: int
) -> dict[str, Any]:
    """Settings and times, as values for JSON."""
    return {
        "bundle": str(folder),
        "pipeline": pipeline.spec.name,
        "weights_sha256": pipeline.bundle.manifest.model.weights_sha256,
        "backend": pipeline.backend.name,
        "device": str(pipeline.device),
        "results": len(result.pictures) or (0 if result.latents is None else len(result.latents)),
        "guidance_scale": sampling.guidance_scale,
        "steps": steps,
        "schedule": pipeline.schedule,
        "full_steps": result.full_steps,
        "reuse_steps": result.reuse_steps,
        "partial_steps": result.partial_steps,
        "seconds": result.seconds,
    }


def _write(result: Result, name: str, output: Path | None, latents_out: Path | None, figures: dict[str, Any]) -> Path:
    """Write images as `run` does, videos as an animation, or latents; return the path."""
    from fora_trt.images.save import free_name, save_images, save_latents, save_videos

    if result.latents is not None:
        path = latents_out or free_name(Path(f"{name}.npy"))
        save_latents(result.latents, path)
        return path
    is_video = any(len(one) > 1 for one in result.pictures)
    path = output or free_name(Path(f"{name}.webp" if is_video else f"{name}.png"))
    if is_video:
        save_videos(result.pictures, path)
    else:
        save_images([one[0] for one in result.pictures], path, figures)
    return path
