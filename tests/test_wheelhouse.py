import ensurepip
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tools import wheelhouse
from tools.wheelhouse import (
    GLIBC,
    MIB,
    Parts,
    closure,
    collected,
    interpreter_from_name,
    listed,
    main,
    pack,
    versions_of,
)

ROOT = Path(__file__).parents[1]
VERSION = f"3.{sys.version_info.minor}"


def made_wheel(folder: Path, name: str, metadata: str = "", entry_points: str = "", version: str = "1.0") -> Path:
    """A wheel of one module, `name`.py, whose `main` says that it is here."""
    about, wheel = f"{name}-{version}.dist-info", folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{name}.py", f"def main():\n    print('{name} is here')\n")
        archive.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{metadata}")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/entry_points.txt", entry_points)
        archive.writestr(f"{about}/RECORD", "")
    return wheel


def bundled_pip() -> Path:
    """The wheel of the pip that comes with Python."""
    found = list((Path(ensurepip.__file__).parent / "_bundled").glob("pip-*.whl"))
    if not found:
        pytest.skip("this Python has no pip of its own")
    return found[0]


@pytest.fixture
def wheels(tmp_path: Path) -> list[Path]:
    """A made-up fora-trt whose extra needs another distribution, and the pip that comes with Python."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    shutil.copy(bundled_pip(), folder)
    made_wheel(folder, "tiny_need")
    metadata = "Provides-Extra: rtx\nRequires-Dist: tiny-need; extra == 'rtx'\n"
    made_wheel(folder, "fora_trt", metadata, "[console_scripts]\nfora-trt = fora_trt:main\n")
    return sorted(folder.iterdir())


@pytest.fixture
def house(tmp_path: Path, wheels: list[Path]) -> Path:
    pack(wheels, tmp_path / "house", MIB, VERSION, "rtx", "")
    return tmp_path / "house"


def wheels_in(house: Path) -> dict[str, bytes]:
    """The content of each wheel, by file name."""
    joined = b"".join(path.read_bytes() for path in sorted(house.glob("wheels.tar.*")))
    with tarfile.open(fileobj=io.BytesIO(joined)) as tar:
        return {name: opened.read() for name in tar.getnames() if (opened := tar.extractfile(name))}


def install(house: Path, python: str, venv: Path) -> "subprocess.CompletedProcess[str]":
    """Run the script where no index and no configuration of pip can help."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON"))}
    environment |= {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_NO_COMPILE": "1"}
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
    assert wheels_in(house) == {wheel.name: wheel.read_bytes() for wheel in wheels}
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
    assert again.returncode == 1 and "exists or cannot be created" in again.stderr and again.stderr.count("\n") == 1
    assert (tmp_path / "venv" / "bin" / "fora-trt").exists()


@pytest.mark.slow
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


COLUMNS = """\
Package            Version      Editable project location
------------------ ------------ -------------------------
Big.Torch          2.11.0+cu130
fora-trt           0.1.0        /home/me/fora-trt
python_dateutil    2.09.0.post0

[notice] A new release of pip is available: 25.0 -> 26.0
"""


@pytest.mark.parametrize("content", [COLUMNS, "Big.Torch==2.11.0+cu130\n# fora\npython_dateutil==2.09.0.post0\n"])
def test_versions_are_read_from_both_forms_of_a_pip_list(content: str, tmp_path: Path) -> None:
    path = tmp_path / "there.txt"
    path.write_text(content)
    assert listed(path) == {"big-torch": "2.11.0+cu130", "python-dateutil": "2.9.0.post0"}


@pytest.mark.parametrize("content", ["", COLUMNS + "torch\n", "-e git+https://x\n", "torch @ file:///torch.whl\n"])
def test_what_is_no_pip_list_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "there.txt"
    path.write_text(content)
    result = CliRunner().invoke(main, ["--have", str(path), "--out", str(tmp_path / "new")])
    assert result.exit_code == 1 and result.output.count("\n") == 1
    assert f"create it on that machine with: python -m pip list >{path.name}" in result.output
    assert not (tmp_path / "new").exists()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels in place of an index: a fora-trt, two needs of it, and what they need."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder), "PIP_CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(name, value)
    needs = "Requires-Dist: big-torch>=2.10\nRequires-Dist: pipeline\n"
    made_wheel(folder, "fora_trt", needs, "[console_scripts]\nfora-trt = fora_trt:main\n")
    for version in ("2.11.0", "2.13.0"):
        made_wheel(folder, "big_torch", "Requires-Dist: cuda-of-torch\n", version=version)
    made_wheel(folder, "cuda_of_torch", version="13.0")
    made_wheel(folder, "pipeline", "Requires-Dist: hub>=1\nRequires-Dist: old-hub\n", version="1.0")
    made_wheel(folder, "pipeline", "Requires-Dist: hub>=2\n", version="2.0")
    for version in ("1.5", "2.0"):
        made_wheel(folder, "hub", version=version)
    made_wheel(folder, "old_hub")
    (tmp_path / "constraints.txt").write_text("# tested\nbig-torch==2.13.0\npipeline==2.0; python_version > '3'\n")
    monkeypatch.setattr(wheelhouse, "ROOT", tmp_path)
    monkeypatch.setattr(wheelhouse, "environment_in", lambda folder, python: python)
    monkeypatch.setattr(
        wheelhouse,
        "project_wheel",
        lambda python, extras, out: Path(shutil.copytree(folder, out) / "fora_trt-1.0-py3-none-any.whl"),
    )
    monkeypatch.setattr(wheelhouse, "download", keep_alone)
    return folder


def keep_alone(python: str, report: dict[str, Any], names: Collection[str], folder: Path) -> None:
    """In place of a download: of a folder with all wheels, leave those of the report by these names."""
    wanted = {f"{name.replace('-', '_')}-{version}-" for name, version in versions_of(report).items() if name in names}
    for wheel in folder.iterdir():
        if not wheel.name.startswith(tuple(wanted)):
            wheel.unlink()


HAVE = {
    "what is there stays, in another version than the tested one, and what only it needs is not looked for": (
        {"pip": "25.0", "big-torch": "2.11.0+cu130", "other": "1.0"},
        {"fora_trt-1.0", "pipeline-2.0", "hub-2.0"},
        {"pip": "25.0", "big-torch": "2.11.0+cu130"},
        "downloading 3 of 5",
    ),
    "a version that is too old is collected, as it was tested": (
        {"pip": "25.0", "big-torch": "2.4.0", "hub": "2.5"},
        {"fora_trt-1.0", "pipeline-2.0", "big_torch-2.13.0", "cuda_of_torch-13.0"},
        {"hub": "2.5", "pip": "25.0"},
        "big-torch 2.4.0 is installed but not supported: collecting 2.13.0",
    ),
    "what is there decides over the tested versions": (
        {"pip": "25.0", "big-torch": "2.11.0", "hub": "1.2"},
        {"fora_trt-1.0", "pipeline-1.0", "old_hub-1.0"},
        {"big-torch": "2.11.0", "hub": "1.2", "pip": "25.0"},
        "versions in constraints.txt conflict with installed ones: allowing other versions",
    ),
}


@pytest.mark.parametrize("case", HAVE)
def test_what_a_machine_has_is_not_collected(
    case: str, index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    have, wanted, promised, word = HAVE[case]
    (tmp_path / "work").mkdir()
    found = collected(tmp_path / "work", sys.executable, "", (), have)
    assert {wheel.name.removesuffix("-py3-none-any.whl") for wheel in found.wheels} == wanted
    assert found.promised == promised
    assert word in capsys.readouterr().err


def machine_with(folder: Path, *wheels: Path) -> str:
    """The path of a Python that has these."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for wheel in wheels:
        shutil.unpack_archive(wheel, site, "zip")
    return str(folder / "bin" / "python")


def test_a_wheelhouse_for_a_machine_is_installed_beside_what_is_there(index: Path, tmp_path: Path) -> None:
    torch = made_wheel(tmp_path, "big_torch", "Requires-Dist: of-a-distribution\n", version="2.11.0+cu130")
    python = machine_with(tmp_path / "machine", torch, bundled_pip())
    there = subprocess.run([python, "-m", "pip", "list"], capture_output=True, text=True, check=True).stdout
    (tmp_path / "there.txt").write_text(there)
    out, told = tmp_path / "house", ["--extras", "", "--have", str(tmp_path / "there.txt")]
    made = CliRunner().invoke(main, ["--python", sys.executable, "--out", str(out), *told])
    assert made.exit_code == 0, made.output
    assert "pip-" not in made.stdout and "torch" not in made.stdout
    done = install(out, python, tmp_path / "venv")
    assert done.returncode == 0, done.stderr
    code = "import big_torch, pipeline; big_torch.main(); pipeline.main()"
    shown = subprocess.run([tmp_path / "venv" / "bin" / "python", "-c", code], capture_output=True, text=True)
    assert shown.stdout == "big_torch is here\npipeline is here\n"

    other = machine_with(tmp_path / "other", made_wheel(tmp_path, "big_torch", version="2.10.0"), bundled_pip())
    refused = install(out, other, tmp_path / "another")
    assert refused.returncode == 1 and refused.stderr.count("\n") == 1
    assert "collected for big-torch 2.11.0+cu130 (installed: 2.10.0): give another Python" in refused.stderr
    assert not (tmp_path / "another").exists()


def test_the_help_says_how_to_do_without_a_virtual_environment(house: Path) -> None:
    shown = CliRunner().invoke(main, ["--help"]).output
    lines = [line.strip() for line in shown.partition("PYTHONPATH:\n")[2].partition("\n\n")[0].splitlines()]
    script = "\n".join(lines).replace("python3", sys.executable)
    code = "import fora_trt, tiny_need; fora_trt.main(); tiny_need.main()"
    script = script.replace("-m fora_trt doctor", f"-c '{code}'")
    done = subprocess.run(["/bin/sh", "-ec", script], capture_output=True, text=True, cwd=house)
    assert done.stdout == "fora_trt is here\ntiny_need is here\n", done.stderr


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
        ("--python", "3.99", "no Python 3.99 is installed"),
        ("--python", "nope", "no Python nope is installed"),
        ("--out", str(tmp_path), "is not a wheelhouse"),
        ("--out", str(tmp_path / "mine"), "is not a wheelhouse"),
        ("--out", "/proc/wheelhouse", "the wheelhouse cannot be written: "),
    ):
        result = CliRunner().invoke(main, ["--out", str(tmp_path / "new"), option, value])
        assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
        assert said in result.output and result.output.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_unknown_extras_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheelhouse, "environment_in", lambda folder, python: python)
    result = CliRunner().invoke(main, ["--extras", "cpux", "--out", str(tmp_path / "new")])
    assert result.exit_code == 1
    assert "unknown extras cpux; choose from cpu, " in result.output
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_the_real_wheelhouse_holds_the_package_and_installs_without_an_index(tmp_path: Path) -> None:
    house, command = tmp_path / "house", [sys.executable, "-m", "tools.wheelhouse", "--out", str(tmp_path / "house")]
    house.mkdir()
    shown = subprocess.run([*command, "--extras", "cpu"], capture_output=True, text=True, cwd=ROOT)
    assert shown.returncode == 0, shown.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["house"]
    assert max(path.stat().st_size for path in house.iterdir()) <= 60 * MIB
    assert f"glibc='2.{GLIBC}'" in (house / "install.sh").read_text()
    (wheel,) = (content for name, content in wheels_in(house).items() if name.startswith("fora_trt-"))
    names = zipfile.ZipFile(io.BytesIO(wheel)).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"fora_trt"}
    assert "fora_trt/models/digits/transformer/diffusion_pytorch_model.safetensors" in names
    assert "fora_trt/evaluate/digit_classifier.safetensors" in names
    assert "fora_trt/engines/onnxruntime/weighted_sum.c" in names
    assert "fora_trt/py.typed" in names

    done = install(house, sys.executable, tmp_path / "venv")
    assert done.returncode == 0, done.stderr
    assert "onnxruntime" in done.stdout and "onnxruntime is not installed" not in done.stdout
    without = ["-m", "pip", "uninstall", "--quiet", "--yes", "onnxruntime", "flatbuffers"]  # all that the extra brings
    binaries = tmp_path / "venv" / "bin"
    subprocess.run([binaries / "python", *without], check=True)
    shown = subprocess.run([binaries / "fora-trt", "doctor"], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "onnxruntime is not installed" in shown.stdout, "the package alone, without an extra"
    shutil.rmtree(tmp_path / "venv")  # more than a gigabyte, which pytest would keep
