"""Write a bundle: split a model, trace it twice, measure the graphs, and put all of it in one folder."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import onnx
import torch

from fora_trt import __version__
from fora_trt.bundle import FORMAT_VERSION, SCHEDULER, Bundle, GraphError, GraphRecord, Manifest, ModelRecord
from fora_trt.errors import ExportError
from fora_trt.export.check import is_rounding, measure_errors
from fora_trt.export.graphs import Graph, Graphs, graphs_from_model, save_graph
from fora_trt.folders import record_of, staging, write_manifest
from fora_trt.models.spec import OPTIMIZATIONS, Model


def bundle_from_model(
    model: Model,
    target: Path,
    *,
    opset: int = 23,
    optimization: str = OPTIMIZATIONS[-1],
    force: bool = False,
    report: Callable[[str], None] = lambda stage: None,
) -> Bundle:
    """Split, trace, optimize, measure and write `model` as the bundle `target`, whose name is the folder's.

    `optimization` is the highest of `OPTIMIZATIONS` that is wanted; a lower one is taken where the model does not
    admit it, or where its graphs do not equal PyTorch within rounding. `report` is told each stage as it begins.
    Raises `ExportError`; then `target` is as it was.
    """
    with staging(target, force, "bundle", ExportError) as folder:
        weights = weights_digest(model.module)
        while True:
            made, records, written, errors = _write_graphs(model, opset, optimization, folder, report)
            if made.optimization == "none" or errors is None or is_rounding(errors, model.precision):
                break
            optimization = OPTIMIZATIONS[OPTIMIZATIONS.index(made.optimization) - 1]
            worst = max(error.relative for error in errors.values())
            report(f"the optimized graphs differ from PyTorch by {worst:.1e}; trying {optimization} instead")
            for file in written:
                file.unlink()
        (folder / SCHEDULER).write_text(json.dumps(model.scheduler, indent=2) + "\n", encoding="utf-8")
        read = {tensor.name for record in records.values() for tensor in record.inputs}
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            name=target.name,
            versions={"fora_trt": __version__, "torch": torch.__version__, "onnx": onnx.__version__},
            model=ModelRecord(
                options=model.options,
                architecture=model.spec.architecture,
                config=model.config,
                weights_sha256=weights,
                vae=model.vae,
                image_size=model.image_size,
            ),
            precision=model.precision,
            opset=opset,
            optimization=made.optimization,
            inputs=tuple(tensor for tensor in model.spec.inputs if tensor.name in read),
            graphs=records,
            cache_sites=tuple(made.sites),
            latents=model.latents,
            conditioning=dict(model.spec.conditioning),
            guidance=model.spec.guidance,
            text=model.spec.text,
            files={file.name: record_of(file) for file in (*written, folder / SCHEDULER)},
            measured_error=errors,
        )
        write_manifest(folder, manifest)
    return Bundle(target, manifest)


def _write_graphs(
    model: Model, opset: int, optimization: str, folder: Path, report: Callable[[str], None]
) -> tuple[Graphs, dict[str, GraphRecord], list[Path], dict[str, GraphError] | None]:
    """The graphs, without their weights, their records and files, and their errors."""
    made = graphs_from_model(model, opset, optimization, report)
    if made.optimization != optimization:
        report(f"{model.spec.architecture} admits no more than --optimize {made.optimization}")
    report("writing the graphs")
    written = [file for name, graph in made.graphs.items() for file in save_graph(graph, folder / f"{name}.onnx")]
    records = {name: _record_of_graph(name, graph) for name, graph in made.graphs.items()}
    made.graphs.clear()
    gc.collect()  # the exporter leaves cycles that keep the weights in memory
    report("measuring the graphs against PyTorch")
    paths = {name: folder / record.file for name, record in records.items()}
    return made, records, written, measure_errors(model, made.sites, paths)


def _record_of_graph(name: str, graph: Graph) -> GraphRecord:
    return GraphRecord(file=f"{name}.onnx", inputs=graph.inputs, outputs=graph.outputs)


def weights_digest(module: torch.nn.Module) -> str:
    """SHA-256 over name, dtype, shape and bytes of every parameter; shared ones count once."""
    digest = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters()):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
        digest.update(parameter.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
