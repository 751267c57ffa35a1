"""A folder that long work fills part by part, so that it can be stopped at any moment and goes on where it was.

Every part is a file that is there whole or not at all. What the parts were made with is written down first: work is
resumed with the same settings or not at all.
"""

from __future__ import annotations

import json
import shutil
import zipfile
import zlib
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from fora_trt.errors import InputError
from fora_trt.folders import Record
from fora_trt.runtime.outputs import write_whole

SETTINGS, PARTS, LOCK = "settings.json", "parts", ".lock"


class WorkFolder:
    """Parts by number, each a dictionary of arrays."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._parts = folder / PARTS

    def has(self, part: int) -> bool:
        """Whether this part is done."""
        return self._path(part).is_file()

    def write(self, part: int, arrays: Mapping[str, NDArray[numpy.generic]]) -> None:
        """Keep a part that is done. Raises `InputError` where the folder cannot be written."""
        write_whole(self._path(part), lambda file: numpy.savez(file, **arrays))  # type: ignore[arg-type] # of the stubs

    def read(self, part: int, names: Container[str] | None = None) -> dict[str, NDArray[numpy.generic]]:
        """A part that is done, or its arrays of these names alone. Raises `InputError` for one that is damaged."""
        path = self._path(part)
        try:
            with numpy.load(path, allow_pickle=False) as content:
                return {name: content[name] for name in content.files if names is None or name in names}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise InputError(f"{path} cannot be read ({error}); remove it and go on with --resume") from error

    def clear(self) -> None:
        """Remove the parts, when what they were for is there."""
        shutil.rmtree(self._parts, ignore_errors=True)

    def _path(self, part: int) -> Path:
        return self._parts / f"{part:06d}.npz"


@contextmanager
def work_folder(folder: Path, settings: Record, resume: bool, beside: tuple[str, ...] = ()) -> Iterator[WorkFolder]:
    """Make or resume the folder for the length of a block, in which nobody else uses it.

    A new one must be empty but for what is named in `beside`, and is so again if the block fails before anything was
    done. Raises `InputError` for one that is not, that was made with other settings, that somebody else is working
    in, or that cannot be written.
    """
    path = folder / SETTINGS
    found = sorted(one.name for one in folder.iterdir()) if folder.is_dir() else []
    stood_there = {folder / name for name in found}
    strange = [name for name in found if name not in beside and not name.startswith(".")]  # a lock, what a kill left
    if strange and not resume:
        raise InputError(f"{folder} holds {strange[0]} already; give --resume to go on with it, or another folder")
    if strange and not path.is_file():
        raise InputError(f"{folder} has no {SETTINGS}, so there is nothing to resume; give another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK, timeout=0)
        lock.acquire()
    except Timeout:
        raise InputError(f"another process is working in {folder}; wait for it, or give another folder") from None
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror or error}); give another folder") from error
    try:
        if strange:
            _check_settings(path, settings)
        else:
            text = settings.model_dump_json(indent=2) + "\n"
            write_whole(path, lambda file: file.write(text.encode()))
        (folder / PARTS).mkdir(exist_ok=True)
        for left in (folder / PARTS).glob(".*"):  # half a part, of a process that was killed
            left.unlink()
        yield WorkFolder(folder)
    except BaseException:
        own = {path, folder / PARTS}
        if not strange and not any((folder / PARTS).glob("*")) and not {*folder.glob("[!.]*")} - own - stood_there:
            shutil.rmtree(folder / PARTS, ignore_errors=True)
            path.unlink(missing_ok=True)
        raise
    finally:
        lock.release()


def _check_settings(path: Path, settings: Record) -> None:
    """Raise `InputError` that names the first setting which is not what the folder was made with."""
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        given = json.loads(settings.model_dump_json())
        differing = next((key for key in {**before, **given} if before.get(key) != given.get(key)), None)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise InputError(f"{path} cannot be read, so nothing can be resumed: {error}; give another folder") from error
    if differing is not None:
        raise InputError(
            f"{path.parent} was made with {differing} {before.get(differing)!r} and not {given.get(differing)!r}; "
            "resume it with the settings it was made with, or give another folder"
        )
