"""Writes the .md page and the .json file of a GPU check from the records of its rows."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_driver import FAILED, Record, newest_of
from benchmarks.gpu_rows import EVERY_THIRD, FORECAST, Row
from fora_trt.schedule import NONE

SHOWN = (EVERY_THIRD, FORECAST)
"""Schedules in the table of times; the result file has all."""


def stem_of(records: Sequence[Record], device_type: str) -> str:
    """File name without suffix: hardware and date of the latest environment row."""
    about = _environment(records).get("details", {}).get("measured_on", {})
    gpu = about.get("gpu") if device_type == "cuda" else f"cpu {about.get('cores', 0)} cores"
    hardware = re.sub(r"[^a-z0-9]+", "-", str(gpu or device_type).lower()).strip("-")
    return f"gpu-check_{hardware}_{about.get('date', 'undated')}"


def device_type_of(records: Sequence[Record]) -> str:
    """The device type that the rows ran on: `cuda` or `cpu`."""
    return str(_environment(records).get("identity", {}).get("type", "cuda"))


def write_result(records: Sequence[Record], rows: Sequence[Row], folder: Path) -> Path:
    """Write the .json and .md files of these records; return the path of the .md file."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = stem_of(records, device_type_of(records))
    content = {"rows": [*newest_of(records).values()], "not_run": not_run(records, rows)}
    _replace(folder / f"{stem}.json", json.dumps(content, indent=2) + "\n")
    _replace(folder / f"{stem}.md", as_markdown(records, rows))
    return folder / f"{stem}.md"


def _replace(path: Path, text: str) -> None:
    """Write a file atomically: the check may be interrupted at any moment."""
    unfinished = path.with_name(f".{path.name}.part")
    unfinished.write_text(text)
    unfinished.replace(path)


def _environment(records: Sequence[Record]) -> Record:
    return newest_of(records).get("environment", {})


def not_run(records: Sequence[Record], rows: Sequence[Row]) -> list[str]:
    """Names of rows without a record."""
    done = newest_of(records)
    return [row.name for row in rows if row.name not in done]


def as_markdown(records: Sequence[Record], rows: Sequence[Row]) -> str:
    """The page: times, comparisons, deviations, missing rows and the environment."""
    newest = [*newest_of(records).values()]
    parts = [
        ["# GPU check"],
        _times(newest),
        _headed("Errors, replays and transfers of the timed rows", _timed_checks(newest)),
        _headed(
            "Error of the digits model against eager FORA in fp32, 50 guided DDIM steps, runs 1 to 3",
            _parity(newest),
        ),
        _headed("Deviations", _deviations(newest)),
        _headed("Absent", [f"- {one['row']}: {one['why']}" for one in newest if one["status"] == "absent"]),
        _headed("Not run", [f"- {name}" for name in not_run(records, rows)]),
        _headed("Other rows", _others(newest)),
        _headed("Measured on", _measured_on(records)),
    ]
    return "\n".join(line for part in parts if part for line in [*part, ""])


def _headed(title: str, lines: list[str]) -> list[str]:
    return [f"## {title}", "", *lines] if lines else []


