"""The commands: each parses options, makes one call and prints the result.

No other package turns errors into exit codes or writes to the terminal.
"""

from __future__ import annotations

from typing import Any

import click

from fora_trt import __version__
from fora_trt.cli.bench import bench
from fora_trt.cli.build import build
from fora_trt.cli.calibrate import calibrate
from fora_trt.cli.demo import demo
from fora_trt.cli.doctor import doctor
from fora_trt.cli.export import export
from fora_trt.cli.inspect import inspect
from fora_trt.cli.quality import quality
from fora_trt.cli.run import run
from fora_trt.cli.sample import sample
from fora_trt.cli.verify import verify
from fora_trt.errors import ForaError


class Commands(click.Group):
    """Prints the message of a `ForaError` and exits with 1; any other exception is a bug and shows its traceback."""

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
    """FORA caching for diffusion transformers: exports a full and a reuse graph and alternates their engines.

    \b
    Examples:
      fora-trt demo
      fora-trt export digits
      fora-trt run export/digits --class-labels 3,7,7 --cache-interval 3 -o digits.png
    """


for command in (export, build, verify, run, sample, bench, quality, calibrate, inspect, doctor, demo):
    main.add_command(command)
