"""Atomic writing of files and folders, and folders whose files are listed in a manifest, whatever they contain."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from fora_trt.errors import ForaError, InputError, first_line
from fora_trt.untrusted import name_problem, read_json, shown

MANIFEST = "manifest.json"
_DIGEST = "sha256"
PIECE = 2**20  # bytes that are read at once


class Record(BaseModel):
    """A part of a manifest: typed and immutable; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class FileRecord(Record):
    """SHA-256 and size in bytes that a file must have."""

    sha256: str
    size: int


ManifestType = TypeVar("ManifestType", bound=Record)


def _hidden(path: Path, what: str) -> Path:
    """`.digits.fora-new`, `-old` or `-lock` beside `digits`: a later call knows by the name what a killed one left."""
    return path.with_name(f".{path.name}.fora-{what}")


def _locked(path: Path, wait: bool) -> int | None:
    """A descriptor of the file `path`, created if it is missing, and locked; None if it is locked and `wait` is false.

    The operating system releases the lock when the descriptor is closed or its process ends, however it ends: a lock
    always has a living owner, on another host of a shared file system too.
    """
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(handle)
            return None
        except OSError:  # a file system without locks; one process at a time works there
            return handle
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), path.lstat()):
                return handle
        os.close(handle)  # its last owner has renamed or removed it meanwhile


@contextmanager
def beside(path: Path) -> Iterator[IO[bytes]]:
    """A temporary file next to `path`: it replaces `path` when the block ends and is deleted when the block fails.

    A second writer of the same path waits. What a killed process has left is overwritten.
    """
    written = _hidden(path, "new")
    handle = _locked(written, wait=True)
    assert handle is not None
    with os.fdopen(handle, "wb") as file:  # the lock is released last: then the name belongs to the next writer
        try:
            file.truncate()
            yield file
            file.flush()
            written.replace(path)
        except BaseException:
            written.unlink(missing_ok=True)
            raise


@contextmanager
def only_writer(target: Path, error: type[ForaError]) -> Iterator[None]:
    """Hold the lock of `target`, a file or folder. Raises `error` if another process holds it.

    At the end, nothing but `target` itself is left: see `_settle`.
    """
    lock = _hidden(target, "lock")
    handle = _locked(lock, wait=False)
    if handle is None:
        raise error(f"another process is writing {target}; wait for it, or choose another name")
    try:
        _settle(target)
        yield
    finally:
        _settle(target)
        lock.unlink(missing_ok=True)  # last: whoever finds no lock finds nothing else either
        os.close(handle)


def _settle(target: Path) -> None:
    """Remove the unfinished folder of `target` and the old one that was replaced, or put the old one back.

    Its caller holds the lock of `target`.
    """
    new, old = _hidden(target, "new"), _hidden(target, "old")
    if old.is_dir() and not target.exists():
        old.rename(target)
    for folder in (new, old):
        shutil.rmtree(folder, ignore_errors=True)


def clear_unfinished(folder: Path) -> None:
    """Remove what killed processes have left unfinished in a folder, and put back what they were replacing.

    What a live process is writing is locked and stays.
    """
    with suppress(OSError, ValueError):  # such as a folder that cannot be written; the next writer says so
        for lock in [*folder.glob(_hidden(folder / "*", "lock").name)]:
            target = folder / lock.name.removeprefix(".").removesuffix(".fora-lock")
            with suppress(_BusyError), only_writer(target, _BusyError):
                pass
        for file in [*folder.glob(_hidden(folder / "*", "new").name)]:
            if file.is_file() and (handle := _locked(file, wait=False)) is not None:
                file.unlink(missing_ok=True)
                os.close(handle)


