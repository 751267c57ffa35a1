"""The commands: options, one call, one print. The only place that turns errors into exit codes and knows a terminal."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fora_trt import __version__
from fora_trt.errors import BackendError, ForaError, InputError

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from fora_trt.bundle import Bundle
    from fora_trt.engines.plan_store import PlanSource
    from fora_trt.evaluate.tables import Table as Found
    from fora_trt.models.recipes import Recipe
    from fora_trt.runtime.conditioning import Conditioning
    from fora_trt.runtime.sampling import Guidance


class Numbers(click.ParamType["tuple[int, ...]"]):
    """Whole numbers between separators; here any number of them, between commas."""

    name = "N,N,..."
    separator = ","
    counts: tuple[int, ...] = ()  # how many there may be; any number without one
    refusal = "is not a list of whole numbers such as 3,7,7"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(int(part) for part in str(value).lower().split(self.separator))
        except ValueError:
            numbers = ()
        if not numbers or (self.counts and len(numbers) not in self.counts):
            self.fail(f"{value!r} {self.refusal}", param, ctx)
        if problem := self.problem_of(numbers):
            self.fail(f"{value!r} {problem}", param, ctx)
        return numbers

    def problem_of(self, numbers: tuple[int, ...]) -> str | None:
        """What is wrong with numbers of the right count."""
        return None


class BatchProfile(Numbers):
    """Least, best and most of a batch, between colons."""

    name, separator, counts = "MIN:OPT:MAX", ":", (3,)
    refusal = "is not three whole numbers such as 1:2:16"

    def problem_of(self, numbers: tuple[int, ...]) -> str | None:
        least, best, most = numbers
        rises = 1 <= least <= best <= most
        return None if rises else "must rise from 1 on: the least batch, the one to tune for, the most"


class ImageSize(Numbers):
    """One whole number for a square, or height and width."""

    name, separator, counts = "N|HxW", "x", (1, 2)
    refusal = "is no image size such as 512, or 512x768 for height and width"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        sides = super().convert(value, param, ctx)
        return sides[0], sides[-1]

    def problem_of(self, numbers: tuple[int, ...]) -> str | None:
        return None if min(numbers) >= 1 else self.refusal


class StepRange(Numbers):
    """First step and the one after the last, between colons."""

    name, separator, counts = "FIRST:LAST", ":", (2,)
    refusal = "is not two whole numbers such as 5:30"

    def problem_of(self, numbers: tuple[int, ...]) -> str | None:
        first, last = numbers
        return None if 0 <= first < last else "must rise, from 0 for the first step"


class Words(click.ParamType[tuple[str, ...]]):
    """Words between commas."""

    name = "A,B,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        return value if isinstance(value, tuple) else tuple(part.strip() for part in str(value).split(",") if part)


PRECISION = click.Choice(["fp32", "fp16", "bf16"])
BUNDLE = click.argument("bundle", type=click.Path(path_type=Path))
BACKEND = click.option("--backend", default="auto", help="auto, or a name that 'fora-trt doctor' lists.")
DEVICE = click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N.")
ENGINES = click.option(
    "--engines",
    type=click.Path(path_type=Path),
    default="engines",
    help="Where TensorRT plans are and are built if missing; or one set of plans, used as it is.",
)
NEGATIVE_PROMPT = click.option("--negative-prompt", default="", help="What not to show.")
CONDITIONING = click.option(
    "--prompt-embeds",
    "--conditioning",
    "conditioning_file",
    type=click.Path(path_type=Path),
    help="Inputs of the model by name, .npz or .safetensors; names with negative_ are the unconditional half.",
)
GUIDANCE_SCALE = click.option(
    "--guidance-scale",
    type=click.FloatRange(min=0),
    help="Classifier-free guidance; up to 1: none.  [default: 1.5 for classes, 4.5 for prompts]",
    show_default=False,
)
SEED = click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), default=0, help="Of the first image; the k-th after it adds k."
)
BATCH_SIZE = click.option(
    "--batch-size", type=click.IntRange(min=1), default=64, help="Images that are denoised together."
)
SCHEDULER = click.option(
    "--scheduler",
    help="ddim, ddpm, dpm-solver++, ... or a diffusers class.  [default: the model's own]",
    show_default=False,
)
TIMESTEP_SPACING = click.option(
    "--timestep-spacing",
    type=click.Choice(["leading", "linspace", "trailing"]),
    help="Which timesteps the scheduler takes.  [default: the scheduler's own]",
    show_default=False,
)
GUIDANCE_INTERVAL = click.option(
    "--guidance-interval",
    type=StepRange(),
    help="Steps that are guided, from 0.  [default: all]",
    show_default=False,
)
VAE = click.option("--vae", help="Folder or hub id of the VAE.  [default: the model's own]", show_default=False)
WIDTH = 120
"""Of tables that do not go to a terminal."""

AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")


class Commands(click.Group):
    """Prints the sentence of a user's mistake and exits with 1; anything else is a defect and shows its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ForaError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=Commands, context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """FORA caching for diffusion transformers: two graphs, two engines, one runtime that alternates them.

    \b
    Examples:
      fora-trt demo
      fora-trt export digits
      fora-trt run export/digits --class-labels 3,7,7 --cache-interval 3 -o digits.png
    """


@main.command()
@click.argument("source")
@click.option("--name", help="Name of the bundle.  [default: from the source]", show_default=False)
@click.option("--out", type=click.Path(path_type=Path), default="export", help="Folder to make the bundle in.")
@click.option("--precision", type=PRECISION, help="Of weights and arithmetic.  [default: fp32]", show_default=False)
@click.option("--image-size", type=ImageSize(), help="Pixels a side, or HEIGHTxWIDTH.  [default: the model's own]")
@click.option(
    "--cache",
    type=Words(),
    multiple=True,
    help="Kinds of sites, or patterns over module paths; between commas, or given again.  [default: all kinds]",
    show_default=False,
)
@click.option("--architecture", type=click.Choice(["DiT", "SiT"], case_sensitive=False), help="Of a state dict.")
@click.option("--num-heads", type=click.IntRange(min=1), help="Attention heads of a state dict of unusual width.")
@click.option("--text-length", type=click.IntRange(min=1), help="Tokens of a prompt.  [default: the model's own]")
@VAE
@click.option("--opset", type=int, help="ONNX opset.  [default: 23]")
@click.option(
    "--measure-trajectory/--no-measure-trajectory",
    "measured",
    default=None,
    help="Compare trajectories in fp16 or bf16 with fp32.  [default: if that takes under two minutes]",
    show_default=False,
)
@click.option("--force", is_flag=True, help="Replace a bundle that is there.")
@AS_JSON
def export(source: str, out: Path, measured: bool | None, force: bool, as_json: bool, **given: Any) -> None:
    """Split a model into a full and a reuse graph and write them as a bundle.

    SOURCE is `digits` (trained, comes with fora-trt), a diffusers folder or hub id of a DiT or PixArt, a state dict of
    the DiT or SiT authors, `package.module:factory` for a network of your own, `random:DiT-XL/2` or a sister (random
    weights, for timing), or a recipe file.

    \b
    Examples:
      fora-trt export digits
      fora-trt export facebook/DiT-XL-2-256 --precision fp16
      fora-trt export DiT-XL-2-512x512.pt --vae stabilityai/sd-vae-ft-ema
      fora-trt export my_package.model:make --cache 'blocks.*.attn' --cache 'blocks.*.mlp'
      fora-trt export random:DiT-S/2 --name s2
      fora-trt export export/pixart-sigma-1024.toml
    """
    recipe = _recipe(source, given)
    from fora_trt.export.write import bundle_from_model
    from fora_trt.models.sources import model_from_source
    from fora_trt.runtime.denoiser import mend_overflow

    _say(as_json, f"loading {recipe.source}")
    target = None if recipe.name is None else out / _folder_name(recipe.name)
    model = model_from_source(recipe.options(), recipe.precision or "fp32", recipe.cache)
    bundle = bundle_from_model(
        model,
        target or out / _folder_name(model.name),
        opset=recipe.opset or 23,
        force=force,
        report=lambda stage: _say(as_json, stage),
    )
    del model
    if bundle.manifest.precision != "fp32" and measured is not False:
        bundle = _with_measured_trajectory(bundle, float("inf") if measured else 120.0, as_json)
    if as_json:
        click.echo(json.dumps({"bundle": str(bundle.folder), **bundle.manifest.model_dump(mode="json")}))
        return
    errors = bundle.manifest.measured_error
    click.echo(f"wrote {bundle.folder}: {len(bundle.manifest.cache_sites)} cache sites, {recipe.precision or 'fp32'}")
    if errors is None:
        click.echo(
            "not measured against PyTorch: onnxruntime is missing or has no kernels of this precision on the CPU"
        )
    else:
        shown = ", ".join(f"{name} graph {error.relative:.1e}" for name, error in errors.items())
        click.echo(f"largest error relative to PyTorch in fp32: {shown}")
        if not all(math.isfinite(error.relative) for error in errors.values()):
            click.echo(
                f"the graphs put out what is not finite in {bundle.manifest.precision}; 'fora-trt run' will name the "
                f"first such tensor; {mend_overflow(bundle.manifest.precision)}",
                err=True,
            )
    if (whole := bundle.manifest.trajectory_error) is not None:
        shown = ", ".join(f"{error.relative:.1e} at cache interval {n}" for n, error in whole.errors.items())
        click.echo(f"error of {whole.steps} steps relative to fp32, on {whole.backend}: {shown}")


def _with_measured_trajectory(bundle: Bundle, within_seconds: float, as_json: bool) -> Bundle:
    from fora_trt.engines.backends import backend_from_name, device_from_name
    from fora_trt.evaluate.verify import with_measured_trajectory

    backend = backend_from_name("torch")  # it computes as the graphs do, whatever is installed
    _say(as_json, "measuring trajectories against fp32")
    try:
        measured = with_measured_trajectory(bundle, backend.name, device_from_name("auto", backend), within_seconds)
    except BackendError as error:
        if within_seconds == float("inf"):  # asked for
            raise
        click.echo(f"trajectories could not be measured: {error}", err=True)
        return bundle
    if measured.manifest.trajectory_error is None:
        click.echo("trajectories would take long to measure here; --measure-trajectory does it all the same", err=True)
    return measured


def _recipe(source: str, given: dict[str, Any]) -> Recipe:
    """The options of a recipe file, or of the command line alone; what was typed goes before what the file says."""
    from fora_trt.models.recipes import Recipe, read_recipe

    recipe = read_recipe(Path(source)) if source.endswith(".toml") else Recipe(source=source)
    given["cache"] = tuple(pattern for patterns in given["cache"] for pattern in patterns) if given["cache"] else None
    return recipe.model_copy(update={key: value for key, value in given.items() if value is not None})


def _folder_name(name: str) -> str:
    if name in ("", ".", "..") or name != Path(name).name or name.startswith(".") or "\0" in name:
        raise click.BadParameter(f"{name!r} is not the name of one folder", param_hint="--name")
    return name


@main.command()
@BUNDLE
@click.option(
    "--backend",
    type=click.Choice(["auto", "tensorrt", "tensorrt-rtx"]),
    default="auto",
    help="auto: tensorrt where it and a GPU are there, else tensorrt-rtx.",
)
@click.option(
    "--batch",
    "profiles",
    type=BatchProfile(),
    multiple=True,
    default=["1:2:16"],
    help="Batches to admit and the one to tune for; guidance doubles the images. Give it again for more profiles.",
)
@click.option(
    "--optimization-level",
    type=click.IntRange(0, 5),
    help="How long tensorrt searches.  [default: 3]",
    show_default=False,
)
@click.option(
    "--workspace",
    type=click.FloatRange(min=0, min_open=True),
    help="GiB that a kernel of tensorrt may use.  [default: all]",
    show_default=False,
)
@click.option(
    "--timing-cache",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Timings of tensorrt to start from and to add to.  [default: a file in --out]",
    show_default=False,
)
@click.option(
    "--compute-capability",
    type=Words(),
    default="",
    help="GPUs that tensorrt-rtx builds for, such as 8.9,12.0.  [default: 8.0,8.6,8.9,12.0]",
    show_default=False,
)
@click.option("--out", type=click.Path(path_type=Path), default="engines", help="Folder of the plans.")
@click.option("--force", is_flag=True, help="Build again what is there.")
@AS_JSON
def build(
    bundle: Path,
    backend: str,
    profiles: tuple[tuple[int, int, int], ...],
    optimization_level: int | None,
    workspace: float | None,
    timing_cache: Path | None,
    compute_capability: tuple[str, ...],
    out: Path,
    force: bool,
    as_json: bool,
) -> None:
    """Build the TensorRT plans of a bundle, for `run` and the others to use.

    tensorrt builds for the GPU at hand. tensorrt-rtx needs no GPU to build and is for GeForce and workstation GPUs.
    Plans that are there and fit are left as they are.

    \b
    Examples:
      fora-trt build export/digits
      fora-trt build export/dit-xl-2-256 --backend tensorrt --batch 2:8:32 --optimization-level 5
      fora-trt build export/dit-xl-2-256 --backend tensorrt-rtx --compute-capability 8.9,12.0
    """
    from fora_trt.bundle import Bundle
    from fora_trt.engines.plan_builder import PlanOptions, Profile
    from fora_trt.engines.plan_store import build_plans, target_of
    from fora_trt.engines.tensorrt_library import first_gpu, library_for_building

    gpu = first_gpu()
    library = library_for_building(backend, gpu)
    target = target_of(library, gpu, compute_capability)
    if library.is_rtx and (optimization_level, workspace, timing_cache) != (None, None, None):
        click.echo(
            "tensorrt-rtx times nothing while it builds, so --optimization-level, --workspace and --timing-cache "
            "have no effect",
            err=True,
        )
        optimization_level = workspace = timing_cache = None
    options = PlanOptions(
        profiles=tuple(Profile(minimum=a, optimum=b, maximum=c) for a, b, c in profiles),
        optimization_level=optimization_level,
        workspace_gib=workspace,
    )
    with _bar(as_json) as progress:
        plans, reused = build_plans(
            Bundle.read(bundle),
            target,
            options,
            out,
            timing_cache=timing_cache,
            force=force,
            report=lambda stage: _say(as_json, stage),
            progress=progress,
        )
    if as_json:
        found = {"folder": str(plans.folder), "reused": reused, **plans.manifest.model_dump(mode="json")}
        click.echo(json.dumps(found))
        return
    made_for = plans.manifest.gpu or f"compute capability {', '.join(plans.manifest.compute_capabilities)}"
    click.echo(f"{'found' if reused else 'wrote'} {plans.folder}, for {made_for}")
    table = _table("", "plan", "size", "attentions", "fused", "built in")
    for name, plan in plans.manifest.plans.items():
        told = [attention.fused for attention in plan.attentions]
        fused = "not told" if None in told else str(told.count(True))
        size = _bytes(plans.manifest.files[plan.file].size)
        table.add_row(name, size, str(len(plan.attentions)), fused, f"{plan.seconds:.1f} s")
    _print(table)
    apart = [one.name for plan in plans.manifest.plans.values() for one in plan.attentions if one.fused is False]
    if apart:
        click.echo(
            f"{apart[0]}{f' and {len(apart) - 1} more' if len(apart) > 1 else ''}: no fused kernel fits; "
            "those need fp16 or bf16 and a head size of 16 to 256"
        )


@main.command()
@BUNDLE
@BACKEND
@DEVICE
@ENGINES
@click.option("--steps", type=click.IntRange(min=1), default=50, help="Steps of the trajectories.")
@click.option("--cache-intervals", type=Numbers(), default="2,3,5", help="Cache intervals of the trajectories.")
@AS_JSON
def verify(
    bundle: Path,
    backend: str,
    device: str,
    engines: Path,
    steps: int,
    cache_intervals: tuple[int, ...],
    as_json: bool,
) -> None:
    """Compare a bundle with PyTorch: both graphs, then whole cached trajectories.

    PyTorch runs the checkpoint with hooks, in fp32, so the checkpoint must still be where it was. Exits with 1 if an
    error is over the tolerance of the bundle's precision.

    \b
    Example:
      fora-trt verify export/digits
    """
    from fora_trt.engines.backends import backend_from_name, device_from_name
    from fora_trt.engines.plan_store import PlanSource
    from fora_trt.evaluate.verify import compare_with_pytorch

    chosen = backend_from_name(backend)
    where = device_from_name(device, chosen)
    source = PlanSource(engines, batch=4, report=lambda line: _say(as_json, line))
    comparisons = compare_with_pytorch(_open(bundle), chosen.name, where, steps, cache_intervals, source)
    table = _table(
        f"{bundle} on {chosen.name} ({where}) against PyTorch", "compared", "maximum error", "relative", "admitted", ""
    )
    done = []
    for one in _watched("comparing", as_json)(comparisons):
        done.append(one)
        verdict = "ok" if one.passed else "TOO LARGE"
        error = one.error
        table.add_row(one.what, f"{error.maximum:.2e}", f"{error.relative:.2e}", f"{one.tolerance:.0e}", verdict)
    passed = all(one.passed for one in done)
    if as_json:
        rows = [{"what": one.what, **vars(one.error), "tolerance": one.tolerance, "passed": one.passed} for one in done]
        click.echo(json.dumps({"backend": chosen.name, "passed": passed, "comparisons": rows}))
    else:
        _print(table)
    if not passed:
        raise click.ClickException(f"{bundle} differs from PyTorch by more than its precision admits")


@main.command()
@BUNDLE
@click.option("--class-labels", type=Numbers(), help="A class for each image.")
@click.option("--prompt", "prompts", multiple=True, help="What to show; given again for more images.")
@NEGATIVE_PROMPT
@CONDITIONING
@click.option("--num-images", type=click.IntRange(min=1), help="Of each prompt, or of a model that takes noise alone.")
@click.option("--height", type=click.IntRange(min=1), help="Of the image; must be what was exported.")
@click.option("--width", type=click.IntRange(min=1), help="Of the image; must be what was exported.")
@click.option("--steps", type=click.IntRange(min=1), default=50, help="Denoising steps.")
@click.option("--cache-interval", type=click.IntRange(min=1), default=3, help="Full step every N steps; 1: no caching.")
@GUIDANCE_SCALE
@GUIDANCE_INTERVAL
@SCHEDULER
@TIMESTEP_SPACING
@SEED
@BATCH_SIZE
@BACKEND
@DEVICE
@ENGINES
@VAE
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
    opened = _open(bundle)
    from fora_trt.engines.backends import backend_from_name, device_from_name
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
    given = _conditioning(opened, class_labels, prompts, negative_prompt, conditioning_file, num_images, placed)
    guidance = _guidance(guidance_scale, guidance_interval, opened, given, update.calls)
    with _plans(engines, min(batch_size, given.images) * (2 if guidance.scale > 1 else 1), as_json) as plans:
        denoiser = load(opened, schedule=schedule, backend=where.name, device=placed, plans=plans)
    trajectory = sample_in_batches(
        Sampler(denoiser, update), schedule, given, seed, guidance, batch_size, _watched("denoising", as_json)
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
    click.echo(
        f"{given.images} images in {trajectory.seconds:.2f} s on {denoiser.backend} ({denoiser.device}): "
        f"{schedule.steps} steps, {figures['full_steps']} of them full, {type(chosen).__name__}"
    )
    for path in (output, latents_out):
        if path is not None:
            click.echo(f"wrote {path}")


def _guidance_scale(asked: float | None, bundle: Bundle, given: Conditioning) -> float:
    """What was asked for, or what is usual for the kind of model."""
    from fora_trt.runtime.conditioning import usual_guidance_scale

    return usual_guidance_scale(bundle.manifest, given) if asked is None else asked


def _guidance(
    asked: float | None, interval: tuple[int, int] | None, bundle: Bundle, given: Conditioning, calls: int
) -> Guidance:
    """Guidance on all steps or on a range of them, which must not be empty."""
    from fora_trt.runtime.sampling import Guidance

    guidance = Guidance(_guidance_scale(asked, bundle, given), *(interval or (0, None)))
    if interval is not None and not any(map(guidance.guides, range(calls))):
        raise InputError(
            f"no step is guided: the interval is {interval[0]}:{interval[1]}, there are steps 0 to {calls - 1}, and "
            f"the guidance scale is {guidance.scale:g}"
        )
    return guidance


def _conditioning(
    bundle: Bundle,
    class_labels: tuple[int, ...] | None,
    prompts: tuple[str, ...],
    negative_prompt: str,
    file: Path | None,
    num_images: int | None,
    device: torch.device,
) -> Conditioning:
    """What the images are to be, said in the one way that the model understands."""
    from fora_trt.runtime.conditioning import (
        conditioning_from_file,
        conditioning_of_classes,
        conditioning_of_tensors,
        way_to_condition,
    )

    manifest = bundle.manifest
    said = {"--class-labels": class_labels is not None, "--prompt": bool(prompts), "--prompt-embeds": file is not None}
    given = [option for option, is_given in said.items() if is_given]
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} say the same thing in two ways; give one of them")
    if negative_prompt and not prompts:
        raise InputError("--negative-prompt goes with --prompt; a file holds its own as negative_prompt_embeds")
    if not given and (needed := way_to_condition(manifest)):
        raise InputError(f"nothing says what {manifest.name} is to make; give {needed}")
    if num_images is not None and not prompts and given:
        raise InputError(f"--num-images does not go with {given[0]}, which says how many there are; leave it out")
    if class_labels is not None:
        return conditioning_of_classes(manifest, class_labels)
    if file is not None:
        return conditioning_from_file(manifest, file)
    if prompts:
        from fora_trt.runtime.prompts import conditioning_of_prompts

        each = [prompt for prompt in prompts for _ in range(num_images or 1)]
        return conditioning_of_prompts(manifest, each, negative_prompt, device)
    return conditioning_of_tensors(manifest, num_images or 1, {}, None)


@main.command()
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
@click.option("--steps", type=click.IntRange(min=1), default=50, help="Denoising steps.")
@click.option("--cache-interval", type=click.IntRange(min=1), default=3, help="Full step every N steps; 1: no caching.")
@GUIDANCE_SCALE
@GUIDANCE_INTERVAL
@SCHEDULER
@TIMESTEP_SPACING
@SEED
@BATCH_SIZE
@BACKEND
@DEVICE
@ENGINES
@VAE
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
    opened = _open(bundle)
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
    prompts = _lines_of(prompts_file) if prompts_file else ()
    classes = None
    if not prompts and conditioning_file is None and opened.manifest.guidance is not None:
        of = opened.manifest
        classes = tuple(balanced_labels(of, num_images) if labels == "balanced" else drawn_labels(of, num_images, seed))
    given = _conditioning(opened, classes, prompts, negative_prompt, conditioning_file, None, placed)
    guidance = _guidance(guidance_scale, guidance_interval, opened, given, update.calls)
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
    with _plans(engines, batch_size * (2 if guidance.scale > 1 else 1), as_json) as plans:
        denoiser = load(opened, schedule=schedule, backend=where.name, device=placed, plans=plans)
    images = SampleSet(out, settings, Sampler(denoiser, update), decoder, schedule, guidance, given)
    began = time.perf_counter()
    made = images.make(resume, _watched("sampling", as_json))
    seconds = time.perf_counter() - began
    if as_json:
        click.echo(json.dumps({"output": str(made), "seconds": seconds, **settings.model_dump(mode="json")}))
    else:
        click.echo(f"wrote {made}: {num_images} images, {seconds:.1f} s of them now")


def _lines_of(path: Path) -> tuple[str, ...]:
    """The lines of a text file that are not empty."""
    try:
        lines = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as text ({error})") from error
    if not lines:
        raise InputError(f"{path} holds no prompt; write one a line")
    return lines


@main.command()
@BUNDLE
@click.option("--num-images", type=click.IntRange(min=2), default=1000, help="Images of each setting.")
@click.option("--cache-intervals", type=Numbers(), default="2,3,5", help="Compared with no caching.")
@click.option("--steps", type=Numbers(), default="50", help="Numbers of denoising steps.")
@click.option("--schedulers", type=Words(), help="As for run, between commas.  [default: the model's own]")
@click.option("--prompt", "prompts", multiple=True, help="Given again for more; the images take them in turn.")
@NEGATIVE_PROMPT
@CONDITIONING
@GUIDANCE_SCALE
@SEED
@BATCH_SIZE
@BACKEND
@DEVICE
@ENGINES
@VAE
@click.option(
    "--inception-weights",
    type=click.Path(path_type=Path),
    help="Of the InceptionV3 of torch-fidelity, for the Fréchet distance and the like.",
)
@click.option(
    "--reference", type=click.Path(path_type=Path), help="Images to be as near to: a .npz of the ADM evaluator."
)
@click.option("--min-psnr", type=float, default=30.0, help="dB that the setting which is recommended must keep.")
@click.option("--no-images", is_flag=True, help="Keep the grid alone, not the images of every setting.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the report.")
@click.option("--resume", is_flag=True, help="Go on where this was stopped.")
@AS_JSON
def quality(
    bundle: Path,
    num_images: int,
    cache_intervals: tuple[int, ...],
    steps: tuple[int, ...],
    schedulers: tuple[str, ...] | None,
    prompts: tuple[str, ...],
    negative_prompt: str,
    conditioning_file: Path | None,
    guidance_scale: float | None,
    seed: int,
    batch_size: int,
    backend: str,
    device: str,
    engines: Path,
    vae: str | None,
    inception_weights: Path | None,
    reference: Path | None,
    min_psnr: float,
    no_images: bool,
    out: Path,
    resume: bool,
    as_json: bool,
) -> None:
    """Measure what caching costs: images of every setting against those without caching, from the same noise.

    Beside each cache interval stands no caching in so many steps as take the same time. A model of classes makes all
    of them in turn. Writes a report, a grid, and the images of every setting to --out. What was done when it is
    stopped stays there for --resume.

    \b
    Examples:
      fora-trt quality export/digits --out report/
      fora-trt quality export/dit-xl-2-256 --num-images 200 --schedulers ddim,dpm-solver++ --steps 20,50 --out report/
      fora-trt quality export/dit-xl-2-256 --inception-weights weights-inception-2015-12-05-6726825d.pth --out report/
    """
    opened = _open(bundle)
    from fora_trt.engines.backends import backend_from_name, device_from_name
    from fora_trt.evaluate.circumstances import circumstances
    from fora_trt.evaluate.quality import QualityOptions, measure_quality
    from fora_trt.evaluate.report import check_report_folder, write_report
    from fora_trt.evaluate.results import About
    from fora_trt.evaluate.tables import quality_table
    from fora_trt.runtime.conditioning import balanced_labels

    check_report_folder(out, "quality", About.of(opened), resume)
    where = backend_from_name(backend)
    placed = device_from_name(device, where)
    said = prompts or conditioning_file is not None
    labels = None if said or opened.manifest.guidance is None else tuple(balanced_labels(opened.manifest, num_images))
    given = _conditioning(opened, labels, prompts, negative_prompt, conditioning_file, None, placed)
    options = QualityOptions(
        images=num_images,
        schedulers=schedulers or (None,),
        steps=steps,
        cache_intervals=cache_intervals,
        guidance_scale=_guidance_scale(guidance_scale, opened, given),
        seed=seed,
        batch_size=min(batch_size, num_images),
        keep_images=not no_images,
        vae=vae,
    )
    with _plans(engines, options.batch_size * (2 if options.guidance_scale > 1 else 1), as_json) as plans:
        found = measure_quality(
            opened,
            options,
            given,
            out,
            backend=where.name,
            device=placed,
            plans=plans,
            inception_weights=inception_weights,
            reference=reference,
            resume=resume,
            watch=_watched("comparing", as_json),
        )
    report = write_report(out, About.of(opened), circumstances(), quality=found, min_psnr=min_psnr)
    if as_json:
        click.echo(json.dumps({"bundle": str(bundle), "out": str(out), **found.model_dump(mode="json")}))
        return
    _print_found(quality_table(found))
    for note in found.notes:
        click.echo(note)
    click.echo(report.recommendation)
    click.echo(f"wrote {out / 'report.html'}, {found.grid}{'' if no_images else ', and the images of every setting'}")


@main.command()
@BUNDLE
@AS_JSON
def inspect(bundle: Path, as_json: bool) -> None:
    """Show what a bundle holds and what caching can save with it.

    \b
    Example:
      fora-trt inspect export/digits
    """
    from fora_trt.evaluate.inspection import inspect_bundle

    found = inspect_bundle(_open(bundle))
    if as_json:
        click.echo(json.dumps(found))
        return
    made = f"{found['architecture']} from {found['source']}, {found['precision']}, opset {found['opset']}"
    click.echo(f"{found['name']}: {made}")
    sites = ", ".join(f"{count} {kind}" for kind, count in found["cache_sites"].items())
    size = _bytes(found["feature_bytes_per_sample"])
    shapes = " or ".join(str([*shape]) for shape in found["feature_shapes"])
    click.echo(f"cache sites: {sites}; a feature is {shapes}, all of them {size} a sample")
    graphs = _table("graphs", "graph", "nodes", "weights", "operations a sample")
    for name, graph in found["graphs"].items():
        graphs.add_row(name, str(graph["nodes"]), _bytes(graph["weight_bytes"]), f"{graph['flops'] / 1e9:.3f} GFLOP")
    _print(graphs)
    click.echo(f"a reuse step keeps {found['arithmetic_kept']:.2%} of the arithmetic of a full step")
    table = _table(
        f"{found['steps']} steps", "cache interval", "full steps", "ideal speed-up", "with the reuse steps' arithmetic"
    )
    for interval, row in found["cache_intervals"].items():
        table.add_row(
            str(interval), str(row["full_steps"]), f"{row['ideal_speedup']:.2f}x", f"{row['arithmetic_speedup']:.2f}x"
        )
    _print(table)


@main.command()
@BUNDLE
@click.option(
    "--backends",
    type=Words(),
    default="tensorrt,tensorrt-rtx,onnxruntime",
    help="What to time at every cache interval; plain PyTorch and torch-compile always come along.",
)
@click.option("--cache-intervals", type=Numbers(), default="1,2,3,5,7", help="1, no caching, always comes along.")
@click.option("--batch-sizes", type=Numbers(), default="1,4,16", help="Images that are denoised together.")
@click.option("--steps", type=click.IntRange(min=1), default=50, help="Denoising steps.")
@click.option("--repeats", type=click.IntRange(min=1), default=10, help="Timed runs of each row, after a warm-up.")
@SCHEDULER
@click.option("--guidance-scale", type=click.FloatRange(min=0), help="Up to 1: none.  [default: the model's usual one]")
@click.option("--memory/--no-memory", default=True, help="Measure peak memory, in a process for each backend.")
@DEVICE
@ENGINES
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the report.  [default: none is written]")
@click.option("--force", is_flag=True, help="Replace the latency in a report that is there.")
@AS_JSON
def bench(
    bundle: Path,
    backends: tuple[str, ...],
    cache_intervals: tuple[int, ...],
    batch_sizes: tuple[int, ...],
    steps: int,
    repeats: int,
    scheduler: str | None,
    guidance_scale: float | None,
    memory: bool,
    device: str,
    engines: Path,
    out: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Measure what caching saves: every backend at every cache interval, and what one would use instead.

    Each cached row is followed by a control: the same time spent on fewer steps without caching. Rows are timed in
    turn. Ctrl-C ends it and keeps what was measured.

    \b
    Examples:
      fora-trt bench export/digits --out report
      fora-trt bench export/dit-xl-2-256 --batch-sizes 1,8,32 --out report
      fora-trt bench export/digits --backends onnxruntime --cache-intervals 1,3 --repeats 3 --json
    """
    opened = _open(bundle)
    from fora_trt.engines.backends import backend_from_name, device_from_name
    from fora_trt.evaluate.bench import Benchmark
    from fora_trt.evaluate.circumstances import circumstances
    from fora_trt.evaluate.entrants import entrants_of
    from fora_trt.evaluate.report import check_report_folder, write_report
    from fora_trt.evaluate.results import About
    from fora_trt.evaluate.tables import bench_tables
    from fora_trt.runtime.conditioning import example_conditioning
    from fora_trt.runtime.schedulers import scheduler_from_config
    from fora_trt.runtime.updates import timesteps_of
    from fora_trt.schedule import Schedule

    for name in backends:
        backend_from_name(name)  # a typing error shows before anything is loaded
    chosen = scheduler_from_config(opened.scheduler_config, scheduler, opened.manifest.latents.learned_sigma)
    for interval in cache_intervals:
        Schedule.static(timesteps_of(chosen, steps), interval)
    if bad := [size for size in batch_sizes if size < 1]:
        raise InputError(f"a batch size is {bad[0]}; at least 1 is needed")
    if out is not None:
        check_report_folder(out, "bench", About.of(opened), force)
    with _plans(engines, 2 * max(batch_sizes), as_json) as plans:
        entrants, absent = entrants_of(
            opened, backends, cache_intervals, lambda name: device_from_name(device, backend_from_name(name)), plans,
            report=lambda stage: _say(as_json, stage),
        )  # fmt: skip
    benchmark = Benchmark(opened, entrants, absent, chosen, steps, guidance_scale, plans if memory else None)
    interrupted = False
    try:
        with _status(as_json) as tell:
            for images in sorted(set(batch_sizes)):
                for stage in benchmark.measure(example_conditioning(opened.manifest, images), repeats):
                    tell(stage)
    except KeyboardInterrupt:
        interrupted = True
    found = benchmark.result(interrupted)
    if out is not None:
        report = write_report(out, About.of(opened), circumstances(), bench=found)
    if as_json:
        click.echo(found.model_dump_json())
    else:
        for one in bench_tables(found):
            _print_found(one)
        for missing in found.absent:
            click.echo(f"{missing.backend}: {missing.why}")
        if out is not None:
            click.echo(f"{report.recommendation}\nwrote {out / 'report.html'}")
    if interrupted:
        click.echo("interrupted: what is shown was measured before", err=True)
        click.get_current_context().exit(130)


