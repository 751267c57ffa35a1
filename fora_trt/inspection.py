"""Statistics of a bundle's graphs and the speed-up that caching can reach, from the bundle's files alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from fora_trt.bundle import Bundle
from fora_trt.contract import FULL, REUSE, TensorSpec
from fora_trt.engines.memory import bytes_of
from fora_trt.export.statistics import graph_statistics
from fora_trt.plan import HIGHEST_ORDER
from fora_trt.presets import usual_text
from fora_trt.schedule import Schedule

STEPS = 50
CACHE_INTERVALS = (1, 2, 3, 4, 5, 7, 10)


def inspect_bundle(bundle: Bundle) -> dict[str, Any]:
    """Graphs, features and the ideal speed-up per cache interval, as values for JSON.

    `cache_sites` counts the sites by kind; `sites` has the kind of each by module path.
    `arithmetic_kept` is the operations of a reuse step divided by those of a full step; `partial_graphs` has that for
    each partial graph, and the cache sites that it computes, also their number by kind. `ideal_speedup` assumes that a
    reuse step costs nothing; `arithmetic_speedup` counts its operations. `read_bytes` are weights plus the inputs of
    one sample. `kept_bytes_per_sample` is what is stored for reuse steps: features, or their folded sums; with a
    forecast, those of order + 1 full steps, and each computes sums for the reuse steps of order + 1 windows
    (`forecast_bytes_per_sample`, by order).
    """
    manifest = bundle.manifest
    graphs = {name: graph_statistics(bundle.graph_path(name)) for name in manifest.graphs}
    kept_tensors = manifest.graphs[FULL].outputs[1:]
    kept = graphs[REUSE].flops / graphs[FULL].flops if graphs[FULL].flops else 1.0
    schedules = {interval: Schedule.fora(STEPS, interval) for interval in CACHE_INTERVALS}
    return {
        "name": manifest.name,
        "source": manifest.model.options.source,
        "architecture": manifest.model.architecture,
        "precision": manifest.precision,
        "opset": manifest.opset,
        "versions": manifest.versions,
        "measured_error": {name: vars(error) for name, error in (manifest.measured_error or {}).items()},
        "trajectory_error": None if manifest.trajectory_error is None else asdict(manifest.trajectory_error),
        "optimization": manifest.optimization,
        "graphs": {
            name: {**vars(one), "read_bytes": one.weight_bytes + bytes_of(manifest.graphs[name].inputs, 1)}
            for name, one in graphs.items()
        },
        "cache_sites": dict(Counter(site.kind for site in manifest.cache_sites)),
        "sites": {site.module: site.kind for site in manifest.cache_sites},
        "feature_shapes": list(dict.fromkeys(feature.shape for feature in manifest.features())),
        "schedule": bundle.schedule or usual_text(),
        "feature_bytes_per_sample": bytes_of(manifest.features(), 1),
        "arithmetic_kept": kept,
        "partial_graphs": {
            name: {
                "computed": computed,
                "kinds": dict(Counter(site.kind for site in manifest.cache_sites if site.module in computed)),
                "arithmetic_kept": graphs[name].flops / graphs[FULL].flops if graphs[FULL].flops else 1.0,
            }
            for name, computed in manifest.partial_graphs.items()
        },
        "variants": [
            {
                "folder": other.folder.name,
                "timesteps": timesteps,
                "arithmetic": graph_statistics(other.graph_path(FULL)).flops / max(1, graphs[FULL].flops),
            }
            for timesteps, other in bundle.variants
        ],
        "steps": STEPS,
        "cache_intervals": {
            interval: {
                "full_steps": schedule.full_steps,
                "ideal_speedup": schedule.ideal_speedup(),
                "kept_bytes_per_sample": _kept_bytes(kept_tensors, schedule),
                "forecast_bytes_per_sample": {
                    order: _kept_bytes(kept_tensors, schedule.with_forecast(order))
                    for order in range(1, HIGHEST_ORDER + 1)
                },
                "arithmetic_speedup": STEPS / (schedule.full_steps + kept * (STEPS - schedule.full_steps)),
            }
            for interval, schedule in schedules.items()
        },
    }


def _kept_bytes(tensors: Sequence[TensorSpec], schedule: Schedule) -> int:
    """Bytes of one sample that full steps keep for reuse steps, in `tensors` of each."""
    return schedule.depth * bytes_of(tensors, 1, schedule.kept_sums)
