"""The folder that holds exported graphs: its format, and reading it. `export/write.py` writes it."""

from __future__ import annotations

import json
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import onnx_ir as ir

from fora_trt.errors import BundleError
from fora_trt.folders import MANIFEST, FileRecord, Record, check_files, read_manifest
from fora_trt.models.options import SourceOptions
from fora_trt.models.spec import (
    CONDITIONING,
    FEATURE,
    FULL,
    FULL_CONDITIONING,
    REUSE,
    WINDOW,
    CacheSite,
    GuidanceSpec,
    InputSpec,
    LatentSpec,
    Optimization,
    TensorSpec,
    TextSpec,
    in_window,
    out_of_window,
)

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_VERSION = 4
SCHEDULER = "scheduler_config.json"


@dataclass(frozen=True)
class GraphError:
    """Largest absolute difference from PyTorch, and the same relative to PyTorch's largest value."""

    maximum: float
    relative: float

    @classmethod
    def between(cls, measured: Tensor, reference: Tensor) -> GraphError:
        """The error of `measured`; a value that is not finite counts as infinitely wrong."""
        difference = (measured.double() - reference.double()).abs().max().item()
        largest = reference.double().abs().max().item()
        finite = difference == difference
        return cls(difference if finite else float("inf"), difference / largest if finite and largest else float("inf"))


@dataclass(frozen=True)
class TrajectoryError:
    """Error of whole trajectories against PyTorch in fp32, by cache interval, on the backend that ran them."""

    steps: int
    backend: str
    errors: dict[int, GraphError]


class ModelRecord(Record):
    """Where the weights came from, and how to load them again. `weights_sha256` digests every tensor as traced."""

    options: SourceOptions
    architecture: str
    config: dict[str, Any]
    weights_sha256: str
    vae: str | None
    image_size: tuple[int, int] | None


class GraphRecord(Record):
    """An ONNX file and the tensors at its edges."""

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class Manifest(Record):
    """Everything that is known about a bundle; the meaning of each field is in `export/README.md`."""

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
    text: TextSpec | None
    files: dict[str, FileRecord]
    measured_error: dict[str, GraphError] | None
    trajectory_error: TrajectoryError | None = None

    def features(self) -> list[TensorSpec]:
        """Every feature of every site, in order."""
        return [feature for site in self.cache_sites for feature in site.features]

    def unfed(self) -> list[str]:
        """Inputs of graphs that are neither the model's nor put out by a graph that runs before, as they are read."""
        provided, unfed = {*self.inputs}, []
        for name in (CONDITIONING, FULL_CONDITIONING, FULL, REUSE):
            graph = self.graphs.get(name)
            if graph is None:
                continue
            unfed += [one.name for one in graph.inputs if one not in provided]
            provided.update(graph.outputs)
            if name == CONDITIONING:
                provided.update(in_window(one) for one in graph.outputs)
            provided.update(out_of_window(one) for one in graph.outputs if one.shape[:1] == (WINDOW,))
        return unfed


@dataclass(frozen=True)
class Bundle:
    """A bundle; `open` gives one whose every file was checked against its manifest."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: str | Path) -> Bundle:
        """Read and check a bundle: manifest, size and SHA-256 of every file, links, external data.

        Raises `BundleError` that names the first thing wrong and the command that mends it.
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
                f"{folder} is not a bundle: it has no {MANIFEST}; "
                "make one with 'fora-trt export digits' and give its folder"
            )
        mend = "export the bundle again"
        return cls(folder, read_manifest(folder, Manifest, FORMAT_VERSION, "bundle", mend, BundleError))

    def check(self) -> None:
        """Raise `BundleError` unless every file is the one that the manifest promises."""
        folder, manifest = self.folder, self.manifest
        mend = f"export it again: fora-trt export {manifest.model.options.source} --name {manifest.name} --force"
        check_files(folder, manifest.files, mend, BundleError)
        if {FULL, REUSE} - manifest.graphs.keys():
            raise BundleError(f"the manifest of {folder} lacks a graph; {mend}")
        named = all(
            feature.name == f"{FEATURE}{site.module}" or feature.name.startswith(f"{FEATURE}{site.module}.")
            for site in manifest.cache_sites
            for feature in site.features
        )
        features = tuple(one for one in manifest.graphs[FULL].outputs if one.name.startswith(FEATURE))
        folds = manifest.optimization == "fold"  # then only what a reuse step reads as it is
        if not named or features != tuple(one for one in manifest.features() if one in features or not folds):
            raise BundleError(
                f"the cache sites in the manifest of {folder} are not the outputs of its full graph; {mend}"
            )
        if unfed := manifest.unfed():
            raise BundleError(f"nothing in {folder} provides {unfed[0]!r}, which one of its graphs reads; {mend}")
        needed = {SCHEDULER, *(graph.file for graph in manifest.graphs.values())}
        if missing := sorted(needed - manifest.files.keys()):
            raise BundleError(f"the manifest of {folder} does not list {missing[0]}; {mend}")
        for graph in manifest.graphs.values():
            _check_graph(folder, graph, manifest.files.keys(), mend)

    def graph_path(self, name: str) -> Path:
        """The ONNX file of the graph `full`, `reuse` or, where there is one, `conditioning`."""
        return self.folder / self.manifest.graphs[name].file

    @property
    def scheduler_config(self) -> dict[str, Any]:
        """The diffusers configuration of the scheduler that the model was published with."""
        config: dict[str, Any] = json.loads((self.folder / SCHEDULER).read_text())
        return config


def _check_graph(folder: Path, record: GraphRecord, listed: Container[str], mend: str) -> None:
    """Weights may lie only in files that the manifest lists, and inputs and outputs must be those it promises."""
    path = folder / record.file
    try:
        graph = ir.load(path).graph
    except Exception as error:  # protobuf's decoding error is not a public class
        raise BundleError(f"{path} is not an ONNX file; {mend}") from error
    for value in graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and str(tensor.location) not in listed:
            raise BundleError(
                f"{path} takes weights from {str(tensor.location)!r}, "
                f"which its manifest does not list; do not use this bundle, or {mend}"
            )
    for edges, promised in ((graph.inputs, record.inputs), (graph.outputs, record.outputs)):
        if (found := tuple(map(tensor_spec, edges))) != promised:
            wrong = sorted({edge.name for edge in {*found} ^ {*promised}})
            raise BundleError(f"{path} and its manifest do not agree on {', '.join(wrong) or 'an order'}; {mend}")


def tensor_spec(value: ir.Value) -> TensorSpec:
    """Name, dtype and shape of an input or output of a graph, as manifests keep them."""
    assert value.name is not None and value.dtype is not None and value.shape is not None
    dtypes = {"FLOAT": "float32", "DOUBLE": "float64"}
    shape = tuple(size if isinstance(size, int) else str(size.value) for size in value.shape)
    return TensorSpec(value.name, dtypes.get(value.dtype.name, value.dtype.name.lower()), shape)
