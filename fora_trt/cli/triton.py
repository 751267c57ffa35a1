"""The command `triton`: writes a bundle as a model of NVIDIA's Triton server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fora_trt.cli.options import AS_JSON, BACKEND, BUNDLE, SCHEDULE_FORMS, SCHEDULER, TIMESTEP_SPACING, VAE, grouped
from fora_trt.cli.serve import BATCHING, refuse_without_effect
from fora_trt.cli.terminal import print_json

LIMITS = grouped(
    "limits",
    click.option("--queue", type=click.IntRange(min=1), default=64, help="Requests that wait; Triton refuses more."),
    click.option("--max-prompt", type=click.IntRange(min=1), default=4000, help="Characters of a prompt."),
    click.option("--max-steps", type=click.IntRange(min=1), default=250, help="Denoising steps of a request."),
)
MODEL = grouped(
    "model",
    click.option(
        "--steps",
        type=click.IntRange(min=1),
        help="Denoising steps of a request that names none.  [default: those of a schedule file in the bundle, or 50]",
        show_default=False,
    ),
    click.option("--schedule", default="", help=f"Schedule of a request that names none: {SCHEDULE_FORMS}."),
    SCHEDULER,
    TIMESTEP_SPACING,
    BACKEND,
    click.option("--device", default="auto", help="auto (GPUs of the server, or else its CPU), cpu, cuda or cuda:N."),
    click.option(
        "--engines",
        type=click.Path(path_type=Path),
        help="Folder of TensorRT plans, or one set of plans, to copy.  [default: built by the server at its start]",
        show_default=False,
    ),
    VAE,
)


@click.command()
@BUNDLE
@click.option(
    "-o",
    "--output",
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder of the repository; the model is written into a folder in it.",
)
@click.option("--name", help="Name of the model.  [default: that of the bundle's folder]", show_default=False)
@click.option("--instances", type=click.IntRange(min=1), default=1, help="Processes for each GPU, or on the CPU.")
@BATCHING
@LIMITS
@MODEL
@click.option("--force", is_flag=True, help="Replace a model that this command wrote, and all that its folder has.")
@AS_JSON
def triton(
    bundle: Path,
    output: Path,
    name: str | None,
    instances: int,
    batching: dict[str, Any],
    limits: dict[str, Any],
    model: dict[str, Any],
    force: bool,
    as_json: bool,
) -> None:
    """Write a bundle into a model repository of NVIDIA's Triton server, for its Python backend.

    The folder of the model has all that the server needs, except fora-trt itself and the text encoder of a model with
    prompts: it can be copied to another machine.

    \b
    Examples:
      fora-trt triton export/digits -o model_repository
      fora-trt triton export/dit-xl-2-256 -o model_repository --device cuda --engines engines --max-batch-size 16
    """
    from fora_trt.serve.triton import TritonConfig, write_model

    batching["join"] = batching["join"] == "windows"
    refuse_without_effect(batching["join"])
    config = TritonConfig(bundle, name, instances=instances, **batching, **limits, **model)
    written = write_model(config, output, force)
    if as_json:
        print_json({"folder": str(written.folder), "name": written.name, "text_encoder": written.text_encoder})
        return
    click.echo(f"wrote {written.folder}")
    if written.text_encoder is not None:
        click.echo(f"the server also needs the text encoder at {written.text_encoder}")
