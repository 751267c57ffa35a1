"""The backends `tensorrt` and `tensorrt-rtx`: plans as engines that share one block of scratch memory."""

from __future__ import annotations

import hashlib
import mmap
import os
import weakref
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
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


class KernelCache:
    """The kernels that TensorRT-RTX compiled for this GPU, kept beside the plan that they belong to.

    The file begins with a digest of what follows; one that was altered is not read. The library refuses what another
    GPU, driver or version made. The cache is a help and no more: whatever goes wrong, kernels are compiled anew.
    """

    def __init__(self, cache: Any, path: Path) -> None:
        self.cache, self._path, self._saved = cache, path, b""
        with suppress(OSError):
            content = path.read_bytes()
            digest, kernels = content[:32], content[32:]
            if hashlib.sha256(kernels).digest() == digest and cache.deserialize(kernels):
                self._saved = digest

    def save(self) -> None:
        """Write what was compiled since, once for each engine: after its first step all kernels are there."""
        if self.cache is None:
            return
        content, self.cache = self.cache.serialize(), None
        if content is None:
            return
        kernels = bytes(content)
        digest = hashlib.sha256(kernels).digest()
        if digest == self._saved:
            return
        beside = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        with suppress(OSError):  # such as a folder that cannot be written
            try:
                beside.write_bytes(digest + kernels)
                beside.replace(self._path)
            finally:
                beside.unlink(missing_ok=True)


@dataclass(eq=False)
class Binding:
    """What a context is told before it runs: batch and window, and the address of every tensor.

    `block` is the scratch that the CUDA graph of it was captured with.
    """

    sizes: tuple[int, int]
    addresses: Mapping[str, int]
    block: Tensor | None = None


class TensorRTEngine(Engine):
    """A deserialized plan and its execution context, on tensors of the caller and on scratch that is shared.

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
        self._library, self._profiles, self._scratch = library, profiles, scratch
        self._cache: KernelCache | None = None
        self._cache_path = plan.with_suffix(f".{_folder_word(gpu_of(device))}.kernels") if library.is_rtx else plan
        self._block: Tensor | None = None  # this and the next two: what the context was told last
        self._sizes: tuple[int, int] | None = None
        self._binding: Binding | None = None
        self._replays: weakref.WeakSet[Replay] = weakref.WeakSet()
        library.log.clear()
        with torch.cuda.device(device):
            self._engine = _deserialized(library, runtime, plan)
            self._context = self._new_context()

    def _new_context(self) -> Any:
        trt, config = self._library.module, self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if self._library.is_rtx:
            # Kernels for the bound shapes before the first run; a capture would freeze the stopgaps of the lazy way.
            config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED  # captured here, with what runs around it
            self._cache = KernelCache(config.create_runtime_cache(), self._cache_path)
            config.set_runtime_cache(self._cache.cache)
        return self._checked(self._engine.create_execution_context(config), "start an execution context")

    def scratch_address(self) -> int:
        return self._scratch.block.data_ptr()

    def scratch_bytes(self, batch: int, window: int = 0) -> int:
        return max(0, self._scratch_needed(batch, window) - self._scratch.block.nbytes)

    def _scratch_needed(self, batch: int, window: int) -> int:
        with torch.cuda.device(self.device):
            self._set_sizes(batch, window)
            return int(self._context.update_device_memory_size_for_shapes())

    def bind(self, tensors: Mapping[str, Tensor]) -> Launch:
        sizes = {spec.shape[0]: len(tensors[name]) for name, spec in self.inputs.items()}
        batch, window = sizes[BATCH], sizes.get(WINDOW, 0)
        self._scratch.reserve(self._scratch_needed(batch, window))
        bound = {name: tensors[name] for name in (*self.inputs, *self.outputs)}
        assert all(one.is_contiguous() and one.device == self._scratch.block.device for one in bound.values())
        binding = Binding((batch, window), {name: address_of(one) for name, one in bound.items()})
        self._set_addresses(binding)
        this = weakref.proxy(self)  # replays are freed before the context, and the launch alone keeps the engine
        replay = Replay(lambda: this._execute(binding), self.device, lambda: this.is_capturable())
        self._replays.add(replay)
        return partial(self._launch, binding, replay)

    def _set_sizes(self, batch: int, window: int) -> None:
        """Choose the profile and give every input its shape."""
        if self._sizes == (batch, window):
            return
        self._sizes = self._binding = None
        profile = self._profile_of(batch)
        if len(self._profiles) > 1:
            stream = torch.cuda.current_stream(self.device).cuda_stream
            self._checked(self._context.set_optimization_profile_async(profile, stream), f"use profile {profile}")
        for name, spec in self.inputs.items():
            self._checked(self._context.set_input_shape(name, spec.sized(batch, window)), f"take the shape of {name}")
        if missing := self._context.infer_shapes():
            raise BackendError(f"{self._library.backend} cannot infer the shape of {', '.join(missing)}")
        self._sizes = batch, window

    def _set_addresses(self, binding: Binding) -> None:
        if self._binding is binding:
            return
        self._set_sizes(*binding.sizes)
        self._binding = None
        for name, address in binding.addresses.items():
            self._checked(self._context.set_tensor_address(name, address), f"bind {name}")
        self._binding = binding

    def _launch(self, binding: Binding, replay: Replay) -> None:
        if binding.block is not self._scratch.block:  # new, or grown when another engine was bound
            replay.forget()
            binding.block = self._scratch.block
        replay()
        if self._cache is not None:
            self._cache.save()

    def is_capturable(self) -> bool:
        if not self._library.is_rtx:
            return True
        return bool(self._context.is_stream_capturable(torch.cuda.current_stream(self.device).cuda_stream))

    def _execute(self, binding: Binding) -> None:
        self._set_addresses(binding)
        if self._block is not self._scratch.block:
            self._block = self._scratch.block
            self._context.set_device_memory(self._block.data_ptr(), self._block.nbytes)
        stream = torch.cuda.current_stream(self.device).cuda_stream
        # a failure does not raise, and inside a capture it would leave a graph that does nothing
        self._checked(self._context.execute_async_v3(stream), "run a step")

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

    def _checked(self, result: Any, what: str) -> Any:
        if result is None or result is False:
            raise BackendError(f"{self._library.backend} could not {what}: {self._library.log.reason()}")
        return result

    def close(self) -> None:
        """Free the graph, the context and the engine, in this order, under their device."""
        if getattr(self, "_engine", None) is None:
            return
        with torch.cuda.device(self.device):
            torch.cuda.synchronize(self.device)  # nothing of it may be running
            for replay in self._replays:
                replay.forget()
            self._context = self._cache = self._engine = self._block = None

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
