"""Recording stand-ins for the modules `tensorrt` and `tensorrt_rtx` and for what is used of `torch.cuda`.

They have the members that this project uses and no others: any other name raises AttributeError. What is declared here
is checked against the real bindings by `test_tensorrt_engine.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from enum import IntEnum
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

# A number is that of a method's arguments; None is a method whose arguments the bindings do not tell.
GET, SET, ENUM = "property", "settable property", "enum member"
Declared = dict[str, dict[str, int | str | None]]

COMMON: Declared = {
    "Builder": {
        "__init__": 1, "create_network": 1, "create_builder_config": 0, "create_optimization_profile": 0,
        "build_serialized_network_to_stream": 3,
    },
    "INetworkDefinition": {"num_layers": GET, "get_layer": 1},
    "ILayer": {"type": GET, "name": GET},
    "IAttentionInputLayer": {"attention": GET, "name": GET},
    "IAttention": {"decomposable": SET, "name": GET},
    "OnnxParser": {"__init__": 2, "parse_from_file": 1, "num_errors": GET, "get_error": 1},
    "ParserError": {"desc": 0},
    "IBuilderConfig": {
        "clear_flag": 1, "set_flag": 1, "max_aux_streams": SET, "profiling_verbosity": SET, "progress_monitor": SET,
        "add_optimization_profile": 1, "create_timing_cache": 1, "set_timing_cache": 2, "get_timing_cache": 0,
    },
    "IOptimizationProfile": {"set_shape": 4},
    "ITimingCache": {"serialize": 0},
    "Runtime": {"__init__": 1, "engine_host_code_allowed": SET, "deserialize_cuda_engine": 1},
    "ICudaEngine": {"create_runtime_config": 0, "create_execution_context": 1, "device_memory_size_v2": GET},
    "IRuntimeConfig": {"set_execution_context_allocation_strategy": 1},
    "IExecutionContext": {
        "set_optimization_profile_async": 2, "set_input_shape": 2, "infer_shapes": 0, "set_tensor_address": 2,
        "update_device_memory_size_for_shapes": 0, "set_device_memory": 2, "execute_async_v3": 1,
    },
    "ILogger": {"__init__": 0, "log": 2, "ERROR": ENUM},
    "IProgressMonitor": {"__init__": 0, "phase_start": 3, "step_complete": 2, "phase_finish": 1},
    "IStreamWriter": {"__init__": 0, "write": None},
    "NetworkDefinitionCreationFlag": {"STRONGLY_TYPED": ENUM},
    "LayerType": {"ATTENTION_INPUT": ENUM, "CONSTANT": ENUM},
    "BuilderFlag": {"TF32": ENUM},
    "ProfilingVerbosity": {"DETAILED": ENUM},
    "ExecutionContextAllocationStrategy": {"USER_MANAGED": ENUM},
}  # fmt: skip
TENSORRT_ONLY: Declared = {
    "IBuilderConfig": {"builder_optimization_level": SET, "set_memory_pool_limit": 2},
    "MemoryPoolType": {"WORKSPACE": ENUM},
}
RTX_ONLY: Declared = {
    "IBuilderConfig": {"num_compute_capabilities": SET, "set_compute_capability": 2},
    "BuilderFlag": {"REQUIRE_USER_ALLOCATION": ENUM},
    "ComputeCapability": {"SM80": ENUM, "SM86": ENUM, "SM89": ENUM, "SM120": ENUM},
    "IRuntimeConfig": {
        "dynamic_shapes_kernel_specialization_strategy": SET, "cuda_graph_strategy": SET,
        "create_runtime_cache": 0, "set_runtime_cache": 1,
    },
    "IRuntimeCache": {"serialize": 0, "deserialize": 1},
    "IExecutionContext": {"is_stream_capturable": 1},
    "DynamicShapesKernelSpecializationStrategy": {"EAGER": ENUM},
    "CudaGraphStrategy": {"DISABLED": ENUM},
}  # fmt: skip
MADE_BY = {
    "Builder.create_network": "INetworkDefinition",
    "Builder.create_builder_config": "IBuilderConfig",
    "Builder.create_optimization_profile": "IOptimizationProfile",
    "OnnxParser.get_error": "ParserError",
    "IBuilderConfig.create_timing_cache": "ITimingCache",
    "IBuilderConfig.get_timing_cache": "ITimingCache",
    "Runtime.deserialize_cuda_engine": "ICudaEngine",
    "ICudaEngine.create_runtime_config": "IRuntimeConfig",
    "ICudaEngine.create_execution_context": "IExecutionContext",
    "IRuntimeConfig.create_runtime_cache": "IRuntimeCache",
}


def declared(rtx: bool) -> Declared:
    """All that the stand-in of one of the two modules declares, by class."""
    more = RTX_ONLY if rtx else TENSORRT_ONLY
    return {name: COMMON.get(name, {}) | more.get(name, {}) for name in (COMMON | more)}


class Call(NamedTuple):
    """A call or an assignment (`Class.member=`); objects are named by class and number, as `ICudaEngine 1`."""

    owner: str
    name: str
    arguments: tuple[Any, ...]


class Recorder:
    """One stand-in module, what its members give, and every call in order.

    `results` maps `Class.member` to what it gives, or to a function of the object and the arguments. What is not in it
    gives True.
    """

    def __init__(self, rtx: bool) -> None:
        self.calls: list[Call] = []
        self.logger: Any = None
        self._counts: dict[str, int] = {}
        self.results: dict[str, Any] = {
            member: partial(lambda made, *_: self.make(made), made) for member, made in MADE_BY.items()
        }
        self.results |= {
            "INetworkDefinition.num_layers": 0,
            "OnnxParser.num_errors": 0,
            "ITimingCache.serialize": b"timings",
            "IRuntimeCache.serialize": b"kernels",
            "IBuilderConfig.add_optimization_profile": 0,
            "ICudaEngine.device_memory_size_v2": 2**20,
            "IExecutionContext.infer_shapes": [],
            "IExecutionContext.update_device_memory_size_for_shapes": 1024,
            "Builder.build_serialized_network_to_stream": lambda _, __, ___, writer: writer.write(b"plan") == 4,
        }
        self.module = SimpleNamespace(__version__="1.7.1.0" if rtx else "10.16.1.11")
        for name, members in declared(rtx).items():
            setattr(self.module, name, self._class(name, members))

    def _class(self, name: str, members: Mapping[str, Any]) -> Any:
        enums = {member: value for value, member in enumerate(members, 1) if members[member] == ENUM}
        if len(enums) == len(members):
            return IntEnum(name, enums)
        content: dict[str, Any] = {"recorder": self, "declared": members}
        return type(name, (Fake,), content | dict.fromkeys(enums, 1))

    def make(self, name: str, /, **properties: Any) -> Any:
        """An object of a class that only the library itself makes."""
        fake = Fake.__new__(getattr(self.module, name))
        fake.__dict__.update(properties, label=self.label(name))
        return fake

    def label(self, name: str) -> str:
        self._counts[name] = self._counts.get(name, 0) + 1
        return f"{name} {self._counts[name]}"

    def record(self, owner: str, name: str, *arguments: Any) -> None:
        # the record must keep nothing alive
        plain = [one.__dict__["label"] if isinstance(one, Fake) else one for one in arguments]
        self.calls.append(Call(owner, name, tuple(plain)))

    def fail(self, member: str, result: Any, reason: str) -> None:
        """Let a method give `result` from now on, and say why in the log alone, as the library does."""

        def failing(*_: Any) -> Any:
            self.logger.log(self.module.ILogger.ERROR, reason)
            return result

        self.results[member] = failing

    def since(self, mark: int, owner: str = "") -> list[Call]:
        """The calls from a position on, of one owner if one is given; without those that free something."""
        return [call for call in self.calls[mark:] if owner in ("", call.owner) and "__del__" not in call.name]

    def named(self, *names: str) -> list[tuple[Any, ...]]:
        """The arguments of every call of one of these members."""
        return [call.arguments for call in self.calls if call.name in names]


class Fake:
    """Base of the classes of a stand-in; of these, subclasses by the project may have attributes of their own."""

    recorder: Recorder
    declared: Mapping[str, Any]

    def __init__(self, *arguments: Any) -> None:
        base = next(each for each in type(self).__mro__ if "declared" in each.__dict__)
        if self.declared.get("__init__") != len(arguments):
            raise TypeError(f"{base.__name__} is not made from {len(arguments)} arguments")
        self.__dict__["label"] = self.recorder.label(base.__name__)
        self.recorder.record(self.__dict__["label"], f"{base.__name__}.__init__", *arguments)
        if base.__name__ == "ILogger":
            self.recorder.logger = self

    def __getattr__(self, name: str) -> Any:
        member, use = f"{type(self).__name__}.{name}", self.declared.get(name, ENUM)
        if use == ENUM:
            raise AttributeError(f"the stand-in has no {member}")
        return self.recorder.results[member] if use in (GET, SET) else partial(self._call, member, use)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__class__":  # the bindings allow it too
            object.__setattr__(self, name, value)
            return
        if "declared" in type(self).__dict__:
            if self.declared.get(name) != SET:
                raise AttributeError(f"{type(self).__name__}.{name} of the stand-in cannot be set")
            self.recorder.record(self.__dict__["label"], f"{type(self).__name__}.{name}=", value)
        self.__dict__[name] = value

    def __del__(self) -> None:
        self.recorder.record(self.__dict__.get("label", ""), f"{type(self).__name__}.__del__")

    def _call(self, member: str, count: int | None, *arguments: Any) -> Any:
        if count not in (None, len(arguments)):
            raise TypeError(f"{member} takes {count} arguments and got {len(arguments)}")
        plain = [bytes(one) if type(one).__name__ == "mmap" else one for one in arguments]
        self.recorder.record(self.__dict__["label"], member, *plain)
        result = self.recorder.results.get(member, True)
        return result(self, *arguments) if callable(result) else result


MILLISECONDS = 4.0


class Stream:
    """A stream of CUDA; the number is its handle."""

    def __init__(self, recorder: Recorder, handle: int) -> None:
        self.recorder, self.cuda_stream = recorder, handle

    def wait_stream(self, other: Stream) -> None:
        self.recorder.record(f"Stream {self.cuda_stream}", "Stream.wait_stream", other.cuda_stream)


class Graph:
    """A CUDA graph, whose replay runs nothing."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def replay(self) -> None:
        self.recorder.record("CUDAGraph", "CUDAGraph.replay")

    def __del__(self) -> None:
        self.recorder.record("CUDAGraph", "CUDAGraph.__del__")


