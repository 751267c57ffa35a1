"""The program `fora-trt`, also as `python -m fora_trt`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; Ctrl-C while it is imported ends the process quietly too."""
    try:
        from fora_trt.cli import main as command

        command(prog_name="fora-trt")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
