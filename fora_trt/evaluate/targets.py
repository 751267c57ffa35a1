"""The targets of a benchmark: every backend that works here, with timed engines, and the PyTorch references."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fora_trt.bundle import Bundle
from fora_trt.engines.backends import backend_from_name, device_from_name
from fora_trt.engines.base import Engine, Launch
from fora_trt.engines.cuda_graphs import Replay
from fora_trt.engines.options import EngineOptions
from fora_trt.engines.torch import compiler_problem
from fora_trt.errors import BackendError, ForaError, first_line
from fora_trt.evaluate.compiled_module import compiled_engines
from fora_trt.evaluate.eager_fora import EagerFora
from fora_trt.evaluate.peaks import seconds_of
from fora_trt.pipeline import Pipeline
from fora_trt.presets import DEFAULT_INTERVAL
from fora_trt.report.results import COMPILED, EAGER, Absent
from fora_trt.runtime.denoiser import Denoiser
from fora_trt.runtime.interface import Predictor
from fora_trt.schedule import NONE, Schedule

REFERENCES = (EAGER, COMPILED)
"""The PyTorch references, which every benchmark includes: a user's alternative to this project."""

REPLAYS = 20
"""Number of runs of an engine on a GPU to measure its time without the rest of a step."""


class EngineClock:
    """Sums the time of engine calls on the CPU since `restart`.

    On a GPU calls return before the work is done; `Target.engine_seconds` measures the engines separately there.
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Set the time to zero."""
        self.seconds = 0.0

    def timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a call so that its time is added; the time of asynchronous GPU work is not included."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = call(*args, **kwargs)
            self.seconds += time.perf_counter() - began
            return result

        return timed


class TimedEngine(Engine):
    """A CPU engine whose launches are timed by a clock."""

    def __init__(self, engine: Engine, clock: EngineClock) -> None:
        super().__init__(engine.inputs.values(), engine.outputs.values(), engine.device)
        self._engine, self._clock = engine, clock
        self.longest_window, self.shortest_window = engine.longest_window, engine.shortest_window
        self.most_rows, self.any_window = engine.most_rows, engine.any_window
        self.accumulates = engine.accumulates

    def bind(self, tensors: Mapping[str, Tensor]) -> Launch:
        return self._clock.timed(self._engine.bind(tensors))


@dataclass(frozen=True)
class Target:
    """A backend or reference that works here, and the schedules it is timed with; the first is without caching.

    `controls` has the text forms of the schedules that get an equal-time control.
    """

    backend: str
    pipeline: Pipeline
    clock: EngineClock
    schedules: tuple[Schedule, ...]
    controls: tuple[str, ...]

    def engine_seconds(self, schedule: Schedule) -> float | None:
        """Time in engines of the last trajectory, which ran with this schedule; None for eager PyTorch on a GPU.

        On a GPU, each engine is run again on its own and its time multiplied by its number of steps.
        """
        denoiser = self.pipeline.denoiser
        if denoiser.device.type == "cpu":
            return self.clock.seconds
        if not isinstance(denoiser, Denoiser) or denoiser.window is None:
            return None
        window, precomputed = denoiser.window, denoiser.precomputed
        launches, graphs = window.launches(), {step.graph for step in schedule.plan}
        times = {graph: _seconds_of(launches[graph], window.engines[graph]) for graph in graphs}
        before = [_seconds_of(launch, engine) for engine, launch in (precomputed.launches if precomputed else ())]
        return sum(before) + sum(times[step.graph] for step in schedule.plan)


def device_of(name: str, device: str) -> torch.device:
    """The device of a backend or reference for the --device option `device`. Raises `BackendError`."""
    return device_from_name(device, backend_from_name("torch" if name in REFERENCES else name))


def targets_of(
    pipeline: Pipeline,
    backends: Sequence[str],
    schedules: Sequence[Schedule],
    device: Callable[[str], torch.device],
    plans: EngineOptions,
    references: Sequence[str] = REFERENCES,
    report: Callable[[str], None] = lambda stage: None,
) -> tuple[list[Target], list[Absent]]:
    """Start the backends and the references; return those that work, and the absent ones with the reason.

    Backends are timed with all schedules, references with one cached schedule (`USUAL_INTERVAL`). `pipeline` has the
    bundle and the settings, `device` returns the device of a backend.
    """
    plain = pipeline.sampling(schedule=NONE).schedule
    cached = [one for one in schedules if one.text != NONE]
    targets, absent = [], []
    for name in dict.fromkeys((*backends, *references)):
        report(f"starting {name}")
        clock = EngineClock()
        try:
            predictor = predictor_of(pipeline.bundle, name, device(name), plans, clock)
        except ForaError as error:
            absent.append(Absent(backend=name, why=str(error)))
        except Exception as error:  # from any library: one broken backend must not stop the benchmark
            absent.append(Absent(backend=name, why=f"{type(error).__name__}: {first_line(error)}"))
        else:
            own = pipeline.over(predictor)
            taken = cached if name in backends else _usual(cached)
            controls = tuple(one.text for one in taken) if name in backends else ()
            targets.append(Target(name, own, clock, (plain, *taken), controls))
    return targets, absent


def _usual(schedules: Sequence[Schedule]) -> list[Schedule]:
    """The schedule whose longest window is nearest to that of FORA at `DEFAULT_INTERVAL`; empty if there is none.

    The references have no partial steps: the compiled module has none.
    """
    whole = [one for one in schedules if not one.masks]
    nearest = min(whole, key=lambda one: abs(one.longest_window + 1 - DEFAULT_INTERVAL), default=None)
    return [] if nearest is None else [nearest]


def predictor_of(
    bundle: Bundle, backend: str, device: torch.device, plans: EngineOptions, clock: EngineClock | None = None
) -> Predictor:
    """The predictor of a target: the engines of a backend, or for `EAGER` and `COMPILED` the original module."""
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
    return Denoiser(engines, bundle.manifest, backend)


def _seconds_of(launch: Launch, engine: Engine) -> float:
    """Time of one run of an engine on a GPU: the median of `REPLAYS` runs."""
    run = Replay(launch, engine.device, lambda: engine.can_capture(launch))
    times = [seconds_of(run, engine.device) for _ in range(REPLAYS + 2)]  # the first warms up, the second captures
    return statistics.median(times[2:])
