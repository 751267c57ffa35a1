"""The commands: options, one call, one print. The only place that turns errors into exit codes and knows a terminal."""

from __future__ import annotations

from typing import Any

import click

from fora_trt import __version__
from fora_trt.cli.bundles import build, export, inspect
from fora_trt.cli.images import run, sample
from fora_trt.cli.measuring import bench, quality, verify
from fora_trt.cli.start import demo, doctor
from fora_trt.errors import ForaError


class Commands(click.Group):
    """Prints the sentence of a user's mistake and exits with 1; anything else is a defect and shows its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ForaError as error:
            raise click.ClickException(str(error)) from error


@click.group(
    cls=Commands,
    context_settings={"show_default": True, "help_option_names": ["-h", "--help"], "max_content_width": 120},
)
@click.version_option(__version__)
def main() -> None:
    """FORA caching for diffusion transformers: two graphs, two engines, one runtime that alternates them.

    \b
    Examples:
      fora-trt demo
      fora-trt export digits
      fora-trt run export/digits --class-labels 3,7,7 --cache-interval 3 -o digits.png
    """


for command in (export, build, verify, run, sample, bench, quality, inspect, doctor, demo):
    main.add_command(command)
