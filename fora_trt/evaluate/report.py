"""What was found, as files that a person and a program can read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fora_trt.evaluate.results import REPORT_VERSION, About, Bench, Quality, Report
from fora_trt.runtime.outputs import write_whole


def write_report(
    folder: Path,
    about: About,
    measured_on: Mapping[str, Any],
    *,
    bench: Bench | None = None,
    quality: Quality | None = None,
) -> None:
    """Write `report.json` into the folder. Raises `InputError` where it cannot be written."""
    where = {name: dict(measured_on) for name, part in (("bench", bench), ("quality", quality)) if part is not None}
    report = Report(format_version=REPORT_VERSION, about=about, measured_on=where, bench=bench, quality=quality)
    text = report.model_dump_json(indent=2) + "\n"
    write_whole(folder / "report.json", lambda file: file.write(text.encode()))
