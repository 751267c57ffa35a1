"""The command `build`: builds the TensorRT plans of a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from fora_trt.cli.options import AS_JSON, BUNDLE, BatchProfile, Words, refuse_given
from fora_trt.cli.terminal import bar, in_bytes, new_table, print_json, print_table, say

if TYPE_CHECKING:
    from fora_trt.engines.tensorrt.plan_store import PlanSet


@click.command()
@BUNDLE
@click.option(
    "--backend",
    type=click.Choice(["auto", "tensorrt", "tensorrt-rtx"]),
    default="auto",
    help="auto: tensorrt if it is installed and a GPU is present, else tensorrt-rtx.",
)
@click.option(
    "--batch",
    "profiles",
    type=BatchProfile(),
    multiple=True,
    default=["1:2:16"],
    help="Optimization profile: batch sizes MIN to MAX, tuned for OPT; guidance doubles the batch. Repeatable.",
)
@click.option(
    "--optimization-level",
    type=click.IntRange(0, 5),
    help="Optimization level of tensorrt; higher levels search longer for fast kernels.  [default: 3]",
    show_default=False,
)
@click.option(
    "--workspace",
    type=click.FloatRange(min=0, min_open=True),
    help="Scratch memory that a tensorrt kernel may use, in GiB.  [default: all GPU memory]",
    show_default=False,
)
@click.option(
    "--timing-cache",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File with tensorrt's kernel timings; read and extended.  [default: a file in --out]",
    show_default=False,
)
@click.option(
    "--compute-capability",
    type=Words(),
    default="",
    help="Compute capabilities that tensorrt-rtx builds for, such as 8.9,12.0.  [default: 8.0,8.6,8.9,12.0]",
    show_default=False,
)
@click.option("--out", type=click.Path(path_type=Path), default="engines", help="Folder of the plans.")
@click.option("--force", is_flag=True, help="Build again even if matching plans exist.")
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
    """Build the TensorRT plans of a bundle, which `run` and the other commands load.

    tensorrt builds for this machine's GPU. tensorrt-rtx builds without a GPU, for GeForce and workstation GPUs.
    Existing plans that match the bundle and the options are kept.

    \b
    Examples:
      fora-trt build export/digits
      fora-trt build export/dit-xl-2-256 --backend tensorrt --batch 2:8:32 --optimization-level 5
      fora-trt build export/dit-xl-2-256 --backend tensorrt-rtx --compute-capability 8.9,12.0
    """
    from fora_trt.bundle import Bundle
    from fora_trt.engines.tensorrt.library import first_gpu, library_for_building
    from fora_trt.engines.tensorrt.plan_builder import PlanOptions, Profile
    from fora_trt.engines.tensorrt.plan_store import build_plans, target_of

    gpu = first_gpu()
    library = library_for_building(backend, gpu)
    target = target_of(library, gpu, compute_capability)
    if library.is_rtx:
        why = "tensorrt-rtx times nothing while it builds; leave it out, or give --backend tensorrt"
        refuse_given(why, "optimization_level", "workspace", "timing_cache")
    options = PlanOptions(
        profiles=tuple(Profile(minimum=a, optimum=b, maximum=c) for a, b, c in profiles),
        optimization_level=optimization_level,
        workspace_gib=workspace,
    )
    opened = Bundle.read(bundle)
    made = []
    for one in (opened, *(other for _, other in opened.variants)):
        with bar() as progress:
            made.append(
                build_plans(
                    one, target, options, out, timing_cache=timing_cache, force=force, report=say, progress=progress
                )
            )
    if as_json:
        first, *others = [
            {"folder": str(plans.folder), "reused": reused, **plans.manifest.model_dump(mode="json")}
            for plans, reused in made
        ]
        print_json({**first, **({"variants": others} if others else {})})
        return
    for plans, reused in made:
        _show(plans, reused)


def _show(plans: PlanSet, reused: bool) -> None:
    """Print each plan, and the attention layers without a fused kernel."""
    made_for = plans.manifest.gpu or f"compute capability {', '.join(plans.manifest.compute_capabilities)}"
    click.echo(f"{'found' if reused else 'wrote'} {plans.folder}, for {made_for}")
    table = new_table("", "plan", "size", "attentions", "fused", "built in")
    for name, plan in plans.manifest.plans.items():
        states = [attention.fused for attention in plan.attentions]
        fused = "unknown" if None in states else str(states.count(True))
        size = in_bytes(plans.manifest.files[plan.file].size)
        table.add_row(name, size, str(len(plan.attentions)), fused, f"{plan.seconds:.1f} s")
    print_table(table)
    unfused = [one.name for plan in plans.manifest.plans.values() for one in plan.attentions if one.fused is False]
    if unfused:
        click.echo(
            f"{unfused[0]}{f' and {len(unfused) - 1} more' if len(unfused) > 1 else ''}: no fused attention kernel; "
            "fused kernels need fp16 or bf16 and a head size of 16 to 256"
        )
