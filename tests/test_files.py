import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fora_trt.bundle import Bundle
from fora_trt.errors import BundleError, ExportError
from fora_trt.files import MANIFEST, beside, clear_unfinished, staging, write_whole

AT_A_LOCK = """
import sys, time
from pathlib import Path
from fora_trt import files
from fora_trt.errors import ExportError
what, target = sys.argv[1], Path(sys.argv[2])
def wait(*_):
    print("there", flush=True)
    time.sleep(60)
if what == "file":
    with files.beside(target) as file:
        file.write(b"half")
        file.flush()
        wait()
renamed = Path.rename
def rename(self, to):
    if what == "swap" and self.name.endswith("fora-new"):
        wait()
    found = renamed(self, to)
    if what == "swapped" and self.name.endswith("fora-new"):
        wait()
    return found
Path.rename = rename
with files.staging(target, True, "bundle", ExportError) as folder:
    (folder / "manifest.json").write_text("new")
    if what == "folder":
        wait()
"""


def stopped(what: str, target: Path) -> subprocess.Popen[str]:
    """A process that writes `target` and is in the middle of it."""
    command = [sys.executable, "-c", AT_A_LOCK, what, str(target)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "there\n"
    return process


def killed(what: str, target: Path) -> None:
    process = stopped(what, target)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A folder that can be replaced."""
    folder = tmp_path / "digits"
    folder.mkdir()
    (folder / MANIFEST).write_text("old")
    return folder


@pytest.mark.parametrize(("moment", "content"), [("folder", "old"), ("swap", "old"), ("swapped", "new")])
def test_a_killed_writer_leaves_the_old_folder_or_the_new_one(moment: str, content: str, target: Path) -> None:
    killed(moment, target)
    assert len(names_in(target.parent)) > 1
    clear_unfinished(target.parent)
    assert names_in(target.parent) == ["digits"]
    assert (target / MANIFEST).read_text() == content


@pytest.mark.parametrize(("before", "content"), [(True, "old"), (False, "new")])
def test_an_interrupted_writer_puts_the_old_folder_back_or_keeps_the_new_one(
    before: bool, content: str, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    renamed = Path.rename

    def rename(self: Path, to: Path) -> Path:
        if before and self.name.endswith("fora-new"):
            raise KeyboardInterrupt
        found = renamed(self, to)
        if self.name.endswith("fora-new"):
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(KeyboardInterrupt), staging(target, True, "bundle", ExportError) as folder:
        (folder / MANIFEST).write_text("new")
    assert names_in(target.parent) == ["digits"]
    assert (target / MANIFEST).read_text() == content


def test_a_bundle_whose_replacement_was_killed_is_put_back_by_reading_it(target: Path) -> None:
    killed("swap", target)
    assert not target.exists()
    with pytest.raises(BundleError, match="is not the manifest of a bundle"):  # it is "old", and it is there
        Bundle.read(target)
    assert names_in(target.parent) == ["digits"]


def test_the_next_writer_of_any_folder_there_clears_up(target: Path) -> None:
    killed("folder", target)
    with staging(target.with_name("other"), False, "bundle", ExportError) as folder:
        (folder / MANIFEST).write_text("")
    assert names_in(target.parent) == ["digits", "other"]


def test_what_a_living_process_writes_stays(target: Path) -> None:
    process = stopped("folder", target)
    try:
        clear_unfinished(target.parent)
        assert (target.parent / ".digits.fora-new" / MANIFEST).read_text() == "new"
        refused = "another process is writing .*digits; wait for it"
        with pytest.raises(ExportError, match=refused), staging(target, True, "bundle", ExportError):
            pass
        assert (target.parent / ".digits.fora-new" / MANIFEST).read_text() == "new"
    finally:
        process.kill()
        process.communicate()


def test_half_a_file_of_a_killed_writer_is_overwritten_or_cleared(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("whole")
    killed("file", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_text() == "whole"
    assert names_in(tmp_path) == [".a.png.fora-new", "a.png"]
    write_whole(tmp_path / "a.png", lambda file: file.write(b"b"))
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [("a.png", "b")]
    killed("file", tmp_path / "a.png")
    clear_unfinished(tmp_path)
    assert names_in(tmp_path) == ["a.png"]


def test_writers_of_one_file_wait_for_each_other(tmp_path: Path) -> None:
    path, order = tmp_path / "a.txt", []

    def write(text: bytes) -> None:
        with beside(path) as file:
            order.append(text)
            file.write(text)
            time.sleep(0.02)
            assert file.tell() == len(text)
            order.append(text)

    threads = [threading.Thread(target=write, args=(bytes([k]) * (10 - k),)) for k in range(8)]
    for one in threads:
        one.start()
    for one in threads:
        one.join(10)
    assert order[::2] == order[1::2]  # none began before the last was done
    assert path.read_bytes() == order[-1]
    assert names_in(tmp_path) == ["a.txt"]


def test_a_file_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(KeyError), beside(tmp_path / "a.txt") as file:
        file.write(b"new")
        raise KeyError
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [("a.txt", "old")]
