"""Write a bundle: trace a model, write its graphs into a folder, and measure their errors against PyTorch."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from pydantic import ValidationError

from fora_trt import __version__
from fora_trt.bundle import (
    FORMAT_VERSION,
    SCHEDULE,
    SCHEDULER,
    Bundle,
    GraphError,
    GraphRecord,
    Manifest,
    ModelRecord,
    TrajectoryError,
)
from fora_trt.contract import OPTIMIZATIONS, Optimization
from fora_trt.errors import BundleError, ExportError, ScheduleError
from fora_trt.export.check import is_rounding, measure_errors
from fora_trt.export.graphs import save_graph
from fora_trt.export.traced import TracedModel, check_opset, traced_from_model
from fora_trt.files import record_of, staging, write_manifest
from fora_trt.models.spec import Model
from fora_trt.schedule import OPEN_STEPS, Schedule, is_file


@dataclass(frozen=True)
class WrittenGraphs:
    """Graphs that were written to a bundle's folder: optimization level, records, files and errors against PyTorch."""

    optimization: Optimization
    records: dict[str, GraphRecord]
    files: list[Path]
    errors: dict[str, GraphError] | None


def bundle_from_model(
    model: Model,
    target: Path,
    *,
    opset: int = 23,
    optimization: Optimization = OPTIMIZATIONS[-1],
    schedule: str | None = None,
    force: bool = False,
    report: Callable[[str], None] = lambda stage: None,
    measure: Callable[[Bundle], TrajectoryError | None] = lambda staged: None,
) -> Bundle:
    """Split, trace, optimize, measure and write `model` as the bundle `target`; the folder name is the bundle's name.

    `optimization` is the highest level to try; a lower level is used if the model does not support it, or if the
    optimized graphs exceed the tolerance against PyTorch. `schedule` is the text form or the file of the schedule that
    is used where none is given; a file is copied into the bundle. `report` is called with the name of each stage as it
    begins. `measure` is called with the bundle in its temporary folder, before the manifest file is written; the
    manifest records the result. Raises `ExportError`, `ScheduleError` for a schedule that is not valid or not for this
    model, and the exceptions of `measure`; then `target` is unchanged.
    """
    check_opset(opset)
    usual = None if schedule is None else _read(schedule)
    with staging(target, force, "bundle", ExportError) as folder:
        traced = traced_from_model(model, opset, report)
        written = _graphs_that_equal_pytorch(traced, optimization, folder, report)
        (folder / SCHEDULER).write_text(json.dumps(model.scheduler, indent=2) + "\n", encoding="utf-8")
        files = [*written.files, folder / SCHEDULER]
        if usual is not None and schedule is not None and is_file(schedule):
            usual.to_file(folder / SCHEDULE)
            files.append(folder / SCHEDULE)
        used = SCHEDULE if folder / SCHEDULE in files else schedule
        try:
            manifest = _manifest(target.name, traced, written, files, used)
        except ValidationError as error:  # a name, a size or a value beyond a limit of the format
            reason = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise ExportError(f"the bundle {target} cannot be described: {reason}; correct the source") from error
        if usual is not None:
            _check_schedule(usual, manifest)
        write_manifest(folder, manifest)
        _check_that_it_opens(folder, target)
        del traced  # frees memory for `measure`, which loads the model again
        measured = measure(Bundle(folder, manifest, trust_source=True))
        manifest = manifest.model_copy(update={"trajectory_error": measured})
        write_manifest(folder, manifest)
    return Bundle(target, manifest, trust_source=True)  # a factory has just run, as the user asked


def _read(schedule: str) -> Schedule:
    """The schedule of a file, or of a text form for any large number of steps. Raises `ScheduleError`."""
    return Schedule.from_file(schedule) if is_file(schedule) else Schedule.from_text(schedule, OPEN_STEPS)