class Event:
    """An event of CUDA; all are `MILLISECONDS` apart."""

    def __init__(self, recorder: Recorder, enable_timing: bool, external: bool) -> None:
        self.recorder = recorder
        assert enable_timing
        assert external, "others cannot be read when they were captured"

    def record(self) -> None:
        self.recorder.record("Event", "Event.record")

    def elapsed_time(self, other: Event) -> float:
        return MILLISECONDS


class Cuda:
    """Takes the place of functions of `torch.cuda`; what is allocated on a GPU lies on the CPU."""

    def __init__(self, recorder: Recorder, patch: pytest.MonkeyPatch) -> None:
        self.recorder, self.free, self.capturing = recorder, 2**30, False
        self.current = Stream(recorder, 1000)
        self._handle = 1000
        patch.setattr(torch.cuda, "device", lambda device: nullcontext())
        patch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        patch.setattr(torch.cuda, "Stream", self._new_stream)
        patch.setattr(torch.cuda, "stream", self._use)
        patch.setattr(torch.cuda, "Event", partial(Event, recorder))
        patch.setattr(torch.cuda, "CUDAGraph", partial(Graph, recorder))
        patch.setattr(torch.cuda, "graph", self._capture)
        patch.setattr(torch.cuda, "synchronize", lambda device: recorder.record("torch", "torch.cuda.synchronize"))
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        patch.setattr(torch.cuda, "mem_get_info", lambda device: (self.free, 2**40))
        patch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
        patch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
        properties = SimpleNamespace(name="Stand-in", major=8, minor=9)
        patch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        for allocate in (torch.empty, torch.zeros):
            patch.setattr(torch, allocate.__name__, _on_the_cpu(allocate))
        patch.setattr(torch.Tensor, "to", _to_the_cpu(torch.Tensor.to))

    def _new_stream(self, device: torch.device) -> Stream:
        self._handle += 1
        return Stream(self.recorder, self._handle)

    @contextmanager
    def _use(self, stream: Stream) -> Iterator[None]:
        caller, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = caller

    @contextmanager
    def _capture(self, graph: Graph, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        """Like torch 2.11: ending a capture that failed raises too, and leaves the stream of the capture current."""
        self.recorder.record("torch", "torch.cuda.graph", capture_error_mode)
        caller, self.current, self.capturing = self.current, stream, True
        try:
            yield
        except BaseException as failure:
            raise RuntimeError("operation failed due to a previous error during capture") from failure
        finally:
            self.capturing = False
        self.current = caller


def _on_the_cpu(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def allocated(*size: Any, **options: Any) -> torch.Tensor:
        return allocate(*size, **(options | {"device": "cpu"}))

    return allocated


def _to_the_cpu(move: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def moved(tensor: torch.Tensor, *where: Any, **options: Any) -> torch.Tensor:
        return move(tensor, *("cpu" if isinstance(one, torch.device) else one for one in where), **options)

    return moved
