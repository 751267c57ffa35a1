"""The commands: each parses options, makes one call and prints the result.

No other package turns errors into exit codes or writes to the terminal.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EDQUOT, EFBIG, EIO, ENOSPC
from pathlib import Path
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
from fora_trt.cli.serve import serve
from fora_trt.cli.terminal import DISPLAY, VERBOSITY
from fora_trt.cli.triton import triton
from fora_trt.cli.verify import verify
from fora_trt.errors import LONGEST_MESSAGE, ForaError, ForaWarning
from fora_trt.interruption import INTERRUPTED, caught, interruptible, unmasked
from fora_trt.quiet import let_libraries_speak, libraries_are_quiet
from fora_trt.untrusted import one_line

FULL = (ENOSPC, EDQUOT, EFBIG, EIO)
"""Errors of a write that are the device's fault, or its owner's."""


class Commands(click.Group):
    """Turns what ends a command into an exit code and a sentence; any other exception is a bug with a traceback.

    Exit codes are 0, 1 for a `ForaError` and for output that cannot be written, 2 for wrong usage, which click finds,
    and 130 for Ctrl-C and SIGTERM.
    """

    def main(self, *args: Any, **kwargs: Any) -> Any:
        _open_streams()
        with interruptible(), libraries_are_quiet():
            warnings.showwarning = _show_warning
            return super().main(*args, **kwargs)

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        """Add a command, and to the command the options of all."""
        cmd.params += [VERBOSE, QUIET]
        super().add_command(cmd, name)

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with _endings(None):
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        name = next(iter(ctx._protected_args), "")
        try:
            with _endings(self.commands.get(name)):
                return super().invoke(ctx)
        finally:
            DISPLAY.end()
            DISPLAY.quiet = False


def _chosen(context: click.Context, parameter: click.Parameter, given: bool) -> None:
    """Apply --verbose or --quiet. All contexts of a call share its `meta`."""
    if not given:
        return
    if context.meta.setdefault(VERBOSITY, parameter.name) != parameter.name:
        raise click.UsageError("--verbose and --quiet exclude each other; give one of them", context)
    if parameter.name == "verbose":
        let_libraries_speak()
    else:
        DISPLAY.quiet = True


def _show_warning(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    """Print a warning as one line; where in the code it arose helps only with --verbose."""
    source = "" if issubclass(category, ForaWarning) else f" ({category.__name__}, {where[0]}:{where[1]})"
    click.echo(f"warning: {one_line(str(message), LONGEST_MESSAGE)}{source}", err=True)


VERBOSE = click.Option(
    ["-v", "--verbose"],
    is_flag=True,
    expose_value=False,
    callback=_chosen,
    help="Also show messages and warnings of libraries, and where in the code an error comes from.",
)
QUIET = click.Option(
    ["-q", "--quiet"],
    is_flag=True,
    expose_value=False,
    callback=_chosen,
    help="Show no progress, only results, notes and errors.",
)


@contextmanager
def _endings(command: click.Command | None) -> Iterator[None]:
    """Exit as the class above describes. `command` is the command that is running, if it is known."""
    try:
        with unmasked():
            yield
    except ForaError as error:
        context = click.get_current_context(silent=True)
        if context is not None and context.meta.get(VERBOSITY) == "verbose":
            traceback.print_exception(error)
        raise click.ClickException(str(error)) from error
    except KeyboardInterrupt:
        caught()
        goes_on = command is not None and any(one.name == "resume" for one in command.params)
        kept = "; what is finished is kept: give the same command with --resume to go on" if goes_on else ""
        click.echo(f"interrupted{kept}", err=True)
        raise click.exceptions.Exit(INTERRUPTED) from None
    except OSError as error:
        if error.filename is not None or error.errno not in FULL:
            raise  # click ends quietly after a closed pipe
        try:
            sys.stdout.flush()
        except OSError:  # Python would try again at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise click.ClickException(f"the output cannot be written: {error.strerror}; write it elsewhere") from error


def _open_streams() -> None:
    """Replace standard streams that are closed: else the next file that is opened gets their number and their text."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115 # until the process ends


@click.group(
    cls=Commands,
    context_settings={"show_default": True, "help_option_names": ["-h", "--help"], "max_content_width": 120},
)
@click.version_option(__version__)
def main() -> None:
    """FORA caching for diffusion transformers: exports a full and a reuse graph and alternates their engines.

    Exit codes: 0, 1 if a command failed, 2 for wrong usage, 130 after Ctrl-C or SIGTERM.

    \b
    Examples:
      fora-trt demo
      fora-trt export digits
      fora-trt run export/digits --class-labels 3,7,7 --cache-interval 3 -o digits.png
    """


for command in (export, build, verify, run, sample, bench, quality, calibrate, inspect, doctor, demo, serve, triton):
    main.add_command(command)
