"""The bundle, a folder of exported graphs: its format and its reader. `export/write.py` writes it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import onnx_ir as ir
from pydantic import AfterValidator, Field, PositiveInt, model_validator
from safetensors import safe_open

from fora_trt.call import PipelineSpec, problems_of
from fora_trt.contract import (
    CONDITIONING,
    FEATURE,
    FULL,
    FULL_CONDITIONING,
    LATENTS,
    NOISE_PREDICTION,
    REUSE,
    CacheSite,
    GuidanceSpec,
    InputSpec,
    LatentSpec,
    Optimization,
    Part,
    Role,
    TensorSpec,
    TextSpec,
    has_fewer_channels,
    in_window,
    out_of_window,
    partial_name,
)
from fora_trt.errors import BundleError, InputError, ScheduleError, first_line
from fora_trt.files import (
    MANIFEST,
    FileRecord,
    Record,
    check_files,
    clear_unfinished,
    read_manifest,
    record_of,
    sha256_of,
    staging,
    write_manifest,
)
from fora_trt.graph_check import check_graph, dtype_of, edge_problem
from fora_trt.models.options import SourceOptions, problem_of_ranges
from fora_trt.schedule import OPEN_STEPS, Schedule, reads_file
from fora_trt.untrusted import checked, in_command, name_problem, read_json, shown

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_VERSION = 8
SCHEDULER = "scheduler_config.json"
SCHEDULE = "schedule.json"
"""File of the schedule that is used where none is given, if it was a file at export."""

CONSTANTS = "constants.safetensors"
"""File of the tensors that a pipeline gives its transformer in every call, if the bundle was exported from one."""

GRAPHS = {FULL, REUSE, CONDITIONING, FULL_CONDITIONING}
PlainName = Annotated[str, AfterValidator(checked(name_problem))]
"""The name of one file or folder: a path would leave the folder."""

MOST_TIMESTEPS = 100_000
"""Largest number in the configuration of a scheduler, whose tables have an entry for each timestep of the training."""

MOST_PIXELS, MOST_TOKENS, MOST_CLASSES = 2**16, 2**16, 2**31
"""Largest image side, prompt length and number of classes in a manifest."""


@dataclass(frozen=True)
class GraphError:
    """Largest absolute difference from PyTorch, and this difference divided by PyTorch's largest absolute value."""

    maximum: float
    relative: float

    @classmethod
    def between(cls, measured: Tensor, reference: Tensor) -> GraphError:
        """The error of `measured`; infinite if a value is NaN or infinite."""
        difference = (measured.double() - reference.double()).abs().max().item()
        largest = reference.double().abs().max().item()
        finite = difference == difference
        if not finite:
            return cls(float("inf"), float("inf"))
        return cls(difference, difference / largest if largest else (0.0 if difference == 0 else float("inf")))


@dataclass(frozen=True)
class TrajectoryError:
    """Error of whole trajectories on `backend` against PyTorch in fp32, one entry per schedule.

    The keys are schedules as the command line spells them: `none` without caching, `fora:3` for cache interval 3.
    """

    steps: int
    backend: str
    errors: dict[str, GraphError]


class ModelRecord(Record):
    """Where the weights came from and how to load them again; `weights_sha256` covers every tensor as traced."""

    options: SourceOptions
    architecture: str
    config: dict[str, Any]
    weights_sha256: str
    vae: Part | None
    image_size: tuple[PositiveInt, PositiveInt] | None


class GraphRecord(Record):
    """An ONNX file with its inputs and outputs."""

    file: PlainName
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class VariantRecord(Record):
    """Another network for some timesteps: a bundle in a folder of this one, by the digest of its manifest file.

    It runs the steps whose timestep is at least `timesteps[0]` and less than `timesteps[1]`.
    """

    folder: PlainName
    timesteps: tuple[float, float]
    sha256: str


