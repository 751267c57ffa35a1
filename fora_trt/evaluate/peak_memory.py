"""How much memory a trajectory needs at its peak: of a block of work, and of a backend in a process of its own.

`PeakMemory` is for any block. `peak_memory` starts this module as a process that does nothing but denoise.
"""

from __future__ import annotations

import gc
import json
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from diffusers import SchedulerMixin
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fora_trt.bundle import Bundle
from fora_trt.engines.plan_store import PlanSource
from fora_trt.errors import BackendError, ForaError, InputError, first_line
from fora_trt.folders import Record
from fora_trt.runtime.conditioning import Conditioning, conditioning_of_tensors
from fora_trt.runtime.schedulers import scheduler_from_config
from fora_trt.runtime.updates import Update, update_from_scheduler

STEPS, CACHE_INTERVAL = 4, 3
"""Of the trajectory that is taken: a full step, two reuse steps and a full one."""

SAMPLED_EVERY = 0.002
"""Seconds between two samples of a GPU's free memory."""


class PeakMemory:
    """Memory that a block of work needs at its peak, in `bytes` once the block is left.

    On a GPU: free memory before the block minus the least free memory during it, so allocations of torch, TensorRT,
    ONNX Runtime and the driver count alike. A thread samples every few milliseconds; shorter peaks of torch's allocator
    are counted too. No other process may use that GPU. Time nothing in the block, for the thread disturbs it, and
    capture with `capture_error_mode="thread_local"`, as `Replay` does.
    On the CPU: the peak of the whole process since it began.
    """

    def __init__(self, device: torch.device) -> None:
        self.bytes = 0
        self._device = device
        self._done = threading.Event()
        self._sampler = threading.Thread(target=self._sample, name="peak memory", daemon=True)

    def __enter__(self) -> PeakMemory:
        if self._device.type == "cuda":
            release(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self._reserved = torch.cuda.memory_reserved(self._device)
            self._before = self._lowest = self._free()
            self._sampler.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._device.type != "cuda":
            self.bytes = process_peak()
            return
        self._done.set()
        self._sampler.join()
        with suppress(RuntimeError):  # after an error of CUDA nothing can be asked any more
            self._lowest = min(self._lowest, self._free())
            by_torch = torch.cuda.max_memory_reserved(self._device) - self._reserved
            self.bytes = max(0, self._before - self._lowest, by_torch)

    def _sample(self) -> None:
        while not self._done.wait(SAMPLED_EVERY):
            with suppress(RuntimeError):
                self._lowest = min(self._lowest, self._free())

    def _free(self) -> int:
        return int(torch.cuda.mem_get_info(self._device)[0])


def process_peak() -> int:
    """Bytes that this process held at its peak.

    From /proc where there is one: `getrusage` also counts the process that this one was started by.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(next(line for line in status.read_text().splitlines() if "VmHWM" in line).split()[1])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS


def release(device: torch.device) -> None:
    """Give back what torch keeps of a GPU for later, so that other libraries and processes find it free."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


class Request(Record):
    """What the process is to do; conditioning comes in a file beside it."""

    bundle: str
    backend: str
    device: str
    engines: str
    images: int
    cache_interval: int
    steps: int
    scheduler: dict[str, Any]
    guidance_scale: float


def peak_memory(
    bundle: Bundle,
    backend: str,
    device: str,
    cached: bool,
    plans: PlanSource,
    given: Conditioning,
    scheduler: SchedulerMixin,
    steps: int,
    guidance_scale: float,
) -> int:
    """Bytes at the peak of a short trajectory, of the process on the CPU and of the device on a GPU.

    Conditioning, scheduler and guidance are those of the trajectories that are timed; of their `steps` it takes
    `STEPS`, or as many more as the scheduler needs. Raises `BackendError` with the reason where that fails.
    """
    request = Request(
        bundle=str(bundle.folder),
        backend=backend,
        device=device,
        engines=str(plans.folder),
        images=given.images,
        cache_interval=CACHE_INTERVAL if cached else 1,
        steps=steps,
        scheduler=json.loads(scheduler.to_json_string()),
        guidance_scale=guidance_scale,
    )
    release(torch.device(device))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "conditioning.safetensors"
        _write(given, path)
        command = [sys.executable, "-m", "fora_trt.evaluate.peak_memory", str(path)]
        done = subprocess.run(command, input=json.dumps(request.model_dump()), capture_output=True, text=True)
    if done.returncode:
        raise BackendError(_reason(done))
    return int(done.stdout.splitlines()[-1])


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode < 0:
        ended = f"the process was ended by {signal.Signals(-done.returncode).name}"
        return f"{ended}, as by a system that runs out of memory" if done.returncode == -signal.SIGKILL else ended
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"the process ended with {done.returncode} and said nothing"


def _write(given: Conditioning, path: Path) -> None:
    halves = {"conditional": given.conditional, "unconditional": given.unconditional or {}}
    named = {f"{half}.{name}": tensor for half, tensors in halves.items() for name, tensor in tensors.items()}
    form = torch.contiguous_format  # expanded tensors, and those that share memory, are refused
    save_file({name: tensor.cpu().clone(memory_format=form) for name, tensor in named.items()}, path)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    halves: dict[str, dict[str, Tensor]] = {"conditional": {}, "unconditional": {}}
    for key, tensor in load_file(path).items():
        half, _, name = key.partition(".")
        halves[half][name] = tensor
    return halves["conditional"], halves["unconditional"]


def _update(config: Mapping[str, Any], steps: int) -> Update:
    """Of the shortest trajectory from `STEPS` to `steps` steps that the scheduler admits."""
    scheduler = scheduler_from_config(config, None, str(config.get("variance_type")).startswith("learned"))
    for fewer in range(min(STEPS, steps), steps):
        with suppress(InputError):
            return update_from_scheduler(scheduler, fewer)
    return update_from_scheduler(scheduler, steps)


def measure(request: Request, conditional: Mapping[str, Tensor], unconditional: Mapping[str, Tensor]) -> int:
    """Take the trajectory in this process; returns its peak. Raises `ForaError` for what the bundle does not take."""
    from fora_trt.evaluate.entrants import steps_of
    from fora_trt.runtime.sampling import Sampler
    from fora_trt.schedule import Schedule

    bundle, device = Bundle.read(request.bundle), torch.device(request.device)
    given = conditioning_of_tensors(bundle.manifest, request.images, conditional, unconditional or None)
    with PeakMemory(device) as peak:
        steps = steps_of(bundle, request.backend, device, PlanSource(Path(request.engines), batch=2 * request.images))
        update = _update(request.scheduler, request.steps)
        schedule = Schedule.static(update.calls, min(request.cache_interval, update.calls))
        Sampler(steps, update)(schedule, given, range(given.images), request.guidance_scale)
    return peak.bytes


def main(path: str) -> None:
    """Do what standard input asks for, and print the peak as a whole number on a line of its own."""
    try:
        print(measure(Request.model_validate(json.loads(sys.stdin.read())), *_read(Path(path))))
    except (ForaError, ValidationError) as error:
        sys.exit(" ".join(str(error).split()))
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {first_line(error)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
