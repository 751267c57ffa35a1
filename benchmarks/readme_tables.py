"""Make the tables of the README: time, speed-up and difference on this machine, with what it was measured on.

    python -m benchmarks.readme_tables cpu-2-cores

writes benchmarks/results/<model>_<hardware>_<date>.json and .md for the digits and for DiT-S/2 with random weights.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from fora_trt.evaluate.comparison import grey_levels_between, measure, name_of, settings_of

from benchmarks.digits_accuracy import digits_accuracy
from fora_trt.bundle import Bundle
from fora_trt.engines.backends import backend_from_name, device_from_name
from fora_trt.evaluate.circumstances import circumstances
from fora_trt.export.write import bundle_from_model
from fora_trt.models.sources import model_from_source
from fora_trt.runtime.conditioning import conditioning_of_classes

RESULTS = Path(__file__).parent / "results"
STEPS, CACHE_INTERVALS = 50, (1, 2, 3, 5)


def rows_of(bundle: Bundle, class_labels: Sequence[int], guidance_scale: float, repeats: int) -> list[dict[str, Any]]:
    """A row per setting; difference from interval 1 in grey levels for pixels, else relative to the latents' norm."""
    backend = backend_from_name("auto")
    settings = settings_of(
        bundle, backend.name, device_from_name("auto", backend), STEPS, CACHE_INTERVALS, also=("torch-compile",)
    )
    wanted = conditioning_of_classes(bundle.manifest, class_labels)
    with click.progressbar(
        measure(settings, wanted, guidance_scale, repeats), length=len(settings) * (repeats + 1)
    ) as bar:
        for _ in bar:
            pass
    baseline = next(setting for setting in settings if setting.name == name_of(1))
    rows = []
    for setting in settings:
        error = setting.latents - baseline.latents
        pixels = bundle.manifest.latents.pixels
        rows.append(
            {
                "setting": setting.name,
                "steps": setting.schedule.steps,
                "full_steps": setting.schedule.full_steps,
                "seconds": setting.seconds,
                "fastest": setting.spread[0],
                "slowest": setting.spread[1],
                "speedup": baseline.seconds / setting.seconds,
                "ideal": STEPS / setting.schedule.full_steps,
                "difference": grey_levels_between(setting.latents, baseline.latents)
                if pixels
                else (error.norm() / baseline.latents.norm()).item(),
                **setting.median_milliseconds(),
            }
        )
    return rows


def write(result: dict[str, Any], hardware: str) -> None:
    """The result as JSON and as a table in Markdown."""
    stem = RESULTS / f"{result['model']}_{hardware}_{result['measured_on']['date']}"
    RESULTS.mkdir(exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    kind = "difference (of 255)" if result["difference"] == "grey levels" else "difference (relative)"
    lines = [
        f"# {result['title']}",
        "",
        ", ".join(f"{key} {value}" for key, value in result["measured_on"].items() if value is not None),
        "",
        f"{STEPS} steps, {result['images']} images, guidance {result['guidance_scale']}, "
        f"median of {result['repeats']} interleaved runs.",
        "",
        f"| setting | full steps | seconds | spread | full step | reuse step | speed-up | ideal | {kind} |",
        "| --- | --: | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for row in result["rows"]:
        reuse = "" if row["reuse_step_ms"] is None else f"{row['reuse_step_ms']:.1f} ms"
        lines.append(
            f"| {row['setting']} | {row['full_steps']} of {row['steps']} | {row['seconds']:.2f} "
            f"| {row['fastest']:.2f} to {row['slowest']:.2f} | {row['full_step_ms']:.1f} ms | {reuse} "
            f"| {row['speedup']:.2f}x | {row['ideal']:.2f}x | {row['difference']:.3g} |"
        )
    for name, value in result.get("accuracy", {}).items():
        lines += ["", f"Read as the class asked for, {name}: {value:.1%}"]
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n")
    click.echo(f"wrote {stem}.json and .md")


@click.command()
@click.argument("hardware")
@click.option("--repeats", type=click.IntRange(min=1), default=10, show_default=True)
def main(hardware: str, repeats: int) -> None:
    """Measure the digits and DiT-S/2; HARDWARE is a word for the names of the files, such as cpu-2-cores."""
    measured_on = circumstances()
    with tempfile.TemporaryDirectory() as folder:
        digits = bundle_from_model(model_from_source("digits"), Path(folder) / "digits")
        write(
            {
                "title": "Digits, 8 x 8 pixels, trained",
                "model": "digits",
                "measured_on": measured_on,
                "images": 10,
                "guidance_scale": 1.5,
                "repeats": repeats,
                "difference": "grey levels",
                "rows": rows_of(digits, range(10), 1.5, repeats),
                "accuracy": digits_accuracy(digits, CACHE_INTERVALS),
            },
            hardware,
        )
        small = bundle_from_model(model_from_source("random:DiT-S/2"), Path(folder) / "dit-s-2")
        write(
            {
                "title": "DiT-S/2, 256 x 256 pixels (latents), random weights: for time only",
                "model": "dit-s-2",
                "measured_on": measured_on,
                "images": 1,
                "guidance_scale": 1.5,
                "repeats": repeats,
                "difference": "relative",
                "rows": rows_of(small, [207], 1.5, repeats),
            },
            hardware,
        )


if __name__ == "__main__":
    main()
