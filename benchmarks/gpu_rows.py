"""The rows of the GPU check: what each row runs, how long it may take, and which values are expected.

This module is a table, the most valuable rows first. It runs nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from fora_trt.contract import OPTIMIZATIONS, Optimization
from fora_trt.engines.backends import BACKENDS
from fora_trt.evaluate.targets import REFERENCES
from fora_trt.report.results import EAGER
from fora_trt.schedule import NONE, Schedule

Kind = Literal["environment", "export", "parity", "tests", "time"]
ONNXRUNTIME = "onnxruntime"
TENSORRTS = ("tensorrt", "tensorrt-rtx")

GRAPH_BOUND = {"fp32": 1e-5, "fp16": 3e-3}
"""Largest error of one step of the digits model, relative to eager FORA in fp32.

Measured on a CPU over all optimization levels and backends: fp32 8e-7, fp16 9e-4.
"""

LATENTS_BOUND = {"fp32": 3e-5, "fp16": 1e-2}
"""Largest relative error of the latents of the digits model after 50 guided steps.

Measured on a CPU: fp32 4e-6, fp16 4e-3, and 6e-3 after 8 steps. If a reuse step reads the sum of another step, the
error exceeds both bounds.
"""

LARGE_GRAPH_BOUND = {"fp16": 2e-2, "bf16": 1e-1}
"""Largest error of one step of DiT-XL/2 with random weights: the tolerance of `verify`, not a measured bound."""

LARGE_LATENTS_BOUND = {"fp16": 1e-1, "bf16": 5e-1}
"""Largest error of the latents of DiT-XL/2: the tolerance of `verify` too."""

EVERY_SECOND, EVERY_THIRD, FORECAST = "fora:2", "fora:3", "dense:18,forecast=2"
"""Texts of schedules; with the last two, 18 of 50 steps are full."""

SCHEDULE_OF_ERRORS = EVERY_SECOND
"""Single steps are compared in a window of a full and a reuse step, which has the length of windows of this schedule.
Errors are measured only in rows with it, so that nothing is compiled again for them."""

MARGIN = 1.02
"""Factor by which a speed-up may exceed the ideal one before its row needs a look: medians are noisy."""


@dataclass(frozen=True)
class Expected:
    """The expected range of all values whose name matches `of`.

    A row with a value outside a fixed range fails; outside another range, it needs a look.
    """

    of: str
    low: float
    high: float
    fixed: bool = False

    def deviations(self, values: Mapping[str, float]) -> Iterator[str]:
        """One message per value outside the range, NaN included; one message if no value matches `of`."""
        found = {name: value for name, value in values.items() if fnmatchcase(name, self.of)}
        if not found:
            yield f"{self.of} was not measured; expected {self}"
        for name, value in found.items():
            if not self.low <= value <= self.high:
                yield f"{name} is {value:.4g}; expected {self}"

    def __str__(self) -> str:
        return f"{self.low:g}" if self.low == self.high else f"{self.low:g} to {self.high:g}"


@dataclass(frozen=True)
class Exported:
    """An exported bundle that several rows share."""

    source: str
    precision: str
    optimization: Optimization = OPTIMIZATIONS[-1]
    image_size: int | None = None

    @property
    def name(self) -> str:
        """Name of the model with its image size, in row names."""
        model = _slug(self.source.removeprefix("random:"))
        return "-".join([model, *([str(self.image_size)] if self.image_size else [])])

    @property
    def folder(self) -> str:
        """Name of the bundle's folder."""
        return f"{self.name}-{self.precision}-{self.optimization}"


@dataclass(frozen=True)
class Row:
    """The work of one process. It usually takes `estimate` seconds, and is killed after `limit` seconds.

    `needs` names a row that must pass first. Rows with `together` may run at the same time as others of them; a row
    with `background` may run at the same time as any other row.
    """

    name: str
    kind: Kind
    limit: float
    estimate: float
    expects: tuple[Expected, ...] = ()
    bundle: Exported | None = None
    target: str = ""
    images: int = 2
    steps: int = 50
    schedules: tuple[str, ...] = ()
    repeats: int = 0
    needs: str = ""
    together: bool = False
    background: bool = False

    def judged(self, values: Mapping[str, float]) -> tuple[str, list[str]]:
        """The status of the row (`passed`, `failed` or `look`), and a message for each value outside its range."""
        outside = [(one.fixed, sentence) for one in self.expects for sentence in one.deviations(values)]
        status = "failed" if any(fixed for fixed, _ in outside) else "look" if outside else "passed"
        return status, [f"{sentence}{' (fixed)' if fixed else ''}" for fixed, sentence in outside]


def rows_of(device_type: str) -> list[Row]:
    """All rows for a GPU, or the reduced set for a CPU."""
    return [*(_gpu_rows() if device_type == "cuda" else _cpu_rows())]


