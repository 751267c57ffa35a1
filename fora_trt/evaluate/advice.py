"""The sentence on top of a report: the fastest setting within the stated loss, and the command that uses it."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass

from fora_trt.evaluate.results import About, Bench, Quality, QualityRow, Report
from fora_trt.evaluate.tables import labels

AS_FAST = 0.95
"""Part of the speed of the fastest setting, from which on one without caching is told beside it."""


@dataclass(frozen=True)
class Advice:
    """What follows from a report. `row` is the setting that is recommended, `command` uses it; `also` is what is left.

    `speedup` is over no caching.
    """

    finding: str
    command: str | None = None
    also: str | None = None
    row: QualityRow | None = None
    speedup: float = 1.0


def recommendation(report: Report, min_psnr: float) -> str:
    """One sentence with its command, and another one where a part was not measured yet.

    The loss is the PSNR against no caching, in dB, which must be at least `min_psnr`. Fewer steps without caching
    count like every other setting.
    """
    advice = advice_of(report, min_psnr)
    sentence = advice.finding + (f": {advice.command}" if advice.command else ".")
    return sentence if advice.also is None else f"{sentence}\n{advice.also}"


def advice_of(report: Report, min_psnr: float) -> Advice:
    """The same, in its parts."""
    name = shlex.quote(report.about.folder)
    if report.quality is None:
        also = f"What that costs was not measured; this adds it: fora-trt quality {name}, with the same --out."
        return Advice(_fastest(report.bench), also=also)
    also = f"Backends and batch sizes were not compared; this does it: fora-trt bench {name}, with the same --out."
    return _within(report.about, report.quality, min_psnr, None if report.bench else also)


def _fastest(bench: Bench | None) -> str:
    """What can be said of time alone."""
    cached = [row for row in bench.rows if row.setting.cache_interval > 1] if bench else []
    if not cached:
        return "Nothing with caching was measured"
    most = max(cached, key=lambda row: row.speedup)
    at_once = "one image" if most.images == 1 else f"{most.images} images at once"
    return (
        f"Caching gains most with {most.setting.label} on {most.backend}: "
        f"{most.speedup:.2f} times as fast as no caching, for {at_once}"
    )


def _within(about: About, quality: Quality, min_psnr: float, also: str | None) -> Advice:
    plain, *others = quality.rows
    names = dict(zip(map(id, quality.rows), labels([row.setting for row in quality.rows]), strict=True))

    def gain(row: QualityRow) -> float:
        return plain.seconds_per_image / row.seconds_per_image

    def described(row: QualityRow) -> str:
        loss = "no difference" if row.psnr is None else f"{row.psnr:.1f} dB"
        return f"{names[id(row)]} ({gain(row):.2f} times as fast as no caching, {loss})"

    kept = [row for row in others if _likeness(row) >= min_psnr]
    if not others:
        return Advice("Nothing but no caching was measured", also=also)
    if not kept:
        closest = max(others, key=_likeness)
        return Advice(f"No setting keeps {min_psnr:g} dB of PSNR; the closest is {described(closest)}", also=also)
    best = max(kept, key=gain)
    if gain(best) <= 1:
        return Advice(f"Nothing that keeps {min_psnr:g} dB of PSNR is faster than no caching", also=also)
    finding = f"The fastest setting that keeps {min_psnr:g} dB of PSNR is {described(best)}"
    if best.setting.cache_interval == 1:
        cached = [row for row in kept if row.setting.cache_interval > 1]
        rest = (
            f"the best with caching is {described(max(cached, key=gain))}" if cached else "nothing cached keeps as much"
        )
        finding = f"{finding}, so caching does not pay here; {rest}"
    rivals = [row for row in kept if row.setting.cache_interval == 1 and gain(row) >= AS_FAST * gain(best)]
    rival = max(rivals, key=_likeness, default=best)
    if best.setting.cache_interval > 1 and _likeness(rival) > _likeness(best):
        told = f"Fewer steps without caching are as good a choice: {described(rival)}."
        also = told if also is None else f"{told} {also}"
    return Advice(finding, _command(about, quality, best), also, best, gain(best))


def _likeness(row: QualityRow) -> float:
    """PSNR in dB; infinite where nothing differs."""
    return math.inf if row.psnr is None else row.psnr


def _command(about: About, quality: Quality, row: QualityRow) -> str:
    """All that the figures depend on, and at the end what the images are to be."""
    setting = row.setting
    scheduler = f" --scheduler {shlex.quote(setting.scheduler)}" if setting.scheduler != about.scheduler else ""
    return (
        f"fora-trt run {shlex.quote(about.folder)} --steps {setting.steps} --cache-interval {setting.cache_interval}"
        f"{scheduler} --guidance-scale {quality.guidance_scale:g} --backend {shlex.quote(quality.backend)}"
        f"{f' {about.asks_for}' if about.asks_for else ''}"
    )
