"""The command `inspect`: shows a bundle's graphs and the speed-up that caching can reach."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fora_trt.cli.options import AS_JSON, BUNDLE
from fora_trt.cli.terminal import in_bytes, new_table, print_json, print_table
from fora_trt.plan import HIGHEST_ORDER


@click.command()
@BUNDLE
@AS_JSON
def inspect(bundle: Path, as_json: bool) -> None:
    """Show a bundle's graphs, cache sites, and the speed-up that caching can reach.

    \b
    Example:
      fora-trt inspect export/digits
    """
    from fora_trt.bundle import Bundle
    from fora_trt.inspection import inspect_bundle

    found = inspect_bundle(Bundle.open(bundle))
    if as_json:
        print_json(found)
        return
    made = f"{found['architecture']} from {found['source']}, {found['precision']}, opset {found['opset']}"
    click.echo(f"{found['name']}: {made}")
    sites = ", ".join(f"{count} {kind}" for kind, count in found["cache_sites"].items())
    size = in_bytes(found["feature_bytes_per_sample"])
    shapes = " or ".join(str([*shape]) for shape in found["feature_shapes"])
    click.echo(f"cache sites: {sites}; feature shape {shapes}; all features take {size} per sample")
    graphs = new_table("graphs", "graph", "nodes", "weights", "read at a batch of 1", "operations per sample")
    for name, graph in found["graphs"].items():
        weights, read = (in_bytes(graph[size]) for size in ("weight_bytes", "read_bytes"))
        graphs.add_row(name, str(graph["nodes"]), weights, read, f"{graph['flops'] / 1e9:.3f} GFLOP")
    print_table(graphs)
    click.echo(f"optimization: {found['optimization']}")
    click.echo(f"schedule where none is given: {found['schedule']}")
    click.echo(f"a reuse step does {found['arithmetic_kept']:.2%} of the arithmetic of a full step")
    _show_partial_steps(found)
    _show_variants(found)
    table = new_table(
        f"{found['steps']} steps",
        "cache interval",
        "full steps",
        "ideal speed-up",
        "counting reuse steps",
        "memory per sample",
        *(f"forecast {order}" for order in range(1, HIGHEST_ORDER + 1)),
    )
    for interval, row in found["cache_intervals"].items():
        table.add_row(
            str(interval),
            str(row["full_steps"]),
            f"{row['ideal_speedup']:.2f}x",
            f"{row['arithmetic_speedup']:.2f}x",
            in_bytes(row["kept_bytes_per_sample"]),
            *map(in_bytes, row["forecast_bytes_per_sample"].values()),
        )
    print_table(table)


def _show_partial_steps(found: dict[str, Any]) -> None:
    """Print the partial graphs, if there are any."""
    if found["partial_graphs"]:
        partial = new_table("partial steps", "graph", "computed cache sites", "arithmetic of a full step")
        for name, one in found["partial_graphs"].items():
            computed = ", ".join(
                f"{one['kinds'].get(kind, 0)} of {all} {kind}" for kind, all in found["cache_sites"].items()
            )
            partial.add_row(name, computed, f"{one['arithmetic_kept']:.1%}")
        print_table(partial)


def _show_variants(found: dict[str, Any]) -> None:
    """Print the networks for some timesteps, if there are any."""
    if found["variants"]:
        variants = new_table("other networks", "bundle", "timesteps", "arithmetic of a full step")
        for one in found["variants"]:
            low, high = one["timesteps"]
            variants.add_row(one["folder"], f"{low:g} to below {high:g}", f"{one['arithmetic']:.1%}")
        print_table(variants)
