"""Hide warnings and log messages of libraries that a user cannot act on."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from fora_trt.errors import ForaWarning


@contextmanager
def quiet(logger: str) -> Iterator[None]:
    """Ignore all warnings, and messages of the logger `logger` below the level ERROR."""
    target = logging.getLogger(logger)
    level = target.level
    target.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        target.setLevel(level)


@contextmanager
def libraries_are_quiet() -> Iterator[None]:
    """Ignore warnings and log messages of other libraries in a block, until `let_libraries_speak` is called.

    The messages of PyTorch's C++ code are hidden too, if it is not imported yet.
    """
    before = logging.root.manager.disable
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("default", ForaWarning)
            logging.disable(logging.CRITICAL)
            yield
    finally:
        logging.disable(before)


def let_libraries_speak() -> None:
    """End the silence of `libraries_are_quiet`."""
    os.environ["TORCH_CPP_LOG_LEVEL"] = "INFO"
    warnings.simplefilter("default")
    logging.disable(logging.NOTSET)