def chosen_of(rows: Sequence[Row], patterns: Sequence[str]) -> list[Row]:
    """The rows whose name matches a pattern or begins with it, and the rows they need.

    Raises `ValueError` for a pattern without a match.
    """
    if not patterns:
        return [*rows]
    names: set[str] = set()
    for pattern in patterns:
        matched = {row.name for row in rows if fnmatchcase(row.name, pattern) or row.name.startswith(f"{pattern}/")}
        if not matched:
            raise ValueError(f"no row matches {pattern!r}; --list shows the names of all rows")
        names |= matched
    names |= {row.needs for row in rows if row.name in names}
    return [row for row in rows if row.name in names or row.kind == "environment"]


def slug_of(target: str) -> str:
    """The name of a target in row names."""
    return "eager" if target == EAGER else _slug(target)


def _slug(text: str) -> str:
    return re.sub(r"\W+", "-", text).strip("-").lower()


PLAIN = tuple(name for name in REFERENCES if name != EAGER and name not in BACKENDS)
"""References that compile the original module."""


# -- expected values -----------------------------------------------------------------------------------------------


def _parity_expectations(precision: str, on_gpu: bool) -> tuple[Expected, ...]:
    return (
        Expected("error/*", 0, GRAPH_BOUND[precision], fixed=True),
        Expected("latents/*", 0, LATENTS_BOUND[precision], fixed=True),
        Expected("replay/*", 0, 0, fixed=on_gpu),
    )


@dataclass(frozen=True)
class Estimate:
    """Expected times of DiT-XL/2 at 256 px in fp16, as (low, high).

    `full` and `reuse` are milliseconds of a step, `seconds` the time of 50 steps without caching, `speedup` the
    speed-up of FORA with a full step in three.
    """

    full: tuple[float, float]
    reuse: tuple[float, float]
    seconds: tuple[float, float]
    speedup: tuple[float, float]

    def expectations(self) -> tuple[Expected, ...]:
        """The estimate as ranges that are not fixed."""
        named = {
            "full ms/*": self.full,
            "reuse ms/fora*": self.reuse,
            f"seconds/{NONE}": self.seconds,
            f"speed-up/{EVERY_THIRD}": self.speedup,
        }
        return tuple(Expected(name, *between) for name, between in named.items())


UNFOLDED_16 = Estimate((14, 20), (1.5, 3), (0.7, 1.0), (2.2, 2.5))
TENSORRT = Estimate((1.6, 2.4), (0.03, 0.07), (0.08, 0.12), (2.55, 2.7))
ESTIMATES: dict[tuple[str, int], Estimate] = {
    (EAGER, 1): Estimate((8, 15), (2, 5), (0.4, 0.75), (1.7, 2.2)),
    **{(name, 1): Estimate((2.0, 3.2), (0.3, 0.55), (0.10, 0.16), (2.0, 2.3)) for name in PLAIN},
    **{(name, 16): UNFOLDED_16 for name in PLAIN},
    ("torch-compile", 1): Estimate((2.0, 3.2), (0.03, 0.08), (0.10, 0.16), (2.6, 2.75)),
    (ONNXRUNTIME, 1): Estimate((4, 8), (0.15, 0.4), (0.2, 0.4), (2.3, 2.6)),
    **{(name, 1): TENSORRT for name in TENSORRTS},
}
"""Estimates by target and number of images; other rows have none."""


def _time_expectations(
    bundle: Exported, target: str, images: int, steps: int, schedules: tuple[str, ...], on_gpu: bool
) -> tuple[Expected, ...]:
    small, precision = bundle.source == "digits", bundle.precision
    graph, latents = (GRAPH_BOUND, LATENTS_BOUND) if small else (LARGE_GRAPH_BOUND, LARGE_LATENTS_BOUND)
    expected = [Expected("latents/*", 0, latents[precision], fixed=True)]
    if target != EAGER and SCHEDULE_OF_ERRORS in schedules:
        expected.append(Expected("error/*", 0, graph[precision], fixed=True))
    ideal = {text: Schedule.from_text(text, steps).ideal_speedup() for text in schedules if text != NONE}
    expected += [Expected(f"speed-up/{text}", 1, best * MARGIN) for text, best in ideal.items()]
    if on_gpu:
        expected += _on_the_device(target, steps, schedules)
    if on_gpu and (bundle.name, precision) == ("dit-xl-2-256", "fp16") and (target, images) in ESTIMATES:
        expected += ESTIMATES[target, images].expectations()
    return tuple(expected)


def _on_the_device(target: str, steps: int, schedules: tuple[str, ...]) -> list[Expected]:
    """Expectations on a GPU: replays equal the first run, a window is one launch, no copies or waits between steps."""
    if target == EAGER:
        return [Expected("replay/*", 0, 0)]
    expected = [Expected("replay/*", 0, 0, fixed=True), Expected("waits/*", 0, 0, fixed=True)]
    if target == ONNXRUNTIME:  # not captured in CUDA graphs
        return [*expected, Expected("copies/*", 0, 0)]
    full_steps = {text: Schedule.from_text(text, steps).full_steps for text in schedules}
    launches = [Expected(f"graph launches/{text}", full, full, True) for text, full in full_steps.items()]
    return [*expected, Expected("copies/*", 0, 0, fixed=True), *launches]


