"""The schedule of a trajectory: a plan, and the text or file that it was made from. No tensors.

A schedule has a text form, `KIND:ARGUMENTS` (`none`, `fora:3`, `dense:18,0.3,forecast=2`), and a file form in JSON;
only this module parses them. Other kinds can be registered in `KINDS`. A per-layer schedule says for some steps which
cache sites they compute: `attention:2,feed-forward:3` gives kinds of cache sites intervals of their own.

FORA's rule (arXiv 2407.01425): number the S steps from S-1 (first) down to 0 (last); step i is full when it is the
first or when N divides i.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, overload

from fora_trt.contract import FULL, REUSE, CacheSite, partial_name
from fora_trt.errors import ScheduleError
from fora_trt.masks import Masks, by_kind, plan_of
from fora_trt.plan import (
    FULL_STEP,
    LATEST,
    MOST_STEPS,
    REUSE_STEP,
    Step,
    depth_of,
    forecast,
    full_by_fora,
    offsets_of,
    readers_of,
    rows_of,
)
from fora_trt.registry import Registry
from fora_trt.untrusted import read_json, shown

FORMAT_VERSION = 1
NONE = "none"
"""Text form of the schedule without caching."""

DEFAULT_EXPONENT = 0.3
"""Exponent of `dense` where none is given; see `fora_trt.presets`."""

OPEN_STEPS = 1000
"""Length of a schedule of unknown length: the number of timesteps that diffusion models are trained with."""

NO_SHARES: Mapping[str, float] = {}
"""The shares of a schedule without partial steps."""

FORECAST = "forecast"
"""Name of the option of a text form that gives the forecast order; every kind takes it."""


@dataclass(frozen=True)
class Schedule:
    """One `Step` per model evaluation, in the order of execution.

    `masks` has for each partial graph of the plan the cache sites that it computes. `text` is the text form or the file
    name that the schedule was made from. `made_from` is the record of its origin in a file. Raises `ScheduleError` if
    the plan does not begin with a full step, or a step reads more steps than precede it.
    """

    plan: tuple[Step, ...]
    text: str = field(default="steps", compare=False)
    masks: Masks = field(default_factory=dict, compare=False)
    made_from: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not self.plan or not self.plan[0].is_full:
            raise ScheduleError("a schedule must begin with a full step: there are no features to reuse before it")
        computing = 0
        for number, step in enumerate(self.plan):
            computing += step.computes
            if len(step.weights) > computing:
                raise ScheduleError(
                    f"step {number} has {len(step.weights)} weights; the number of full steps before it is "
                    f"{computing}; give at most one weight per full step"
                )
            if not step.computes and not (step.weights and all(map(math.isfinite, step.weights))):
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
        return cls.from_flags(full_by_fora(steps, cache_interval), text)

    @classmethod
    def fora_nearest(cls, steps: int, full_steps: int) -> Schedule:
        """FORA at the interval, at least 2, whose number of full steps is nearest to this number."""
        candidates = (cls.fora(steps, interval) for interval in range(2, steps + 1))
        return min(candidates, key=lambda one: abs(one.full_steps - full_steps))

    @classmethod
    def even(cls, steps: int, full_steps: int, first: int = 1, last: int | None = None) -> Schedule:
        """Full steps at equal distances; see `dense`."""
        return cls.dense(steps, full_steps, 0.0, first, last)

    @classmethod
    def dense(
        cls,
        steps: int,
        full_steps: int,
        exponent: float = DEFAULT_EXPONENT,
        first: int = 1,
        last: int | None = None,
    ) -> Schedule:
        """`full_steps` full steps with a density of (1 - u)^-exponent, where u runs from 0 (first step) to 1 (last).

        So they stand closer together towards the end; exponent 0 gives equal distances. The `first` and the `last`
        steps of the trajectory are full (by default one each), and the others are distributed between them. Raises
        `ScheduleError` for numbers that do not fit together.
        """
        ends = (first, min(1, full_steps - 1) if last is None else last)
        _check_full_steps(_counted(steps), full_steps, *ends)
        if not (exponent < 1 and math.isfinite(exponent)):
            raise ScheduleError(f"the exponent of the density is {exponent}; give a finite number below 1")
        text = f"even:{full_steps}" if exponent == 0 else f"dense:{full_steps},{exponent:g}"
        options = {"first": first, "last": last}
        text += "".join(f",{name}={given}" for name, given in options.items() if given not in (1, None))
        full = _distributed(steps, full_steps, exponent, *ends)
        return cls.from_flags((number in full for number in range(steps)), text)

    @classmethod
    def of_full_steps(cls, steps: int, full_steps: Sequence[int]) -> Schedule:
        """The steps with these numbers are full, counted from 0. Raises `ScheduleError` unless they rise from 0."""
        numbers = [*full_steps]
        if numbers != sorted({*numbers}) or not numbers or numbers[0] != 0 or numbers[-1] >= _counted(steps):
            raise ScheduleError(
                f"the full steps are {','.join(map(str, numbers)) or 'none'}; give numbers of steps that rise from 0 "
                f"to at most {steps - 1}"
            )
        text = f"full:{','.join(map(str, numbers))}"
        return cls.from_flags((number in numbers for number in range(steps)), text)

    @classmethod
    def of_masks(cls, computed: Sequence[Collection[str]], sites: Sequence[CacheSite], text: str = "steps") -> Schedule:
        """A schedule whose steps each compute these cache sites, given by module path. Raises `ScheduleError`."""
        plan, masks = plan_of(computed, sites)
        return cls(plan, text, masks)

    @classmethod
    def from_flags(cls, full: Iterable[bool], text: str = "steps") -> Schedule:
        """From one flag per step: True for a full step, False for a reuse step of FORA."""
        return cls(tuple(FULL_STEP if flag else REUSE_STEP for flag in full), text)

    @classmethod
    def from_text(cls, text: str, steps: int, sites: Sequence[CacheSite] | None = None) -> Schedule:
        """The schedule of a text form (`none`, `fora:3`) or a .json file, for `steps` model evaluations.

        `sites` are the cache sites of the model, which a per-layer schedule needs. Raises `ScheduleError` for an
        unknown kind, invalid arguments, or a file for another number of steps.
        """
        kind, arguments, order = _parts_of(text)
        entry = _kind_of(text)
        if entry is not None and not (entry is BY_KIND and sites is None):
            made = entry.made(steps, f"{kind}:{arguments}" if entry is BY_KIND else arguments, sites).checked(steps)
            return made if order is None else made.with_forecast(order)
        if Path(text).suffix == ".json":
            return cls.from_file(text, sites).checked(steps)
        raise _unknown(text)

    @classmethod
    def of_any_length(cls, text: str, sites: Sequence[CacheSite]) -> Schedule:
        """The schedule of a text form for `OPEN_STEPS` steps, or of a file for as many as it has.

        Raises `ScheduleError` as `from_text`.
        """
        if is_file(text):
            return cls.from_file(text, sites)
        if not reads_file(text):
            return cls.from_text(text, OPEN_STEPS, sites)
        kind, arguments, order = _parts_of(text)
        made = KINDS[kind].made(OPEN_STEPS, arguments, sites)
        return made if order is None else made.with_forecast(order)

    @classmethod
    def open(cls, text: str, steps: int | None = None, sites: Sequence[CacheSite] | None = None) -> Schedule:
        """The schedule of a text form for any number of steps, known (`steps`) or unknown (None).

        A cache interval longer than the trajectory is allowed here. With an unknown number, the schedule has
        `OPEN_STEPS` steps, and its full steps are counted from the first step instead of the last. Raises
        `ScheduleError` for a kind that needs the number of steps.
        """
        _, arguments, order = _parts_of(text)
        entry = _kind_of(text)
        if entry is not None and entry.open is not None:
            made = entry.open(steps, arguments)
            return made if order is None else made.with_forecast(order)
        if steps is not None:
            return cls.from_text(text, steps, sites)
        if entry is None and Path(text).suffix == ".json":
            return cls.from_file(text, sites)
        if entry is None:
            return cls.from_text(text, OPEN_STEPS)  # raises
        raise ScheduleError(
            f"the schedule {text!r} needs the number of steps; give Schedule.from_text({text!r}, steps), or "
            "as_transformer(pipe) in a diffusers pipeline"
        )

    def with_forecast(self, order: int) -> Schedule:
        """The same full steps with a forecast of this order (0 to 3) in place of the weights; order 0 is FORA.

        Where fewer than `order` + 1 full steps precede a reuse step, its order is lower. A schedule without reuse steps
        stays as it is. Raises `ScheduleError` for another order.
        """
        plan = forecast(self.plan, order)
        if plan == self.plan:
            return self
        return replace(self, plan=plan, text=text_with_forecast(self.text, order), made_from={})

    @classmethod
    def from_file(cls, path: str | Path, sites: Sequence[CacheSite] | None = None) -> Schedule:
        """Read a schedule that `to_file` wrote. Raises `ScheduleError` for an unreadable or invalid file.

        With `sites`, the cache sites of a model, it is also invalid if its masks name others.
        """
        try:
            _, content = read_json(Path(path), follow=True)
        except OSError as error:
            raise ScheduleError(f"the schedule {path} cannot be read ({error.strerror})") from error
        except ValueError as error:
            raise ScheduleError(f"the schedule {path} {error}") from error
        try:
            plan, masks = _plan_from(content)
            if sites is not None and masks:
                computed = [
                    masks.get(step.graph, [site.module for site in sites] if step.is_full else ()) for step in plan
                ]
                again, masks = plan_of(computed, sites)
                plan = tuple(new if old.computes else old for old, new in zip(plan, again, strict=True))
            return cls(plan, str(path), masks, content.get("made_from", {}))
        except ScheduleError as error:
            raise ScheduleError(f"the schedule {path} is invalid: {error}") from error

    def to_file(self, path: str | Path) -> None:
        """Write the schedule as JSON: for each step `full`, a list of weights, or the name of a mask."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    def to_json(self) -> str:
        """The content of the schedule's file."""
        steps = [step.graph if step.computes else list(step.weights) for step in self.plan]
        masks = {"masks": {name: [*paths] for name, paths in self.masks.items()}} if self.masks else {}
        content = {"format_version": FORMAT_VERSION, "steps": steps, **masks, "made_from": dict(self.made_from)}
        return json.dumps(content, indent=2) + "\n"

    def checked(self, steps: int) -> Schedule:
        """Return the schedule; raise `ScheduleError` unless it has this number of steps."""
        if self.steps != steps:
            raise ScheduleError(
                f"the schedule {self.text} is for {self.steps} model evaluations, but this trajectory has {steps}; "
                f"change the number of steps to match, or give another schedule"
            )
        return self

    def check_model(self, weights_sha256: str, source: str) -> None:
        """Raise `ScheduleError` if the schedule was calibrated for a model with other weights and another source.

        A schedule of a model in one precision fits the same model in another: their weights differ, but not the source.
        """
        if not isinstance(made := self.made_from.get("model"), dict):
            return
        if weights_sha256 != made.get("weights_sha256") and source != made.get("source"):
            raise ScheduleError(
                f"the schedule {self.text} was calibrated for {shown(made.get('name'))} (from "
                f"{shown(made.get('source'))}), not for "
                f"this model (from {source}); calibrate one for it: fora-trt calibrate BUNDLE -o FILE"
            )

    def check_scheduler(self, scheduler: str, timesteps: Sequence[float]) -> None:
        """Raise `ScheduleError` if the schedule was calibrated for another scheduler class or other timesteps."""
        made, times = self.made_from.get("scheduler"), self.made_from.get("timesteps")
        if not isinstance(made, str) or not isinstance(times, list):
            return
        if not all(isinstance(one, int | float) for one in times):
            raise ScheduleError(f"the timesteps in the schedule {self.text} are not all numbers; calibrate it again")
        equal = len(times) == len(timesteps) and all(abs(a - b) < 1e-2 for a, b in zip(times, timesteps, strict=True))
        if made != scheduler or not equal:
            raise ScheduleError(
                f"the schedule {self.text} was calibrated for {_described(made, times)}, but this trajectory takes "
                f"{_described(scheduler, timesteps)}; calibrate one for these, or give another schedule"
            )

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
    def partial_steps(self) -> int:
        """Number of steps that compute some layers."""
        return sum(step.is_partial for step in self.plan)

    @property
    def caches(self) -> bool:
        """Whether the schedule has a reuse or a partial step."""
        return self.full_steps < self.steps

    def work(self, shares: Mapping[str, float] = NO_SHARES) -> float:
        """The arithmetic of the full and the partial steps, in full steps.

        `shares` has the arithmetic of a step of each partial graph, divided by that of a full step.
        """
        return sum(shares[step.graph] if step.is_partial else 1.0 for step in self.plan if step.computes)

    def ideal_speedup(self, shares: Mapping[str, float] = NO_SHARES) -> float:
        """Speed-up over no caching if a reuse step cost nothing; `shares` as for `work`."""
        return self.steps / self.work(shares)

    def digest(self) -> str:
        """A short digest of the plan, which differs for files of one name and different content."""
        steps = json.dumps([[step.graph, *step.weights] for step in self.plan])
        return hashlib.sha256(steps.encode()).hexdigest()[:16]

    def readers(self) -> dict[int, list[int]]:
        """For each full step, the reuse steps that read its sums; the full step folds one sum for each of them."""
        return readers_of(self.plan)

    @property
    def longest_window(self) -> int:
        """The largest number of reuse steps between two full steps; 0 without caching."""
        return max(offsets_of(self.plan))

    @property
    def kept_sums(self) -> int:
        """The largest number of reuse steps that one full step folds a sum for; `longest_window` for FORA."""
        return rows_of(self.plan)

    @property
    def depth(self) -> int:
        """The largest number of full steps that a reuse step reads: 1 for FORA, the order + 1 for a forecast."""
        return depth_of(self.plan)


