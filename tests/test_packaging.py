import re
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]


def test_a_bare_import_loads_neither_torch_nor_onnx() -> None:
    code = "import sys, fora_trt; fora_trt.Schedule.fora(50, 3); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "fora_trt.schedule" in loaded
    assert not {"torch", "onnx", "onnxruntime", "diffusers", "numpy"} & set(loaded)


def test_the_image_is_built_from_files_that_exist_and_reach_it() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    copied = {word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]}
    admitted = {line.removeprefix("!/") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] == "!"}
    assert copied == admitted
    assert all((ROOT / name).exists() for name in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (extras,) = re.findall(r"^ARG EXTRAS=(.+)$", "\n".join(lines), re.MULTILINE)
    assert {*extras.split(",")} <= project["project"]["optional-dependencies"].keys()
    needed = {project["project"]["readme"], *project["project"]["license-files"], "pyproject.toml", "constraints.txt"}
    assert needed | {"fora_trt"} == copied


def test_the_files_of_the_source_distribution_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for pattern in project["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]:
        assert [*ROOT.glob(pattern.removeprefix("/"))], pattern


def test_every_constraint_is_one_version() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    for line in lines:
        if not line.startswith("#"):
            assert [one.operator for one in Requirement(line).specifier] == ["=="], line
