"""What a benchmark compares: each backend that works here, with a clock on its engines, and plain PyTorch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fora_trt.bundle import Bundle
from fora_trt.engines.backends import backend_from_name, compiler_problem, device_from_name
from fora_trt.engines.base import Engine, Launch
from fora_trt.engines.cuda_graphs import Replay
from fora_trt.engines.plan_store import PlanSource
from fora_trt.errors import BackendError, ForaError, first_line
from fora_trt.evaluate.compiled_module import compiled_engines
from fora_trt.evaluate.eager_fora import EagerFora
from fora_trt.evaluate.peaks import seconds_of
from fora_trt.evaluate.results import COMPILED, EAGER, Absent
from fora_trt.runtime.denoiser import Denoiser
from fora_trt.runtime.sampling import Steps
from fora_trt.schedule import Schedule

REFERENCES = (EAGER, COMPILED)
"""What a user would pick instead; in every benchmark."""

REPLAYS = 20
"""How often an engine is run on a GPU to learn its time without the rest of a step."""


class EngineClock:
    """Seconds in engines since `restart`: measured around each call on the CPU, and beside the trajectory on a GPU."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin at zero."""
        self.seconds = 0.0

    def timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same call, its time added up. Not for what a GPU does later."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = call(*args, **kwargs)
            self.seconds += time.perf_counter() - began
            return result

        return timed


class TimedEngine(Engine):
    """An engine of the CPU with a clock on it."""

    def __init__(self, engine: Engine, clock: EngineClock) -> None:
        super().__init__(engine.inputs.values(), engine.outputs.values(), engine.device)
        self._engine, self._clock = engine, clock
        self.longest_window, self.shortest_window = engine.longest_window, engine.shortest_window
        self.most_rows = engine.most_rows

    def bind(self, tensors: Mapping[str, Tensor]) -> Launch:
        return self._clock.timed(self._engine.bind(tensors))


@dataclass(frozen=True)
class Entrant:
    """A backend that works here, the cache intervals at which it is measured (1 first), and those with a control."""

    backend: str
    steps: Steps
    clock: EngineClock
    cache_intervals: tuple[int, ...]
    controls: tuple[int, ...]

    def engine_seconds(self, steps: Steps, schedule: Schedule) -> float | None:
        """What the engines took of the trajectory that `steps` just took, which are its own or their twin.

        None for eager PyTorch on a GPU, which has no engines.
        """
        if steps.device.type == "cpu":
            return self.clock.seconds
        if not isinstance(steps, Denoiser):
            return None
        engines, table = {True: steps.full, False: steps.reuse}, steps.table
        launches = steps.engine_launches()
        times = {full: _seconds_of(launches[full], engines[full]) for full in {*schedule.full}}
        before = sum(_seconds_of(launch, engine) for engine, launch in (table.launches if table else ()))
        return before + sum(times[full] for full in schedule.full)


def device_of(name: str, device: str) -> torch.device:
    """Where a backend or a reference of this name runs if `device` is asked for. Raises `BackendError`."""
    return device_from_name(device, backend_from_name("torch" if name in REFERENCES else name))


def entrants_of(
    bundle: Bundle,
    backends: Sequence[str],
    cache_intervals: Sequence[int],
    device: Callable[[str], torch.device],
    plans: PlanSource,
    references: Sequence[str] = REFERENCES,
    report: Callable[[str], None] = lambda stage: None,
) -> tuple[list[Entrant], list[Absent]]:
    """Start the backends, at every cache interval with a control, and references not among them at the middle one.

    `device` gives the device of a backend. What cannot run here is told why.
    """
    middle = min((interval for interval in cache_intervals if interval > 1), key=lambda one: abs(one - 3), default=1)
    entrants, absent = [], []
    for name in dict.fromkeys((*backends, *references)):
        report(f"starting {name}")
        clock = EngineClock()
        try:
            steps = steps_of(bundle, name, device(name), plans, clock)
        except ForaError as error:
            absent.append(Absent(backend=name, why=str(error)))
        except Exception as error:  # of many libraries, on a machine that we do not know
            absent.append(Absent(backend=name, why=f"{type(error).__name__}: {first_line(error)}"))
        else:
            intervals = tuple(dict.fromkeys((1, *(cache_intervals if name in backends else (middle,)))))
            entrants.append(Entrant(name, steps, clock, intervals, intervals[1:] if name in backends else ()))
    return entrants, absent


def steps_of(
    bundle: Bundle, backend: str, device: torch.device, plans: PlanSource, clock: EngineClock | None = None
) -> Steps:
    """What takes the steps: the engines of a backend, or for `EAGER` and `COMPILED` the module."""
    clock, on_cpu = clock or EngineClock(), device.type == "cpu"
    if backend == EAGER:
        eager = EagerFora(bundle, device, cast_whole=True)
        eager.call = clock.timed(eager.call)
        return eager
    engines: Mapping[str, Engine]
    if backend == COMPILED:
        if problem := compiler_problem():
            raise BackendError(problem)
        engines = compiled_engines(bundle, device)
    else:
        engines = backend_from_name(backend).engines(bundle, device, plans)
    if on_cpu:
        engines = {name: TimedEngine(engine, clock) for name, engine in engines.items()}
    return Denoiser(engines, bundle.manifest, Schedule.static(1, 1), backend)


def _seconds_of(launch: Launch, engine: Engine) -> float:
    """Of one run of an engine on a GPU, from the median of `REPLAYS`."""
    run = Replay(launch, engine.device, lambda: engine.can_capture(launch))
    times = [seconds_of(run, engine.device) for _ in range(REPLAYS + 2)]  # the first warms up, the second captures
    return statistics.median(times[2:])