def _described(scheduler: str, timesteps: Sequence[float]) -> str:
    """A scheduler and its timesteps in a few words."""
    return f"{scheduler} with the timesteps {', '.join(f'{one:g}' for one in timesteps[:3])}, ... ({len(timesteps)})"


def _counted(steps: int) -> int:
    if steps < 1:
        raise ScheduleError(f"the number of steps is {steps}; at least 1 is needed")
    if steps > MOST_STEPS:
        raise ScheduleError(f"the number of steps is {steps}; the limit is {MOST_STEPS}")
    return steps


def fora_text(cache_interval: int) -> str:
    """Text form of FORA's schedule at a cache interval. Raises `ScheduleError` for an interval below 1."""
    if cache_interval < 1:
        raise ScheduleError(f"the cache interval is {cache_interval}; it must be at least 1 (no caching)")
    return NONE if cache_interval == 1 else f"fora:{cache_interval}"


def _plan_from(content: Any) -> tuple[tuple[Step, ...], Masks]:
    """The steps and the masks of a schedule file."""
    if not isinstance(content, dict) or content.keys() - {"format_version", "steps", "masks", "made_from"}:
        raise ScheduleError("expected an object with the keys format_version, steps, masks and made_from")
    if content.get("format_version") != FORMAT_VERSION:
        raise ScheduleError(
            f"format_version is {shown(content.get('format_version'))}; this version of fora-trt reads {FORMAT_VERSION}"
        )
    if not isinstance(content.get("made_from", {}), dict) or not isinstance(content.get("steps"), list):
        raise ScheduleError("'steps' must be a list and 'made_from' an object")
    _counted(max(1, len(content["steps"])))  # `Schedule` refuses an empty plan
    names = _names_of(content.get("masks", {}))
    steps = tuple(_step_from(number, one, names) for number, one in enumerate(content["steps"]))
    used = {step.graph for step in steps}
    return steps, {name: mask for name, mask in names.values() if name in used}


