"""The command `export`: exports a model as a bundle."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fora_trt.cli.options import AS_JSON, CALL, PRECISION, VAE, ImageSize, Words, refuse_given
from fora_trt.cli.terminal import print_json, say
from fora_trt.contract import OPTIMIZATIONS
from fora_trt.errors import BackendError, ExportError, ForaError, first_line
from fora_trt.untrusted import name_problem, shown

if TYPE_CHECKING:
    from fora_trt.bundle import Bundle, TrajectoryError
    from fora_trt.models.recipes import Recipe
    from fora_trt.models.spec import Model

DEFAULT_OPSET = 23


@click.command()
@click.argument("source")
@click.option("--name", help="Name of the bundle.  [default: from the source]", show_default=False)
@click.option("--out", type=click.Path(path_type=Path), default="export", help="Folder in which the bundle is written.")
@click.option(
    "--precision", type=PRECISION, help="Precision of weights and arithmetic.  [default: fp32]", show_default=False
)
@click.option(
    "--image-size",
    type=ImageSize(),
    help="Image size in pixels: one number for a square, or HEIGHTxWIDTH.  [default: the model's own]",
)
@click.option(
    "--cache",
    type=Words(),
    multiple=True,
    help="Layers to cache: kinds of cache sites or patterns of module paths; comma-separated or repeated."
    "  [default: all kinds]",
    show_default=False,
)
@click.option(
    "--exclude",
    type=Words(),
    multiple=True,
    help="Layers that are not cached: kinds or patterns as for --cache.  [default: none]",
    show_default=False,
)
@click.option(
    "--architecture",
    help="DiT, SiT, PixArt-alpha or PixArt-Sigma, if the tensors do not tell.  [default: detected]",
)
@click.option(
    "--weights",
    metavar="ema|raw|KEY",
    help="Weights of a checkpoint that holds several: averaged, not averaged, or by name.  [default: averaged]",
    show_default=False,
)
@click.option(
    "--null-class/--no-null-class",
    default=None,
    help="Whether the last row of a state dict's class embeddings is the null class of guidance.  [default: it is]",
    show_default=False,
)
@click.option(
    "--num-heads", type=click.IntRange(min=1), help="Attention heads of a state dict, if its width does not imply them."
)
@click.option(
    "--text-length", type=click.IntRange(min=1), help="Largest number of prompt tokens.  [default: the model's own]"
)
@click.option("--frames", type=click.IntRange(min=1), help="Frames of a video.  [default: the pipeline's own]")
@CALL
@click.option(
    "--component",
    help="The transformer of a pipeline with several, such as transformer_2.  [default: all]",
    show_default=False,
)
@VAE
@click.option(
    "--optimize",
    type=click.Choice(OPTIMIZATIONS),
    help="Work to move out of the loop: none, the conditioning path, or that and the cached sums.  [default: all]",
    show_default=False,
)
@click.option(
    "--schedule",
    help="Schedule for commands that are given none: a text form, or a file, which is copied.  [default: fora:3]",
    show_default=False,
)
@click.option("--opset", type=int, help="ONNX opset.  [default: 23]")
@click.option(
    "--measure-trajectory/--no-measure-trajectory",
    "measured",
    default=None,
    help="Measure the error of fp16 or bf16 trajectories against fp32.  [default: if it takes under two minutes]",
    show_default=False,
)
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@AS_JSON
def export(source: str, out: Path, measured: bool | None, force: bool, as_json: bool, **given: Any) -> None:
    """Split a model into a full and a reuse graph and write them as a bundle.

    SOURCE is one of: `digits` (a trained model that comes with fora-trt); the folder or hub id of a diffusers pipeline
    with a transformer (DiT, PixArt, SD3, FLUX, Wan, LTX, ...); a state dict or a trainer's checkpoint of the DiT, SiT
    or PixArt authors; `package.module:factory` for your own network;
    `random:DiT-XL/2` or another variant (random weights, for timing); a .toml recipe file.

    \b
    Examples:
      fora-trt export digits
      fora-trt export facebook/DiT-XL-2-256 --precision fp16
      fora-trt export stabilityai/stable-diffusion-3-medium-diffusers --precision fp16 --image-size 1024
      fora-trt export DiT-XL-2-512x512.pt --vae stabilityai/sd-vae-ft-ema
      fora-trt export results/0050000.pt --weights ema
      fora-trt export my_package.model:make --cache 'blocks.*.attn' --cache 'blocks.*.mlp'
      fora-trt export random:DiT-S/2 --name s2 --exclude 'transformer_blocks.0.*'
      fora-trt export export/pixart-sigma-1024.toml
    """
    recipe = _recipe(source, given)
    from fora_trt.export.traced import check_opset
    from fora_trt.files import refuse_existing
    from fora_trt.models.sources import source_from_options

    check_opset(recipe.opset or DEFAULT_OPSET)
    if measured and (recipe.precision or "fp32") == "fp32":
        refuse_given("trajectories are compared with those in fp32; give --precision fp16 or bf16", "measured")
    target = out / _folder_name(recipe.name or source_from_options(recipe.options()).name)
    refuse_existing(target, force, "bundle", ExportError)
    bundles, notes = _exported(recipe, target, measured, force)
    if as_json:
        first, *others = [{"bundle": str(one.folder), **one.manifest.model_dump(mode="json")} for one in bundles]
        print_json({**first, "notes": notes, **({"other_transformers": others} if others else {})})
        return
    for one in bundles:
        _show(one)


def _exported(recipe: Recipe, target: Path, measured: bool | None, force: bool) -> tuple[list[Bundle], list[str]]:
    """Export each transformer of the source; the bundles, and sentences about what was chosen."""
    from fora_trt.exporting import export_models, models_of_options

    notes, precision = list[str](), recipe.precision or "fp32"

    def models() -> Iterator[Model]:
        for model in models_of_options(recipe.options(), precision):
            for note in model.notes:
                click.echo(note, err=True)
            notes.extend(model.notes)
            if measured and model.spec.pipeline is not None:
                refuse_given("the trajectories of a pipeline are its own", "measured")
            yield model

    def measure(staged: Bundle, target: Path) -> TrajectoryError | None:
        if measured is False or precision == "fp32" or staged.manifest.pipeline is not None:
            return None
        return _trajectory_error(staged, target, measured is True)

    say(f"loading {recipe.source}")
    level, opset = recipe.optimize or OPTIMIZATIONS[-1], recipe.opset or DEFAULT_OPSET
    return export_models(models(), target, recipe.component, opset, level, recipe.schedule, force, say, measure), notes


def _show(bundle: Bundle) -> None:
    """Print what was written and its error against PyTorch."""
    manifest = bundle.manifest
    click.echo(f"wrote {bundle.folder}: {len(manifest.cache_sites)} cache sites, {manifest.precision}")
    if manifest.measured_error is None:
        click.echo(f"the graphs were {manifest.measured_on}")
    else:
        shown = ", ".join(f"{name} graph {error.relative:.1e}" for name, error in manifest.measured_error.items())
        click.echo(f"largest error relative to PyTorch in fp32, on {manifest.measured_on}: {shown}")
    if (whole := manifest.trajectory_error) is not None:
        shown = ", ".join(f"{error.relative:.1e} ({schedule})" for schedule, error in whole.errors.items())
        click.echo(f"error of {whole.steps} steps relative to fp32, on {whole.backend}: {shown}")
    for _, other in bundle.variants:
        _show(other)


def _trajectory_error(staged: Bundle, target: Path, asked: bool) -> TrajectoryError | None:
    """The error of whole trajectories of a bundle that will be written to `target`.

    Returns None, with a message, if it cannot be measured or would take long. Raises `BackendError` if the user asked
    for it and it cannot be measured.
    """
    from fora_trt.engines.backends import backend_from_name, device_from_name
    from fora_trt.evaluate.verify import measured_trajectories

    backend = backend_from_name("torch")  # always installed, and runs the graphs
    say("measuring trajectories against fp32")
    try:
        within_seconds = float("inf") if asked else 120.0
        found = measured_trajectories(staged, backend.name, device_from_name("auto", backend), within_seconds)
    except Exception as error:  # such as out of memory; the exported bundle is still valid
        if asked and not isinstance(error, ForaError):
            raise
        reason = (first_line(error) or type(error).__name__).replace(str(staged.folder), str(target))
        if asked:
            raise BackendError(
                f"the trajectory error could not be measured, so no bundle was written: {reason}; "
                "--no-measure-trajectory exports without measuring"
            ) from error
        click.echo(f"the trajectory error could not be measured: {reason}", err=True)
        return None
    if found is None:
        click.echo(
            "trajectory error not measured: it would take over two minutes; --measure-trajectory measures it anyway",
            err=True,
        )
    return found


def _recipe(source: str, given: dict[str, Any]) -> Recipe:
    """The options of a recipe file, if SOURCE is one, and of the command line; the latter override the file's."""
    from fora_trt.models.recipes import Recipe, read_recipe

    recipe = read_recipe(Path(source)) if source.endswith(".toml") else Recipe(source=source)
    given["call"] = dict(given["call"]) or None
    for name in ("cache", "exclude"):
        given[name] = tuple(pattern for patterns in given[name] for pattern in patterns) if given[name] else None
    return recipe.model_copy(update={key: value for key, value in given.items() if value is not None})


def _folder_name(name: str) -> str:
    if problem := name_problem(name):
        raise click.BadParameter(
            f"'{shown(name)}' is not a folder name: it {problem}; give a name without slashes that does not begin with "
            "a dot",
            param_hint="--name",
        )
    return name
