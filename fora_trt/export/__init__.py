"""Second stage: trace a module that is split at its cache sites, and write a full and a reuse graph.

The package can be called: `fora_trt.export(pipe, "export/sd3")` is the function `export` of `fora_trt/exporting.py`.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """A module that is called like `fora_trt.exporting.export`, a later stage."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return import_module("fora_trt.exporting").export(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
