"""A work folder for long computations, which write it part by part; they can be interrupted at any moment and resumed.

Parts are files that are written atomically. The settings are written first: work can only be resumed with the same
settings.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from fora_trt.errors import InputError, first_line
from fora_trt.files import Record, clear_unfinished, write_whole
from fora_trt.untrusted import read_npz

SETTINGS, PARTS, LOCK = "settings.json", "parts", ".lock"


class WorkFolder:
    """Stores parts by number; a part is a dictionary of arrays."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._parts = folder / PARTS

    def has(self, part: int) -> bool:
        """Whether this part has been written."""
        return self._path(part).is_file()

    def write(self, part: int, arrays: Mapping[str, NDArray[numpy.generic]]) -> None:
        """Write a part. Raises `InputError` if the folder cannot be written."""
        write_whole(self._path(part), lambda file: numpy.savez(file, **arrays))  # type: ignore[arg-type] # of the stubs

    def read(self, part: int, names: Container[str] | None = None) -> dict[str, NDArray[numpy.generic]]:
        """Read a part, or only its arrays with these names. Raises `InputError` for a damaged part."""
        path = self._path(part)
        try:
            return read_npz(path, names)
        except (OSError, ValueError) as error:
            raise InputError(
                f"{path} cannot be read ({first_line(error)}); remove it and continue with --resume"
            ) from error

    def clear(self) -> None:
        """Remove the parts, after the final result has been written."""
        shutil.rmtree(self._parts, ignore_errors=True)

    def _path(self, part: int) -> Path:
        return self._parts / f"{part:06d}.npz"


@contextmanager
def work_folder(folder: Path, settings: Record, resume: bool, beside: tuple[str, ...] = ()) -> Iterator[WorkFolder]:
    """Create or resume a work folder and lock it for the duration of a block.

    A new folder must be empty except for the names in `beside`. If the block fails before the first part is written,
    the new files are removed again. Raises `InputError` for a folder that is not empty, was made with other settings,
    is in use by another process, or cannot be written.
    """
    path = folder / SETTINGS
    found = sorted(one.name for one in folder.iterdir()) if folder.is_dir() else []
    stood_there = {folder / name for name in found}
    # names with a dot are the lock and incomplete files of a killed process
    strange = [name for name in found if name not in beside and not name.startswith(".")]
    if strange and not resume:
        raise InputError(f"{folder} already contains {strange[0]}; give --resume to continue it, or another folder")
    if strange and not path.is_file():
        raise InputError(f"{folder} has no {SETTINGS}, so it cannot be resumed; give another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK, timeout=0)
        lock.acquire()
    except Timeout:
        raise InputError(f"another process is working in {folder}; wait for it, or give another folder") from None
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({first_line(error)}); give another folder") from error
    try:
        if strange:
            _check_settings(path, settings)
        else:
            text = settings.model_dump_json(indent=2) + "\n"
            write_whole(path, lambda file: file.write(text.encode()))
        (folder / PARTS).mkdir(exist_ok=True)
        for place in (folder, folder / PARTS):
            clear_unfinished(place)
        yield WorkFolder(folder)
    except BaseException:
        own = {path, folder / PARTS}
        if not strange and not any((folder / PARTS).glob("*")) and not {*folder.glob("[!.]*")} - own - stood_there:
            shutil.rmtree(folder / PARTS, ignore_errors=True)
            path.unlink(missing_ok=True)
        raise
    finally:
        lock.release()


def recorded(folder: Path, setting: str) -> Any:
    """The value of a setting in a work folder; None if there is none, or its file cannot be read."""
    try:
        found = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found.get(setting) if isinstance(found, dict) else None


def _check_settings(path: Path, settings: Record) -> None:
    """Raise `InputError` if a setting differs from those that the folder was made with; it names the first one."""
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        given = json.loads(settings.model_dump_json())
        differing = next((key for key in {**before, **given} if before.get(key) != given.get(key)), None)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise InputError(
            f"{path} cannot be read, so the folder cannot be resumed: {first_line(error)}; give another"
        ) from error
    if differing is not None:
        raise InputError(
            f"{path.parent} was made with {differing} {before.get(differing)!r}; {given.get(differing)!r} was given; "
            "resume it with its original settings, or give another folder"
        )
