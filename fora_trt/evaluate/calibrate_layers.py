"""Per-layer calibration: finds the cache sites that each step computes, with the arithmetic of a number of full steps.

From the errors of reuse along trajectories without caching follow masks by SmoothCache's rule (a threshold), and by
least squares for groups of sites that are computed together. All of them are tried on a few images, and the best are
compared on all. Every trial runs in eager PyTorch, so that no graph is needed; the bundle gets those of the schedule
when it is exported with its file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy

from fora_trt.bundle import Bundle
from fora_trt.contract import FULL, REUSE
from fora_trt.errors import InputError
from fora_trt.evaluate.calibrate import (
    GAINS,
    HIGHER_ORDER_GAINS,
    ORDER,
    Calibrated,
    Calibration,
    Compared,
    Found,
    Wanted,
)
from fora_trt.evaluate.eager_fora import EagerFora
from fora_trt.evaluate.mask_search import Computed, by_squares, by_threshold, grouped, merged, within
from fora_trt.evaluate.site_errors import Errors, observed_errors
from fora_trt.export.statistics import StepFlops
from fora_trt.pipeline import Pipeline, Sampling
from fora_trt.plan import HIGHEST_ORDER
from fora_trt.sampling.conditioning import Conditioning
from fora_trt.sampling.loop import Watch
from fora_trt.schedule import Schedule

MOST_GRAPHS = 8
GROUPS = (2, 3, 4)
"""Numbers of groups of sites that are computed together; without merging, 3 groups have at most 8 masks."""

EXPONENTS = (0.5, 0.3, 0.0, 1.0)
"""Errors count more towards the last steps, by the factor (1 - u)^-exponent where u runs from 0 to 1."""

SMOOTHCACHE = "threshold"
"""Text of the schedule by SmoothCache's rule alone."""


class LayersCalibrated(Calibrated):
    """The result of a per-layer calibration.

    `rule` is the text of the schedule that was found; `graphs` is the number of its graphs, the full and the reuse
    graph among them. `arithmetic` is divided by that of no caching. `advice` is a sentence, if a schedule without
    partial steps is better.
    """

    rule: str
    graphs: int
    arithmetic: float
    advice: str | None = None


class Arithmetic:
    """FLOPs of the steps of a bundle's schedules; what is computed once before the loop does not count."""

    def __init__(self, bundle: Bundle) -> None:
        """Read the full graph. Raises `BundleError` if it lacks the features of a cache site."""
        self._flops = StepFlops.of(bundle.graph_path(FULL))
        self._features = {site.module: [one.name for one in site.features] for site in bundle.manifest.cache_sites}
        self._of_graph = {FULL: self._of_mask([*self._features]), REUSE: self._of_mask([])}
        self._of_row: dict[bytes, int] = {}
        self.full, self.reuse = self._of_graph[FULL], self._of_graph[REUSE]
        others = {path: [one for one in self._features if one != path] for path in self._features}
        self.costs = numpy.array([(self.full - self._of_mask(rest)) / self.full for rest in others.values()])
        """(I,): what a full step saves that reads a site instead of computing it, divided by a full step."""

    def of_schedule(self, schedule: Schedule) -> float:
        """In full steps."""
        new = {name: mask for name, mask in schedule.masks.items() if name not in self._of_graph}
        self._of_graph |= {name: self._of_mask(mask) for name, mask in new.items()}
        return sum(self._of_graph[step.graph] for step in schedule.plan) / self.full

    def of_masks(self, computed: Computed) -> float:
        """In full steps."""
        paths = [*self._features]
        for row in numpy.unique(computed, axis=0):
            if (key := row.tobytes()) not in self._of_row:
                mask = [path for path, one in zip(paths, row, strict=True) if one]
                self._of_row[key] = self._of_mask(mask)
        return sum(self._of_row[row.tobytes()] for row in computed) / self.full

    def of_number(self, full_steps: int, steps: int) -> float:
        """In full steps, if the other steps are reuse steps."""
        return full_steps + (steps - full_steps) * self.reuse / self.full

    def _of_mask(self, computed: Sequence[str]) -> int:
        own = {*computed}
        return self._flops.reading({one for path, names in self._features.items() if path not in own for one in names})


