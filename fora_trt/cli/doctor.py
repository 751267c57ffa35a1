"""The command `doctor`: shows which backends work on this machine."""

from __future__ import annotations

import click

from fora_trt.cli.options import AS_JSON
from fora_trt.cli.terminal import new_table, print_json, print_table


@click.command()
@AS_JSON
def doctor(as_json: bool) -> None:
    """Show which backends work on this machine, their versions, the GPU, and how to install missing packages.

    \b
    Example:
      fora-trt doctor
    """
    from fora_trt.doctor import findings

    report = findings()
    if as_json:
        print_json({"findings": [vars(finding) for finding in report]})
        return
    table = new_table("", "", "found", "to do", texts=3)
    for finding in report:
        table.add_row(finding.what, finding.found, finding.remedy)
    print_table(table)
