"""Export in one call: a source by name, or a diffusers pipeline that is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import ValidationError

from fora_trt.bundle import Bundle, TrajectoryError
from fora_trt.contract import OPTIMIZATIONS, PRECISIONS, Optimization
from fora_trt.engines.memory import free_bytes, gibibytes
from fora_trt.errors import ExportError, ModelError
from fora_trt.evaluate.export_check import GraphCheck
from fora_trt.export.write import bundle_from_model
from fora_trt.files import refuse_existing
from fora_trt.models.assembly import model_from_empty
from fora_trt.models.options import SourceOptions
from fora_trt.models.pipelines import empty_from_pipeline
from fora_trt.models.sources import model_from_source
from fora_trt.models.spec import Model
from fora_trt.sampling.scheduler_step import check_scheduler
from fora_trt.untrusted import name_problem, shown

DEFAULT_OPSET = 23

LARGE = 5 * 10**8
"""Number of parameters from which an export says beforehand what it needs."""

MEMORY = 2.5
"""Most memory that an export takes, as a multiple of its weights; 2.2 was measured on DiT-XL/2."""


class Measure(Protocol):
    """Returns the trajectory error of a bundle in a temporary folder that will be written to `target`."""

    def __call__(self, staged: Bundle, target: Path) -> TrajectoryError | None: ...


def export(
    source: Any,
    target: str | Path | None = None,
    *,
    precision: str = "fp32",
    cache: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    optimize: Optimization = OPTIMIZATIONS[-1],
    schedule: str | None = None,
    component: str | None = None,
    opset: int = DEFAULT_OPSET,
    force: bool = False,
    report: Callable[[str], None] = lambda stage: None,
    **arguments: Any,
) -> Bundle:
    """Export a source as a bundle in the folder `target`, by default `export/NAME`.

    `source` is what `fora-trt export` takes, or a diffusers pipeline in memory: then the transformer that is loaded is
    exported, with all changes to its weights. `cache` and `exclude` list kinds of cache sites or patterns over module
    paths. `arguments` are those of a call of the pipeline with one prompt (`height=1024`, `prompt_embeds=...`), or for
    a name the options of the source (`image_size=(1024, 1024)`).

    A pipeline with several transformers becomes several bundles; the others have the name of their component at the end
    (`wan-transformer_2`), and the result is the bundle of the first. `component` selects one. The pipeline itself does
    not change. Raises `ModelError` for a source that cannot be exported, `ExportError` for graphs that are not written.
    """
    sites = {name: None if one is None else tuple(one) for name, one in (("cache", cache), ("exclude", exclude))}
    if isinstance(source, str | Path):
        models = _models_of_name(source, precision, component, {**arguments, **sites})
    else:
        models = _models_of_pipeline(source, precision, component, arguments, sites)
    return export_models(models, target, component, opset, optimize, schedule, force, report)[0]


def export_models(
    models: Iterable[Model],
    target: str | Path | None,
    component: str | None,
    opset: int,
    optimize: Optimization,
    schedule: str | None,
    force: bool,
    report: Callable[[str], None],
    measure: Measure = lambda staged, target: None,
) -> list[Bundle]:
    """Write the models of one source, the first as the bundle `target` and those of other transformers beside it.

    `component` is the one transformer that was selected. `measure` is called with each bundle.
    """
    written: list[Bundle] = []
    for model in models:
        first = Path("export") / model.name if target is None else Path(target)
        if problem := name_problem(first.name):
            raise ExportError(f"'{shown(first.name)}' is not a name for a bundle: it {problem}")
        pipeline, folders = model.spec.pipeline, [first]
        if component is None and pipeline is not None:
            folders = [first.with_name(name) for name in pipeline.bundles(first.name).values()]
            folders = folders[pipeline.components.index(pipeline.call.component) :]
        for folder in folders:  # those of the other transformers too, before the work on the first
            refuse_existing(folder, force, "bundle", ExportError)
        if pipeline is None:
            check_scheduler(model.scheduler, model.latents.learned_sigma)
        if (size := _size_in_words(model)) is not None:
            report(size)
        if model.options.variants and pipeline is not None:
            raise ModelError("variants are for networks without a pipeline of their own; export the pipeline alone")
        bundle = bundle_from_model(
            model,
            folders[0],
            check=GraphCheck(),
            opset=opset,
            optimization=optimize,
            schedule=schedule,
            force=force,
            report=report,
            measure=partial(measure, target=folders[0]),
            variants=_variants_of(model, report),
        )
        written.append(bundle)
    return written


def _variants_of(model: Model, report: Callable[[str], None]) -> Iterator[tuple[tuple[float, float], Model]]:
    """The networks for some timesteps, each loaded when it is asked for."""
    for one in model.options.variants:
        report(f"loading {one.source} for the timesteps {one.timesteps[0]:g} to {one.timesteps[1]:g}")
        yield one.timesteps, model_from_source(model.options.of_variant(one), model.precision)


def _size_in_words(model: Model) -> str | None:
    """What the export of a large model needs; None for a small one."""
    parameters = [*model.module.parameters()]
    count = sum(one.numel() for one in parameters)
    if count < LARGE:
        return None
    stored = sum(one.nbytes for one in parameters)
    needed, free = MEMORY * stored, free_bytes(torch.device("cpu"))
    doubt = "" if needed <= free else f", and only {gibibytes(free)} are free"
    return (
        f"{count / 1e9:.1f} billion parameters: {gibibytes(stored)} on disk, at most about {gibibytes(needed)} of "
        f"memory{doubt}"
    )


def _models_of_name(
    source: str | Path, precision: str, component: str | None, given: dict[str, Any]
) -> Iterator[Model]:
    """The models of a source by name: that of each transformer of a pipeline."""
    try:
        options = SourceOptions(source=str(source), component=component, **given)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ModelError(
            f"the option {key!r} of the source is not valid: {first['msg']}; the options are "
            f"{', '.join(SourceOptions.model_fields)}"
        ) from error
    yield from models_of_options(options, precision)


def models_of_options(options: SourceOptions, precision: str) -> Iterator[Model]:
    """The models of a source: that of each transformer of a pipeline, one after the other."""
    model = model_from_source(options, precision)
    yield model
    pipeline = model.spec.pipeline
    for other in pipeline.components if pipeline is not None and options.component is None else ():
        if other != model.spec.pipeline.call.component:  # type: ignore[union-attr]
            yield model_from_source(options.model_copy(update={"component": other}), precision)


def _models_of_pipeline(
    pipe: Any, precision: str, component: str | None, given: dict[str, Any], sites: dict[str, Any]
) -> Iterator[Model]:
    """The models of a pipeline in memory."""
    if precision not in PRECISIONS:
        raise ModelError(f"the precision is {precision!r}; choose one of {', '.join(PRECISIONS)}")
    if not hasattr(pipe, "components") or not hasattr(pipe, "scheduler"):
        raise ModelError(
            f"the source is an object of type {type(pipe).__name__}; give a diffusers pipeline, or the name of a source"
        )
    waiting = [component]
    while waiting:
        empty = empty_from_pipeline(pipe, waiting.pop(0), given)
        options = SourceOptions(source=f"{empty.name} in memory", component=component, **sites)
        model = model_from_empty(empty, options, precision)
        yield model
        pipeline = model.spec.pipeline
        if component is None and pipeline is not None and pipeline.call.component == pipeline.components[0]:
            waiting += pipeline.components[1:]
