"""Text, names, JSON and arrays that others wrote: their limits, and how messages show them."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

import numpy
import pytest

from fora_trt.errors import ForaError
from fora_trt.untrusted import in_command, json_value, name_problem, one_line, read_json, read_npz, shown


def test_text_is_shown_on_one_line_and_cannot_move_the_cursor() -> None:
    assert one_line("a\r\nb\tc") == "a b c"
    assert one_line("\x1b[2J\x9b\u202e\u2028\ud800") == r"\x1b[2J\x9b\u202e\u2028\ud800"
    assert one_line("Füße, 猫, 👩‍🚀") == "Füße, 猫, 👩‍🚀"
    assert shown("x" * 1000) == "x" * 197 + "..."
    assert str(ForaError("first\nsecond\x1b")) == r"first second\x1b"
    assert len(str(ForaError("x" * 10**6))) == 4000


@pytest.mark.parametrize(
    ("text", "word"), [("digits", "digits"), ("a b; c", "'a b; c'"), ("$(x)", "'$(x)'"), ("a'b\n", "'a'\"'\"'b '")]
)
def test_text_in_a_command_is_one_word(text: str, word: str) -> None:
    assert in_command(text) == word


@pytest.mark.parametrize("name", ["digits", "DiT-XL-2-256", "a b", "Füße", "model.v2", "x" * 200])
def test_names(name: str) -> None:
    assert name_problem(name) is None


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".x", "-x", "a/b", "a\\b", "/x", " a", "a\0", "a\n", "x" * 201, "ü" * 101]
)
def test_no_names(name: str) -> None:
    assert name_problem(name) is not None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 33 + b"]" * 33, "deeper than 32 levels"),
        (b"[" * 10**6, "deeper than 32 levels"),
        (b"1" * 5000, "holds the integer 1111"),
        (b"-9223372036854775809", "the limit is 9223372036854775807"),
        (b'{"a": ["\\u001b"]}', r"holds a control character in '\x1b' at a.0"),
        (b'{"\\ud800": 1}', "holds a control character"),
        (b'"' + b"x" * 70_000 + b'"', "a text of 70000 characters"),
        (b"\xff", "is not UTF-8 text"),
        (b"{", "is not JSON"),
    ],
)
def test_json_has_limits(content: bytes, message: str) -> None:
    with pytest.raises(ValueError) as raised:
        json_value(content)
    assert message in str(raised.value)


def test_json_within_the_limits_is_read() -> None:
    assert json_value(b"\xef\xbb\xbf" + b"[" * 32 + b"]" * 32) is not None
    assert json_value(b'{"a": [1, -2.5, true, null, "x"]}') == {"a": [1, -2.5, True, None, "x"]}


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("1")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    os.mkfifo(tmp_path / "pipe")
    assert read_json(tmp_path / "link", follow=True) == (b"1", 1)
    for name in ("link", "pipe", "."):
        with pytest.raises(ValueError, match="is a link or not a regular file"):
            read_json(tmp_path / name)
    with pytest.raises(ValueError, match="regular file"):
        read_npz(tmp_path / "pipe")


def packed(path: Path, content: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a.npy", content)
    return path


def test_arrays_are_read_within_their_declared_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numpy.savez(tmp_path / "whole.npz", a=numpy.arange(6).reshape(2, 3), b=numpy.ones(4))
    assert read_npz(tmp_path / "whole.npz")["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert read_npz(tmp_path / "whole.npz", ["b"]).keys() == {"b"}
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:100])
    with pytest.raises(ValueError, match=r"it is damaged or no \.npz file"):
        read_npz(tmp_path / "cut.npz")
    header = io.BytesIO()
    numpy.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**12,)})
    with pytest.raises(ValueError, match="needs 8000000000000 bytes"):
        read_npz(packed(tmp_path / "liar.npz", header.getvalue()))
    numpy.save(header := io.BytesIO(), numpy.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="pickle"):
        read_npz(packed(tmp_path / "pickle.npz", header.getvalue() + bytes(100)))
    monkeypatch.setattr("fora_trt.untrusted.MOST_UNPACKED", 1000)
    with pytest.raises(ValueError, match=r"its arrays take 1000000 bytes; the limit is 1000"):
        read_npz(packed(tmp_path / "bomb.npz", bytes(10**6)))
