"""Errors for what a user can mend: each message says what came, what was expected and what mends it."""

from __future__ import annotations


class ForaError(Exception):
    """Base of all errors of this package; the command line prints its message and exits with 1."""


class ScheduleError(ForaError, ValueError):
    """Steps and cache interval that make no schedule, or a trajectory that leaves its schedule."""


class ModelError(ForaError):
    """A source that is unknown, cannot be read, or is not a model that can be split."""


class ExportError(ForaError):
    """A module that does not trace to graphs of the promised form, or a folder that cannot be written."""


class BundleError(ForaError):
    """A bundle that is incomplete, altered, unsafe, or made by a newer version."""


class BackendError(ForaError):
    """A backend that is unknown, not installed, or cannot run this bundle on this machine."""


class SourceError(BackendError):
    """The checkpoint that a bundle was exported from is not where it was, or cannot be loaded any more."""


class PlanError(BackendError):
    """Plans that cannot be built, are damaged, or do not fit this bundle, this GPU or this version of TensorRT."""


class InputError(ForaError, ValueError):
    """A value given to a run that does not fit the bundle: a class, a shape, a scheduler, an output path."""


def first_line(error: BaseException) -> str:
    """What an error of another library says first; more would not fit a sentence."""
    return str(error).strip().partition("\n")[0]
