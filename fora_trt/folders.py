"""Folders that a manifest describes: written whole or not at all, checked whole when read. Knows no content."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from fora_trt.errors import ForaError

MANIFEST = "manifest.json"
_DIGEST = "sha256"


class Record(BaseModel):
    """A part of a manifest: typed, immutable, and without keys that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class FileRecord(Record):
    """What a file must be to be used."""

    sha256: str
    size: int


ManifestType = TypeVar("ManifestType", bound=Record)


def write_manifest(folder: Path, manifest: Record) -> None:
    """Write `manifest.json` into `folder`, or leave the one that is there."""
    beside = folder / f".{MANIFEST}.{os.getpid()}"
    try:
        beside.write_text(sealed(manifest.model_dump(mode="json")), encoding="utf-8")
        beside.replace(folder / MANIFEST)
    finally:
        beside.unlink(missing_ok=True)


def sealed(content: Mapping[str, Any]) -> str:
    """A manifest as text, with a digest of its own content as its last key, so that no altered byte is missed."""
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
    """Read and check the manifest of a `what` ("bundle") whose newest known format is `version`.

    Raises `error` that names the file, what is wrong with it, and `mend`.
    """
    path = folder / name
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = content["format_version"]
    except OSError as problem:
        raise error(f"{path} cannot be read ({problem.strerror})") from problem
    except (ValueError, KeyError, TypeError) as problem:
        raise error(f"{path} is not the manifest of a {what}: {problem}; {mend}") from problem
    if not isinstance(found, int) or found > version:
        raise error(f"{path} has format version {found}; this fora-trt reads up to {version}: pip install -U fora-trt")
    if found < version:
        raise error(f"{path} has format version {found}, of an older fora-trt; {mend}")
    if content.pop(_DIGEST, None) != _digest_of(content):
        raise error(f"{path} was altered: its content is not what its own SHA-256 says; {mend}")
    try:
        return kind.model_validate(content)
    except ValidationError as problem:
        first = problem.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the top level"
        raise error(f"{path} is damaged at {where}: {first['msg']}; {mend}") from problem


def _digest_of(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def check_files(folder: Path, files: Mapping[str, FileRecord], mend: str, error: type[ForaError]) -> None:
    """Raise `error` unless every file is a regular one of the recorded size and SHA-256, in this very folder."""
    for name, record in files.items():
        if Path(name).name != name or "\\" in name:
            raise error(f"the manifest of {folder} lists {name!r}, which leaves the folder; do not use anything in it")
        path = folder / name
        try:
            status = path.lstat()
        except FileNotFoundError:
            raise error(f"{path} is missing; {mend}") from None
        if not stat.S_ISREG(status.st_mode):
            raise error(f"{path} is a link or no regular file, which is not followed; copy the file there instead")
        if status.st_size != record.size:
            raise error(f"{path} has {status.st_size} bytes where the manifest says {record.size}; {mend}")
    paths = [folder / name for name in files]
    with ThreadPoolExecutor() as pool:  # hashing lets other threads run
        for path, digest, record in zip(paths, pool.map(sha256_of, paths), files.values(), strict=True):
            if digest != record.sha256:
                raise error(f"{path} was altered: its SHA-256 is not the one in the manifest; {mend}")


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, mapped and not read into memory."""
    with path.open("rb") as file:
        if not path.stat().st_size:
            return hashlib.sha256().hexdigest()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return hashlib.sha256(content).hexdigest()


def record_of(path: Path) -> FileRecord:
    """Digest and size of a file, as a manifest keeps them."""
    return FileRecord(sha256=sha256_of(path), size=path.stat().st_size)


@contextmanager
def staging(target: Path, force: bool, what: str, error: type[ForaError]) -> Iterator[Path]:
    """A folder beside `target` that takes its place when the block ends, and is gone when the block fails.

    Raises `error` if `target` is there and `force` is not given, is no `what` ("bundle"), or cannot be written.
    """
    try:
        there, known = target.exists(), (target / MANIFEST).is_file()
    except OSError as problem:  # a name that is too long, say
        raise error(f"{target} cannot be written ({problem.strerror}); choose another name or folder") from problem
    if there and not force:
        raise error(f"{target} is there already; give --force to replace it or --name to make another")
    if there and not known:
        raise error(f"{target} is not a {what}, so --force does not replace it; remove it or choose another folder")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as problem:
        raise error(
            f"{target.parent} cannot be written ({problem.strerror}); choose another folder with --out"
        ) from problem
    try:
        folder.chmod(0o755)
        yield folder
        _move(folder, target, replace=force and target.exists())
    except OSError as problem:
        raise error(f"writing {target} failed ({problem.strerror or problem}); nothing was changed") from problem
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _move(folder: Path, target: Path, replace: bool) -> None:
    """Rename `folder` to `target`; what is to be replaced is moved aside first and removed last."""
    if not replace:
        folder.rename(target)  # fails if another process has made it meanwhile
        return
    aside = folder.with_name(folder.name + ".old")
    target.rename(aside)
    try:
        folder.rename(target)
    except BaseException:
        aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)
