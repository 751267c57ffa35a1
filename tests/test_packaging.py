import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_a_bare_import_loads_neither_torch_nor_onnx() -> None:
    code = "import sys, fora_trt; fora_trt.Schedule.fora(50, 3); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "fora_trt.schedule" in loaded
    assert not {"torch", "onnx", "onnxruntime", "diffusers", "numpy"} & set(loaded)


@pytest.mark.slow
def test_the_wheel_holds_the_package_alone_and_works_in_an_empty_environment(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"fora_trt"}
    assert "fora_trt/models/digits/transformer/diffusion_pytorch_model.safetensors" in names
    assert "fora_trt/evaluate/digit_classifier.safetensors" in names
    assert "fora_trt/engines/onnxruntime/weighted_sum.c" in names
    assert "fora_trt/py.typed" in names

    python = tmp_path / "environment" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "environment")], check=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--constraint", str(ROOT / "constraints.txt")]
    subprocess.run([*pip, "--no-compile", str(wheel)], check=True)
    doctor = [str(python.parent / "fora-trt"), "doctor"]
    shown = subprocess.run(doctor, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert "onnxruntime is not installed" in shown
