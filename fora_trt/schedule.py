"""The schedule of a trajectory: which graph runs at each step, and which full steps a reuse step reads. No tensors.

A schedule has a text form, `KIND` or `KIND:ARGUMENTS` (`none`, `fora:3`), and a file form in JSON; only this module
parses them. Other kinds can be registered in `KINDS`.

FORA's rule (arXiv 2407.01425): number the S steps from S-1 (first) down to 0 (last); step i is full when it is the
first or when N divides i.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fora_trt.contract import FULL, REUSE
from fora_trt.errors import ScheduleError
from fora_trt.registry import Registry

FORMAT_VERSION = 1
NONE = "none"
"""Text form of the schedule without caching."""

DEFAULT_INTERVAL = 3
"""Cache interval where neither an interval nor a schedule is given."""

OPEN_STEPS = 1000
"""Length of a schedule of unknown length: the number of timesteps that diffusion models are trained with."""

LATEST = (1.0,)
"""Weights of FORA: a reuse step reads the sums of the last full step with weight 1."""


@dataclass(frozen=True)
class Step:
    """One step: the graph that runs and, for a reuse step, the weights of the sums that it reads.

    `weights[j]` is the weight of the j-th full step before it, the latest first. A full step has no weights.
    """

    graph: str = FULL
    weights: tuple[float, ...] = ()

    @property
    def is_full(self) -> bool:
        """Whether the step computes every layer."""
        return self.graph == FULL


FULL_STEP = Step()
REUSE_STEP = Step(REUSE, LATEST)
"""The two steps of FORA."""


@dataclass(frozen=True)
class Schedule:
    """One `Step` per model evaluation, in the order of execution.

    `text` is the text form or the file name that the schedule was made from. `made_from` is the record of its origin in
    a file. Raises `ScheduleError` if the plan begins with a reuse step, or a step reads more full steps than precede
    it.
    """

    plan: tuple[Step, ...]
    text: str = field(default="steps", compare=False)
    made_from: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not self.plan or not self.plan[0].is_full:
            raise ScheduleError("a schedule must begin with a full step: there are no features to reuse before it")
        full_steps = 0
        for number, step in enumerate(self.plan):
            full_steps += step.is_full
            if len(step.weights) > full_steps:
                raise ScheduleError(
                    f"step {number} has {len(step.weights)} weights; the number of full steps before it is "
                    f"{full_steps}; give at most one weight per full step"
                )
            if not step.is_full and not (step.weights and all(map(math.isfinite, step.weights))):
                raise ScheduleError(f"step {number} has the weights {list(step.weights)}; give finite numbers")

    @classmethod
    def none(cls, steps: int) -> Schedule:
        """No caching: every step is full."""
        return cls((FULL_STEP,) * _counted(steps), NONE)

    @classmethod
    def fora(cls, steps: int, cache_interval: int) -> Schedule:
        """FORA's rule: a full step at least every `cache_interval` steps; 1 means no caching.

        Raises `ScheduleError` unless 1 <= cache_interval <= steps.
        """
        text = fora_text(cache_interval)
        if cache_interval > _counted(steps):
            raise ScheduleError(
                f"the cache interval {cache_interval} is larger than the number of steps {steps}; "
                f"choose an interval from 1 to {steps}"
            )
        remaining = range(steps - 1, -1, -1)
        return cls.from_flags((i == steps - 1 or i % cache_interval == 0 for i in remaining), text)

    @classmethod
    def from_flags(cls, full: Iterable[bool], text: str = "steps") -> Schedule:
        """From one flag per step: True for a full step, False for a reuse step of FORA."""
        return cls(tuple(FULL_STEP if flag else REUSE_STEP for flag in full), text)

    @classmethod
    def from_text(cls, text: str, steps: int) -> Schedule:
        """The schedule of a text form (`none`, `fora:3`) or a .json file, for `steps` model evaluations.

        Raises `ScheduleError` for an unknown kind, invalid arguments, or a file for another number of steps.
        """
        kind, _, arguments = text.partition(":")
        if (entry := KINDS.find(kind)) is not None:
            return entry.make(steps, arguments)
        if Path(text).suffix == ".json":
            return cls.from_file(text).checked(steps)
        known = ", ".join(one.usage for one in KINDS.values())
        raise ScheduleError(f"there is no schedule {text!r}; give {known}, or a .json file")

    @classmethod
    def open(cls, text: str, steps: int | None = None) -> Schedule:
        """The schedule of a text form for any number of steps, known (`steps`) or unknown (None).

        A cache interval longer than the trajectory is allowed here. With an unknown number, the schedule has
        `OPEN_STEPS` steps, and its full steps are counted from the first step instead of the last. Raises
        `ScheduleError` for a kind that needs the number of steps.
        """
        kind, _, arguments = text.partition(":")
        entry = KINDS.find(kind)
        if entry is not None and entry.open is not None:
            return entry.open(steps, arguments)
        if steps is not None:
            return cls.from_text(text, steps)
        if Path(text).suffix == ".json":
            return cls.from_file(text)
        raise ScheduleError(
            f"the schedule {text!r} needs the number of steps; give Schedule.from_text({text!r}, steps), or "
            "as_transformer(pipe.scheduler) in a diffusers pipeline"
        )

    @classmethod
    def from_file(cls, path: str | Path) -> Schedule:
        """Read a schedule that `to_file` wrote. Raises `ScheduleError` for an unreadable or invalid file."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ScheduleError(f"the schedule {path} cannot be read ({error.strerror})") from error
        except ValueError as error:
            raise ScheduleError(f"the schedule {path} is not JSON: {error}") from error
        try:
            return cls(_plan_from(content), str(path), content.get("made_from", {}))
        except ScheduleError as error:
            raise ScheduleError(f"the schedule {path} is invalid: {error}") from error

    def to_file(self, path: str | Path) -> None:
        """Write the schedule as JSON: for each step `full` or a list of weights."""
        steps = [FULL if step.is_full else list(step.weights) for step in self.plan]
        content = {"format_version": FORMAT_VERSION, "steps": steps, "made_from": dict(self.made_from)}
        Path(path).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def checked(self, steps: int) -> Schedule:
        """Return the schedule; raise `ScheduleError` unless it has this number of steps."""
        if self.steps != steps:
            raise ScheduleError(
                f"the schedule {self.text} is for {self.steps} model evaluations, but this trajectory has {steps}; "
                f"change the number of steps to match, or give another schedule"
            )
        return self

    @property
    def steps(self) -> int:
        """Length of the trajectory: the number of evaluations of the model (NFE)."""
        return len(self.plan)

    @property
    def full(self) -> tuple[bool, ...]:
        """For each step: whether it computes every layer."""
        return tuple(step.is_full for step in self.plan)

    @property
    def full_steps(self) -> int:
        """Number of steps that compute every layer."""
        return sum(self.full)

    @property
    def caches(self) -> bool:
        """Whether the schedule has a reuse step."""
        return self.full_steps < self.steps

    @property
    def ideal_speedup(self) -> float:
        """Speed-up over no caching if a reuse step cost nothing."""
        return self.steps / self.full_steps

    def digest(self) -> str:
        """A short digest of the plan, which differs for files of one name and different content."""
        steps = json.dumps([[step.graph, *step.weights] for step in self.plan])
        return hashlib.sha256(steps.encode()).hexdigest()[:16]

    def readers(self) -> dict[int, list[int]]:
        """For each full step, the reuse steps that read its sums; the full step folds one sum for each of them."""
        readers: dict[int, list[int]] = {}
        for number, step in enumerate(self.plan):
            if step.is_full:
                readers[number] = []
            for full in [*readers][-len(step.weights) :] if step.weights else ():
                readers[full].append(number)
        return readers

    @property
    def longest_window(self) -> int:
        """The largest number of steps from a full step to the last step that reads its sums; 0 without caching."""
        return max(reading[-1] - full if reading else 0 for full, reading in self.readers().items())


