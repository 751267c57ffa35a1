"""The rows of the GPU check: what each of them runs, how long it may take, and what it is expected to find.

A table, in the order in which rows are worth their time. It runs nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from fora_trt.engines.backends import BACKENDS
from fora_trt.evaluate.entrants import REFERENCES
from fora_trt.evaluate.results import EAGER
from fora_trt.models.spec import OPTIMIZATIONS
from fora_trt.schedule import Schedule

Kind = Literal["environment", "export", "parity", "tests", "time"]
ONNXRUNTIME = "onnxruntime"
TENSORRTS = ("tensorrt", "tensorrt-rtx")

GRAPH_BOUND = {"fp32": 1e-5, "fp16": 3e-3}
"""Largest error of one step of the digits, relative to eager FORA in fp32.

Measured on a CPU over all levels and backends: fp32 8e-7, fp16 9e-4.
"""

LATENTS_BOUND = {"fp32": 3e-5, "fp16": 1e-2}
"""Largest relative error of the latents of the digits after 50 guided steps.

Measured on a CPU: fp32 4e-6, fp16 4e-3, and 6e-3 after 8 steps. A reuse step that reads the sum of another one is over
both bounds.
"""

LARGE_GRAPH_BOUND = {"fp16": 2e-2, "bf16": 1e-1}
"""Of one step of DiT-XL/2 with random weights: what `verify` admits, for nothing was measured yet."""

LARGE_LATENTS_BOUND = {"fp16": 1e-1, "bf16": 5e-1}
"""Of its latents; what `verify` admits too."""

WINDOW_OF_ERRORS = 2
"""The cache interval whose denoiser measures single steps: a full and a reuse step. Others would compile once more."""

MARGIN = 1.02
"""By how much a speed-up may be over the ideal one before it is looked at: two medians are never exact."""


@dataclass(frozen=True)
class Expected:
    """A range for all values whose name matches `of`. A row fails outside of a fixed one, else it needs a look."""

    of: str
    low: float
    high: float
    fixed: bool = False

    def deviations(self, values: Mapping[str, float]) -> Iterator[str]:
        """One sentence for each value outside the range. NaN is outside, and so is a name that no value has."""
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
    """A bundle that rows share."""

    source: str
    precision: str
    optimization: str = OPTIMIZATIONS[-1]
    image_size: int | None = None

    @property
    def name(self) -> str:
        """Of its folder, and in the names of rows."""
        model = _slug(self.source.removeprefix("random:"))
        return "-".join([model, *([str(self.image_size)] if self.image_size else [])])

    @property
    def folder(self) -> str:
        """Where it is kept."""
        return f"{self.name}-{self.precision}-{self.optimization}"


@dataclass(frozen=True)
class Row:
    """Work for one process. Seconds: `estimate` is what it usually takes, at `limit` it is ended.

    `needs` names the row that must have passed before. Only rows `together` run at the same time; one in the
    `background` runs beside any other.
    """

    name: str
    kind: Kind
    limit: float
    estimate: float
    expects: tuple[Expected, ...] = ()
    bundle: Exported | None = None
    entrant: str = ""
    images: int = 2
    steps: int = 50
    intervals: tuple[int, ...] = ()
    repeats: int = 0
    needs: str = ""
    together: bool = False
    background: bool = False

    def judged(self, values: Mapping[str, float]) -> tuple[str, list[str]]:
        """Whether the row `passed`, `failed` or needs a `look`, and a sentence for each value outside its range."""
        outside = [(one.fixed, sentence) for one in self.expects for sentence in one.deviations(values)]
        status = "failed" if any(fixed for fixed, _ in outside) else "look" if outside else "passed"
        return status, [f"{sentence}{' (fixed)' if fixed else ''}" for fixed, sentence in outside]


def rows_of(device_type: str) -> list[Row]:
    """All rows for a GPU, or those that a CPU can do."""
    return [*(_gpu_rows() if device_type == "cuda" else _cpu_rows())]


def chosen_of(rows: Sequence[Row], patterns: Sequence[str]) -> list[Row]:
    """The rows whose name matches a pattern or begins with it, and those they need. Raises `ValueError`."""
    if not patterns:
        return [*rows]
    names: set[str] = set()
    for pattern in patterns:
        matched = {row.name for row in rows if fnmatchcase(row.name, pattern) or row.name.startswith(f"{pattern}/")}
        if not matched:
            raise ValueError(f"no row is named {pattern!r}; --list shows their names")
        names |= matched
    names |= {row.needs for row in rows if row.name in names}
    return [row for row in rows if row.name in names or row.kind == "environment"]


def slug_of(entrant: str) -> str:
    """An entrant in the name of a row."""
    return "eager" if entrant == EAGER else _slug(entrant)


def _slug(text: str) -> str:
    return re.sub(r"\W+", "-", text).strip("-").lower()


PLAIN = tuple(name for name in REFERENCES if name != EAGER and name not in BACKENDS)
"""References that compile the module itself."""


# -- what is expected ------------------------------------------------------------------------------------------------


def _parity_expectations(precision: str, on_gpu: bool) -> tuple[Expected, ...]:
    return (
        Expected("error/*", 0, GRAPH_BOUND[precision], fixed=True),
        Expected("latents/*", 0, LATENTS_BOUND[precision], fixed=True),
        Expected("replay/*", 0, 0, fixed=on_gpu),
    )


@dataclass(frozen=True)
class Estimate:
    """Of DiT-XL/2 at 256 px in fp16: milliseconds of a step, seconds of 50 uncached ones, speed-up at interval 3."""

    full: tuple[float, float]
    reuse: tuple[float, float]
    seconds: tuple[float, float]
    speedup: tuple[float, float]

    def expectations(self) -> tuple[Expected, ...]:
        """As ranges that are not fixed."""
        named = {
            "full ms/*": self.full,
            "reuse ms/*": self.reuse,
            "seconds/1": self.seconds,
            "speed-up/3": self.speedup,
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
"""By entrant and images; what is not here has no estimate."""


def _time_expectations(
    bundle: Exported, entrant: str, images: int, steps: int, intervals: tuple[int, ...], on_gpu: bool
) -> tuple[Expected, ...]:
    small, precision = bundle.source == "digits", bundle.precision
    graph, latents = (GRAPH_BOUND, LATENTS_BOUND) if small else (LARGE_GRAPH_BOUND, LARGE_LATENTS_BOUND)
    expected = [Expected("latents/*", 0, latents[precision], fixed=True)]
    if entrant != EAGER and WINDOW_OF_ERRORS in intervals:
        expected.append(Expected("error/*", 0, graph[precision], fixed=True))
    ideal = {interval: Schedule.static(steps, interval).ideal_speedup for interval in intervals if interval > 1}
    expected += [Expected(f"speed-up/{interval}", 1, best * MARGIN) for interval, best in ideal.items()]
    if on_gpu:
        expected += _on_the_device(entrant, steps, intervals)
    if on_gpu and (bundle.name, precision) == ("dit-xl-2-256", "fp16") and (entrant, images) in ESTIMATES:
        expected += ESTIMATES[entrant, images].expectations()
    return tuple(expected)


def _on_the_device(entrant: str, steps: int, intervals: tuple[int, ...]) -> list[Expected]:
    """Replays equal the first run, a window is one launch, and nothing is copied or waited for between steps."""
    if entrant == EAGER:
        return [Expected("replay/*", 0, 0)]
    expected = [Expected("replay/*", 0, 0, fixed=True), Expected("waits/*", 0, 0, fixed=True)]
    if entrant == ONNXRUNTIME:  # launched kernel by kernel
        return [*expected, Expected("copies/*", 0, 0)]
    full_steps = {interval: Schedule.static(steps, interval).full_steps for interval in intervals}
    launches = [Expected(f"graph launches/{interval}", full, full, True) for interval, full in full_steps.items()]
    return [*expected, Expected("copies/*", 0, 0, fixed=True), *launches]


# -- the rows --------------------------------------------------------------------------------------------------------


def _parity_rows(
    entrants: Sequence[str], on_gpu: bool, limit: float, precisions: Sequence[str] = ("fp32", "fp16")
) -> Iterator[Row]:
    """Runs 1, 2 and 3 of a guided trajectory of the digits against eager FORA."""
    for precision in precisions:
        for level in OPTIMIZATIONS:
            for entrant in entrants:
                yield Row(
                    f"parity/{level}/{precision}/{slug_of(entrant)}",
                    "parity",
                    limit,
                    limit / 4,
                    _parity_expectations(precision, on_gpu),
                    Exported("digits", precision, level),
                    entrant,
                    intervals=(3,),
                    together=True,
                )


def _time_row(
    bundle: Exported,
    entrant: str,
    images: int,
    limit: float,
    intervals: tuple[int, ...] = (1, 2, 3, 5),
    steps: int = 50,
    repeats: int = 10,
    on_gpu: bool = True,
) -> Row:
    return Row(
        f"time/{bundle.name}/{bundle.precision}/{images}/{slug_of(entrant)}",
        "time",
        limit,
        limit / 3,
        _time_expectations(bundle, entrant, images, steps, intervals, on_gpu),
        bundle,
        entrant,
        images,
        steps,
        intervals,
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
"""Of an H100 or H200, from their data sheets and what is usually reached of those."""


def _gpu_rows() -> Iterator[Row]:
    time: Callable[..., Row] = _time_row
    brief = (1, 3)
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
    """A trial of the check itself, with the numerics that do not need a GPU."""
    entrants = ("torch", ONNXRUNTIME, "torch-compile")
    digits = Exported("digits", "fp32")
    yield Row("environment", "environment", 120, 15, (Expected("TFLOP/s", 0.001, 20), Expected("TB/s", 0.001, 1)))
    yield from _parity_rows(entrants, on_gpu=False, limit=120, precisions=["fp32"])
    for entrant in (EAGER, *entrants, *PLAIN):
        yield _time_row(digits, entrant, 1, 120, (1, 2, 3, 5), steps=20, repeats=3, on_gpu=False)
    yield from _parity_rows(entrants, on_gpu=False, limit=120, precisions=["fp16"])
