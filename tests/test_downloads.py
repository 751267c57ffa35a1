import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fora_trt.bundle import Bundle
from fora_trt.downloads import is_safetensors, problem_of, text_of
from fora_trt.errors import InputError, ModelError
from fora_trt.models.recipes import read_recipe
from fora_trt.models.sources import model_from_source
from fora_trt.sampling.conditioning import conditioning_from_file
from fora_trt.sampling.request import lines_of
from fora_trt.schedule import Schedule

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d7a' * 16}\nsize 2701065216\n"


def truncated_pickle(share: float) -> bytes:
    content = io.BytesIO()
    torch.save({"w": torch.zeros(1000, 100)}, content)
    return content.getvalue()[: int(share * len(content.getvalue()))]


def truncated_safetensors(folder: Path, size: int) -> bytes:
    save_file({"w": torch.zeros(100)}, folder / "whole")
    return (folder / "whole").read_bytes()[:size]


def tarred() -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a"), io.BytesIO())
    return content.getvalue()


CONTENTS = {
    "an empty file": (b"", "is empty; download or copy it again"),
    "a pointer": (POINTER.encode(), "is a Git LFS pointer, not the file itself; run 'git lfs pull'"),
    "a page": (b"\n<!DOCTYPE html><html><body>404</body></html>", "is a web page, not the file itself"),
    "a page after a mark": (b"\xef\xbb\xbf<html>", "is a web page"),
    "an answer in XML": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "is a web page"),
    "an answer in JSON": (b'{"error": "Repository not found"}', """is text that begins with '{"error": "Repository"""),
    "an answer": (b"Entry not found", "is text that begins with 'Entry not found', not a file of weights or arrays"),
    "half a pickle": (truncated_pickle(0.5), "is truncated: its end is missing after "),
    "most of a pickle": (truncated_pickle(0.999), "is truncated: its end is missing after "),
    "a gzip archive": (b"\x1f\x8b\x08" + bytes(100), "is a gzip archive"),
    "a tar archive": (tarred(), "is a tar archive; unpack it"),
    "quantized weights": (b"GGUF\x03" + bytes(100), "is a GGUF file, whose weights are quantized"),
}


@pytest.mark.parametrize("kind", CONTENTS)
@pytest.mark.parametrize("name", ["DiT.pt", "DiT.safetensors"])
def test_what_a_download_left_is_named_wherever_it_is_given(
    kind: str, name: str, exported: Bundle, tmp_path: Path
) -> None:
    content, problem = CONTENTS[kind]
    (tmp_path / name).write_bytes(content)
    assert (problem_of(tmp_path / name) or "").startswith(problem)
    with pytest.raises(ModelError) as raised:
        model_from_source(str(tmp_path / name))
    assert str(raised.value).startswith(f"{tmp_path / name} {problem}")
    with pytest.raises(InputError) as refused:
        conditioning_from_file(exported.manifest, tmp_path / name)
    assert str(refused.value).startswith(f"{tmp_path / name} {problem}")


@pytest.mark.parametrize("size", [30, 200, 463])
def test_truncated_safetensors_are_told_by_their_size(size: int, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(truncated_safetensors(tmp_path, size))
    whole = (tmp_path / "whole").stat().st_size
    assert is_safetensors(path)
    found = problem_of(path)
    assert found is not None
    assert found.startswith(f"is truncated: it has {size} of at least ")
    assert size < int(found.split("of at least ")[1].split()[0]) <= whole
    assert problem_of(tmp_path / "whole") is None


def test_a_pointer_in_place_of_a_configuration_is_named(pipeline_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(POINTER)
    with pytest.raises(ModelError, match=r"config\.json is a Git LFS pointer"):
        model_from_source(str(tmp_path))


@pytest.mark.parametrize("damage", ["truncated", "bits", "not a number"])
def test_a_damaged_archive_of_inputs_is_named(damage: str, exported: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "inputs.npz"
    np.savez(path, class_labels=np.arange(100))
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        content = content[:100]
    elif damage == "bits":
        content[200] ^= 255
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("class_labels.npy", b"\x93NUMPY\x01\x00garbage")
        content = bytearray(path.read_bytes())
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"inputs\.npz (is truncated|cannot be read: )"):
        conditioning_from_file(exported.manifest, path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_text_is_read_as_it_was_meant(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("a cat\r\n\r\na dog\u2028on a line\nein Bär\r\n".encode(encoding))
    assert lines_of(path) == ("a cat", "a dog\u2028on a line", "ein Bär")
    recipe, schedule = tmp_path / "recipe.toml", tmp_path / "schedule.json"
    recipe.write_bytes("source = 'digits'\r\n".encode(encoding))
    assert read_recipe(recipe).source == "digits"
    schedule.write_bytes(Schedule.fora(4, 2).to_json().encode(encoding))
    assert Schedule.from_file(schedule).plan == Schedule.fora(4, 2).plan
    assert not text_of(path).startswith("\ufeff")


def test_a_page_of_prompts_is_no_prompt(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("<!doctype html>\n<p>login</p>\n")
    with pytest.raises(InputError, match=r"prompts\.txt is a web page"):
        lines_of(tmp_path / "prompts.txt")