class _BusyError(ForaError):
    """Another process is writing a path that was to be cleared."""


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file atomically. Raises `InputError` if it cannot be written."""
    try:
        with beside(path) as file:
            write(file)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {first_line(error)}; give another path") from error


def write_manifest(folder: Path, manifest: Record) -> None:
    """Write `manifest.json` into `folder` atomically; on failure an existing one stays unchanged."""
    with beside(folder / MANIFEST) as file:
        file.write(sealed(manifest.model_dump(mode="json")).encode())


def sealed(content: Mapping[str, Any]) -> str:
    """A manifest as JSON text; its last key is the SHA-256 of the other keys, which detects any alteration."""
    return json.dumps({**content, _DIGEST: _digest_of(content)}, indent=2) + "\n"


def read_manifest(
    folder: Path,
    kind: type[ManifestType],
    version: int,
    what: str,
    mend: str,
    error: type[ForaError],
    name: str = MANIFEST,
) -> ManifestType:
    """Read and check the manifest of a `what` ("bundle"), which must have format `version`.

    Raises `error`, whose message names the file, the problem, and `mend`, the instruction that repairs it.
    """
    path = folder / name
    try:
        raw, content = read_json(path)
        found = content["format_version"]
    except OSError as problem:
        raise error(f"{path} cannot be read ({problem.strerror}); make it readable, or {mend}") from problem
    except (KeyError, TypeError, IndexError) as problem:
        raise error(f"{path} is not the manifest of a {what}: it has no format_version; {mend}") from problem
    except ValueError as problem:
        raise error(f"{path} is not the manifest of a {what}: it {problem}; {mend}") from problem
    if type(found) is not int or found > version:
        raise error(
            f"{path} has format version {shown(found)}; this fora-trt reads up to {version}: pip install -U fora-trt"
        )
    if found < version:
        raise error(f"{path} has format version {found} of an older fora-trt; version {version} is needed; {mend}")
    digest = content.pop(_DIGEST, None)
    if digest != _digest_of(content) or raw != sealed(content).encode():  # other digits may be the same number
        raise error(f"{path} was altered: its content does not match the SHA-256 that it records; {mend}")
    try:
        return kind.model_validate(content)
    except ValidationError as problem:
        first = problem.errors()[0]
        where, reason = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
        raise error(f"{path} is damaged at {shown(where or 'the top level')}: {reason}; {mend}") from problem


def _digest_of(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def check_files(folder: Path, files: Mapping[str, FileRecord], mend: str, error: type[ForaError]) -> None:
    """Raise `error` unless every file is a regular file in this folder with the recorded size and SHA-256."""
    for name, record in files.items():
        if name_problem(name):
            raise error(
                f"the manifest of {folder} lists '{shown(name)}', a path outside the folder or no name of a file; do "
                "not use this folder"
            )
        path = folder / name
        try:
            status = path.lstat()
        except FileNotFoundError:
            raise error(f"{path} is missing; {mend}") from None
        if not stat.S_ISREG(status.st_mode):
            raise error(f"{path} is a link or not a regular file; copy the file itself to this path")
        if status.st_size != record.size:
            raise error(f"{path} has {status.st_size} bytes; the manifest records {record.size}; {mend}")
    paths = [folder / name for name in files]
    try:
        with ThreadPoolExecutor() as pool:  # hashlib releases the GIL
            digests = [*pool.map(sha256_of, paths)]
    except OSError as problem:
        raise error(f"{problem.filename} cannot be read ({problem.strerror}); make it readable, or {mend}") from problem
    for path, digest, record in zip(paths, digests, files.values(), strict=True):
        if digest != record.sha256:
            raise error(f"{path} was altered: its SHA-256 differs from the one in the manifest; {mend}")


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, which is read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()


def record_of(path: Path) -> FileRecord:
    """SHA-256 and size of a file, as a manifest records them."""
    return FileRecord(sha256=sha256_of(path), size=path.stat().st_size)


def refuse_existing(target: Path, force: bool, what: str, error: type[ForaError]) -> None:
    """Raise `error` if `target` exists and either `force` is false or `target` is not a `what` ("bundle").

    What a killed process left beside `target` is put in order first.
    """
    clear_unfinished(target.parent)
    try:
        there, known = target.exists(), (target / MANIFEST).is_file()
    except OSError as problem:  # such as a name that is too long
        raise error(f"{target} cannot be written ({problem.strerror}); choose another name or folder") from problem
    if there and not force:
        raise error(f"{target} already exists; give --force to replace it or --name to choose another name")
    if there and not known:
        raise error(f"{target} is not a {what}, so --force does not replace it; remove it or choose another folder")


@contextmanager
def staging(target: Path, force: bool, what: str, error: type[ForaError]) -> Iterator[Path]:
    """A temporary folder next to `target`: it replaces `target` when the block ends and is deleted if the block fails.

    A process that is killed leaves the old `target`, or the new one, or the old one under another name until
    `clear_unfinished` puts it back. Raises `error` if `target` may not be replaced (`refuse_existing`), if another
    process is writing it, and if it cannot be written.
    """
    refuse_existing(target, force, what, error)
    with ExitStack() as stack:
        folder = _hidden(target, "new")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(only_writer(target, error))
            folder.mkdir()
        except OSError as problem:
            raise error(
                f"{target.parent} cannot be written ({problem.strerror}); choose another folder with --out"
            ) from problem
        try:
            yield folder
            if force and target.exists():
                target.rename(_hidden(target, "old"))
            folder.rename(target)  # fails if another program has created `target` meanwhile
        except OSError as problem:
            raise error(f"writing {target} failed ({problem.strerror or problem}); nothing was changed") from problem
