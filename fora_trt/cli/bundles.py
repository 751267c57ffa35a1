"""Commands that make bundles and plans, and that look into them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fora_trt.cli.options import AS_JSON, BUNDLE, PRECISION, VAE, BatchProfile, ImageSize, Words
from fora_trt.cli.terminal import bar, in_bytes, new_table, print_table, say
from fora_trt.errors import BackendError
from fora_trt.models.spec import OPTIMIZATIONS

if TYPE_CHECKING:
    from fora_trt.bundle import Bundle
    from fora_trt.models.recipes import Recipe


@click.command()
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
@click.option(
    "--optimize",
    type=click.Choice(OPTIMIZATIONS),
    help="What leaves the loop: what timestep and class decide, then the cached sum too.  [default: all that can]",
    show_default=False,
)
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

    say(as_json, f"loading {recipe.source}")
    target = None if recipe.name is None else out / _folder_name(recipe.name)
    model = model_from_source(recipe.options(), recipe.precision or "fp32", recipe.cache)
    bundle = bundle_from_model(
        model,
        target or out / _folder_name(model.name),
        opset=recipe.opset or 23,
        optimization=recipe.optimize or OPTIMIZATIONS[-1],
        force=force,
        report=lambda stage: say(as_json, stage),
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
    say(as_json, "measuring trajectories against fp32")
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


@click.command()
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
    with bar(as_json) as progress:
        plans, reused = build_plans(
            Bundle.read(bundle),
            target,
            options,
            out,
            timing_cache=timing_cache,
            force=force,
            report=lambda stage: say(as_json, stage),
            progress=progress,
        )
    if as_json:
        found = {"folder": str(plans.folder), "reused": reused, **plans.manifest.model_dump(mode="json")}
        click.echo(json.dumps(found))
        return
    made_for = plans.manifest.gpu or f"compute capability {', '.join(plans.manifest.compute_capabilities)}"
    click.echo(f"{'found' if reused else 'wrote'} {plans.folder}, for {made_for}")
    table = new_table("", "plan", "size", "attentions", "fused", "built in")
    for name, plan in plans.manifest.plans.items():
        told = [attention.fused for attention in plan.attentions]
        fused = "not told" if None in told else str(told.count(True))
        size = in_bytes(plans.manifest.files[plan.file].size)
        table.add_row(name, size, str(len(plan.attentions)), fused, f"{plan.seconds:.1f} s")
    print_table(table)
    apart = [one.name for plan in plans.manifest.plans.values() for one in plan.attentions if one.fused is False]
    if apart:
        click.echo(
            f"{apart[0]}{f' and {len(apart) - 1} more' if len(apart) > 1 else ''}: no fused kernel fits; "
            "those need fp16 or bf16 and a head size of 16 to 256"
        )


@click.command()
@BUNDLE
@AS_JSON
def inspect(bundle: Path, as_json: bool) -> None:
    """Show what a bundle holds and what caching can save with it.

    \b
    Example:
      fora-trt inspect export/digits
    """
    from fora_trt.bundle import Bundle
    from fora_trt.evaluate.inspection import inspect_bundle

    found = inspect_bundle(Bundle.open(bundle))
    if as_json:
        click.echo(json.dumps(found))
        return
    made = f"{found['architecture']} from {found['source']}, {found['precision']}, opset {found['opset']}"
    click.echo(f"{found['name']}: {made}")
    sites = ", ".join(f"{count} {kind}" for kind, count in found["cache_sites"].items())
    size = in_bytes(found["feature_bytes_per_sample"])
    shapes = " or ".join(str([*shape]) for shape in found["feature_shapes"])
    click.echo(f"cache sites: {sites}; a feature is {shapes}, all of them {size} a sample")
    graphs = new_table("graphs", "graph", "nodes", "weights", "read at a batch of 1", "operations a sample")
    for name, graph in found["graphs"].items():
        weights, read = (in_bytes(graph[size]) for size in ("weight_bytes", "read_bytes"))
        graphs.add_row(name, str(graph["nodes"]), weights, read, f"{graph['flops'] / 1e9:.3f} GFLOP")
    print_table(graphs)
    click.echo(f"optimized: {found['optimization']}")
    click.echo(f"a reuse step keeps {found['arithmetic_kept']:.2%} of the arithmetic of a full step")
    table = new_table(
        f"{found['steps']} steps",
        "cache interval",
        "full steps",
        "ideal speed-up",
        "with the reuse steps' arithmetic",
        "kept a sample",
    )
    for interval, row in found["cache_intervals"].items():
        table.add_row(
            str(interval),
            str(row["full_steps"]),
            f"{row['ideal_speedup']:.2f}x",
            f"{row['arithmetic_speedup']:.2f}x",
            in_bytes(row["kept_bytes_per_sample"]),
        )
    print_table(table)
