"""The bundle, a folder of exported graphs: its format and its reader. `export/write.py` writes it."""

from __future__ import annotations

import json
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import onnx_ir as ir

from fora_trt.contract import (
    CONDITIONING,
    FEATURE,
    FULL,
    FULL_CONDITIONING,
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
    in_window,
    out_of_window,
)
from fora_trt.errors import BundleError
from fora_trt.files import MANIFEST, FileRecord, Record, check_files, read_manifest
from fora_trt.models.options import SourceOptions

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_VERSION = 7
SCHEDULER = "scheduler_config.json"
SCHEDULE = "schedule.json"
"""File of the schedule that is used where none is given, if it was a file at export."""


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
        return cls(difference if finite else float("inf"), difference / largest if finite and largest else float("inf"))


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
    image_size: tuple[int, int] | None


class GraphRecord(Record):
    """An ONNX file with its inputs and outputs."""

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class Manifest(Record):
    """The content of a bundle's `manifest.json`; `export/README.md` explains each field."""

    format_version: int
    name: str
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
    schedule: str | None = None
    files: dict[str, FileRecord]
    measured_error: dict[str, GraphError] | None
    trajectory_error: TrajectoryError | None = None

    def features(self) -> list[TensorSpec]:
        """The features of all cache sites, in the order of the sites."""
        return [feature for site in self.cache_sites for feature in site.features]

    @property
    def can_forecast(self) -> bool:
        """Whether reuse steps can read a weighted sum over several full steps: all folded values must be linear."""
        return all(one.role != "function" for one in self.graphs[REUSE].inputs)

    def unfed(self) -> list[str]:
        """Names of graph inputs that neither the model's inputs nor the outputs of an earlier graph provide."""
        provided, unfed = {*self.inputs}, []
        for name in (CONDITIONING, FULL_CONDITIONING, FULL, REUSE):
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
    """A bundle. `open` checks every file against the manifest, `read` reads the manifest alone."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: str | Path) -> Bundle:
        """Read and check a bundle: manifest, size and SHA-256 of every file, links, external data.

        Raises `BundleError` that names the first problem and the command that repairs it.
        """
        bundle = cls.read(folder)
        bundle.check()
        return bundle

    @classmethod
    def read(cls, folder: str | Path) -> Bundle:
        """Read and check the manifest alone. Raises `BundleError`."""
        folder = Path(folder)
        if not (folder / MANIFEST).is_file():
            raise BundleError(
                f"{folder} is not a bundle: it contains no {MANIFEST}; "
                "create one with 'fora-trt export digits' and give its folder"
            )
        mend = "export the bundle again"
        return cls(folder, read_manifest(folder, Manifest, FORMAT_VERSION, "bundle", mend, BundleError))

    def check(self) -> None:
        """Raise `BundleError` unless every file matches the manifest."""
        folder, manifest = self.folder, self.manifest
        mend = f"export it again: fora-trt export {manifest.model.options.source} --name {manifest.name} --force"
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
            raise BundleError(f"a graph in {folder} reads {unfed[0]!r}, which no other graph provides; {mend}")
        schedule = {SCHEDULE} if manifest.schedule == SCHEDULE else set()
        needed = {SCHEDULER, *schedule, *(graph.file for graph in manifest.graphs.values())}
        if missing := sorted(needed - manifest.files.keys()):
            raise BundleError(f"the manifest of {folder} does not list {missing[0]}; {mend}")
        for graph in manifest.graphs.values():
            _check_graph(folder, graph, manifest.files.keys(), mend)

    def graph_path(self, name: str) -> Path:
        """The ONNX file of a graph: `full`, `reuse`, or `conditioning` and `full_conditioning` if present."""
        return self.folder / self.manifest.graphs[name].file

    @property
    def schedule(self) -> str | None:
        """The schedule that is used where none is given: a text form or a file; None for the usual one."""
        named = self.manifest.schedule
        return str(self.folder / SCHEDULE) if named == SCHEDULE else named

    @property
    def scheduler_config(self) -> dict[str, Any]:
        """The diffusers configuration of the model's scheduler."""
        config: dict[str, Any] = json.loads((self.folder / SCHEDULER).read_text())
        return config


def _check_graph(folder: Path, record: GraphRecord, listed: Container[str], mend: str) -> None:
    """Check that external weights lie in listed files, and that inputs and outputs match the manifest."""
    path = folder / record.file
    try:
        graph = ir.load(path).graph
    except Exception as error:  # protobuf's decoding error has no public class
        raise BundleError(f"{path} is not an ONNX file; {mend}") from error
    for value in graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and str(tensor.location) not in listed:
            raise BundleError(
                f"{path} loads weights from {str(tensor.location)!r}, "
                f"which the manifest does not list; do not use this bundle, or {mend}"
            )
    for edges, promised in ((graph.inputs, record.inputs), (graph.outputs, record.outputs)):
        found, wanted = ([spec.in_onnx for spec in specs] for specs in (map(tensor_spec, edges), promised))
        if found != wanted:
            wrong = sorted({name for name, *_ in {*found} ^ {*wanted}})
            differing = ", ".join(wrong) or "the order of inputs or outputs"
            raise BundleError(f"{path} and the manifest disagree on {differing}; {mend}")


def tensor_spec(value: ir.Value, role: Role = "conditioning") -> TensorSpec:
    """Name, dtype, shape and role of a graph input or output, as the manifest records them."""
    assert value.name is not None and value.dtype is not None and value.shape is not None
    dtypes = {"FLOAT": "float32", "DOUBLE": "float64"}
    shape = tuple(size if isinstance(size, int) else str(size.value) for size in value.shape)
    return TensorSpec(value.name, dtypes.get(value.dtype.name, value.dtype.name.lower()), shape, role)
