"""The recommendation of a report: the fastest setting that keeps the minimum PSNR, and the command that uses it."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass, replace

from fora_trt.report.results import About, Bench, BenchRow, Quality, QualityRow, Report
from fora_trt.report.tables import at_once, batch_sizes, labels, reference_name

ABOUT_AS_FAST, RIVALS = 0.1, 3
"""Settings whose speed-ups differ by at most this fraction count as equally fast: the closest of the fastest is chosen,
and at most so many others are named beside it."""


@dataclass(frozen=True)
class Advice:
    """The recommendation: `row` is the recommended setting, `command` runs it, `also` has further remarks.

    `speedup` is relative to no caching.
    """

    finding: str
    command: str | None = None
    also: str | None = None
    row: QualityRow | None = None
    speedup: float = 1.0


def recommendation(report: Report, min_psnr: float) -> str:
    """The recommendation as text: a sentence with its command, and a second one if a part was not measured yet.

    A setting must have a PSNR of at least `min_psnr` dB, to the fine solution if it was measured, else to no caching.
    Fewer steps without caching, with the best of several solvers, are a setting like any other.
    """
    advice = advice_of(report, min_psnr)
    sentence = advice.finding + (f": {advice.command}" if advice.command else ".")
    return sentence if advice.also is None else f"{sentence}\n{advice.also}"


def advice_of(report: Report, min_psnr: float) -> Advice:
    """The recommendation in its parts."""
    name = shlex.quote(report.about.folder)
    if report.quality is None:
        also = f"Image quality was not measured; to add it: fora-trt quality {name}, with the same --out."
        return Advice(_fastest(report.bench), also=also)
    also = f"Backends and batch sizes were not compared; to add this: fora-trt bench {name}, with the same --out."
    advice = _within(report.about, report.quality, min_psnr, None if report.bench else also)
    timed = None if advice.row is None else _benchmarked(report.bench, report.quality, advice.row)
    return replace(advice, also=" ".join(filter(None, (advice.also, timed))) or None)


def _fastest(bench: Bench | None) -> str:
    """The sentence for a report without quality: the schedule and backend with the largest speed-up, by batch size."""
    cached = [row for row in bench.rows if row.setting.caches] if bench else []
    if bench is None or not cached:
        return "No schedule with caching was measured"
    most = [
        max(own, key=lambda row: row.speedup)
        for images in batch_sizes(bench)
        if (own := [row for row in cached if row.images == images])
    ]
    first, *others = sorted(most, key=lambda row: -row.speedup)
    sentence = (
        f"The largest speed-up is that of {first.setting.label} on {first.backend}: "
        f"{first.speedup:.2f} times as fast as no caching, for {at_once(first.images)}"
    )
    more = [
        f"{row.speedup:.2f} times for {at_once(row.images)}"
        + ("" if _same(row, first) else f" ({row.setting.label} on {row.backend})")
        for row in sorted(others, key=lambda row: row.images)
    ]
    return "; ".join([sentence, *more])


def _same(row: BenchRow, other: BenchRow) -> bool:
    return (row.setting, row.backend) == (other.setting, other.backend)


def _benchmarked(bench: Bench | None, quality: Quality, row: QualityRow) -> str | None:
    """The benchmark's speed-ups of a cached setting on the backend of `quality`; None if it has none."""
    wanted = (quality.backend, row.setting.schedule, row.setting.steps, row.setting.scheduler)
    found = [
        f"{one.speedup:.2f} times for {at_once(one.images)}"
        for one in (bench.rows if bench and row.setting.caches else ())
        if (one.backend, one.setting.schedule, one.setting.steps, one.setting.scheduler) == wanted
    ]
    return f"Speed-up of {row.setting.label} in the benchmark: {', '.join(found)}." if found else None


def _within(about: About, quality: Quality, min_psnr: float, also: str | None) -> Advice:
    plain, *others = quality.rows
    names = dict(zip(map(id, quality.rows), labels([row.setting for row in quality.rows]), strict=True))

    def gain(row: QualityRow) -> float:
        return plain.seconds_per_image / row.seconds_per_image

    reference = reference_name(quality)

    def described(row: QualityRow) -> str:
        return f"{names[id(row)]} ({gain(row):.2f} times as fast as {reference}, {_closeness(row)})"

    asked = f"{min_psnr:g} dB of PSNR{f' to {quality.solution}' if quality.solution else ''}"
    kept = [row for row in others if row.accuracy >= min_psnr]
    if not others:
        return Advice("Only the setting without caching was measured", also=also)
    if not kept:
        closest = max(others, key=lambda row: row.accuracy)
        return Advice(f"No setting keeps {asked}; the closest is {described(closest)}", also=also)
    fastest = max(map(gain, kept))
    if fastest <= 1:
        return Advice(f"No setting that keeps {asked} is faster than {reference}", also=also)
    best = max((row for row in kept if gain(row) >= (1 - ABOUT_AS_FAST) * fastest), key=lambda row: row.accuracy)
    finding = f"The fastest way to keep {asked} is {described(best)}"
    if not best.setting.caches:
        cached = [row for row in kept if row.setting.caches]
        rest = (
            f"the best with caching is {described(max(cached, key=gain))}" if cached else "no cached setting keeps it"
        )
        finding = f"{finding}, so caching does not pay here; {rest}"
    near = [row for row in others if row is not best and abs(gain(row) / gain(best) - 1) <= ABOUT_AS_FAST]
    rivals = sorted(near, key=lambda row: -row.accuracy)[:RIVALS]
    if rivals:
        named = "; ".join(f"{names[id(row)]}, {_closeness(row)}" for row in rivals)
        also = f"In about the same time: {named}.{'' if also is None else f' {also}'}"
    return Advice(finding, _command(about, quality, best), also, best, gain(best))


def _closeness(row: QualityRow) -> str:
    return "no difference" if math.isinf(row.accuracy) else f"{row.accuracy:.1f} dB"


def _command(about: About, quality: Quality, row: QualityRow) -> str:
    """The command that runs a setting as it was measured; it ends with an example of the conditioning option."""
    setting = row.setting
    scheduler = f" --scheduler {shlex.quote(setting.scheduler)}" if setting.scheduler != about.scheduler else ""
    return (
        f"fora-trt run {shlex.quote(about.folder)} --steps {setting.steps} --schedule {shlex.quote(setting.schedule)}"
        f"{scheduler} --guidance-scale {quality.guidance_scale:g} --backend {shlex.quote(quality.backend)}"
        f"{f' {about.asks_for}' if about.asks_for else ''}"
    )
