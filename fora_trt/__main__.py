"""The program `fora-trt`, also as `python -m fora_trt`."""

from __future__ import annotations

import sys

from fora_trt.interruption import INTERRUPTED, interruptible, unmasked


def main() -> None:
    """Run the command line; a signal while it is imported is a sentence and an exit code too."""
    try:
        with interruptible(ends=True), unmasked():
            from fora_trt.cli import main as command

            command(prog_name="fora-trt")
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
