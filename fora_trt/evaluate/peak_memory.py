"""Measures peak memory: of any block of code, or of a backend that denoises in a separate process.

`PeakMemory` is a context manager for a block. `peak_memory` runs this module as a process that only denoises.
"""

from __future__ import annotations

import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from itertools import islice
from pathlib import Path
from types import TracebackType

import torch

from fora_trt.bundle import Bundle
from fora_trt.engines.options import EngineOptions
from fora_trt.errors import BackendError, ForaError, first_line
from fora_trt.evaluate.targets import predictor_of
from fora_trt.pipeline import Pipeline, PipelineConfig
from fora_trt.sampling.conditioning import Conditioning, conditioning_of_tensors
from fora_trt.schedule import NONE, Schedule

SAMPLED_EVERY = 0.002
"""Seconds between two samples of a GPU's free memory."""


class PeakMemory:
    """Context manager that measures the peak memory of a block; the result is in `bytes` after the block.

    On a GPU: free memory before the block minus the smallest free memory during it, which includes allocations of
    torch, TensorRT, ONNX Runtime and the driver. A thread samples free memory every 2 ms; shorter peaks are seen only
    in torch's allocator. No other process may use that GPU. Do not time anything in the block, because the thread
    disturbs it, and capture CUDA graphs with `capture_error_mode="thread_local"`, as `Replay` does.
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
        with suppress(RuntimeError):  # after a CUDA error every further CUDA call fails
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
    """Peak memory of this process in bytes.

    It is read from /proc if that exists, because `getrusage` can include the memory of the parent process.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(next(line for line in status.read_text().splitlines() if "VmHWM" in line).split()[1])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS


def release(device: torch.device) -> None:
    """Free the GPU memory that torch's allocator caches, for other libraries and processes."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def peak_memory(config: PipelineConfig, given: Conditioning) -> int:
    """Peak memory of the begin of a trajectory in bytes: of the process on the CPU, of the device on a GPU.

    `config` has the settings of the timed trajectories. All memory is allocated when a reuse step has run that reads as
    many full steps as the schedule has one read; later steps do not run. `config.backend` may also be a reference
    (`EAGER`, `COMPILED`). Raises `BackendError` with the reason if the process fails.
    """
    release(torch.device(config.device))
    command = [sys.executable, "-m", "fora_trt.evaluate.peak_memory", str(os.getpid())]
    done = subprocess.run(command, input=pickle.dumps((config, _contiguous(given))), capture_output=True)
    if done.returncode:
        raise BackendError(_reason(done))
    return int(done.stdout.splitlines()[-1])


def _contiguous(given: Conditioning) -> Conditioning:
    """A copy on the CPU in separate memory: pickling a view would also pickle the rest of its storage."""
    halves = [
        None
        if half is None
        else {name: tensor.cpu().clone(memory_format=torch.contiguous_format) for name, tensor in half.items()}
        for half in (given.conditional, given.unconditional)
    ]
    return Conditioning(given.images, halves[0] or {}, halves[1])


def _reason(done: subprocess.CompletedProcess[bytes]) -> str:
    if done.returncode < 0:
        ended = f"the process was killed by {signal.Signals(-done.returncode).name}"
        return f"{ended}, probably because memory ran out" if done.returncode == -signal.SIGKILL else ended
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"the process exited with {done.returncode} and printed nothing"


def measure(config: PipelineConfig, given: Conditioning) -> int:
    """Run the trajectory in this process; return its peak memory. Raises `ForaError` for unsupported inputs."""
    bundle, device = Bundle.read(config.bundle, config.trust_source), torch.device(config.device)
    given = conditioning_of_tensors(bundle.manifest, given.images, given.conditional, given.unconditional)
    with PeakMemory(device) as peak:
        plans = EngineOptions(Path(config.engines), batch=2 * given.images)
        pipeline = Pipeline(config, opened=bundle, predictor=predictor_of(bundle, config.backend, device, plans))
        asked = config.schedule
        if asked and isinstance(asked, str):
            asked = Schedule.open(asked, pipeline.sampling(schedule=NONE).nfe, bundle.manifest.cache_sites)
        sampling = pipeline.sampling(schedule=asked)
        few = steps_until_full(sampling.schedule)
        guidance = pipeline.guidance(given, sampling)
        pipeline.sampler(sampling)(given, range(given.images), guidance, lambda steps: islice(steps, few))
    return peak.bytes


def steps_until_full(schedule: Schedule) -> int:
    """Number of steps after which a trajectory has allocated all its memory."""
    deep = [number for number, step in enumerate(schedule.plan) if len(step.weights) == schedule.depth]
    return deep[0] + 1 if deep else 1


def main() -> None:
    """Read a configuration and conditioning from standard input, measure, and print the peak in bytes on one line."""
    try:
        print(measure(*pickle.load(sys.stdin.buffer)))  # noqa: S301 # written by `peak_memory`, this process's parent
    except ForaError as error:
        sys.exit(" ".join(str(error).split()))
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {first_line(error)}")


def _end_with(parent: int) -> None:
    """End this process when `parent`, which waits for its result, was killed; else it would measure to the end."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with, args=(int(sys.argv[1]),), daemon=True).start()
    main()
