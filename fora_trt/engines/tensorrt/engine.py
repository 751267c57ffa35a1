"""Engines of the backends `tensorrt` and `tensorrt-rtx`: they run plans and share one block of scratch memory."""

from __future__ import annotations

import hashlib
import mmap
import weakref
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fora_trt.bundle import Bundle, GraphRecord
from fora_trt.contract import BATCH, WINDOW
from fora_trt.engines.base import Engine, Launch
from fora_trt.engines.cuda_graphs import Replay
from fora_trt.engines.memory import address_of, free_bytes, gibibytes
from fora_trt.engines.options import EngineOptions
from fora_trt.engines.tensorrt.library import Gpu, Library, gpu_of, library_from_name
from fora_trt.engines.tensorrt.plan_builder import CONDITIONING_ROWS, WINDOWS, Profile
from fora_trt.engines.tensorrt.plan_store import PlanSet, plans_for
from fora_trt.errors import BackendError, InputError
from fora_trt.files import beside

ALIGNMENT = 256  # bytes, of scratch memory

Sizes = tuple[int, int]
"""Batch, and the number of reuse steps in window tensors (0 if the graph has no window tensors)."""


class Scratch:
    """Memory that the execution contexts of one device share; its size is the largest size that any of them needs."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.block = torch.empty(ALIGNMENT, dtype=torch.uint8, device=device)

    def reserve(self, size: int) -> None:
        """Make the block at least `size` bytes large. Growing allocates a new block at another address."""
        if size > self.block.nbytes:
            self.block = torch.empty(0, dtype=torch.uint8, device=self._device)  # free it first
            self.block = torch.empty(size, dtype=torch.uint8, device=self._device)

    def place(self) -> tuple[int, int]:
        """Address and size in bytes of the current block."""
        return self.block.data_ptr(), self.block.nbytes


class KernelCache:
    """The kernels that TensorRT-RTX compiled for this GPU, stored in a file next to their plan.

    The file begins with the SHA-256 of the kernels; an altered file is ignored. The library rejects kernels of another
    GPU, driver or version. The cache only saves time: on any problem, kernels are compiled again.
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
        """Write the kernels after a step at these sizes, if it is the first one: later steps compile no kernels."""
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
        with suppress(OSError), beside(self._path) as file:  # such as a folder without write permission
            file.write(content)


@dataclass(eq=False)
class Context:
    """An execution context `made` by the library, and its current settings.

    `needed` is the scratch memory in bytes for `sizes`; `scratch` is the address and size of the scratch memory in use.
    """

    made: Any
    sizes: Sizes | None = None
    needed: int = 0
    scratch: tuple[int, int] | None = None


class PlanLaunch:
    """Runs a plan on bound tensors, in its own execution context; the second run is captured as a CUDA graph.

    NVIDIA advises one context per captured graph. The first run after a change of shapes, addresses or scratch memory
    does deferred work that a replay would not repeat, so it is never captured. The launch keeps the engine alive and
    returns its context to the engine when it is freed.
    """

    def __init__(self, engine: TensorRTEngine, context: Context, addresses: Mapping[str, int]) -> None:
        self._engine, self._context, self._warm = engine, context, False
        this = weakref.proxy(self)  # no reference cycle, so that the graph is freed together with the launch
        self._replay = Replay(lambda: this._execute(), engine.device, lambda: this.is_capturable())
        for name, address in addresses.items():
            engine.checked(context.made.set_tensor_address(name, address), f"bind {name}")

    def __call__(self) -> None:
        if self._context.scratch != self._engine.scratch.place():  # first use, or another engine enlarged the block
            self._replay.forget()
        self._replay()
        if self._engine.kernels is not None and self._context.sizes is not None:
            self._engine.kernels.save_after(self._context.sizes)

    def is_capturable(self) -> bool:
        """Whether the launch has run outside a capture since the last change, and its stream can be captured."""
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
                f"a step of {self._engine.library.backend} cannot be captured before its first run at this batch; "
                "run it once outside the capture"
            )
        stream = torch.cuda.current_stream(self._engine.device).cuda_stream
        # TensorRT reports a failure by its result; unchecked, a failed capture would leave an empty graph
        self._engine.checked(context.made.execute_async_v3(stream), "run a step")
        self._warm = True

    def release(self) -> Context:
        """Free the CUDA graph and return the context; the launch cannot run afterwards."""
        self._replay.forget()
        context, self._context = self._context, Context(None)
        return context

    def __del__(self) -> None:
        with suppress(Exception):  # at the end of the process torch may be gone already
            self._engine.take_back(self.release())


