"""Write a bundle: trace a model, write its graphs into a folder, and check them against PyTorch."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from pydantic import ValidationError
from safetensors.torch import save_file

from fora_trt import __version__
from fora_trt.bundle import (
    CONSTANTS,
    FORMAT_VERSION,
    SCHEDULE,
    SCHEDULER,
    Bundle,
    GraphRecord,
    Manifest,
    ModelRecord,
    TrajectoryError,
    VariantRecord,
    problem_of_variant,
)
from fora_trt.contract import OPTIMIZATIONS, CacheSite, Optimization
from fora_trt.errors import BundleError, ExportError, ScheduleError
from fora_trt.export.check import GRAPH_TOLERANCE, Check, Measured
from fora_trt.export.graphs import Writer
from fora_trt.export.traced import TracedModel, check_opset, traced_from_model
from fora_trt.files import MANIFEST, record_of, sha256_of, staging, write_manifest
from fora_trt.masks import Masks
from fora_trt.models.spec import Model
from fora_trt.schedule import Schedule, reads_file


@dataclass(frozen=True)
class WrittenGraphs:
    """Graphs that were written to a bundle's folder: optimization level, records and files."""

    optimization: Optimization
    masks: Masks
    records: dict[str, GraphRecord]
    files: list[Path]


def bundle_from_model(
    model: Model,
    target: Path,
    *,
    check: Check,
    opset: int = 23,
    optimization: Optimization = OPTIMIZATIONS[-1],
    schedule: str | None = None,
    force: bool = False,
    report: Callable[[str], None] = lambda stage: None,
    measure: Callable[[Bundle], TrajectoryError | None] = lambda staged: None,
    variants: Iterable[tuple[tuple[float, float], Model]] = (),
) -> Bundle:
    """Split, trace, optimize, check and write `model` as the bundle `target`; the folder name is the bundle's name.

    `check` compares the graphs with PyTorch. `optimization` is the highest level to try; a lower level is used if the
    model does not support it, or if the optimized graphs exceed the tolerance; graphs that exceed it at every level are
    not written. `schedule` is the text form or the file of the schedule that is used where none is given; a file is
    copied into the bundle. `report` is called with the name of each stage as it begins. `measure` is called with the
    bundle in its temporary folder, before the manifest file is written; the manifest records the result. `variants` are
    networks for ranges of timesteps; each is loaded after the one before it is written, and becomes a bundle within
    this one. Raises `ExportError`, `ScheduleError` for a schedule that is not valid or not for this model, and the
    exceptions of `measure`; then `target` is unchanged.
    """
    check_opset(opset)
    if schedule is not None:  # raises early
        Schedule.of_any_length(schedule, [CacheSite(path, kind, ()) for path, kind in model.sites])
    with staging(target, force, "bundle", ExportError) as folder:
        traced = traced_from_model(model, opset, report)
        usual = None if schedule is None else Schedule.of_any_length(schedule, traced.sites)
        masks = {} if usual is None else usual.masks
        try:
            plain = _manifest(target.name, traced)
        except ValidationError as error:  # a name, a size or a value beyond a limit of the format
            reason = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise ExportError(f"the bundle {target} cannot be described: {reason}; correct the source") from error
        written, measured = _graphs_that_equal_pytorch(traced, plain, optimization, masks, folder, report, check)
        (folder / SCHEDULER).write_text(json.dumps(model.scheduler, indent=2) + "\n", encoding="utf-8")
        files = [*written.files, folder / SCHEDULER]
        if model.spec.constants:
            save_file({name: one.contiguous() for name, one in model.spec.constants.items()}, folder / CONSTANTS)
            files.append(folder / CONSTANTS)
        if usual is not None and schedule is not None and reads_file(schedule):
            usual.to_file(folder / SCHEDULE)
            files.append(folder / SCHEDULE)
        manifest = _with_graphs(plain, traced, written).model_copy(
            update={
                "schedule": SCHEDULE if folder / SCHEDULE in files else schedule,
                "files": {file.name: record_of(file) for file in files},
                "measured_error": measured.errors or None,
                "measured_on": measured.where,
            }
        )
        if usual is not None:
            _check_schedule(usual, manifest)
        write_manifest(folder, manifest)
        _check_that_it_opens(folder, target)
        del traced  # frees memory for `measure`, which loads the model again, and for the other networks
        for number, (timesteps, other) in enumerate(variants, 1):
            place = folder / f"{target.name}-variant-{number}"
            own = bundle_from_model(
                other, place, check=check, opset=opset, optimization=optimization, report=report
            )  # fmt: skip
            if problem := problem_of_variant(manifest, own.manifest):
                raise ExportError(f"the variant {other.options.source} {problem}")
            record = VariantRecord(folder=own.folder.name, timesteps=timesteps, sha256=sha256_of(own.folder / MANIFEST))
            manifest = manifest.model_copy(update={"variants": (*manifest.variants, record)})
        trajectory_error = measure(Bundle(folder, manifest, trust_source=True))
        manifest = manifest.model_copy(update={"trajectory_error": trajectory_error})
        write_manifest(folder, manifest)
    return Bundle(target, manifest, trust_source=True)  # a factory has just run, as the user asked