class Manifest(Record):
    """The content of a bundle's `manifest.json`; `export/README.md` explains each field."""

    format_version: int
    name: PlainName
    versions: dict[str, str]
    model: ModelRecord
    precision: Literal["fp32", "fp16", "bf16"]
    opset: int
    optimization: Optimization
    inputs: tuple[TensorSpec, ...]
    graphs: dict[str, GraphRecord]
    cache_sites: tuple[CacheSite, ...]
    latents: LatentSpec
    conditioning: dict[str, InputSpec]
    guidance: GuidanceSpec | None
    guidance_scale: float
    text: TextSpec | None
    pipeline: PipelineSpec | None = None
    schedule: str | None = None
    partial_graphs: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    variants: tuple[VariantRecord, ...] = ()
    files: dict[str, FileRecord]
    measured_error: dict[str, GraphError] | None
    measured_on: str | None = None
    trajectory_error: TrajectoryError | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        if problem := next(_problems(self), None):
            raise ValueError(problem)
        return self

    def export_command(self, schedule: str | None = None, **other: Any) -> str:
        """How to export the bundle again, for messages; what the manifest says is quoted for a shell.

        `schedule` replaces the text form of the bundle's schedule, `other` are options of the source that differ.
        """
        name = in_command(self.name)
        if self.pipeline is not None and self.pipeline.where is None:
            asked = "" if schedule is None else f", schedule={shown(schedule)!r}"
            return f"fora_trt.export(pipe, {shown(self.name)!r}{asked}, force=True) in Python"
        options = self.model.options.model_copy(update=other)
        if options.inputs is not None or options.variants:
            return f"fora-trt export RECIPE.toml --name {name} --force"
        precision = () if self.precision == "fp32" else ("--precision", self.precision)
        usual = schedule or ("FILE" if self.schedule == SCHEDULE else self.schedule)
        named = () if usual is None else ("--schedule", in_command(usual))
        source = map(in_command, options.words())
        words = [in_command(options.source), "--name", name, *precision, *source, *named, "--force"]
        return " ".join(["fora-trt export", *words])

    def features(self) -> list[TensorSpec]:
        """The features of all cache sites, in the order of the sites."""
        return [feature for site in self.cache_sites for feature in site.features]

    @property
    def can_forecast(self) -> bool:
        """Whether reuse steps can read a weighted sum over several full steps: all folded values must be linear."""
        return all(one.role != "function" for one in self.graphs[REUSE].inputs)

    @property
    def denoises_all_latents(self) -> bool:
        """Whether the prediction has the channels of the latents; if it has fewer, some of the input are no noise."""
        return not has_fewer_channels(self.graphs[FULL].outputs[0].shape[1:], self.latents.shape)

    def check_graphs(self, names: Collection[str], schedule: str = "SCHEDULE") -> None:
        """Raise `ScheduleError` unless the bundle has these graphs, which a schedule needs."""
        if lacking := {*names} - self.graphs.keys():
            kinds = "a kind of partial step" if len(lacking) == 1 else f"{len(lacking)} kinds of partial steps"
            raise ScheduleError(
                f"the schedule has {kinds} without a graph in {self.name}; export it with the schedule: "
                f"{self.export_command(schedule)}"
            )

    def check_one_network(self, what: str) -> None:
        """Raise `InputError` if the bundle has variants, for what takes bundles of one network only."""
        if self.variants:
            raise InputError(
                f"{self.name} has other networks for some timesteps, which {what} does not take; run, sample, quality "
                f"and verify do, and {what} takes the bundle of each: {', '.join(one.folder for one in self.variants)}"
            )

    def unfed(self) -> list[str]:
        """Names of graph inputs that neither the model's inputs nor the outputs of an earlier graph provide."""
        provided, unfed = {*self.inputs}, []
        for name in (CONDITIONING, FULL_CONDITIONING, FULL, *self.partial_graphs, REUSE):
            graph = self.graphs.get(name)
            if graph is None:
                continue
            unfed += [one.name for one in graph.inputs if one not in provided]
            provided.update(graph.outputs)
            if name == CONDITIONING:
                provided.update(in_window(one) for one in graph.outputs)
            provided.update(out_of_window(one) for one in graph.outputs if one.is_of_window)
        return unfed