class TensorRTEngine(Engine):
    """A deserialized plan with its execution contexts; it runs on tensors of the caller and uses shared scratch memory.

    Contexts own neither weights nor scratch memory, so they are cheap. The context of a freed launch is reused, because
    destroying it would wait for the GPU. All engines with the same scratch memory must run on one stream, or on streams
    that wait for each other.
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
            self._unused = [self._new_context()]  # created here, so that a plan that cannot run fails at load time

    def _runtime_config(self, plan: Path) -> Any:
        trt, config = self.library.module, self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if self.library.is_rtx:
            # Compile kernels for the bound shapes before the first run. The lazy strategy starts with fallback kernels,
            # and a capture would keep them.
            config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED  # fora-trt captures larger CUDA graphs itself
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
        """True; `PlanLaunch.is_capturable` decides for each launch."""
        return True

    def _context_at(self, sizes: Sizes) -> Context:
        """An unused context with these shapes; the caller owns it until `take_back`."""
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
        """Keep an unused context for the next launch."""
        if context.made is not None:
            self._unused.append(context)

    def _set_sizes(self, context: Context, sizes: Sizes, profile: int) -> None:
        """Select the profile, set the shape of every input, and query the size of the scratch memory."""
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
        if (
            context.needed <= 0 < self._engine.device_memory_size_v2
        ):  # 0 is valid only for a plan without scratch memory
            raise BackendError(
                f"{self.library.backend} could not determine the scratch memory for a batch of {sizes[0]}: "
                f"{self.library.log.reason()}"
            )
        context.sizes = sizes

    def _profile_of(self, batch: int) -> int:
        """Index of the narrowest profile that contains the batch. Raises `InputError` if there is none."""
        fitting = [i for i, profile in enumerate(self._profiles) if profile.admits(batch)]
        if not fitting:
            profiles = ", ".join(map(str, self._profiles))
            raise InputError(
                f"a call has a batch of {batch} (with guidance twice the number of images); the plans were built for "
                f"{profiles} (min:opt:max); build new ones with fora-trt build --batch 1:{batch}:{batch}"
            )
        return min(fitting, key=lambda i: self._profiles[i].maximum - self._profiles[i].minimum)

    def checked(self, result: Any, what: str) -> Any:
        """Return a result of the library; if it is None or False, raise `BackendError` with the errors from the log."""
        if result is None or result is False:
            raise BackendError(f"{self.library.backend} could not {what}: {self.library.log.reason()}")
        return result

    def close(self) -> None:
        """Free the CUDA graphs, the contexts and the engine, in this order, with their device current."""
        if getattr(self, "_engine", None) is None:
            return
        with torch.cuda.device(self.device):
            torch.cuda.synchronize(self.device)  # no work of the engine may be running
            for launch in self._launches:
                launch.release()
            self._unused = []
            self.kernels = self._config = self._engine = None

    def __del__(self) -> None:
        with suppress(Exception):  # at the end of the process torch may be gone already
            self.close()


def engines_from_bundle(bundle: Bundle, device: torch.device, wanted: EngineOptions, backend: str) -> dict[str, Engine]:
    """An engine for each graph, from matching plans, which are built if there are none. Raises `BackendError`."""
    library = library_from_name(backend)
    if device.type != "cuda":
        raise BackendError(f"{backend} runs on NVIDIA GPUs; give --device cuda, or --backend onnxruntime for the CPU")
    with torch.cuda.device(device):  # TensorRT builds and loads plans on the current device
        plans = plans_for(bundle, library, gpu_of(device), wanted)
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
            f"the weights of {plans.folder} need {gibibytes(need)}, but {device} has {gibibytes(free)} free; "
            "end other programs on the GPU, or export with --precision fp16"
        )


def _deserialized(library: Library, runtime: Any, plan: Path) -> Any:
    """Deserialize a plan. The file must have been checked before, because a plan contains native code."""
    with plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        engine = runtime.deserialize_cuda_engine(content)
    if engine is None:
        raise BackendError(f"{library.backend} could not load {plan}: {library.log.reason()}")
    return engine


def _folder_word(gpu: Gpu) -> str:
    return f"sm{gpu.compute_capability.replace('.', '')}"