def _counted(steps: int) -> int:
    if steps < 1:
        raise ScheduleError(f"the number of steps is {steps}; at least 1 is needed")
    return steps


def fora_text(cache_interval: int) -> str:
    """Text form of FORA's schedule at a cache interval. Raises `ScheduleError` for an interval below 1."""
    if cache_interval < 1:
        raise ScheduleError(f"the cache interval is {cache_interval}; it must be at least 1 (no caching)")
    return NONE if cache_interval == 1 else f"fora:{cache_interval}"


def _plan_from(content: Any) -> tuple[Step, ...]:
    """The steps of a schedule file."""
    if not isinstance(content, dict) or content.keys() - {"format_version", "steps", "made_from"}:
        raise ScheduleError("expected an object with the keys format_version, steps and made_from")
    if content.get("format_version") != FORMAT_VERSION:
        raise ScheduleError(
            f"format_version is {content.get('format_version')}; this version of fora-trt reads {FORMAT_VERSION}"
        )
    if not isinstance(content.get("made_from", {}), dict) or not isinstance(content.get("steps"), list):
        raise ScheduleError("'steps' must be a list and 'made_from' an object")
    return tuple(_step_from(number, one) for number, one in enumerate(content["steps"]))


def _step_from(number: int, content: Any) -> Step:
    if content == FULL:
        return FULL_STEP
    if isinstance(content, list) and all(
        isinstance(one, (int, float)) and not isinstance(one, bool) for one in content
    ):
        return Step(REUSE, tuple(map(_as_float, content)))
    raise ScheduleError(f"step {number} is {content!r}; expected {FULL!r} or a list of weights such as {list(LATEST)}")


