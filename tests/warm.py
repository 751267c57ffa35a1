"""What the server of `tests.processes` does once and not in each command: imports, and the trace of a small model."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from fora_trt.models.sources import model_from_source
from tests.conftest import save_pixels
from tests.shared import traced_once

for name in ("fora_trt.cli", "fora_trt.evaluate.bench", "fora_trt.evaluate.quality", "fora_trt.evaluate.export_check"):
    import_module(name)
for name in ("onnxruntime", "matplotlib.pyplot", "torchmetrics"):
    import_module(name)
torch.set_num_threads(1)  # threads are not forked
with TemporaryDirectory() as folder:
    save_pixels(Path(folder))
    traced_once(model_from_source(folder))