def _names_of(masks: Any) -> dict[str, tuple[str, tuple[str, ...]]]:
    """For each mask of a schedule file the name of its graph, and the cache sites that it computes."""
    if not isinstance(masks, dict) or FULL in masks:
        raise ScheduleError(f"'masks' must be an object with a list of module paths by name, and no name {FULL!r}")
    for name, mask in masks.items():
        if not isinstance(mask, list) or not mask or not all(isinstance(one, str) for one in mask):
            raise ScheduleError(
                f"the mask {shown(repr(name))} is {shown(repr(mask))}; expected a list of module paths, not empty"
            )
    return {name: (partial_name(mask), tuple(mask)) for name, mask in masks.items()}


def _step_from(number: int, content: Any, masks: Mapping[str, tuple[str, tuple[str, ...]]]) -> Step:
    if content == FULL:
        return FULL_STEP
    if isinstance(content, str) and content in masks:
        return Step(masks[content][0])
    if isinstance(content, list) and all(
        isinstance(one, (int, float)) and not isinstance(one, bool) for one in content
    ):
        return Step(REUSE, tuple(map(_as_float, content)))
    raise ScheduleError(
        f"step {number} is {shown(repr(content))}; expected {FULL!r}, a list of weights such as {list(LATEST)}, or the "
        "name of a mask"
    )


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
    `Schedule.open`. A kind without it needs the number of steps. A per-layer kind has `make_for(steps, arguments,
    sites)` instead, which takes the cache sites of the model. `reads_file` says that the arguments begin with the path
    of a file, which also determines the number of steps.
    """

    name: str
    usage: str
    make: Callable[[int, str], Schedule] | None = None
    open: Callable[[int | None, str], Schedule] | None = None
    make_for: Callable[[int, str, Sequence[CacheSite]], Schedule] | None = None
    reads_file: bool = False

    def made(self, steps: int, arguments: str, sites: Sequence[CacheSite] | None = None) -> Schedule:
        """The schedule of what follows the colon. Raises `ScheduleError`, also for a per-layer kind without sites."""
        if self.make_for is not None and sites is not None:
            return self.make_for(steps, arguments, sites)
        if self.make is not None:
            return self.make(steps, arguments)
        raise ScheduleError(
            f"the schedule {self.name}:{arguments} says which layers of a model are computed; give it with a bundle"
        )


KINDS: Registry[ScheduleKind] = Registry("kind of schedule", ScheduleError, "fora_trt.published_schedules")


def is_file(text: str) -> bool:
    """Whether a schedule is given as a file, and not in a text form."""
    return _kind_of(text) is None and Path(text).suffix == ".json"


def is_text_form(text: str) -> bool:
    """Whether a schedule is given in a text form that reads no file."""
    return _kind_of(text) is not None and not reads_file(text)


def in_folder(text: str, folder: Path) -> str:
    """The same schedule with the path of the file that it reads, if any, relative to a folder."""
    if is_file(text):
        return str(folder / text)
    kind, colon, path = text.partition(":")
    return f"{kind}:{folder / path}" if colon and reads_file(text) else text


def text_forms() -> str:
    """The text forms that read no file, for messages."""
    return ", ".join(one.usage for one in (*KINDS.values(), BY_KIND) if not one.reads_file)


def reads_file(text: str) -> bool:
    """Whether a schedule is given as a file, or made from another file, such as a router."""
    kind = _kind_of(text)
    return is_file(text) if kind is None else kind.reads_file


def _unknown(text: str, kinds: Collection[str] = ()) -> ScheduleError:
    """The error for a text that is no schedule; `kinds` are those of the cache sites, if they are known."""
    known = ", ".join(one.usage for one in (*KINDS.values(), BY_KIND))
    of_sites = f" (KIND is {' or '.join(kinds)})" if kinds else ""
    return ScheduleError(f"there is no schedule {text!r}; give {known}{of_sites}, or a .json file")


def _kind_of(text: str) -> ScheduleKind | None:
    """The kind of a text form; None for a file and for an unknown kind."""
    return KINDS.get(text.partition(":")[0]) or (BY_KIND if INTERVALS.fullmatch(text) else None)


def text_with_forecast(text: str, order: int) -> str:
    """The text form with the option `forecast=ORDER`, which replaces the one that it has; order 0 is left out."""
    kind, _, arguments = text.partition(":")
    words = [word for word in arguments.split(",") if word and not word.startswith(f"{FORECAST}=")]
    words += [f"{FORECAST}={order}"] if order and kind != NONE else []
    return f"{kind}:{','.join(words)}" if words else kind


@overload
def with_forecast(schedule: str, order: int | None) -> str: ...


@overload
def with_forecast(schedule: Schedule | str, order: int | None) -> Schedule | str: ...


def with_forecast(schedule: Schedule | str, order: int | None) -> Schedule | str:
    """A schedule or text form with the forecast order that was given beside it; None changes nothing.

    Raises `ScheduleError` for a file and for a text that has a forecast order already.
    """
    if order is None:
        return schedule
    if isinstance(schedule, Schedule):
        return schedule.with_forecast(order)
    _, _, given = _parts_of(schedule)
    if given is not None:
        raise ScheduleError(f"the schedule {schedule!r} has a forecast order already; give one order, here or there")
    if Path(schedule).suffix == ".json":
        raise ScheduleError(f"the schedule {schedule} has weights of its own; give the file without a forecast order")
    _check_reuse(schedule, order)
    return text_with_forecast(schedule, order)


def _parts_of(text: str) -> tuple[str, str, int | None]:
    """Kind, arguments without the forecast, and forecast order of a text form; None if it has none."""
    kind, _, arguments = text.partition(":")
    words = arguments.split(",")
    given = [word for word in words if word.startswith(f"{FORECAST}=")]
    if not given:
        return kind, arguments, None
    if len(given) > 1:
        raise ScheduleError(f"{given[1]!r} in the schedule {text!r} comes after {given[0]!r}; give one of them")
    where = f"{given[0]!r} in the schedule {text!r}"
    order = _whole(given[0].removeprefix(f"{FORECAST}="), where, "the forecast order")
    _check_reuse(kind, order)
    return kind, ",".join(word for word in words if word not in given), order


def _check_reuse(kind: str, order: int | None) -> None:
    if kind == NONE and order:
        raise ScheduleError(f"without caching no step can forecast; leave out the forecast order {order}")


def _whole(word: str, where: str, what: str) -> int:
    try:
        return int(word)
    except ValueError:
        raise ScheduleError(f"{where} is not an integer; give {what}") from None


class Arguments:
    """The words after the colon of a text form, separated by commas; words with an equals sign are options.

    Each is taken once. `finished` raises `ScheduleError` for the first word that was not taken.
    """

    def __init__(self, kind: str, arguments: str) -> None:
        self._kind, self._text = kind, f"{kind}:{arguments}" if arguments else kind
        words = arguments.split(",") if arguments else []
        self._positional = [word for word in words if "=" not in word]
        self._options: dict[str, str] = {}
        for word in words:
            name, equals, value = word.partition("=")
            if equals and name in self._options:
                raise ScheduleError(f"{word!r} in the schedule {self._text!r} gives {name} a second time; remove it")
            if equals:
                self._options[name] = value

    def integer(self, what: str) -> int:
        """The next word as an integer; `what` says in messages what it is."""
        word = self._next(what)
        return _whole(word, f"{word!r} in the schedule {self._text!r}", what)

    def integers(self, what: str) -> list[int]:
        """All remaining words as integers, at least one."""
        return [self.integer(what) for _ in range(max(1, len(self._positional)))]

    def number(self, what: str, default: float) -> float:
        """The next word as a number; `default` if there is none."""
        if not self._positional:
            return default
        try:
            return float(word := self._next(what))
        except ValueError:
            raise ScheduleError(f"{word!r} in the schedule {self._text!r} is not a number; give {what}") from None

    def option(self, name: str, what: str) -> int | None:
        """The integer of the option `name=`; None if it is not given."""
        if name not in self._options:
            return None
        value = self._options.pop(name)
        return _whole(value, f"{f'{name}={value}'!r} in the schedule {self._text!r}", what)

    def finished(self, usage: str) -> None:
        """Raise `ScheduleError` if a word is left; `usage` is the form of the schedule."""
        left = [*self._positional, *(f"{name}={value}" for name, value in self._options.items())]
        if left:
            raise ScheduleError(f"{left[0]!r} in the schedule {self._text!r} is not understood; the form is {usage}")

    def _next(self, what: str) -> str:
        if not self._positional:
            form = KINDS[self._kind].usage
            raise ScheduleError(f"the schedule {self._text!r} lacks {what}; the form is {form}")
        return self._positional.pop(0)


def _check_full_steps(steps: int, full_steps: int, first: int, last: int) -> None:
    if not 1 <= full_steps <= steps:
        raise ScheduleError(f"the number of full steps is {full_steps}; give 1 to {steps}, the number of steps")
    if first < 1 or last < 0:
        raise ScheduleError(f"first={first} and last={last} are not possible; give at least first=1 and last=0")
    if first + last > full_steps:
        raise ScheduleError(
            f"first={first} and last={last} need {first + last} full steps; the schedule has {full_steps}"
        )


def _distributed(steps: int, full_steps: int, exponent: float, first: int, last: int) -> set[int]:
    """Numbers of the full steps of `Schedule.dense`: quantiles of the density, rounded, each used once."""
    begin, end, inner = first - 1, steps - last, full_steps - first - last
    shares = [1 - (1 - k / (inner + 1)) ** (1 / (1 - exponent)) for k in range(1, inner + 1)]
    chosen = [begin + round(share * (end - begin)) for share in shares]
    for k in range(inner):  # apart from those before
        chosen[k] = max(chosen[k], (chosen[k - 1] if k else begin) + 1)
    for k in reversed(range(inner)):  # and from those after
        chosen[k] = min(chosen[k], (chosen[k + 1] if k + 1 < inner else end) - 1)
    return {*range(first), *chosen, *range(end, steps)}


def _none_from(steps: int | None, arguments: str) -> Schedule:
    Arguments(NONE, arguments).finished(NONE)
    return Schedule.none(OPEN_STEPS if steps is None else steps)


def _interval_from(arguments: str) -> int:
    given = Arguments("fora", arguments)
    interval = given.integer("the cache interval")
    given.finished("fora:N")
    return interval


def _fora_from(steps: int, arguments: str) -> Schedule:
    return Schedule.fora(steps, _interval_from(arguments))


def _open_fora_from(steps: int | None, arguments: str) -> Schedule:
    cache_interval = _interval_from(arguments)
    if steps is not None:
        return Schedule.fora(steps, min(cache_interval, max(steps, 1)))
    text = fora_text(cache_interval)
    return Schedule.from_flags((number % cache_interval == 0 for number in range(OPEN_STEPS)), text)


ENDS = "the number of full steps at that end"


def _full_steps_from(given: Arguments, steps: int) -> int:
    """The number of full steps: the next word, or as many as FORA has at the interval of the option `every=`."""
    every = given.option(EVERY, "the cache interval of FORA")
    if every is None:
        return given.integer(FULL_STEPS)
    return Schedule.fora(steps, min(every, steps)).full_steps


def _even_from(steps: int, arguments: str) -> Schedule:
    given = Arguments("even", arguments)
    full_steps = _full_steps_from(given, steps)
    first, last = given.option("first", ENDS), given.option("last", ENDS)
    given.finished(EVEN)
    return Schedule.even(steps, full_steps, 1 if first is None else first, last)


def _dense_from(steps: int, arguments: str) -> Schedule:
    given = Arguments("dense", arguments)
    full_steps = _full_steps_from(given, steps)
    exponent = given.number("the exponent of the density", DEFAULT_EXPONENT)
    first, last = given.option("first", ENDS), given.option("last", ENDS)
    given.finished(DENSE)
    return Schedule.dense(steps, full_steps, exponent, 1 if first is None else first, last)


def _by_kind_from(steps: int, arguments: str, sites: Sequence[CacheSite]) -> Schedule:
    """From the whole text `KIND:N,KIND:N`."""
    kinds, intervals = [*dict.fromkeys(site.kind for site in sites)], dict[str, int]()
    for word in arguments.split(","):
        kind, _, number = word.partition(":")
        if kind not in kinds:
            raise _unknown(arguments, kinds)
        where = f"{word!r} in the schedule {arguments!r}"
        interval = _whole(number, where, "a cache interval")
        if kind in intervals:
            raise ScheduleError(f"{where} gives the interval of {kind} a second time; remove it")
        if not 1 <= interval <= steps:
            raise ScheduleError(f"{where} is no interval from 1 to {steps}")
        intervals[kind] = interval
    return Schedule.of_masks(by_kind(steps, intervals, sites), sites, arguments)


def _full_from(steps: int, arguments: str) -> Schedule:
    given = Arguments("full", arguments)
    numbers = given.integers("the number of a full step")
    given.finished("full:0,K,...")
    return Schedule.of_full_steps(steps, numbers)


EVERY = "every"
"""Name of the option of `even` and `dense` that gives the number of full steps by a cache interval."""

FULL_STEPS = "the number of full steps, or every=N for as many as fora:N has"
INTERVALS = re.compile(r"[a-z-]+:-?\d+(,[a-z-]+:-?\d+)*(,forecast=.*)?")
EVEN, DENSE = "even:F[,first=K][,last=K]", "dense:F[,EXPONENT][,first=K][,last=K]"

KINDS.register(ScheduleKind(NONE, NONE, _none_from, _none_from))
KINDS.register(ScheduleKind("fora", "fora:N", _fora_from, _open_fora_from))
KINDS.register(ScheduleKind("even", EVEN, _even_from))
KINDS.register(ScheduleKind("dense", DENSE, _dense_from))
KINDS.register(ScheduleKind("full", "full:0,K,...", _full_from))
BY_KIND = ScheduleKind("by-kind", "KIND:N,KIND:N,...", make_for=_by_kind_from)
"""The text form without a name of its own: intervals for kinds of cache sites, such as `attention:2,feed-forward:3`."""
