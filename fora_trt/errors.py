"""Errors that a user can fix: each message names the value found, the value expected and the fix."""

from __future__ import annotations

from typing import Any

from fora_trt.untrusted import one_line

LONGEST_MESSAGE = 4000
"""Most characters of a message."""


class ForaError(Exception):
    """Base of all errors of this package; the command line prints the message and exits with status 1.

    A message is one line without control characters, whatever text of a file or another library it quotes.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(one_line(message, LONGEST_MESSAGE))


class ForaWarning(UserWarning):
    """A warning of this package, which the command line shows where it hides those of libraries."""


class ScheduleError(ForaError, ValueError):
    """Invalid steps or cache interval of a schedule, or a trajectory that deviates from its schedule."""


class ModelError(ForaError):
    """A source that is unknown, unreadable, or not a model that can be split at its cache sites."""


class ExportError(ForaError):
    """A module that cannot be traced to valid graphs, or an export folder that cannot be written."""


class BundleError(ForaError):
    """A bundle that is incomplete, altered, unsafe, or made by a newer version."""


class BackendError(ForaError):
    """A backend that is unknown, not installed, or cannot run this bundle on this machine."""


class SourceError(BackendError):
    """The checkpoint from which a bundle was exported has moved or can no longer be loaded."""


class TrustError(BackendError):
    """A bundle that names a factory, code of this machine, which nobody allowed to run."""


class PlanError(BackendError):
    """Plans that cannot be built, are damaged, or do not match this bundle, GPU or TensorRT version."""


class InputError(ForaError, ValueError):
    """A value given to a run that is invalid for the bundle: a class, a shape, a scheduler, an output path."""


class NotOfEnginesError(ForaError, AttributeError):
    """A method of a diffusers transformer that changes its weights or layers, which engines do not have."""


class ShapeError(InputError):
    """An input that the exported graphs do not have, or whose shape differs from the exported one."""


class BusyError(ForaError, RuntimeError):
    """A denoiser that another thread is using, or whose engines were started before the process was forked."""


class RoomError(InputError):
    """A batch that does not fit the free memory of the device; a batch of `fits` does, or none if that is 0."""

    def __init__(self, message: str, batch: int, fits: int) -> None:
        super().__init__(message)
        self.batch, self.fits = batch, fits

    def __reduce__(self) -> tuple[Any, ...]:
        return RoomError, (str(self), self.batch, self.fits)


def first_line(error: BaseException) -> str:
    """The first line of another library's error message, short enough to quote in a sentence.

    Of an error of the system it is the reason alone: sentences name the file themselves.
    """
    said = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return one_line(said.strip().partition("\n")[0], LONGEST_MESSAGE // 4)
