import ensurepip
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from tools.wheelhouse import GLIBC, MIB, Parts, closure, interpreter_from_name, main, pack

ROOT = Path(__file__).parents[1]
VERSION = f"3.{sys.version_info.minor}"


def made_wheel(folder: Path, name: str, metadata: str = "", entry_points: str = "") -> None:
    """A wheel of one module, `name`.py, whose `main` says that it is here."""
    about = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}.py", f"def main():\n    print('{name} is here')\n")
        archive.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{metadata}")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/entry_points.txt", entry_points)
        archive.writestr(f"{about}/RECORD", "")


@pytest.fixture
def wheels(tmp_path: Path) -> list[Path]:
    """A made-up fora-trt whose extra needs another distribution, and the pip that comes with Python."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    bundled = list((Path(ensurepip.__file__).parent / "_bundled").glob("pip-*.whl"))
    if not bundled:
        pytest.skip("this Python has no pip of its own")
    shutil.copy(bundled[0], folder)
    made_wheel(folder, "tiny_need")
    metadata = "Provides-Extra: rtx\nRequires-Dist: tiny-need; extra == 'rtx'\n"
    made_wheel(folder, "fora_trt", metadata, "[console_scripts]\nfora-trt = fora_trt:main\n")
    return sorted(folder.iterdir())


@pytest.fixture
def house(tmp_path: Path, wheels: list[Path]) -> Path:
    pack(wheels, tmp_path / "house", MIB, VERSION, "rtx", "")
    return tmp_path / "house"


def install(house: Path, python: str, venv: Path) -> "subprocess.CompletedProcess[str]":
    """Run the script where no index and no configuration of pip can help."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    environment |= {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull}
    command = ["sh", str(house / "install.sh"), python, str(venv)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=venv.parent)


def test_parts_are_cut_at_the_limit_and_join_to_the_stream(tmp_path: Path) -> None:
    parts, stream = Parts(tmp_path, limit=1000), os.urandom(3456)
    for start in range(0, len(stream), 1234):
        parts.write(stream[start : start + 1234])
    assert [path.stat().st_size for path in parts.files] == [1000, 1000, 1000, 456]
    assert b"".join(path.read_bytes() for path in parts.files) == stream


def test_parts_hold_the_wheels_and_their_digests(house: Path, wheels: list[Path]) -> None:
    parts = sorted(house.glob("wheels.tar.*"))
    assert len(parts) > 1 and all(path.stat().st_size <= MIB for path in parts)
    joined = b"".join(path.read_bytes() for path in parts)
    with tarfile.open(fileobj=io.BytesIO(joined)) as tar:
        inside = {name: opened.read() for name in tar.getnames() if (opened := tar.extractfile(name))}
    assert inside == {wheel.name: wheel.read_bytes() for wheel in wheels}
    sums = (house / "SHA256SUMS").read_text()
    assert all(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" in sums for path in parts)
    assert sums.endswith("  WHEELS.SHA256SUMS\n")


def test_the_script_installs_without_an_index_and_runs_the_doctor(house: Path, tmp_path: Path) -> None:
    done = install(house, sys.executable, tmp_path / "venv")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("fora_trt is here\n")
    code = "import tiny_need, pip; tiny_need.main()"
    shown = subprocess.run([tmp_path / "venv" / "bin" / "python", "-c", code], capture_output=True, text=True)
    assert shown.stdout == "tiny_need is here\n"
    assert not (tmp_path / "venv" / "wheels").exists()
    again = install(house, sys.executable, tmp_path / "venv")
    assert again.returncode == 1 and "exists already" in again.stderr and again.stderr.count("\n") == 1
    assert (tmp_path / "venv" / "bin" / "fora-trt").exists()


def test_what_was_left_out_is_taken_from_the_environment_of_python(wheels: list[Path], tmp_path: Path) -> None:
    (need,) = (wheel for wheel in wheels if wheel.name.startswith("tiny_need"))
    pack([wheel for wheel in wheels if wheel != need], tmp_path / "house", MIB, VERSION, "rtx", "tiny-need")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "has")], check=True)
    python = tmp_path / "has" / "bin" / "python"
    refused = install(tmp_path / "house", str(python), tmp_path / "venv")
    assert refused.returncode == 1 and "has no tiny-need" in refused.stderr
    (site,) = (tmp_path / "has").glob("lib/python*/site-packages")
    shutil.unpack_archive(need, site, "zip")
    done = install(tmp_path / "house", str(python), tmp_path / "venv")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["wheels.tar.001", "SHA256SUMS", "WHEELS.SHA256SUMS"])