@dataclass(frozen=True)
class Bundle:
    """A bundle. `open` checks every file against the manifest, `read` reads the manifest alone.

    With `trust_source`, a factory that the manifest names as the source may be called: code of this machine.
    """

    folder: Path
    manifest: Manifest
    trust_source: bool = field(default=False, compare=False)

    @classmethod
    def open(cls, folder: str | Path, trust_source: bool = False) -> Bundle:
        """Read and check a bundle: manifest, size and SHA-256 of every file, links, operators, external data.

        Raises `BundleError` that names the first problem and the command that repairs it.
        """
        bundle = cls.read(folder, trust_source)
        bundle.check()
        return bundle

    @classmethod
    def read(cls, folder: str | Path, trust_source: bool = False) -> Bundle:
        """Read and check the manifest alone. Raises `BundleError`."""
        folder = Path(folder)
        try:
            if not (known := _has_manifest(folder)):
                clear_unfinished(folder.parent)  # puts a bundle back whose replacement was killed
                known = _has_manifest(folder)
        except OSError as error:  # such as a name that is too long
            raise BundleError(f"{folder} cannot be read ({error.strerror}); give the folder of a bundle") from error
        if not known:
            raise BundleError(f"{folder} is not a bundle: it contains no {MANIFEST}; {_meant(folder)}")
        mend = "export the bundle again"
        manifest = read_manifest(folder, Manifest, FORMAT_VERSION, "bundle", mend, BundleError)
        return cls(folder, manifest, trust_source)

    def check(self) -> None:
        """Raise `BundleError` unless every file matches the manifest."""
        folder, manifest = self.folder, self.manifest
        mend = self._mend
        check_files(folder, manifest.files, mend, BundleError)
        if absent := sorted({FULL, REUSE} - manifest.graphs.keys()):
            raise BundleError(f"the manifest of {folder} lists no {absent[0]} graph; {mend}")
        named = all(
            feature.name == f"{FEATURE}{site.module}" or feature.name.startswith(f"{FEATURE}{site.module}.")
            for site in manifest.cache_sites
            for feature in site.features
        )
        features = tuple(one for one in manifest.graphs[FULL].outputs if one.role == "feature")
        folds = manifest.optimization == "fold"  # the full graph then outputs only features that the reuse graph reads
        if not named or features != tuple(one for one in manifest.features() if one in features or not folds):
            raise BundleError(
                f"the cache sites in the manifest of {folder} do not match the outputs of its full graph; {mend}"
            )
        if unfed := manifest.unfed():
            raise BundleError(f"a graph in {folder} reads '{shown(unfed[0])}', which no other graph provides; {mend}")
        schedule = {SCHEDULE} if manifest.schedule == SCHEDULE else set()
        constants = {CONSTANTS} if self._constant_names else set()
        needed = {SCHEDULER, *schedule, *constants, *(graph.file for graph in manifest.graphs.values())}
        if missing := sorted(needed - manifest.files.keys()):
            raise BundleError(f"the manifest of {folder} does not list {missing[0]}; {mend}")
        sizes = {name: record.size for name, record in manifest.files.items()}
        for graph in manifest.graphs.values():
            path = folder / graph.file
            try:
                check_graph(path, graph.inputs, graph.outputs, sizes)
            except ValueError as error:
                raise BundleError(f"{path} {error}; {mend}") from error
        if manifest.schedule is not None:
            _check_schedule(folder, manifest, mend)
        self._check_constants()
        self._check_variants()
        self.scheduler_config  # noqa: B018 # raises for a file that is no configuration

    def graph_path(self, name: str) -> Path:
        """The ONNX file of a graph, by the name that the manifest gives it."""
        return self.folder / self.manifest.graphs[name].file

    @property
    def schedule(self) -> str | None:
        """The schedule that is used where none is given: a text form or a file; None for the usual one."""
        named = self.manifest.schedule
        return str(self.folder / SCHEDULE) if named == SCHEDULE else named

    @property
    def scheduled_steps(self) -> int | None:
        """The number of steps of the schedule file in the bundle; None without one: text forms fit any number."""
        return Schedule.from_file(self.folder / SCHEDULE).steps if self.manifest.schedule == SCHEDULE else None

    def copy(
        self, target: Path, schedule: Schedule | str | None = None, config: Mapping[str, Any] | None = None
    ) -> None:
        """Write the bundle to another folder, with another schedule and the `config.json` of a transformer beside it.

        Without a schedule all files stay as they are. Raises `InputError` if the folder holds anything but a bundle,
        `ScheduleError` for a schedule whose graphs the bundle lacks.
        """
        if target.exists() and not _has_manifest(target):
            raise InputError(f"{target} exists and is not a bundle, so it is not replaced; choose a new folder")
        with staging(target, True, "bundle", InputError) as folder:
            files = {name: one for name, one in self.manifest.files.items() if schedule is None or name != SCHEDULE}
            for name in files:
                shutil.copyfile(self.folder / name, folder / name)
            for _, other in self.variants:
                (folder / other.folder.name).mkdir()
                for name in (*other.manifest.files, MANIFEST):
                    shutil.copyfile(other.folder / name, folder / other.folder.name / name)
            named = self.manifest.schedule if schedule is None else schedule
            if schedule is not None:
                sites = self.manifest.cache_sites
                made = schedule if isinstance(schedule, Schedule) else Schedule.of_any_length(schedule, sites)
                self.manifest.check_graphs(made.masks, made.text)
                if isinstance(schedule, Schedule) or reads_file(schedule):
                    made.to_file(folder / SCHEDULE)
                    files[SCHEDULE], named = record_of(folder / SCHEDULE), SCHEDULE
            if config is not None:
                (folder / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")
            write_manifest(folder, self.manifest.model_copy(update={"schedule": named, "files": files}))

    @property
    def variants(self) -> list[tuple[tuple[float, float], Bundle]]:
        """The bundles of other networks, each with its range of timesteps."""
        records = self.manifest.variants
        return [(one.timesteps, Bundle.read(self.folder / one.folder, self.trust_source)) for one in records]

    def _check_variants(self) -> None:
        for record in self.manifest.variants:
            folder = self.folder / record.folder
            if folder.is_symlink() or not _has_manifest(folder) or sha256_of(folder / MANIFEST) != record.sha256:
                raise BundleError(
                    f"{folder} is not the bundle that the manifest of {self.folder} names for some timesteps; "
                    f"{self._mend}"
                )
            other = Bundle.open(folder).manifest
            if problem := problem_of_variant(self.manifest, other):
                raise BundleError(f"{folder} {problem}; {self._mend}")

    @property
    def _mend(self) -> str:
        return f"export it again: {self.manifest.export_command()}"

    @property
    def _constant_names(self) -> set[str]:
        pipeline = self.manifest.pipeline
        return set() if pipeline is None else pipeline.call.constants()

    @property
    def constants(self) -> dict[str, Tensor]:
        """The constant arguments of the transformer's call, by name; empty without a pipeline. Raises `BundleError`."""
        if not (names := self._constant_names):
            return {}
        from safetensors.torch import load_file  # imports torch

        with self._reading_constants() as path:
            found = load_file(path)
        return {name: found[name] for name in sorted(names)}

    def _check_constants(self) -> None:
        """Raise `BundleError` if a constant is missing, without loading one."""
        if not (names := self._constant_names):
            return
        with self._reading_constants() as path, safe_open(path, framework="numpy") as file:
            missing = names - {*file.keys()}
        if missing:
            raise BundleError(f"{path} lacks {shown(min(missing))}; {self._mend}")

    @contextmanager
    def _reading_constants(self) -> Iterator[Path]:
        path = self.folder / CONSTANTS
        try:
            yield path
        except Exception as error:  # a damaged file can raise anything
            raise BundleError(f"{path} cannot be read ({first_line(error)}); {self._mend}") from error

    @property
    def scheduler_config(self) -> dict[str, Any]:
        """The diffusers configuration of the model's scheduler. Raises `BundleError` if it is none."""
        path, mend = self.folder / SCHEDULER, self._mend
        try:
            _, config = read_json(path)
        except (OSError, ValueError) as error:
            raise BundleError(f"{path} {first_line(error)}; {mend}") from error
        if not isinstance(config, dict) or not isinstance(config.get("_class_name"), str):
            raise BundleError(f"{path} is not the configuration of a scheduler, an object with a _class_name; {mend}")
        if (odd := next(_odd_numbers(config), None)) is not None:
            raise BundleError(
                f"{path} holds the number {shown(odd)}; finite numbers of at most {MOST_TIMESTEPS} are needed; {mend}"
            )
        return config


def _meant(path: Path) -> str:
    """What to give instead of a path that is no bundle: its folder, or the one of this name in `export/`, if it is."""
    for near in (path.parent, Path("export") / path.name):
        with suppress(OSError):
            if _has_manifest(near):
                return f"did you mean {near}?"
    return "create one with 'fora-trt export digits' and give its folder"


def _has_manifest(folder: Path) -> bool:
    return (folder / MANIFEST).is_file() or (folder / MANIFEST).is_symlink()


def _odd_numbers(value: object) -> Iterator[float]:
    """Numbers of a scheduler's configuration that are not finite, or larger than any that it needs.

    Minus infinity is the default of `lambda_min_clipped`.
    """
    if isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _odd_numbers(one)
    elif isinstance(value, int | float) and not abs(value) <= MOST_TIMESTEPS and value != float("-inf"):
        yield value


def _check_schedule(folder: Path, manifest: Manifest, mend: str) -> None:
    """Raise `BundleError` unless the schedule is a text form, or the file of the bundle, and valid."""
    schedule, sites = manifest.schedule or "", manifest.cache_sites
    try:
        if schedule == SCHEDULE:
            made = Schedule.from_file(folder / SCHEDULE, sites)
        elif reads_file(schedule):
            raise ScheduleError(f"'{shown(schedule)}' is a file; only {SCHEDULE} of the bundle is read")
        else:
            made = Schedule.from_text(schedule, OPEN_STEPS, sites)
    except ScheduleError as error:
        raise BundleError(f"the schedule in the manifest of {folder} is not valid: {error}; {mend}") from error
    if made.masks.keys() - manifest.graphs.keys():
        raise BundleError(f"the schedule of {folder} has partial steps whose graph is missing; {mend}")


def problem_of_variant(usual: Manifest, other: Manifest) -> str | None:
    """Why a bundle cannot run some timesteps in place of another, as the end of a sentence; None if it can."""
    known = {one.name: (one.dtype, one.shape) for one in usual.inputs}
    if unknown := [one.name for one in other.inputs if known.get(one.name) != (one.dtype, one.shape)]:
        return f"takes '{shown(unknown[0])}', which {usual.name} does not take with this shape and dtype"
    if usual.latents != other.latents or usual.guidance != other.guidance or other.precision != usual.precision:
        return f"has other latents, another guidance or another precision than {usual.name}"
    if other.variants or other.pipeline is not None or usual.pipeline is not None:
        return "has variants itself, or is of a diffusers pipeline"
    return None


def _problems(manifest: Manifest) -> Iterator[str]:
    """The values of a manifest that do not fit together, or exceed a limit, as sentences."""
    if unknown := manifest.graphs.keys() - GRAPHS - manifest.partial_graphs.keys():
        yield f"there is a graph '{shown(min(unknown))}'; the graphs are {', '.join(sorted(GRAPHS))}"
    yield from _problems_of_partial_graphs(manifest)
    if manifest.variants and (problem := problem_of_ranges([one.timesteps for one in manifest.variants])):
        yield problem
    edges: list[tuple[str, Sequence[TensorSpec], Sequence[TensorSpec]]] = [("the model", manifest.inputs, ())]
    edges += [(f"the {name} graph", graph.inputs, graph.outputs) for name, graph in manifest.graphs.items()]
    edges.append(("the cache sites", (), manifest.features()))
    for what, inputs, outputs in edges:
        names = [spec.name for spec in (*inputs, *outputs)]
        yield from (f"{what} names '{shown(one)}' twice" for one in names if names.count(one) > 1)
        for spec in (*inputs, *outputs):
            if problem := edge_problem(spec):
                yield f"'{shown(spec.name)}' of {what} {problem}"
    shapes = {spec.name: spec.shape[1:] for spec in manifest.inputs}
    yield from _problems_of_latents(manifest, shapes)
    if manifest.pipeline is not None:
        yield from problems_of(manifest.pipeline)
    for name, valid in manifest.conditioning.items():
        values, default = valid.values or (0, 1), valid.default or ()
        if not all(map(math.isfinite, (*values, *default))) or values[0] >= values[1]:
            yield f"the values of '{shown(name)}' are not finite, or do not rise"
        size = math.prod(int(one) for one in shapes.get(name, ()))
        if valid.default is not None and name in shapes and len(default) != size:
            yield f"the default of '{shown(name)}' has {len(default)} numbers; {size} are needed"
    if not 0 <= manifest.guidance_scale < math.inf:
        yield f"the guidance scale is {manifest.guidance_scale}; a finite number of at least 0 is needed"
    guidance, text = manifest.guidance, manifest.text
    if guidance and not (1 <= guidance.num_classes <= MOST_CLASSES and 0 <= (guidance.null_class or 0) <= MOST_CLASSES):
        classes = f"{guidance.num_classes} classes and the null class {guidance.null_class}"
        yield f"there are {classes}; the limit is {MOST_CLASSES}"
    if guidance and not 1 <= (1 if guidance.channels is None else guidance.channels) <= manifest.latents.channels:
        yield f"{guidance.channels} channels are guided; the latents have {manifest.latents.channels}"
    if text and not (1 <= text.length <= MOST_TOKENS and text.pipeline.isidentifier()):
        yield f"the text has {text.length} tokens of '{shown(text.pipeline)}'; the limit is {MOST_TOKENS}, and a class"
    if max(manifest.model.image_size or (1,)) > MOST_PIXELS:
        yield f"the images are larger than {MOST_PIXELS} pixels, which is the limit"
    if manifest.model.options.source.startswith("-"):
        yield "the source begins with a dash"


def _problems_of_partial_graphs(manifest: Manifest) -> Iterator[str]:
    sites = {site.module: site for site in manifest.cache_sites}
    for name, computed in manifest.partial_graphs.items():
        if name not in manifest.graphs or name != partial_name(computed):
            yield f"the partial graph '{shown(name)}' does not exist, or has not the name of its cache sites"
        elif not {*computed} < sites.keys() or not computed:
            yield f"the partial graph {name} does not compute some of the cache sites"
        else:
            own = {feature for path in computed for feature in sites[path].features}
            graph = manifest.graphs[name]
            if own & {*graph.inputs} or {one for one in graph.outputs if one.role == "feature"} - own:
                yield f"the features of the partial graph {name} are not those of the cache sites that it computes"


def _problems_of_latents(manifest: Manifest, shapes: dict[str, tuple[int | str, ...]]) -> Iterator[str]:
    latents = manifest.latents
    if not latents.shape or shapes.get(LATENTS) != latents.shape:
        yield f"the latents have the shape {shown(list(latents.shape))}, the input {LATENTS!r} another or none"
    if not all(map(math.isfinite, (latents.scale, latents.shift))) or latents.scale == 0:
        yield f"the latents have the scale {latents.scale} and the shift {latents.shift}; finite numbers are needed"
    for name in {FULL, REUSE, *manifest.partial_graphs} & manifest.graphs.keys():
        first = next(iter(manifest.graphs[name].outputs), None)
        wanted = [(many * latents.channels, *latents.shape[1:]) for many in (1, 2) if latents.shape]
        if (
            first is None
            or first.name != NOISE_PREDICTION
            or not (first.shape[1:] in wanted or has_fewer_channels(first.shape[1:], latents.shape))
        ):
            yield f"the first output of the {name} graph is not a {NOISE_PREDICTION!r} of the shape of the latents"


def tensor_spec(value: ir.Value, role: Role = "conditioning") -> TensorSpec:
    """Name, dtype, shape and role of a graph input or output, as the manifest records them."""
    assert value.name is not None and value.dtype is not None and value.shape is not None
    shape = tuple(size if isinstance(size, int) else str(size.value) for size in value.shape)
    return TensorSpec(value.name, dtype_of(value.dtype.name), shape, role)