# -- the rows --------------------------------------------------------------------------------------------------------


def _parity_rows(
    targets: Sequence[str], on_gpu: bool, limit: float, precisions: Sequence[str] = ("fp32", "fp16")
) -> Iterator[Row]:
    """Rows that compare runs 1, 2 and 3 of a guided trajectory of the digits model with eager FORA."""
    for precision in precisions:
        for level in OPTIMIZATIONS:
            for target in targets:
                yield Row(
                    f"parity/{level}/{precision}/{slug_of(target)}",
                    "parity",
                    limit,
                    limit / 4,
                    _parity_expectations(precision, on_gpu),
                    Exported("digits", precision, level),
                    target,
                    schedules=(EVERY_THIRD, FORECAST),
                    together=True,
                )


def _time_row(
    bundle: Exported,
    target: str,
    images: int,
    limit: float,
    schedules: tuple[str, ...] = (NONE, EVERY_SECOND, EVERY_THIRD, "fora:5", FORECAST),
    steps: int = 50,
    repeats: int = 10,
    on_gpu: bool = True,
) -> Row:
    return Row(
        f"time/{bundle.name}/{bundle.precision}/{images}/{slug_of(target)}",
        "time",
        limit,
        limit / 3,
        _time_expectations(bundle, target, images, steps, schedules, on_gpu),
        bundle,
        target,
        images,
        steps,
        schedules,
        repeats,
        needs=_export_name(bundle) if on_gpu else "",
    )


def _export_name(bundle: Exported) -> str:
    return f"export/{bundle.name}/{bundle.precision}"


def _export_row(bundle: Exported) -> Row:
    return Row(_export_name(bundle), "export", 900, 150, bundle=bundle, background=True)


XL = "random:DiT-XL/2"
XL_256, XL_512 = (Exported(XL, "fp16", image_size=size) for size in (256, 512))
XL_256_BF16 = Exported(XL, "bf16", image_size=256)
CEILINGS = (Expected("TFLOP/s", 450, 900), Expected("TB/s", 2.0, 4.6))
"""Peak rates of an H100 or H200, from their data sheets and usual measurements."""


def _gpu_rows() -> Iterator[Row]:
    time: Callable[..., Row] = _time_row
    brief = (NONE, EVERY_THIRD, FORECAST)
    yield Row("environment", "environment", 120, 20, CEILINGS)
    yield _export_row(XL_256)
    yield _export_row(XL_512)
    yield _export_row(XL_256_BF16)
    others = [name for name in BACKENDS if name != ONNXRUNTIME]
    yield from _parity_rows(others, on_gpu=True, limit=150)
    yield Row("tests", "tests", 400, 120, (Expected("failed", 0, 0, True), Expected("passed", 1, float("inf"), True)))
    yield time(XL_256, "torch-compile", 1, 590)
    yield time(XL_256, EAGER, 1, 240)
    yield from (time(XL_256, name, 1, 400) for name in (*PLAIN, "torch", *TENSORRTS))
    for bundle, images in ((XL_256, 16), (XL_256, 4), (XL_256_BF16, 1), (XL_512, 1), (XL_512, 4)):
        yield time(bundle, "torch-compile", images, 420, brief)
        yield time(bundle, EAGER, images, 240, brief)
        if images == 16:
            yield from (time(bundle, name, images, 300, brief) for name in PLAIN)
    yield from _parity_rows([ONNXRUNTIME], on_gpu=True, limit=150)
    yield time(XL_256, ONNXRUNTIME, 1, 300)
    for bundle, images in ((XL_512, 1), (XL_256, 4), (XL_256, 16), (XL_256_BF16, 1), (XL_512, 4)):
        yield from (time(bundle, name, images, 240, brief) for name in ("torch", *TENSORRTS))
        if images != 16:
            yield from (time(bundle, name, images, 300, brief) for name in PLAIN)


def _cpu_rows() -> Iterator[Row]:
    """Rows that test the check itself, and compare results without a GPU."""
    targets = ("torch", ONNXRUNTIME, "torch-compile")
    digits = Exported("digits", "fp32")
    yield Row("environment", "environment", 120, 15, (Expected("TFLOP/s", 0.001, 20), Expected("TB/s", 0.001, 1)))
    yield from _parity_rows(targets, on_gpu=False, limit=120, precisions=["fp32"])
    for target in (EAGER, *targets, *PLAIN):
        yield _time_row(digits, target, 1, 120, repeats=3, on_gpu=False)
    yield from _parity_rows(targets, on_gpu=False, limit=120, precisions=["fp16"])