@pytest.mark.parametrize("harm", ["damaged", "missing"])
def test_harm_is_refused_by_name_and_leaves_nothing(house: Path, tmp_path: Path, name: str, harm: str) -> None:
    content = bytearray((house / name).read_bytes())
    content[len(content) // 2] ^= 1
    (house / name).unlink()
    if harm == "damaged":
        (house / name).write_bytes(content)
    done = install(house, sys.executable, tmp_path / "venv")
    assert done.returncode == 1
    assert done.stderr == f"install.sh: {name} is {harm}: copy it again\n"
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize("python", [sys.executable, "/nowhere/python3"])
def test_another_python_is_refused(wheels: list[Path], tmp_path: Path, python: str) -> None:
    pack(wheels, tmp_path / "house", MIB, "3.99", "", "")
    done = install(tmp_path / "house", python, tmp_path / "venv")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "3.99" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_what_cannot_be_installed_leaves_nothing(wheels: list[Path], tmp_path: Path) -> None:
    pack([wheel for wheel in wheels if "tiny" not in wheel.name], tmp_path / "house", MIB, VERSION, "rtx", "")
    done = install(tmp_path / "house", sys.executable, tmp_path / "venv")
    assert done.returncode == 1 and "pip could not install" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_closure_goes_neither_through_what_is_left_out_nor_through_other_extras() -> None:
    needs = {
        "App": ["Torch>=2", "numpy", "only-old; python_version < '3.8'", "viewer[gl]; extra == 'plot'"],
        "torch": ["triton", "numpy", "nvidia-cublas[fast]"],
        "nvidia_cublas": ["cuda-core; extra == 'fast'"],
        "viewer": ["gl; extra == 'gl'", "slow; extra == 'slow'"],
    } | {name: [] for name in ("numpy", "triton", "cuda-core", "gl", "slow", "only-old")}
    found = [{"metadata": {"name": name, "requires_dist": requires}} for name, requires in needs.items()]
    report = {"install": found, "environment": {"python_version": "3.12"}}
    torch = {"torch", "triton", "nvidia-cublas", "cuda-core"}
    assert closure(report, ["app"], ()) == {"app", "numpy"} | torch
    assert closure(report, ["app"], {"torch"}) == {"app", "numpy"}
    assert closure(report, ["app[plot]"], {"torch"}) == {"app", "numpy", "viewer", "gl"}


def test_an_interpreter_is_found_by_version_command_or_path() -> None:
    assert interpreter_from_name(VERSION) == (sys.executable, VERSION)
    assert interpreter_from_name(f"python{VERSION}") == (sys.executable, VERSION)
    assert interpreter_from_name(sys.executable) == (sys.executable, VERSION)


def test_errors_are_one_sentence_and_leave_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    for option, value, said in (
        ("--python", "3.99", "no Python 3.99 runs here"),
        ("--python", "nope", "no Python nope runs here"),
        ("--out", str(tmp_path), "is not a wheelhouse"),
        ("--out", str(tmp_path / "mine"), "is not a wheelhouse"),
        ("--out", "/proc/wheelhouse", "the wheelhouse cannot be made: "),
    ):
        result = CliRunner().invoke(main, ["--out", str(tmp_path / "new"), option, value])
        assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
        assert said in result.output and result.output.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.slow
def test_the_real_wheelhouse_installs_without_an_index(tmp_path: Path) -> None:
    house, command = tmp_path / "house", [sys.executable, "-m", "tools.wheelhouse", "--out", str(tmp_path / "house")]
    unknown = subprocess.run([*command, "--extras", "cpux"], capture_output=True, text=True, cwd=ROOT)
    assert unknown.returncode == 1 and "there is no extra cpux; there are cpu, " in unknown.stderr
    house.mkdir()
    shown = subprocess.run([*command, "--extras", "cpu"], capture_output=True, text=True, cwd=ROOT)
    assert shown.returncode == 0, shown.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["house"]
    assert max(path.stat().st_size for path in house.iterdir()) <= 60 * MIB
    assert f"glibc='2.{GLIBC}'" in (house / "install.sh").read_text()
    done = install(house, sys.executable, tmp_path / "venv")
    assert done.returncode == 0, done.stderr
    assert "onnxruntime" in done.stdout and "onnxruntime is not installed" not in done.stdout
    shutil.rmtree(tmp_path / "venv")  # more than a gigabyte, which pytest would keep