def _check_schedule(schedule: Schedule, manifest: Manifest) -> None:
    schedule.check_model(manifest.model.weights_sha256, manifest.model.options.source)
    if schedule.depth > 1 and not manifest.can_forecast:
        raise ScheduleError(
            f"{schedule.text} forecasts, but the full graph of {manifest.name} folds values that are not linear in the "
            "features; export it with --optimize conditioning, or give a schedule without a forecast"
        )
    if schedule.depth > 1 and schedule.masks and manifest.optimization != "fold":
        raise ScheduleError(
            f"{schedule.text} forecasts between partial steps, which needs folded sums, and the level of "
            f"{manifest.name} is {manifest.optimization}; export it with --optimize fold, or leave the forecast out"
        )


def _check_that_it_opens(folder: Path, target: Path) -> None:
    """Raise `ExportError` for a bundle that `Bundle.open` refuses, such as one with an operator that is not allowed."""
    try:
        Bundle.open(folder)
    except BundleError as error:
        reason = str(error).replace(str(folder), str(target)).partition("; export it again")[0]
        raise ExportError(f"the bundle could not be opened again, so it was not written: {reason}") from error


def _graphs_that_equal_pytorch(
    traced: TracedModel,
    plain: Manifest,
    level: Optimization,
    masks: Masks,
    folder: Path,
    report: Callable[[str], None],
    check: Check,
) -> tuple[WrittenGraphs, Measured]:
    """Write the graphs at a level, or at the next lower level while the error exceeds the tolerance.

    Raises `ExportError` if it exceeds the tolerance at the lowest level too.
    """
    model = traced.model
    written = _written(traced, level, masks, folder, report)
    staged = Bundle(folder, _with_graphs(plain, traced, written), trust_source=True)
    report("measuring the graphs against PyTorch")
    measured = check.measure(model, staged)
    if (graph := measured.wrong(model.precision)) is None:
        return written, measured
    error = measured.errors[graph].relative
    if written.optimization == "none":
        raise ExportError(
            f"{plain.name} is not written: its {graph} graph differs from PyTorch by {error:.1e} of the largest value "
            f"on {measured.where}, and the tolerance in {model.precision} is {GRAPH_TOLERANCE[model.precision]:.0e}; "
            f"{check.locate(model, staged, graph)}"
        )
    lower = OPTIMIZATIONS[OPTIMIZATIONS.index(written.optimization) - 1]
    report(f"the optimized graphs differ from PyTorch by {error:.1e}; trying {lower} instead")
    for file in written.files:
        file.unlink()
    return _graphs_that_equal_pytorch(traced, plain, lower, masks, folder, report, check)


def _written(
    traced: TracedModel, level: Optimization, masks: Masks, folder: Path, report: Callable[[str], None]
) -> WrittenGraphs:
    if level != "none":
        report(f"optimizing the graphs to level {level}")
    made = traced.graphs(level, masks)
    if made.optimization != level:
        report(f"{traced.model.spec.architecture} supports --optimize {made.optimization} at most")
    report("writing the graphs")
    writer = Writer(folder)
    files = [file for name, graph in made.graphs.items() for file in writer.save(graph, f"{name}.onnx")]
    records = {
        name: GraphRecord(file=f"{name}.onnx", inputs=graph.inputs, outputs=graph.outputs)
        for name, graph in made.graphs.items()
    }
    made.graphs.clear()
    gc.collect()  # reference cycles of the exporter keep weights in memory
    return WrittenGraphs(made.optimization, masks, records, files)


def _manifest(name: str, traced: TracedModel) -> Manifest:
    """The part of the manifest that does not depend on the graphs."""
    model = traced.model
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
        optimization="none",
        inputs=model.spec.inputs,
        graphs={},
        cache_sites=traced.sites,
        latents=model.latents,
        conditioning=dict(model.spec.conditioning),
        guidance=model.spec.guidance,
        guidance_scale=model.guidance_scale,
        text=model.spec.text,
        pipeline=model.spec.pipeline,
        files={},
        measured_error=None,
    )


def _with_graphs(plain: Manifest, traced: TracedModel, written: WrittenGraphs) -> Manifest:
    read = {tensor.name for record in written.records.values() for tensor in record.inputs}
    inputs = tuple(tensor for tensor in traced.model.spec.inputs if tensor.name in read)
    graphs = {"optimization": written.optimization, "graphs": written.records, "partial_graphs": dict(written.masks)}
    return plain.model_copy(update={**graphs, "inputs": inputs})


def weights_digest(module: torch.nn.Module, dtypes: Mapping[str, torch.dtype] | None = None) -> str:
    """SHA-256 over name, dtype, shape and bytes of every parameter, cast to `dtypes`; a shared one counts once."""
    digest = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters()):
        cast = parameter.detach().to(dtypes[name] if dtypes else parameter.dtype)
        digest.update(f"{name} {cast.dtype} {tuple(cast.shape)}\n".encode())
        digest.update(cast.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
