import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fora_trt.errors import InputError
from fora_trt.evaluate.work_folder import LOCK, PARTS, SETTINGS, WorkFolder, work_folder
from fora_trt.files import Record


class Settings(Record):
    images: int = 10
    steps: tuple[int, ...] = (50,)
    name: str | None = None


def filled(folder: Path, parts: int = 2, **settings: object) -> None:
    with work_folder(folder, Settings.model_validate(settings), resume=False) as work:
        for part in range(parts):
            work.write(part, {"number": np.array([part]), "square": np.array([part**2])})


def test_a_part_is_read_as_it_was_written_whole_or_by_name(tmp_path: Path) -> None:
    arrays = {"pictures": np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3), "psnr": np.array([np.inf, 40.0])}
    with work_folder(tmp_path / "new" / "work", Settings(), resume=False) as work:
        assert not work.has(3)
        work.write(3, arrays)
        assert work.has(3)
        found = work.read(3)
        assert {name: array.dtype for name, array in found.items()} == {"pictures": np.uint8, "psnr": np.float64}
        assert all(np.array_equal(found[name], array) for name, array in arrays.items())
        assert set(work.read(3, {"psnr", "lpips"})) == {"psnr"}
        work.clear()
        assert not work.has(3)


def test_parts_are_there_when_it_is_resumed(tmp_path: Path) -> None:
    filled(tmp_path)
    with work_folder(tmp_path, Settings(), resume=True) as work:
        assert [work.has(part) for part in range(3)] == [True, True, False]
        assert work.read(1)["square"] == [1]


def test_resuming_what_does_not_exist_begins_it(tmp_path: Path) -> None:
    with work_folder(tmp_path / "none", Settings(), resume=True) as work:
        assert not work.has(0)


def test_a_folder_in_use_wants_resume(tmp_path: Path) -> None:
    filled(tmp_path)
    refused = rf"{tmp_path} already contains parts; give --resume to continue it, or another folder"
    with pytest.raises(InputError, match=refused), work_folder(tmp_path, Settings(), resume=False):
        pass
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.doc").touch()
    refused = rf"other has no {SETTINGS}, so it cannot be resumed"
    with pytest.raises(InputError, match=refused), work_folder(tmp_path / "other", Settings(), resume=True):
        pass
    with work_folder(tmp_path / "other", Settings(), resume=False, beside=("thesis.doc",)) as work:
        work.write(0, {"number": np.array([0])})
    assert (tmp_path / "other" / "thesis.doc").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"images": 11}, "images 10; 11 was given"),
        ({"steps": (20, 50)}, r"steps \[50\]; \[20, 50\] was given"),
        ({"name": "x"}, "name None; 'x' was given"),
    ],
)
def test_other_settings_are_named(given: dict[str, object], message: str, tmp_path: Path) -> None:
    filled(tmp_path)
    refused = f"was made with {message}; resume it with its original settings"
    with pytest.raises(InputError, match=refused), work_folder(tmp_path, Settings.model_validate(given), resume=True):
        pass
    with work_folder(tmp_path, Settings(), resume=True) as work:  # nothing was changed, nothing is locked
        assert work.has(1)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "\xff"])
def test_damaged_settings_are_a_sentence(text: str, tmp_path: Path) -> None:
    filled(tmp_path)
    (tmp_path / SETTINGS).write_bytes(text.encode("latin1"))
    refused = f"{SETTINGS} cannot be read, so the folder cannot be resumed"
    with pytest.raises(InputError, match=refused), work_folder(tmp_path, Settings(), resume=True):
        pass


def test_two_do_not_work_in_one_folder(tmp_path: Path) -> None:
    filled(tmp_path)
    with (
        work_folder(tmp_path, Settings(), resume=True),
        pytest.raises(InputError, match="another process is working in"),
        work_folder(tmp_path, Settings(), resume=True),
    ):
        pass
    with work_folder(tmp_path, Settings(), resume=True):
        pass


@pytest.mark.parametrize("keep", [0, 1, 40, -1])
def test_a_damaged_part_is_a_sentence(keep: int, tmp_path: Path) -> None:
    filled(tmp_path)
    path = tmp_path / PARTS / "000001.npz"
    path.write_bytes(path.read_bytes()[:keep])
    with work_folder(tmp_path, Settings(), resume=True) as work:
        with pytest.raises(InputError, match=r"000001.npz cannot be read .* remove it and continue with --resume"):
            work.read(1)
        assert work.read(0)["number"] == [0]


def test_half_a_part_is_none_and_is_removed(tmp_path: Path) -> None:
    filled(tmp_path)
    (tmp_path / PARTS / ".000002.npz.fora-new").write_bytes(b"PK")
    with work_folder(tmp_path, Settings(), resume=True) as work:
        assert not work.has(2)
    assert [path.name for path in sorted((tmp_path / PARTS).iterdir())] == ["000000.npz", "000001.npz"]


def test_what_fails_before_the_first_part_leaves_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(KeyError), work_folder(tmp_path, Settings(), resume=False):
        raise KeyError
    assert [path.name for path in tmp_path.iterdir() if path.name != LOCK] == []
    with pytest.raises(KeyError), work_folder(tmp_path, Settings(images=3), resume=False) as work:
        work.write(0, {"number": np.array([0])})
        raise KeyError
    with work_folder(tmp_path, Settings(images=3), resume=True) as work:
        assert work.has(0)


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match="cannot be written"), work_folder(place, Settings(), resume=False):
            pass
    with work_folder(tmp_path / "work", Settings(), resume=False) as work:
        (tmp_path / "work" / PARTS).rmdir()
        with pytest.raises(InputError, match="cannot be written: No such file or directory"):
            work.write(0, {"number": np.array([0])})
        (tmp_path / "work" / PARTS).mkdir()


ENDLESS = """
import sys
from pathlib import Path
import numpy as np
from fora_trt.evaluate.work_folder import work_folder
from tests.test_work_folder import Settings
with work_folder(Path(sys.argv[1]), Settings(), resume=True) as work:
    for part in range(10_000):
        if not work.has(part):
            work.write(part, {"number": np.full(20_000, part)})
"""


def test_killed_at_any_moment_every_part_is_whole(tmp_path: Path) -> None:
    done: list[int] = []
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", ENDLESS, str(tmp_path)])
        while not WorkFolder(tmp_path).has(len(done) + 2):
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.wait()
        with work_folder(tmp_path, Settings(), resume=True) as work:
            now = [part for part in range(10_000) if work.has(part)]
            assert all((work.read(part)["number"] == part).all() for part in now)
        assert now == list(range(len(now)))
        assert len(now) > len(done)
        done = now