def _check_schedule(schedule: Schedule, manifest: Manifest) -> None:
    schedule.check_model(manifest.model.weights_sha256, manifest.model.options.source)
    if schedule.depth > 1 and not manifest.can_forecast:
        raise ScheduleError(
            f"{schedule.text} forecasts, but the full graph of {manifest.name} folds values that are not linear in the "
            "features; export it with --optimize conditioning, or give a schedule without a forecast"
        )


def _check_that_it_opens(folder: Path, target: Path) -> None:
    """Raise `ExportError` for a bundle that `Bundle.open` refuses, such as one with an operator that is not allowed."""
    try:
        Bundle.open(folder)
    except BundleError as error:
        reason = str(error).replace(str(folder), str(target)).partition("; export it again")[0]
        raise ExportError(f"the bundle could not be opened again, so it was not written: {reason}") from error


def _graphs_that_equal_pytorch(
    traced: TracedModel, level: Optimization, folder: Path, report: Callable[[str], None]
) -> WrittenGraphs:
    """Write the graphs at a level, or at the next lower level while the error exceeds the tolerance."""
    written = _written(traced, level, folder, report)
    errors = written.errors
    if written.optimization == "none" or errors is None or is_rounding(errors, traced.model.precision):
        return written
    lower = OPTIMIZATIONS[OPTIMIZATIONS.index(written.optimization) - 1]
    worst = max(error.relative for error in errors.values())
    report(f"the optimized graphs differ from PyTorch by {worst:.1e}; trying {lower} instead")
    for file in written.files:
        file.unlink()
    return _graphs_that_equal_pytorch(traced, lower, folder, report)


def _written(traced: TracedModel, level: Optimization, folder: Path, report: Callable[[str], None]) -> WrittenGraphs:
    model = traced.model
    if level != "none":
        report(f"optimizing the graphs to level {level}")
    made = traced.graphs(level)
    if made.optimization != level:
        report(f"{model.spec.architecture} supports --optimize {made.optimization} at most")
    report("writing the graphs")
    files = [file for name, graph in made.graphs.items() for file in save_graph(graph, folder / f"{name}.onnx")]
    records = {
        name: GraphRecord(file=f"{name}.onnx", inputs=graph.inputs, outputs=graph.outputs)
        for name, graph in made.graphs.items()
    }
    made.graphs.clear()
    gc.collect()  # reference cycles of the exporter keep weights in memory
    report("measuring the graphs against PyTorch")
    return WrittenGraphs(made.optimization, records, files, measure_errors(model, traced.sites, folder, records))


def _manifest(
    name: str, traced: TracedModel, written: WrittenGraphs, files: list[Path], schedule: str | None
) -> Manifest:
    model = traced.model
    read = {tensor.name for record in written.records.values() for tensor in record.inputs}
    return Manifest(
        format_version=FORMAT_VERSION,
        name=name,
        versions={"fora_trt": __version__, "torch": torch.__version__, "onnx": onnx.__version__},
        model=ModelRecord(
            options=model.options,
            architecture=model.spec.architecture,
            config=model.config,
            weights_sha256=weights_digest(model.module),
            vae=model.vae,
            image_size=model.image_size,
        ),
        precision=model.precision,
        opset=traced.opset,
        optimization=written.optimization,
        inputs=tuple(tensor for tensor in model.spec.inputs if tensor.name in read),
        graphs=written.records,
        cache_sites=traced.sites,
        latents=model.latents,
        conditioning=dict(model.spec.conditioning),
        guidance=model.spec.guidance,
        guidance_scale=model.guidance_scale,
        text=model.spec.text,
        schedule=schedule,
        files={file.name: record_of(file) for file in files},
        measured_error=written.errors,
    )


def weights_digest(module: torch.nn.Module, dtypes: Mapping[str, torch.dtype] | None = None) -> str:
    """SHA-256 over name, dtype, shape and bytes of every parameter, cast to `dtypes`; a shared one counts once."""
    digest = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters()):
        cast = parameter.detach().to(dtypes[name] if dtypes else parameter.dtype)
        digest.update(f"{name} {cast.dtype} {tuple(cast.shape)}\n".encode())
        digest.update(cast.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