class LayerCalibration(Calibration):
    """A calibration that finds masks. Its pipeline runs `EagerFora`."""

    label = "per-layer"

    def __init__(
        self,
        pipeline: Pipeline,
        given: Conditioning,
        wanted: Wanted,
        most_graphs: int = MOST_GRAPHS,
        known: dict[str, float] | None = None,
        watch_steps: Watch = iter,
    ) -> None:
        """Raises `InputError`, `ScheduleError` or `BundleError` for settings that are not possible."""
        if most_graphs < 2:
            raise InputError(f"the number of graphs is {most_graphs}; the full and the reuse graph are 2 already")
        assert isinstance(pipeline.denoiser, EagerFora)
        self._eager, self._partial = pipeline.denoiser, most_graphs - 2
        self._arithmetic, self._watch_steps = Arithmetic(pipeline.bundle), watch_steps
        self._errors: Errors | None = None
        super().__init__(pipeline, given, wanted, known, watch_steps)
        self.trials.full_steps_of = self._arithmetic.of_schedule

    def _check(self) -> None:
        """Any bundle will do: without a forecast, its reuse steps read one step."""

    def run(self) -> Iterator[str]:
        """Search; yield a line before each stage and trial. Stop iterating at any moment to keep the best so far."""
        yield "observing the errors of reuse"
        self._errors = self._observed()
        if not self._full_steps:
            yield from self._search_number()
        yield f"the arithmetic of {self._full_steps} full steps: trying masks"
        yield from self._try(self.by_smoothcache(), 0.0)
        forecasts = self.pipeline.manifest.can_forecast
        for number in GROUPS if self._partial else (1,):
            for exponent in EXPONENTS:
                schedule = self._by_squares(self._full_steps, number, exponent)
                yield from self._try(schedule.with_forecast(ORDER if forecasts else 0), GAINS)
        assert self.best is not None
        base = self.best.schedule
        for order in (0, 1, ORDER, HIGHEST_ORDER) if forecasts else ():
            yield from self._try(base.with_forecast(order), HIGHER_ORDER_GAINS if order > ORDER else GAINS)
        yield from self._confirm()

    def _observed(self) -> Errors:
        self.trials.charge("observed", len(self._half) * self.plain.nfe)
        trials = self.trials
        given, seeds = trials.trajectories.inputs(self._half)
        size = self.pipeline.config.batch_size
        return observed_errors(self._eager, self.plain, given, seeds, trials.guidance, size, self._watch_steps)

    def by_smoothcache(self) -> Schedule:
        """The schedule by SmoothCache's rule alone; known after the errors were observed."""
        return self._by_threshold(self._full_steps)

    def _by_threshold(self, full_steps: int) -> Schedule:
        errors = self._weighted(0.0)
        return self._schedule(full_steps, lambda threshold: by_threshold(errors, threshold), SMOOTHCACHE)

    def _by_squares(self, full_steps: int, number: int, exponent: float) -> Schedule:
        errors, costs = self._weighted(exponent), self._arithmetic.costs

        def made(price: float) -> Computed:
            return by_squares(errors, costs, grouped(errors, costs, number, price), price)

        return self._schedule(full_steps, made, f"squares:{number},{exponent:g}")

    def _weighted(self, exponent: float) -> Errors:
        """The errors; with an exponent those at later steps are larger."""
        assert self._errors is not None
        steps = self.plain.nfe
        return self._errors * (1 - numpy.arange(steps) / steps) ** -exponent

    def _schedule(self, full_steps: int, made: Callable[[float], Computed], text: str) -> Schedule:
        """The schedule of masks with the arithmetic of so many full steps, within the number of graphs."""
        costs, sites = self._arithmetic.costs, self.pipeline.manifest.cache_sites
        budget = self._arithmetic.of_number(full_steps, self.plain.nfe)
        found = within(budget, self._arithmetic.of_masks, lambda value: merged(made(value), costs, self._partial))
        masks = [{site.module for site, one in zip(sites, row, strict=True) if one} for row in found]
        return Schedule.of_masks(masks, sites, text)

    def _with_number(self, full_steps: int) -> Schedule:
        return self._by_squares(full_steps, GROUPS[1] if self._partial else 1, EXPONENTS[0])

    def _measured(self, schedule: Schedule, images: Sequence[int]) -> Found:
        self._eager.add_graphs(schedule.masks)
        return super()._measured(schedule, images)

    def _rivals(self) -> list[Schedule]:
        """As of `Calibration`, with SmoothCache's rule; what this bundle cannot run is left out."""
        can = self.pipeline.manifest.can_forecast
        smooth = self.by_smoothcache()
        return [*(one for one in super()._rivals() if can or one.depth == 1), smooth]

    def _row(self, label: str, sampling: Sampling) -> Compared:
        self._eager.add_graphs(sampling.schedule.masks)
        share = self._arithmetic.of_schedule(sampling.schedule) / self.plain.nfe
        named = "per-layer, SmoothCache's rule" if label == SMOOTHCACHE else label
        return super()._row(named, sampling).model_copy(update={"arithmetic": round(share, 4)})

    def _calibrated(self, rows: Sequence[Compared], interrupted: bool = False) -> LayersCalibrated:
        assert self.best is not None
        schedule = self.best.schedule
        found = super()._calibrated(rows, interrupted)
        return LayersCalibrated(
            **{**dict(found), "fitted": False},
            rule=schedule.text,
            graphs=len(schedule.masks) + 2,
            arithmetic=round(self._arithmetic.of_schedule(schedule) / schedule.steps, 4),
            advice=advice_of({row.label: row.psnr for row in rows}, [one.text for one in super()._rivals()]),
        )


def advice_of(psnr: Mapping[str, float], without_partial_steps: Sequence[str]) -> str | None:
    """A sentence, if one of these schedules has a larger PSNR in dB than the per-layer schedule."""
    others = [text for text in without_partial_steps if text in psnr]
    best = max(others, key=lambda text: psnr[text], default=None)
    if best is None or psnr[best] <= psnr[LayerCalibration.label]:
        return None
    return (
        f"full and reuse steps alone are better here: {best} reaches {psnr[best]:.1f} dB with the same arithmetic, the "
        f"per-layer schedule {psnr[LayerCalibration.label]:.1f} dB; give --schedule {best}, or calibrate without "
        "--per-layer"
    )


def export_command(bundle: Bundle, schedule: str) -> str:
    """The command that exports the model with the graphs of a schedule file, as another bundle."""
    other = bundle.manifest.model_copy(update={"name": f"{bundle.manifest.name}-layers"})
    return other.export_command(schedule)