@main.command()
@AS_JSON
def doctor(as_json: bool) -> None:
    """Show which backends work here, their versions, the GPU, and how to install what is missing.

    \b
    Example:
      fora-trt doctor
    """
    from fora_trt.evaluate.doctor import findings

    report = findings()
    if as_json:
        click.echo(json.dumps([vars(finding) for finding in report]))
        return
    table = _table("", "", "found", "to do", numbers=False)
    for finding in report:
        table.add_row(finding.what, finding.found, finding.remedy)
    _print(table)


@main.command()
@click.option("--out", type=click.Path(path_type=Path), default="export", help="Folder to make the bundle in.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default="digits-demo.png", help="The picture.")
@click.option("--steps", type=click.IntRange(min=5), default=50, help="Denoising steps.")
@click.option("--cache-intervals", type=Numbers(), default="1,2,3,5", help="The first must be 1.")
@click.option("--repeats", type=click.IntRange(min=1), default=5, help="Timed runs of each row.")
@BACKEND
@DEVICE
@ENGINES
def demo(
    out: Path,
    output: Path,
    steps: int,
    cache_intervals: tuple[int, ...],
    repeats: int,
    backend: str,
    device: str,
    engines: Path,
) -> None:
    """Export, verify and run the digits at several cache intervals, from the same noise.

    Prints a table and writes one picture that shows all rows.

    \b
    Example:
      fora-trt demo -o digits-demo.png
    """
    if cache_intervals[0] != 1:
        raise click.BadParameter("the first must be 1: all others are compared with it", param_hint="--cache-intervals")
    from fora_trt.runtime.outputs import save_image, writable_file

    writable_file(output)
    context = click.get_current_context()
    context.invoke(export, source="digits", name="digits", out=out, force=True)
    bundle = out / "digits"
    context.invoke(verify, bundle=bundle, backend=backend, device=device, engines=engines)
    from fora_trt.engines.backends import backend_from_name, device_from_name
    from fora_trt.evaluate.bench import Benchmark
    from fora_trt.evaluate.entrants import entrants_of
    from fora_trt.evaluate.pictures import grey_levels_between, picture_of
    from fora_trt.evaluate.results import EAGER
    from fora_trt.runtime.conditioning import conditioning_of_classes
    from fora_trt.runtime.schedulers import scheduler_from_config

    opened, chosen = _open(bundle), backend_from_name(backend)
    where = device_from_name(device, chosen)
    with _plans(engines, 20, False) as plans:
        entrants, _ = entrants_of(opened, [chosen.name], cache_intervals, lambda name: where, plans, [EAGER])
    kept = [replace(one, controls=tuple({3}.intersection(one.controls))) for one in entrants]
    benchmark = Benchmark(opened, kept, [], scheduler_from_config(opened.scheduler_config, None, True), steps)
    with _status(False) as tell:
        for stage in benchmark.measure(conditioning_of_classes(opened.manifest, range(10)), repeats):
            tell(stage)
    (timings,) = benchmark.rows.values()
    bench = benchmark.result()
    table = _table(
        f"10 digits ({where}), median of {repeats} (fastest to slowest)",
        "", "full steps", "seconds", "ideal", "speed-up", "over PyTorch", "difference of 255",
    )  # fmt: skip
    for timing, row in zip(timings, bench.rows, strict=True):
        table.add_row(
            f"{row.backend}, {row.setting.label}",
            f"{row.setting.full_steps} of {row.setting.steps}",
            f"{row.seconds:.2f} ({row.fastest:.2f} to {row.slowest:.2f})",
            f"{row.ideal_speedup:.2f}x",
            f"{row.speedup:.2f}x",
            f"{bench.over_eager(row):.2f}x",
            f"{grey_levels_between(timing.latents, timings[0].latents):.1f}",
        )
    _print(table)
    save_image(picture_of(opened, zip(timings, bench.rows, strict=True)), output)
    click.echo(f"wrote {output}: each row of the table, from the same noise")


def _open(folder: Path) -> Bundle:
    from fora_trt.bundle import Bundle

    return Bundle.open(folder)


def _say(as_json: bool, stage: str) -> None:
    """Tell how far a command is, on the side where it is in nobody's way."""
    if not as_json:
        click.echo(f"{stage} ...", err=True)


def _watched(what: str, quiet: bool) -> Callable[[Iterable[Any]], Iterator[Any]]:
    """A progress bar around an iteration, on a terminal only."""

    def watch(items: Iterable[Any]) -> Iterator[Any]:
        if quiet or not sys.stderr.isatty():
            yield from items
            return
        from rich.console import Console
        from rich.progress import track

        yield from track(items, description=what, console=Console(stderr=True), transient=True)

    return watch


@contextmanager
def _status(quiet: bool) -> Iterator[Callable[[str], None]]:
    """One line that says what is going on, on a terminal only."""
    if quiet or not sys.stderr.isatty():
        yield lambda stage: None
        return
    from rich.console import Console

    with Console(stderr=True).status("") as status:
        yield status.update


@contextmanager
def _bar(quiet: bool) -> Iterator[Callable[[float, str], None]]:
    """A bar that shows a fraction and a phase, on a terminal only."""
    if quiet or not sys.stderr.isatty():
        yield lambda fraction, phase: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("building", total=1.0)
        yield lambda fraction, phase: bar.update(task, completed=fraction, description=phase)


@contextmanager
def _plans(engines: Path, batch: int, quiet: bool) -> Iterator[PlanSource]:
    """Where plans come from, with a word and a bar when some must be built."""
    from fora_trt.engines.plan_store import PlanSource

    with _bar(quiet) as progress:
        yield PlanSource(engines, batch, lambda line: _say(quiet, line), progress)


def _table(title: str, *columns: str, numbers: bool = True) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if numbers and i else "left")
    return table


def _print_found(found: Found) -> None:
    """A table of a report, or as much of it as fits a line; the report has all."""
    from rich.console import Console

    found = found.fitting(Console().width if sys.stdout.isatty() else WIDTH)
    table = _table(found.title)
    for k, heading in enumerate(found.header):
        table.add_column(heading, justify="left" if k < found.texts else "right")
    for row in found.rows:
        table.add_row(*row)
    _print(table)


def _print(table: Table) -> None:
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else WIDTH, markup=False).print(table)


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
