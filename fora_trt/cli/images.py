"""Commands that make images: a few, or a set for evaluation."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click

from fora_trt.cli.conditioning import conditioning_of, guidance_of, lines_of
from fora_trt.cli.options import AS_JSON, BUNDLE, CONDITIONING, NEGATIVE_PROMPT, Numbers, sampling_options
from fora_trt.cli.terminal import plan_source, watched


@click.command()
@BUNDLE
@click.option("--class-labels", type=Numbers(), help="A class for each image.")
@click.option("--prompt", "prompts", multiple=True, help="What to show; given again for more images.")
@NEGATIVE_PROMPT
@CONDITIONING
@click.option("--num-images", type=click.IntRange(min=1), help="Of each prompt, or of a model that takes noise alone.")
@click.option("--height", type=click.IntRange(min=1), help="Of the image; must be what was exported.")
@click.option("--width", type=click.IntRange(min=1), help="Of the image; must be what was exported.")
@sampling_options
@click.option("-o", "--output", type=click.Path(path_type=Path), help="A .png for a grid, or a folder.")
@click.option("--latents-out", type=click.Path(path_type=Path), help="Keep the latents as a .npy file.")
@AS_JSON
def run(
    bundle: Path,
    class_labels: tuple[int, ...] | None,
    prompts: tuple[str, ...],
    negative_prompt: str,
    conditioning_file: Path | None,
    num_images: int | None,
    height: int | None,
    width: int | None,
    steps: int,
    cache_interval: int,
    guidance_scale: float | None,
    guidance_interval: tuple[int, int] | None,
    scheduler: str | None,
    timestep_spacing: str | None,
    seed: int,
    batch_size: int,
    backend: str,
    device: str,
    engines: Path,
    vae: str | None,
    output: Path | None,
    latents_out: Path | None,
    as_json: bool,
) -> None:
    """Make images with the two engines of a bundle.

    Without -o and --latents-out the pictures go to NAME.png in this folder, if the bundle makes any.

    \b
    Examples:
      fora-trt run export/digits --class-labels 3,7,7 -o digits.png
      fora-trt run export/digits --class-labels 0,1,2 --scheduler dpm-solver++ --steps 20 -o folder/
      fora-trt run export/pixart-sigma-1024 --prompt "a lighthouse in a storm" --steps 20 -o lighthouse.png
      fora-trt run export/dit-xl-2-256 --class-labels 207 --cache-interval 5 --json
    """
    from fora_trt.bundle import Bundle

    opened = Bundle.open(bundle)
    from fora_trt.engines.backends import backend_from_name, device_from_name
    from fora_trt.engines.torch_engine import COMPILED
    from fora_trt.runtime.denoiser import load
    from fora_trt.runtime.images import Decoder, can_decode, check_image_size
    from fora_trt.runtime.outputs import save_images, save_latents, writable_file, writable_images
    from fora_trt.runtime.sampling import Sampler, sample_in_batches
    from fora_trt.runtime.schedulers import scheduler_from_config
    from fora_trt.runtime.updates import update_from_scheduler
    from fora_trt.schedule import Schedule

    manifest = opened.manifest
    check_image_size(manifest, height, width)
    if output is None and (vae is not None or can_decode(manifest)) and latents_out is None:
        output = Path(f"{manifest.name}.png")
    decoder = None if output is None else Decoder(manifest, vae)
    for path, check in ((output, writable_images), (latents_out, writable_file)):
        if path is not None:
            check(path)
    learned_sigma = manifest.latents.learned_sigma
    chosen = scheduler_from_config(opened.scheduler_config, scheduler, learned_sigma, timestep_spacing)
    update = update_from_scheduler(chosen, steps)
    schedule = Schedule.static(update.calls, cache_interval)
    where = backend_from_name(backend)
    placed = device_from_name(device, where)
    given = conditioning_of(opened, class_labels, prompts, negative_prompt, conditioning_file, num_images, placed)
    guidance = guidance_of(guidance_scale, guidance_interval, opened, given, update.calls)
    with plan_source(engines, min(batch_size, given.images) * (2 if guidance.scale > 1 else 1), as_json) as plans:
        denoiser = load(opened, schedule=schedule, backend=where.name, device=placed, plans=plans)
    trajectory = sample_in_batches(
        Sampler(denoiser, update), schedule, given, seed, guidance, batch_size, watched("denoising", as_json)
    )
    if latents_out is not None:
        save_latents(trajectory.latents, latents_out)
    if output is not None and decoder is not None:
        save_images(decoder.images(trajectory.latents, denoiser.device), output)
    figures: dict[str, Any] = {
        "bundle": str(bundle),
        "backend": denoiser.backend,
        "device": str(denoiser.device),
        "scheduler": type(chosen).__name__,
        "images": given.images,
        "batch_size": min(batch_size, given.images),
        "guidance_scale": guidance.scale,
        "guidance_interval": guidance_interval,
        "steps": schedule.steps,
        "full_steps": len(trajectory.full_seconds) // -(-given.images // batch_size),
        "cache_interval": cache_interval,
        "ideal_speedup": schedule.ideal_speedup,
        "seconds": trajectory.seconds,
        "seconds_per_image": trajectory.seconds / given.images,
        **trajectory.median_milliseconds(),
        "output": None if output is None else str(output),
        "latents_out": None if latents_out is None else str(latents_out),
    }
    if as_json:
        click.echo(json.dumps(figures))
        return
    compiling = ", its compilation included" if denoiser.backend == COMPILED else ""
    click.echo(
        f"{given.images} images in {trajectory.seconds:.2f} s on {denoiser.backend} ({denoiser.device}){compiling}: "
        f"{schedule.steps} steps, {figures['full_steps']} of them full, {type(chosen).__name__}"
    )
    for path in (output, latents_out):
        if path is not None:
            click.echo(f"wrote {path}")


@click.command()
@BUNDLE
@click.option("--num-images", type=click.IntRange(min=1), default=50_000, help="How many.")
@click.option(
    "--labels",
    type=click.Choice(["balanced", "drawn"]),
    default="balanced",
    help="Classes in turn, or at random.",
)
@click.option("--prompts", "prompts_file", type=click.Path(path_type=Path), help="Text file, a prompt a line, in turn.")
@NEGATIVE_PROMPT
@CONDITIONING
@sampling_options
@click.option("--format", "layout", type=click.Choice(["npz", "png"]), default="npz", help="One archive, or files.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the images.")
@click.option("--resume", is_flag=True, help="Go on where this was stopped.")
@AS_JSON
def sample(
    bundle: Path,
    num_images: int,
    labels: str,
    prompts_file: Path | None,
    negative_prompt: str,
    conditioning_file: Path | None,
    steps: int,
    cache_interval: int,
    guidance_scale: float | None,
    guidance_interval: tuple[int, int] | None,
    scheduler: str | None,
    timestep_spacing: str | None,
    seed: int,
    batch_size: int,
    backend: str,
    device: str,
    engines: Path,
    vae: str | None,
    layout: str,
    out: Path,
    resume: bool,
    as_json: bool,
) -> None:
    """Make a large set of images for evaluation, in the layout of the ADM evaluator.

    Image k has the seed SEED + k. Stopped at any moment, by kill -9 too, it goes on with --resume, and gives bit for
    bit what it would have given undisturbed. `samples.npz` holds `arr_0` (N, H, W, 3) and the classes as `arr_1`.

    \b
    Examples:
      fora-trt sample export/digits --num-images 2000 --out samples/
      fora-trt sample export/dit-xl-2-256 --labels drawn --guidance-scale 1.5 --out samples/ --resume
    """
    from fora_trt.bundle import Bundle

    opened = Bundle.open(bundle)
    from fora_trt.engines.backends import backend_from_name, device_from_name
    from fora_trt.evaluate.circumstances import versions
    from fora_trt.evaluate.results import About
    from fora_trt.evaluate.sample_set import SampleSet, SampleSettings
    from fora_trt.runtime.conditioning import balanced_labels, drawn_labels
    from fora_trt.runtime.denoiser import load
    from fora_trt.runtime.images import Decoder
    from fora_trt.runtime.sampling import Sampler
    from fora_trt.runtime.schedulers import scheduler_from_config
    from fora_trt.runtime.updates import update_from_scheduler
    from fora_trt.schedule import Schedule

    decoder = Decoder(opened.manifest, vae)
    learned = opened.manifest.latents.learned_sigma
    chosen = scheduler_from_config(opened.scheduler_config, scheduler, learned, timestep_spacing)
    update = update_from_scheduler(chosen, steps)
    schedule = Schedule.static(update.calls, cache_interval)
    where = backend_from_name(backend)
    placed = device_from_name(device, where)
    prompts = lines_of(prompts_file) if prompts_file else ()
    classes = None
    if not prompts and conditioning_file is None and opened.manifest.guidance is not None:
        of = opened.manifest
        classes = tuple(balanced_labels(of, num_images) if labels == "balanced" else drawn_labels(of, num_images, seed))
    given = conditioning_of(opened, classes, prompts, negative_prompt, conditioning_file, None, placed)
    guidance = guidance_of(guidance_scale, guidance_interval, opened, given, update.calls)
    batch_size = min(batch_size, num_images)
    settings = SampleSettings(
        bundle=About.of(opened).sha256,
        num_images=num_images,
        conditioning=given.digest(),
        seed=seed,
        scheduler=type(chosen).__name__,
        timestep_spacing=timestep_spacing,
        steps=steps,
        cache_interval=cache_interval,
        guidance_scale=guidance.scale,
        guidance_interval=guidance_interval,
        batch_size=batch_size,
        backend=where.name,
        device=placed.type,
        vae=vae,
        layout=layout,
        versions=versions(),
    )
    with plan_source(engines, batch_size * (2 if guidance.scale > 1 else 1), as_json) as plans:
        denoiser = load(opened, schedule=schedule, backend=where.name, device=placed, plans=plans)
    images = SampleSet(out, settings, Sampler(denoiser, update), decoder, schedule, guidance, given)
    began = time.perf_counter()
    made = images.make(resume, watched("sampling", as_json))
    seconds = time.perf_counter() - began
    if as_json:
        click.echo(json.dumps({"output": str(made), "seconds": seconds, **settings.model_dump(mode="json")}))
    else:
        click.echo(f"wrote {made}: {num_images} images, {seconds:.1f} s of them now")
