"""Workers: processes of Ray that compute the parts of a long computation, each with its own engines and device.

Ray starts the processes, gives each a part at a time, and starts a worker that was killed again, with its part. The
command writes the results. This module does not know what is computed.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch

from fora_trt.errors import BackendError, ForaError, InputError, first_line
from fora_trt.ray_cluster import check_ray, cores, ray_started
from fora_trt.report.environment import versions

MOST_ON_CORES = 4
"""Most workers for each core of a machine: each has engines of its own, and more are not faster."""

Task = TypeVar("Task")
Result = TypeVar("Result")


class Results(Generic[Task, Result]):
    """Tasks with their results, in the order in which they are finished; a progress bar can read their number."""

    def __init__(self, count: int, results: Iterator[tuple[Task, Result]]) -> None:
        self._count, self._results = count, results

    def __iter__(self) -> Iterator[tuple[Task, Result]]:
        return self._results

    def __length_hint__(self) -> int:
        return self._count


def computed_here(compute: Callable[[Task], Result], tasks: Sequence[Task]) -> Results[Task, Result]:
    """Tasks with their results, each computed in this process when it is asked for."""
    return Results(len(tasks), ((task, compute(task)) for task in tasks))


@dataclass
class Workers:
    """A number of workers on this machine, or on the cluster at `address`; Ray starts when they are first needed.

    A context: workers, and a Ray that was started here, end with it. Without `count` there is a worker for each GPU of
    the cluster if `device` is a GPU, else for each machine. `report` is called with a line before workers start.
    """

    count: int | None
    address: str | None
    device: torch.device
    report: Callable[[str], None] = lambda stage: None
    _ray: Any = None
    _running: ExitStack = field(default_factory=ExitStack)
    _actors: list[Any] = field(default_factory=list)

    def __enter__(self) -> Workers:
        """Check what can be checked before Ray starts. Raises `InputError` or `BackendError`."""
        check_ray("--workers" if self.address is None else "--ray-address", self.address)
        if self.address is None:
            assert self.count is not None
            if self._takes_gpu and self.count > (gpus := torch.cuda.device_count()):
                raise InputError(f"each worker takes a GPU, and this machine has {gpus}; give --workers {gpus} or less")
            if not self._takes_gpu and self.count > MOST_ON_CORES * cores():
                raise InputError(
                    f"{self.count} workers share the {cores()} cores of this machine; give --workers {cores()}"
                )
        return self

    def __exit__(self, *error: Any) -> None:
        self._running.__exit__(*error)

    def crew(self, work: object) -> Crew:
        """Workers that call methods of `work`, which is pickled; they take the place of those before them.

        Raises `InputError` for more workers than the cluster has room for, `BackendError` if Ray cannot be used.
        """
        ray = self._start()
        for actor in self._actors:
            ray.kill(actor)
        machines, count = self._machines(), self.number()
        threads = threads_each(machines, count, self._takes_gpu)
        if not threads or not count:
            kind = "GPUs" if self._takes_gpu else "CPUs"
            room = sum(gpus if self._takes_gpu else cpus for cpus, gpus in machines)
            raise InputError(
                f"the cluster at {self.address} has {room} {kind} for {count} workers; give fewer --workers"
            )
        self.report(f"starting {count} workers with {threads} CPU threads each")
        # a worker that was killed starts again and repeats its task, however often
        kept = {"max_restarts": -1, "max_task_retries": -1}
        worker = ray.remote(Worker).options(num_cpus=threads, num_gpus=int(self._takes_gpu), **kept)
        content = pickle.dumps(work)
        self._actors = [worker.remote(content, versions()) for _ in range(count)]
        return Crew(self._actors)

    def number(self) -> int:
        """The number of workers; joins the cluster if it depends on that."""
        if self.count is not None:
            return self.count
        self._start()
        machines = self._machines()
        return sum(gpus for _, gpus in machines) if self._takes_gpu else len(machines)

    @property
    def _takes_gpu(self) -> bool:
        return self.device.type == "cuda"

    def _start(self) -> Any:
        """Ray, which has started, or joined the cluster. Raises `BackendError`."""
        if self._ray is None:
            self.report("starting Ray" if self.address is None else f"joining the Ray cluster at {self.address}")
            count = self.count or 1
            cpus, gpus = threads_each([(cores(), 0)], count, takes_gpu=False) or 1, int(self._takes_gpu)
            verbose = logging.root.manager.disable < logging.CRITICAL
            started = ray_started(self.address, cpus * count, gpus * count, verbose)
            self._ray = self._running.enter_context(started)
        return self._ray

    def _machines(self) -> list[tuple[int, int]]:
        """CPUs and GPUs of each machine of the cluster."""
        import ray

        nodes: Sequence[Any] = ray.nodes()
        found = [node["Resources"] for node in nodes if node["Alive"]]
        sizes = [(int(one.get("CPU", 0)), int(one.get("GPU", 0))) for one in found]
        return [one for one in sizes if one[0]]


@dataclass(frozen=True)
class Crew:
    """Workers of one work."""

    actors: Sequence[Any]

    def map(self, method: str, tasks: Sequence[Task]) -> Results[Task, Any]:
        """Tasks with what the method returns for them; each task goes to the next worker that is free.

        A task that is a tuple has the arguments of the method. Raises the `ForaError` that a worker raises, and
        `BackendError` if Ray fails.
        """
        return Results(len(tasks), self._results(method, tasks))

    def call(self, method: str, *arguments: Any) -> Any:
        """What the method returns for these arguments, from one worker. Raises as `map` does."""
        ((_, result),) = self.map(method, [arguments])
        return result

    def _results(self, method: str, tasks: Sequence[Task]) -> Iterator[tuple[Task, Any]]:
        from ray.exceptions import RayError, RayTaskError
        from ray.util import ActorPool

        def submit(actor: Any, number: int) -> Any:
            return actor.do.remote(number, method, tasks[number])

        try:
            for number, result in ActorPool(list(self.actors)).map_unordered(submit, list(range(len(tasks)))):
                yield tasks[number], result
        except RayTaskError as error:
            if isinstance(error.cause, ForaError):
                raise error.cause from None
            raise
        except RayError as error:
            raise BackendError(f"Ray has ended the workers: {first_line(error)}; give the command again") from error


class Worker:
    """The process of a worker: unpickles the work at its first task, and calls its methods.

    Engines that the work starts stay for its next tasks.
    """

    def __init__(self, work: bytes, versions_there: dict[str, str]) -> None:
        self._pickled, self._versions_there = work, versions_there
        self._work: object = None

    def do(self, number: int, method: str, task: object) -> tuple[int, object]:
        """The number of a task and its result. Raises `BackendError` if other versions are installed here."""
        if self._work is None:
            _check_versions(self._versions_there, versions())
            self._work = pickle.loads(self._pickled)  # noqa: S301 # of the command that started this worker
        arguments = task if isinstance(task, tuple) else (task,)
        return number, getattr(self._work, method)(*arguments)


def threads_each(machines: Sequence[tuple[int, int]], count: int, takes_gpu: bool) -> int:
    """The largest number of CPUs that each of `count` workers can have; 0 if they do not fit.

    `machines` has CPUs and GPUs of each. A worker is on one machine, and with `takes_gpu` has a GPU for itself.
    """
    for threads in range(max((cpus for cpus, _ in machines), default=0), 0, -1):
        if sum(min(cpus // threads, gpus) if takes_gpu else cpus // threads for cpus, gpus in machines) >= count:
            return threads
    return 0


def _check_versions(wanted: dict[str, str], found: dict[str, str]) -> None:
    for name in sorted({*wanted, *found}):
        if wanted.get(name) != found.get(name):
            raise BackendError(
                f"a worker has {name} {found.get(name, 'not installed')}, and the command {wanted.get(name)}; install "
                "the same versions on all machines of the cluster"
            )
