"""The backends `tensorrt` and `tensorrt-rtx`: plans as engines that share one block of scratch memory."""

from __future__ import annotations

import hashlib
import mmap
import os
import weakref
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fora_trt.bundle import Bundle, GraphRecord
from fora_trt.engines.base import Engine, Launch
from fora_trt.engines.cuda_graphs import Replay
from fora_trt.engines.memory import address_of, free_bytes, gibibytes
from fora_trt.engines.plan_builder import CONDITIONING_ROWS, WINDOWS, Profile
from fora_trt.engines.plan_store import PlanSet, PlanSource, plans_for
from fora_trt.engines.tensorrt_library import Gpu, Library, gpu_of, library_from_name
from fora_trt.errors import BackendError, InputError
from fora_trt.models.spec import BATCH, WINDOW

ALIGNMENT = 256  # bytes, of scratch memory

Sizes = tuple[int, int]
"""Batch, and the number of reuse steps in tensors of a window (0 where there are none)."""


class Scratch:
    """Memory that the execution contexts of one device use in turn; whoever needs most decides its size."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.block = torch.empty(ALIGNMENT, dtype=torch.uint8, device=device)

    def reserve(self, size: int) -> None:
        """Make the block at least `size` bytes large. One that grows is another block, at another address."""
        if size > self.block.nbytes:
            self.block = torch.empty(0, dtype=torch.uint8, device=self._device)  # free it first
            self.block = torch.empty(size, dtype=torch.uint8, device=self._device)

    def place(self) -> tuple[int, int]:
        """Address and size in bytes of the block at hand."""
        return self.block.data_ptr(), self.block.nbytes


class KernelCache:
    """The kernels that TensorRT-RTX compiled for this GPU, kept beside the plan that they belong to.

    The file begins with a digest of what follows; one that was altered is not read. The library refuses what another
    GPU, driver or version made. The cache is a help and no more: whatever goes wrong, kernels are compiled anew.
    """

    def __init__(self, cache: Any, path: Path) -> None:
        self.cache, self._path, self._saved = cache, path, b""
        self._sizes: set[Sizes] = set()
        with suppress(OSError):
            content = path.read_bytes()
            digest, kernels = content[:32], content[32:]
            if hashlib.sha256(kernels).digest() == digest and cache.deserialize(kernels):
                self._saved = digest

    def save_after(self, sizes: Sizes) -> None:
        """Write the kernels after a step at these sizes; only the first such step can have compiled any."""
        if sizes in self._sizes:
            return
        self._sizes.add(sizes)
        content = self.cache.serialize()
        if content is None:
            return
        kernels = bytes(content)
        digest = hashlib.sha256(kernels).digest()
        if digest != self._saved:
            self._write(digest + kernels)
            self._saved = digest

    def _write(self, content: bytes) -> None:
        beside = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        with suppress(OSError):  # such as a folder that cannot be written
            try:
                beside.write_bytes(content)
                beside.replace(self._path)
            finally:
                beside.unlink(missing_ok=True)


@dataclass(eq=False)
class Context:
    """An execution context of the library, and what it was told last.

    `needed` is the scratch in bytes that it needs at its `sizes`, `scratch` where the scratch is and how large.
    """

    made: Any
    sizes: Sizes | None = None
    needed: int = 0
    scratch: tuple[int, int] | None = None


class PlanLaunch:
    """Runs a plan on bound tensors, in an execution context that no other launch uses; captured at its second run.

    NVIDIA advises a context for each captured graph. A first run after shapes, addresses or scratch changed does
    deferred work that a capture would not repeat, so it is never captured. When the launch is freed, its context goes
    back to the engine, which the launch keeps alive.
    """

    def __init__(self, engine: TensorRTEngine, context: Context, addresses: Mapping[str, int]) -> None:
        self._engine, self._context, self._warm = engine, context, False
        this = weakref.proxy(self)  # the graph must be freed with the launch, not by the garbage collector
        self._replay = Replay(lambda: this._execute(), engine.device, lambda: this.is_capturable())
        for name, address in addresses.items():
            engine.checked(context.made.set_tensor_address(name, address), f"bind {name}")

    def __call__(self) -> None:
        if self._context.scratch != self._engine.scratch.place():  # new, or grown when another engine was bound
            self._replay.forget()
        self._replay()
        if self._engine.kernels is not None and self._context.sizes is not None:
            self._engine.kernels.save_after(self._context.sizes)

    def is_capturable(self) -> bool:
        """Whether it ran outside a capture since anything changed, on a stream that can be captured."""
        if not self._warm or self._context.scratch != self._engine.scratch.place():
            return False
        if not self._engine.library.is_rtx:
            return True
        stream = torch.cuda.current_stream(self._engine.device).cuda_stream
        return bool(self._context.made.is_stream_capturable(stream))

    def _execute(self) -> None:
        context, scratch = self._context, self._engine.scratch.place()
        if context.scratch != scratch:
            context.made.set_device_memory(*scratch)
            context.scratch, self._warm = scratch, False
        if not self._warm and torch.cuda.is_current_stream_capturing():
            raise BackendError(
                f"a step of {self._engine.library.backend} was captured before it ran at this batch; "
                "run it once outside the capture"
            )
        stream = torch.cuda.current_stream(self._engine.device).cuda_stream
        # a failure does not raise, and inside a capture it would leave a graph that does nothing
        self._engine.checked(context.made.execute_async_v3(stream), "run a step")
        self._warm = True

    def release(self) -> Context:
        """Free the graph and give the context up; the launch cannot run any more."""
        self._replay.forget()
        context, self._context = self._context, Context(None)
        return context

    def __del__(self) -> None:
        with suppress(Exception):  # at the end of the process torch may be gone already
            self._engine.take_back(self.release())


class TensorRTEngine(Engine):
    """A deserialized plan on tensors of the caller: its execution contexts, and scratch that engines share.

    Contexts hold no weights and no scratch, so they are cheap. One whose launch was freed serves the next launch: it
    is not destroyed, which would have to wait for the GPU.
    All engines that share scratch must run on one stream, or on streams that wait for each other.
    """

    def __init__(
        self,
        library: Library,
        runtime: Any,
        plan: Path,
        record: GraphRecord,
        profiles: tuple[Profile, ...],
        scratch: Scratch,
        device: torch.device,
    ) -> None:
        super().__init__(record.inputs, record.outputs, device)
        self.longest_window, self.most_rows = WINDOWS[-1], CONDITIONING_ROWS.maximum
        self.library, self.scratch, self._profiles = library, scratch, profiles
        self.kernels: KernelCache | None = None
        self._launches: weakref.WeakSet[PlanLaunch] = weakref.WeakSet()
        library.log.clear()
        with torch.cuda.device(device):
            self._engine = _deserialized(library, runtime, plan)
            self._config = self._runtime_config(plan)
            self._unused = [self._new_context()]  # now, so that an engine which cannot run fails here

    def _runtime_config(self, plan: Path) -> Any:
        trt, config = self.library.module, self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if self.library.is_rtx:
            # Kernels for the bound shapes before the first run; a capture would freeze the stopgaps of the lazy way.
            config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED  # captured here, with what runs around it
            path = plan.with_suffix(f".{_folder_word(gpu_of(self.device))}.kernels")
            self.kernels = KernelCache(config.create_runtime_cache(), path)
            config.set_runtime_cache(self.kernels.cache)
        return config

    def _new_context(self) -> Context:
        made = self._engine.create_execution_context(self._config)
        return Context(self.checked(made, "start an execution context"))

    def scratch_address(self) -> int:
        return self.scratch.place()[0]

    def scratch_bytes(self, batch: int, window: int = 0) -> int:
        context = self._context_at((batch, window))
        self.take_back(context)
        return max(0, context.needed - self.scratch.block.nbytes)

    def bind(self, tensors: Mapping[str, Tensor]) -> Launch:
        sizes = {spec.shape[0]: len(tensors[name]) for name, spec in self.inputs.items()}
        bound = {name: tensors[name] for name in (*self.inputs, *self.outputs)}
        assert all(one.is_contiguous() and one.device == self.scratch.block.device for one in bound.values())
        context = self._context_at((sizes[BATCH], sizes.get(WINDOW, 0)))
        self.scratch.reserve(context.needed)
        launch = PlanLaunch(self, context, {name: address_of(one) for name, one in bound.items()})
        self._launches.add(launch)
        return launch

    def is_capturable(self) -> bool:
        """True: each launch knows for itself whether it ran before."""
        return True

    def _context_at(self, sizes: Sizes) -> Context:
        """A context with these shapes that no launch uses; the caller has it until `take_back`."""
        profile = self._profile_of(sizes[0])
        with torch.cuda.device(self.device):
            alike = [context for context in self._unused if context.sizes == sizes]
            context = (alike or self._unused or [self._new_context()])[0]
            if context.sizes != sizes:
                self._set_sizes(context, sizes, profile)
        if context in self._unused:
            self._unused.remove(context)
        return context

    def take_back(self, context: Context) -> None:
        """Keep a context for the next launch."""
        if context.made is not None:
            self._unused.append(context)

    def _set_sizes(self, context: Context, sizes: Sizes, profile: int) -> None:
        """Choose the profile, give every input its shape, and ask how much scratch that needs."""
        context.sizes = context.scratch = None
        if len(self._profiles) > 1:
            stream = torch.cuda.current_stream(self.device).cuda_stream
            chosen = context.made.set_optimization_profile_async(profile, stream)
            self.checked(chosen, f"use profile {profile}")
        for name, spec in self.inputs.items():
            self.checked(context.made.set_input_shape(name, spec.sized(*sizes)), f"take the shape of {name}")
        if missing := context.made.infer_shapes():
            raise BackendError(f"{self.library.backend} cannot infer the shape of {', '.join(missing)}")
        context.needed = int(context.made.update_device_memory_size_for_shapes())
        if context.needed <= 0 < self._engine.device_memory_size_v2:  # 0 is right only for a plan without any scratch
            raise BackendError(
                f"{self.library.backend} could not tell how much scratch memory a batch of {sizes[0]} needs: "
                f"{self.library.log.reason()}"
            )
        context.sizes = sizes

    def _profile_of(self, batch: int) -> int:
        """The narrowest profile that admits the batch. Raises `InputError`."""
        fitting = [i for i, profile in enumerate(self._profiles) if profile.admits(batch)]
        if not fitting:
            profiles = ", ".join(map(str, self._profiles))
            raise InputError(
                f"a call has a batch of {batch} (twice the images under guidance), and the plans were built for "
                f"{profiles} (least:best:most); build for it with fora-trt build --batch 1:{batch}:{batch}"
            )
        return min(fitting, key=lambda i: self._profiles[i].maximum - self._profiles[i].minimum)

    def checked(self, result: Any, what: str) -> Any:
        """The result of the library; raises `BackendError` with the reason from its log where that is a failure."""
        if result is None or result is False:
            raise BackendError(f"{self.library.backend} could not {what}: {self.library.log.reason()}")
        return result

    def close(self) -> None:
        """Free the graphs, the contexts and the engine, in this order, under their device."""
        if getattr(self, "_engine", None) is None:
            return
        with torch.cuda.device(self.device):
            torch.cuda.synchronize(self.device)  # nothing of it may be running
            for launch in self._launches:
                launch.release()
            self._unused = []
            self.kernels = self._config = self._engine = None

    def __del__(self) -> None:
        with suppress(Exception):  # at the end of the process torch may be gone already
            self.close()


def engines_from_bundle(bundle: Bundle, device: torch.device, source: PlanSource, backend: str) -> dict[str, Engine]:
    """An engine for each graph, from the plans that fit; builds them if there are none. Raises `BackendError`."""
    library = library_from_name(backend)
    if device.type != "cuda":
        raise BackendError(f"{backend} runs on NVIDIA GPUs; give --device cuda, or --backend onnxruntime for the CPU")
    with torch.cuda.device(device):  # what is built and loaded belongs to the current device
        plans = plans_for(bundle, library, gpu_of(device), source)
        _check_room(plans, device)
        runtime = library.module.Runtime(library.logger)
        runtime.engine_host_code_allowed = False
        scratch, options = Scratch(device), plans.manifest.options
        profiles = {name: options.of_graph(name).profiles for name in bundle.manifest.graphs}
        return {
            name: TensorRTEngine(library, runtime, plans.path(name), record, profiles[name], scratch, device)
            for name, record in bundle.manifest.graphs.items()
        }


def _check_room(plans: PlanSet, device: torch.device) -> None:
    need, free = sum(file.size for file in plans.manifest.files.values()), free_bytes(device)
    if need > free:
        raise BackendError(
            f"the weights of {plans.folder} take {gibibytes(need)}, and {device} has {gibibytes(free)} free; "
            "end what else uses the GPU, or export with --precision fp16"
        )


def _deserialized(library: Library, runtime: Any, plan: Path) -> Any:
    """The engine of a plan. Its file must have been checked: a plan is native code."""
    with plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        engine = runtime.deserialize_cuda_engine(content)
    if engine is None:
        raise BackendError(f"{library.backend} could not load {plan}: {library.log.reason()}")
    return engine


def _folder_word(gpu: Gpu) -> str:
    return f"sm{gpu.compute_capability.replace('.', '')}"
