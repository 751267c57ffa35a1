import subprocess
import sys


def test_a_bare_import_loads_neither_torch_nor_onnx() -> None:
    code = "import sys, fora_trt; fora_trt.Schedule.fora(50, 3); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "fora_trt.schedule" in loaded
    assert not {"torch", "onnx", "onnxruntime", "diffusers", "numpy"} & set(loaded)