def _as_float(number: float) -> float:
    """A number of a file as a float; infinite if it is an integer too large for one."""
    try:
        return float(number)
    except OverflowError:
        return math.inf


@dataclass(frozen=True)
class ScheduleKind:
    """A kind of schedule in the text form: `make(steps, arguments)` parses what follows the colon.

    `open` does the same for any number of steps, smaller than the arguments need or unknown (None); see
    `Schedule.open`. A kind without it needs the number of steps.
    """

    name: str
    usage: str
    make: Callable[[int, str], Schedule]
    open: Callable[[int | None, str], Schedule] | None = None


KINDS: Registry[ScheduleKind] = Registry("kind of schedule", ScheduleError)


def _none_from(steps: int | None, arguments: str) -> Schedule:
    if arguments:
        raise ScheduleError(f"the schedule {NONE!r} takes no argument; remove ':{arguments}'")
    return Schedule.none(OPEN_STEPS if steps is None else steps)


def _interval_from(arguments: str) -> int:
    try:
        return int(arguments)
    except ValueError:
        raise ScheduleError(f"the cache interval of 'fora:{arguments}' is {arguments!r}; give an integer") from None


def _fora_from(steps: int, arguments: str) -> Schedule:
    return Schedule.fora(steps, _interval_from(arguments))


def _open_fora_from(steps: int | None, arguments: str) -> Schedule:
    cache_interval = _interval_from(arguments)
    if steps is not None:
        return Schedule.fora(steps, min(cache_interval, max(steps, 1)))
    text = fora_text(cache_interval)
    return Schedule.from_flags((number % cache_interval == 0 for number in range(OPEN_STEPS)), text)


KINDS.register(ScheduleKind(NONE, NONE, _none_from, _none_from))
KINDS.register(ScheduleKind("fora", "fora:N", _fora_from, _open_fora_from))


def offsets_in_windows(plan: Iterable[Step], longest: int | None = None) -> list[int]:
    """The offset of each step in its window: 0 is the full step, k the k-th reuse step after it.

    A plan may begin within a window; its first step then has offset 1. After `longest` reuse steps, the next step gets
    offset 0: it runs in full. Raises `ScheduleError` for weights other than FORA's; no denoiser supports them yet.
    """
    offsets, offset = [], 0
    for number, step in enumerate(plan):
        if step.weights not in ((), LATEST):
            raise ScheduleError(
                f"step {number} of the schedule has the weights {list(step.weights)}; the only supported weights are "
                f"{list(LATEST)}: a reuse step reads the last full step"
            )
        offset = 0 if step.is_full or offset == longest else offset + 1
        offsets.append(offset)
    return offsets
