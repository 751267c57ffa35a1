"""A report as Markdown, and the sentences that it shares with the HTML page."""

from __future__ import annotations

from fora_trt.report.advice import advice_of
from fora_trt.report.results import About, Bench, Quality, Report
from fora_trt.report.tables import Table, bench_tables, quality_table, reference_name


def as_markdown(report: Report) -> str:
    """Recommendation, environment and tables, for a README or for `benchmarks/results/`."""
    about, bench, quality, advice = report.about, report.bench, report.quality, advice_of(report, report.min_psnr)
    lines = [f"# {_plain(about.name)}", "", f"{_plain(about_line(about))}.", "", f"{_plain(advice.finding)}."]
    lines += ["", "```", advice.command, "```"] if advice.command else []
    lines += ["", _plain(advice.also)] if advice.also else []
    for part, found in report.measured_on.items():
        shown = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in found.items() if value is not None)
        lines += ["", f"Measured for {part}: {_plain(shown)}"]
    if bench is not None:
        lines += ["", "## Latency", "", _plain(bench_line(bench))]
        for table in bench_tables(bench):
            lines += ["", f"{table.title}:", "", *_markdown_table(table)]
        lines += [line for one in bench.absent for line in ("", _plain(f"{one.backend} did not run: {one.why}"))]
        lines += [line for note in bench.notes for line in ("", _plain(note))]
    if quality is not None:
        table = quality_table(quality)
        lines += ["", "## Quality", "", f"{_plain(table.title)}:", "", *_markdown_table(table)]
        lines += [line for note in quality_notes(quality) for line in ("", _plain(note))]
    return "\n".join(lines) + "\n"


def _markdown_table(table: Table) -> list[str]:
    marks = ["---" if k < table.texts else "--:" for k in range(len(table.header))]
    return [f"| {' | '.join(map(_plain, cells))} |" for cells in (table.header, marks, *table.rows)]


def _plain(text: str) -> str:
    """Text as one line, with Markdown characters escaped."""
    for sign, instead in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("`", "\\`")):
        text = text.replace(sign, instead)
    return " ".join(text.split())


def about_line(about: About) -> str:
    """Architecture, source and precision of the bundle."""
    return f"{about.architecture} from {about.source}, {about.precision}"


def machine_lines(report: Report) -> list[str]:
    """Machine, version, commit and date in one line per part; identical lines only once."""
    lines = []
    for found in report.measured_on.values():
        cores = f", {found['cores']} cores" if found.get("cores") else ""
        facts = (
            found.get("gpu"), f"{found.get('processor') or 'unknown processor'}{cores}",
            f"fora-trt {found.get('fora_trt')}", str(found.get("commit") or "")[:7], found.get("date"),
        )  # fmt: skip
        lines.append(" · ".join(str(part) for part in facts if part))
    return list(dict.fromkeys(lines))


def bench_line(bench: Bench) -> str:
    """How latency was measured."""
    stopped = " (the measurement was interrupted)" if bench.interrupted else ""
    return (
        f"{bench.steps} steps on {bench.device}, guidance {bench.guidance_scale:g}; median of {bench.repeats} "
        f"interleaved runs{stopped}; measured peak rates of this machine: {bench.peaks.flops / 1e9:,.0f} GFLOP/s and "
        f"{bench.peaks.bytes / 1e9:,.0f} GB/s."
    )


def quality_notes(quality: Quality) -> list[str]:
    """What the numbers compare with, the source of the image features, and the notes of the measurement."""
    source = quality.features
    notes = [f"Image features for Fréchet distance, precision and recall: {source}."] if source else []
    if len(quality.groups) > 1:
        notes.append(
            f"All rows are compared with {reference_name(quality)}, except for the latent error. Rows with another "
            "number of steps or another scheduler also differ from it by the error of their solver, without any caching"
            + (
                "."
                if quality.solution
                else "; quality --truth-steps compares all rows with a solution that is finer than all of them."
            )
        )
    return [*notes, *quality.notes]