def _table(header: Sequence[str], texts: int, rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table; the first `texts` columns are text, all others numbers."""
    marks = ["---"] * texts + ["--:"] * (len(header) - texts)
    return [f"| {' | '.join(cells)} |" for cells in (header, marks, *rows)] if rows else []


def _number(record: Record, name: str, form: str = ".3g", unit: str = "") -> str:
    value: Any = record.get("values", {}).get(name)
    if value is None:
        return ""
    return f"{value:{form}}{unit}" if isinstance(value, int | float) else str(value)


def _worst(record: Record, prefix: str) -> str:
    """The largest of the values whose name begins with `prefix`."""
    values = [float(value) for name, value in record.get("values", {}).items() if name.startswith(prefix)]
    return f"{max(values):.1e}" if values else ""


def _all(record: Record, prefix: str, form: str = "g") -> str:
    """The values whose name begins with `prefix`, one per schedule or run, in order."""
    values = {name: value for name, value in record.get("values", {}).items() if name.startswith(prefix)}
    return ", ".join(f"{value:{form}}" for value in values.values())


def _measured(newest: Sequence[Record], kind: str) -> list[Record]:
    return [record for record in newest if record["kind"] == kind and record.get("values")]


def _labels(record: Record) -> list[str]:
    """The parts of a row's name after its kind; of a timed row: model, precision, images and backend."""
    return str(record["row"]).split("/")[1:]


def _times(newest: Sequence[Record]) -> list[str]:
    header = ["model", "precision", "images", "backend", "full step", "reuse step", "of a forecast", "no cache"]
    header += [cell for text in SHOWN for cell in ("ideal", text)]
    rows = []
    for record in _measured(newest, "time"):
        steps = (f"full ms/{NONE}", f"reuse ms/{EVERY_THIRD}", f"reuse ms/{FORECAST}")
        cells = [_number(record, name, ".3f", " ms") for name in steps]
        cells.append(_number(record, f"seconds/{NONE}", ".3f", " s"))
        for text in SHOWN:
            cells += [_number(record, f"{what}/{text}", ".2f", "x") for what in ("ideal", "speed-up")]
        rows.append([*_labels(record), *cells, _number(record, "peak MiB", ".0f", " MiB"), record["status"]])
    return _table([*header, "peak memory", "status"], 4, rows)


def _timed_checks(newest: Sequence[Record]) -> list[str]:
    header = ["model", "precision", "images", "backend", "error, full", "error, reuse", "error, latents"]
    header += ["replays differ by", "graph launches", "kernel launches", "copies", "waits"]
    rows = []
    for record in _measured(newest, "time"):
        errors = [_number(record, "error/full", ".1e"), _number(record, "error/reuse", ".1e")]
        worst = [_worst(record, "latents/"), _worst(record, "replay/")]
        counts = [_all(record, f"{kind}/") for kind in ("graph launches", "kernel launches", "copies", "waits")]
        rows.append([*_labels(record), *errors, *worst, *counts])
    return _table(header, 4, rows)


def _parity(newest: Sequence[Record]) -> list[str]:
    header = ["level", "precision", "backend", "error, full", "error, reuse"]
    header += [f"latents, {text}" for text in SHOWN]
    rows = []
    for record in _measured(newest, "parity"):
        errors = [_number(record, "error/full", ".1e"), _number(record, "error/reuse", ".1e")]
        found = [_all(record, f"latents/{text}/", ".1e") for text in SHOWN]
        found += [_worst(record, "replay/"), record["status"]]
        rows.append([*_labels(record), *errors, *found])
    return _table([*header, "replays differ by", "status"], 3, rows)


def _deviations(newest: Sequence[Record]) -> list[str]:
    """Failed rows, then rows that need a look."""
    failed = [one for one in newest if one["status"] in FAILED]
    look = [one for one in newest if one["status"] == "look"]
    return [f"- {one['row']} ({one['status']}): {one['why']}" for one in (*failed, *look)]


def _others(newest: Sequence[Record]) -> list[str]:
    lines = []
    for record in newest:
        if record["kind"] in ("export", "tests") and record["status"] != "absent":
            summary = record.get("details", {}).get("summary", "")
            lines.append(
                f"- {record['row']}: {record['status']} in {record['seconds']:.0f} s{', ' if summary else ''}{summary}"
            )
    return lines


def _measured_on(records: Sequence[Record]) -> list[str]:
    environment = _environment(records)
    about = environment.get("details", {}).get("measured_on", {})
    lines = [f"- {name}: {value}" for name, value in about.items() if value is not None]
    lines += [f"- {name}: {_number(environment, name)}" for name in environment.get("values", {})]
    gpus = environment.get("details", {}).get("gpu", "")
    return lines + [f"- {line}" for line in gpus.splitlines()]
