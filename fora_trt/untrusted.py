"""Text, names and JSON that others wrote: read within limits, and shown on one line, quoted for a shell."""

from __future__ import annotations

import json
import re
import shlex
import stat
import zipfile
import zlib
from collections.abc import Callable, Container
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fora_trt.downloads import decoded

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

MOST_BYTES = 64 * 2**20
"""Largest JSON file."""

MOST_LEVELS = 32
"""Deepest nesting of lists and objects in JSON."""

MOST_UNPACKED = 2**33
"""Largest content of a .npz file in bytes, when it is decompressed."""

LARGEST = 2**63 - 1
"""Largest absolute value of an integer in JSON."""

LONGEST_TEXT = 2**16
"""Most characters of one text in JSON."""

LONGEST_SHOWN = 200
"""Most characters of a text of others in a message."""

LONGEST_NAME = 200
"""Most bytes of the name of a file or folder; file systems take 255, and temporary names are longer."""

UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that move the cursor, end a line, change the direction of writing, or are no text."""


def one_line(text: str, most: int = LONGEST_TEXT) -> str:
    """The text on one line: other white space becomes a space, unsafe characters are escaped, a long text is cut."""
    flat = UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), re.sub(r"[\t\n\v\f\r]+", " ", text))
    return flat if len(flat) <= most else f"{flat[: most - 3]}..."


def shown(text: object) -> str:
    """A text of others for a message: on one line, of bounded length."""
    return one_line(str(text), LONGEST_SHOWN)


def in_command(word: object) -> str:
    """A text of others as one word of a command that a user may copy to a shell."""
    return shlex.quote(shown(word))


def name_problem(name: str) -> str | None:
    """Why a text is not the name of one file or folder, as the end of a sentence that begins with it; None if it is."""
    if "/" in name or "\\" in name:
        return "is a path"
    if not name or name.strip() != name or name.startswith((".", "-")):
        return "is empty, or begins with a dot or a dash, or has a space at an end"
    if UNSAFE.search(name):
        return "contains a control character"
    if len(name.encode()) > LONGEST_NAME:
        return f"has more than {LONGEST_NAME} bytes"
    return None


def read_json(path: Path, follow: bool = False) -> tuple[bytes, Any]:
    """The bytes and the value of a JSON file, whose text, numbers and nesting are within the limits.

    With `follow`, the path may be a link. Raises `OSError`, and `ValueError` with the reason as the end of a sentence.
    """
    status = path.stat() if follow else path.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("is a link or not a regular file; copy the file itself to this path")
    if status.st_size > MOST_BYTES:
        raise ValueError(f"has {status.st_size} bytes; the limit is {MOST_BYTES}")
    content = path.read_bytes()
    return content, json_value(content)


def json_value(content: bytes) -> Any:
    """The value of JSON text; see `read_json`."""
    try:
        value = json.loads(decoded(content), parse_int=_integer)
    except RecursionError:
        raise ValueError(f"nests lists or objects deeper than {MOST_LEVELS} levels") from None
    except UnicodeDecodeError:
        raise ValueError("is not JSON: it is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error}") from None
    check_values(value)
    return value


def read_npz(path: Path, names: Container[str] | None = None) -> dict[str, NDArray[numpy.generic]]:
    """The arrays of a .npz file, or those with these names; nothing in it is unpickled.

    Sizes are checked before anything is decompressed. Raises `OSError`, and `ValueError` with the reason.
    """
    import numpy

    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("it is no regular file")
    try:
        with zipfile.ZipFile(path) as packed:
            if (size := sum(one.file_size for one in packed.infolist())) > MOST_UNPACKED:
                raise ValueError(f"its arrays take {size} bytes; the limit is {MOST_UNPACKED}")
            for member in packed.infolist():
                with packed.open(member) as file:
                    _check_header(file, member.file_size)
        with numpy.load(path, allow_pickle=False) as content:
            return {name: content[name] for name in content.files if names is None or name in names}
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        # zipfile raises the last two for a compression that it does not know and for an encrypted file
        raise ValueError(f"it is damaged or no .npz file ({error}); write or copy it again") from error


def _check_header(file: Any, size: int) -> None:
    """Raise `ValueError` unless the array that a member of a .npz file describes fits the size of the member."""
    from numpy.lib import format as of_numpy

    version = of_numpy.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"it has arrays of format {version}; write it with numpy.savez")
    read = of_numpy.read_array_header_1_0 if version == (1, 0) else of_numpy.read_array_header_2_0
    shape, _, dtype = read(file)
    needed = dtype.itemsize
    for one in shape:
        needed *= one
    if not 0 <= needed <= size:
        raise ValueError(f"an array of shape {shown(shape)} needs {needed} bytes; the file holds {size} of it")


def check_values(value: object) -> None:
    """Raise `ValueError` for a text, a number or a nesting beyond the limits, with its place."""
    todo: list[tuple[object, tuple[object, ...]]] = [(value, ())]
    while todo:
        one, place = todo.pop()
        if isinstance(one, dict | list) and len(place) >= MOST_LEVELS:
            raise ValueError(f"nests lists or objects deeper than {MOST_LEVELS} levels")
        if isinstance(one, dict):
            todo += [(key, (*place, "a key")) for key in one]
            todo += [(each, (*place, key)) for key, each in one.items()]
        elif isinstance(one, list):
            todo += [(each, (*place, number)) for number, each in enumerate(one)]
        elif isinstance(one, str) and (problem := _text_problem(one)):
            raise ValueError(f"{problem} at {shown('.'.join(map(str, place)) or 'the top level')}")


def _text_problem(text: str) -> str | None:
    if len(text) > LONGEST_TEXT:
        return f"holds a text of {len(text)} characters, of which at most {LONGEST_TEXT} are read,"
    ends = text.replace("\n", " ")  # messages show them as spaces
    return f"holds a control character in '{shown(text)}'" if UNSAFE.search(ends) else None


def _integer(digits: str) -> int:
    if len(digits) > len(str(LARGEST)) + 1 or abs(number := int(digits)) > LARGEST:
        raise ValueError(f"holds the integer {shown(digits)}; the limit is {LARGEST}")
    return number


def checked(rule: Callable[[str], str | None]) -> Callable[[str], str]:
    """A rule such as `name_problem` as a validator of pydantic."""

    def check(text: str) -> str:
        if problem := rule(text):
            raise ValueError(f"'{shown(text)}' {problem}")
        return text

    return check
