"""How much memory a process needs that does nothing but denoise with one backend: run in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from fora_trt.bundle import Bundle
from fora_trt.engines.plan_store import PlanSource

STEPS, CACHE_INTERVAL = 4, 3
"""Of the trajectory that is taken: a full step, two reuse steps and a full one."""


def peak_memory(bundle: Bundle, backend: str, device: str, images: int, cached: bool, plans: PlanSource) -> int | None:
    """Bytes at the peak, of the process on the CPU and of the device on a GPU; None where that could not be found.

    With guidance where the model has an unconditional half.
    """
    told = [str(bundle.folder), backend, device, str(plans.folder), str(images), str(CACHE_INTERVAL if cached else 1)]
    command = [sys.executable, "-m", "fora_trt.evaluate.peak_memory", *told]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        return int(json.loads(done.stdout.splitlines()[-1]))
    except (IndexError, ValueError):  # it ran out of memory, say; the row has other figures
        return None


def main(folder: str, backend: str, device: str, engines: str, images: str, cache_interval: str) -> None:
    """Take a short trajectory and print the peak, as a whole number on a line of its own."""
    import torch

    from fora_trt.evaluate.entrants import steps_of
    from fora_trt.runtime.conditioning import example_conditioning, usual_guidance_scale
    from fora_trt.runtime.sampling import Sampler
    from fora_trt.runtime.schedulers import scheduler_from_config
    from fora_trt.runtime.updates import update_from_scheduler
    from fora_trt.schedule import Schedule

    bundle, where = Bundle.read(folder), torch.device(device)
    peak = _peak_of_device(where) if where.type == "cuda" else _peak_of_process()
    steps = steps_of(bundle, backend, where, PlanSource(Path(engines), batch=2 * int(images)))
    given = example_conditioning(bundle.manifest, int(images))
    update = update_from_scheduler(scheduler_from_config(bundle.scheduler_config, None, False), STEPS)
    schedule = Schedule.static(update.calls, min(int(cache_interval), update.calls))
    scale = usual_guidance_scale(bundle.manifest, given)
    Sampler(steps, update)(schedule, given, range(given.images), scale)
    print(json.dumps(peak()))


def _peak_of_process() -> Callable[[], int]:
    """From /proc where there is one: `getrusage` also counts the process that this one was started by."""
    status = Path("/proc/self/status")
    if status.exists():
        return lambda: 1024 * int(next(line for line in status.read_text().splitlines() if "VmHWM" in line).split()[1])
    import resource

    return lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS


def _peak_of_device(device: object) -> Callable[[], int]:
    import torch

    before = torch.cuda.mem_get_info(device)[0]  # type: ignore[arg-type] # of the stubs
    return lambda: int(before - torch.cuda.mem_get_info(device)[0])  # type: ignore[arg-type]


if __name__ == "__main__":
    main(*sys.argv[1:])
