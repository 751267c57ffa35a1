"""`python -m fora_trt` is `fora-trt`."""

from fora_trt.cli import main

main(prog_name="fora-trt")
