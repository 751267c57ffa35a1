"""Files that users bring: recognize what is not the file that its name promises, and read text in usual encodings."""

from __future__ import annotations

import codecs
import json
import zipfile
from pathlib import Path

POINTER = b"version https://git-lfs.github.com/"
PAGES = (b"<!doctype", b"<html", b"<head", b"<?xml")
ARCHIVES = {
    b"\x1f\x8b": "a gzip archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!": "a RAR archive",
    b"GGUF": "a GGUF file, whose weights are quantized",
    b"\x89HDF": "an HDF5 file",
    b"\x89PNG": "a PNG image",
    b"%PDF": "a PDF document",
}
"""What files that begin with these bytes are; none of them contains weights that can be read."""

TAR, TAR_AT = b"ustar", 257
ZIP, PICKLE = b"PK\x03\x04", b"\x80"
BEGINNING = 512  # bytes that tell one kind from another

ENCODINGS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def problem_of(path: Path, text: bool = False) -> str | None:
    """What a file is in place of its expected content, and how to get the file; None if it can be what it should be.

    Recognizes empty and truncated files, Git LFS pointers, web pages, messages of a server and archives. With `text`,
    text is expected, otherwise weights or arrays. Raises `OSError` if the file cannot be read.
    """
    if not path.is_file():
        return "is not a file" if path.exists() else "does not exist"
    with path.open("rb") as file:
        start = file.read(BEGINNING)
    if not start:
        return "is empty; download or copy it again"
    if start.startswith(POINTER):
        return "is a Git LFS pointer, not the file itself; run 'git lfs pull' in its repository, or download the file"
    if start.removeprefix(codecs.BOM_UTF8).lstrip().lower().startswith(PAGES):
        return "is a web page, not the file itself; download the file behind the link, which a page may only describe"
    if text:
        return None
    for signature, kind in ARCHIVES.items():
        if start.startswith(signature):
            return f"is {kind}; PyTorch or safetensors weights, or a NumPy archive are expected"
    if start[TAR_AT:].startswith(TAR):
        return "is a tar archive; unpack it and give the file or folder in it"
    if start.startswith(ZIP) and not zipfile.is_zipfile(path):
        return f"is truncated: its end is missing after {path.stat().st_size} bytes; download or copy it again"
    if (expected := _size_of_safetensors(path, start)) is not None and path.stat().st_size < expected:
        return (
            f"is truncated: it has {path.stat().st_size} of at least {expected} bytes; download or copy the file again"
        )
    if (words := _words(start)) is not None:
        return f"is text that begins with {words!r}, not a file of weights or arrays; download or copy it again"
    return None


def is_safetensors(path: Path) -> bool:
    """Whether the file begins like a .safetensors file: the size of its header, and the header as a JSON object."""
    with path.open("rb") as file:
        return _size_of_safetensors(path, file.read(BEGINNING)) is not None


def _size_of_safetensors(path: Path, start: bytes) -> int | None:
    """The smallest size in bytes that a .safetensors file with this beginning can have; None for another file."""
    header = int.from_bytes(start[:8], "little")
    if start[8:9] != b"{" or header > 100_000_000:  # the limit of the format
        return None
    if path.stat().st_size < 8 + header:
        return 8 + header
    with path.open("rb") as file:
        file.seek(8)
        try:
            entries = json.loads(file.read(header))
            ends = [one["data_offsets"][1] for name, one in entries.items() if name != "__metadata__"]
            return 8 + header + max(map(int, ends), default=0)
        except (ValueError, KeyError, TypeError, IndexError, RecursionError):
            return 8 + header  # damaged in another way, which the reader reports


def _words(start: bytes) -> str | None:
    """The beginning of a file that contains text; None for binary data."""
    try:
        text = start.decode("utf-8")
    except UnicodeDecodeError:
        return None
    return " ".join(text.split())[:60] if all(one.isprintable() or one.isspace() for one in text) else None


def text_of(path: Path) -> str:
    """The content of a text file in UTF-8, or in UTF-16 if it begins with a byte order mark, which is left out.

    Raises `OSError` or `UnicodeDecodeError`.
    """
    return decoded(path.read_bytes()).replace("\r\n", "\n").replace("\r", "\n")


def decoded(content: bytes) -> str:
    """The text of a file's content; see `text_of`. Raises `UnicodeDecodeError`."""
    return content.decode(next((name for mark, name in ENCODINGS.items() if content.startswith(mark)), "utf-8"))
