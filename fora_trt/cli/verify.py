"""The command `verify`: compares the results of a bundle with PyTorch."""

from __future__ import annotations

from pathlib import Path

import click

from fora_trt.cli.options import (
    AS_JSON,
    BACKEND,
    BUNDLE,
    DEVICE,
    ENGINES,
    SCHEDULES,
    TRUST_SOURCE,
    Numbers,
    fitting,
    own_schedule,
    pipeline_of,
    schedules_of,
)
from fora_trt.cli.terminal import new_table, print_json, print_table, watched
from fora_trt.schedule import fora_text, text_with_forecast


@click.command()
@BUNDLE
@BACKEND
@DEVICE
@ENGINES
@click.option("--steps", type=click.IntRange(min=1), default=50, help="Steps of the trajectories.")
@click.option("--cache-intervals", type=Numbers(), default="2,3,5", help="Cache intervals of the trajectories.")
@SCHEDULES
@TRUST_SOURCE
@AS_JSON
def verify(
    bundle: Path,
    backend: str,
    device: str,
    engines: Path,
    steps: int,
    cache_intervals: tuple[int, ...],
    schedules: tuple[str, ...],
    trust_source: bool,
    as_json: bool,
) -> None:
    """Compare a bundle with PyTorch: a step of each graph, then whole cached trajectories.

    Without --schedule, one more trajectory forecasts features, at the largest of the cache intervals, and one has the
    schedule of the bundle if that has partial steps.

    The reference is the checkpoint in PyTorch with caching hooks, in fp32. If the checkpoint is not available, it is
    the bundle's full graph without folding, in fp32; the output names the reference. Exits with 1 if an error exceeds
    the tolerance for the bundle's precision.

    \b
    Example:
      fora-trt verify export/digits
    """
    from fora_trt.evaluate.unfolded import reference_from_bundle
    from fora_trt.evaluate.verify import compare_with_pytorch

    settings = {"steps": steps, "backend": backend, "device": device, "engines": engines, "batch_size": 2}
    settings["trust_source"] = trust_source
    pipeline = pipeline_of(bundle, **settings)
    own = () if schedules else own_schedule(pipeline)
    cache_intervals = fitting(cache_intervals, pipeline.config.steps)
    reference, description = reference_from_bundle(pipeline.bundle, pipeline.device)
    if not schedules:
        forecasts = pipeline.manifest.can_forecast and max(cache_intervals) > 1
        forecast = (text_with_forecast(fora_text(max(cache_intervals)), 2),) if forecasts else ()
        schedules = (*forecast, *own)
    comparisons = compare_with_pytorch(pipeline, schedules_of(cache_intervals, schedules), reference)
    title = f"{bundle} on {pipeline.backend.name} ({pipeline.device}) against {description}"
    table = new_table(title, "compared", "maximum error", "relative", "tolerance", "")
    done = []
    for one in watched("comparing")(comparisons):
        done.append(one)
        verdict = "ok" if one.passed else "TOO LARGE"
        error = one.error
        table.add_row(one.what, f"{error.maximum:.2e}", f"{error.relative:.2e}", f"{one.tolerance:.0e}", verdict)
    passed = all(one.passed for one in done)
    if as_json:
        rows = [{"what": one.what, **vars(one.error), "tolerance": one.tolerance, "passed": one.passed} for one in done]
        result = {"backend": pipeline.backend.name, "reference": description, "passed": passed, "comparisons": rows}
        print_json(result)
    else:
        print_table(table)
    if not passed:
        raise click.ClickException(
            f"{bundle} differs from {description} by more than the tolerance for {pipeline.manifest.precision}; "
            "the failed comparisons are printed above"
        )
