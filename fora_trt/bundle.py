"""The folder that holds an exported pair of graphs: written whole or not at all, checked whole when read."""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
import stat
import tempfile
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx
import onnx_ir as ir
import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from fora_trt import __version__
from fora_trt.errors import BundleError, ExportError
from fora_trt.export.check import GraphError, measure_errors
from fora_trt.export.graphs import Graph, full_graph_from_model, reuse_graph_from_model, save_graph, tensor_spec
from fora_trt.export.split import FEATURE, FULL, REUSE, CacheSite
from fora_trt.models.spec import GuidanceSpec, LatentSpec, Model, TensorSpec

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SCHEDULER = "scheduler_config.json"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelRecord(_Part):
    """Where the weights came from. `weights_sha256` digests every tensor as it was traced."""

    source: str
    architecture: str
    config: dict[str, Any]
    weights_sha256: str
    image_size: int | None
    vae: str | None


class GraphRecord(_Part):
    """An ONNX file and the tensors at its edges."""

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class FileRecord(_Part):
    """What a file must be to be used."""

    sha256: str
    size: int


class Manifest(_Part):
    """Everything that is known about a bundle; the meaning of each field is in `export/README.md`."""

    format_version: int
    name: str
    versions: dict[str, str]
    model: ModelRecord
    precision: Literal["fp32", "fp16", "bf16"]
    opset: int
    graphs: dict[str, GraphRecord]
    cache_sites: tuple[CacheSite, ...]
    latents: LatentSpec
    guidance: GuidanceSpec
    files: dict[str, FileRecord]
    measured_error: dict[str, GraphError] | None


@dataclass(frozen=True)
class Bundle:
    """A bundle whose every file was checked against its manifest."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: str | Path) -> Bundle:
        """Read and check a bundle: manifest, size and SHA-256 of every file, links, external data.

        Raises `BundleError` that names the first thing wrong and the command that mends it.
        """
        folder = Path(folder)
        if not (folder / MANIFEST).is_file():
            raise BundleError(
                f"{folder} is not a bundle: it has no {MANIFEST}; "
                "make one with 'fora-trt export digits' and give its folder"
            )
        manifest = _read_manifest(folder)
        mend = f"export it again: fora-trt export {manifest.model.source} --name {manifest.name} --force"
        for name, record in manifest.files.items():
            _check_file(folder, name, record, mend)
        if {FULL, REUSE} - manifest.graphs.keys():
            raise BundleError(f"the manifest of {folder} lacks a graph; {mend}")
        features = {tensor.name: tensor for tensor in manifest.graphs[FULL].outputs[1:]}
        if {f"{FEATURE}{site.module}": site.feature for site in manifest.cache_sites} != features:
            raise BundleError(
                f"the cache sites in the manifest of {folder} are not the outputs of its full graph; {mend}"
            )
        needed = {SCHEDULER, *(graph.file for graph in manifest.graphs.values())}
        if missing := sorted(needed - manifest.files.keys()):
            raise BundleError(f"the manifest of {folder} does not list {missing[0]}; {mend}")
        for graph in manifest.graphs.values():
            _check_graph(folder, graph, manifest.files.keys(), mend)
        return cls(folder, manifest)

    def graph_path(self, name: str) -> Path:
        """The ONNX file of the graph `full` or `reuse`."""
        return self.folder / self.manifest.graphs[name].file

    @property
    def scheduler_config(self) -> dict[str, Any]:
        """The diffusers configuration of the scheduler that the model was published with."""
        config: dict[str, Any] = json.loads((self.folder / SCHEDULER).read_text())
        return config


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        version = raw["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{path} is not the manifest of a bundle: {error}; export the bundle again") from error
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise BundleError(
            f"{path} has format version {version}; this fora-trt reads up to {FORMAT_VERSION}: pip install -U fora-trt"
        )
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the top level"
        raise BundleError(f"{path} is damaged at {where}: {first['msg']}; export the bundle again") from error


def _check_file(folder: Path, name: str, record: FileRecord, mend: str) -> None:
    if Path(name).name != name or "\\" in name:
        raise BundleError(f"the manifest of {folder} lists {name!r}, which leaves the folder; do not use this bundle")
    path = folder / name
    try:
        status = path.lstat()
    except FileNotFoundError:
        raise BundleError(f"{path} is missing; {mend}") from None
    if not stat.S_ISREG(status.st_mode):
        raise BundleError(
            f"{path} is a link or no regular file, which a bundle may not hold; copy the file there instead"
        )
    if status.st_size != record.size:
        raise BundleError(f"{path} has {status.st_size} bytes where the manifest says {record.size}; {mend}")
    if sha256_of(path) != record.sha256:
        raise BundleError(f"{path} was altered: its SHA-256 is not the one in the manifest; {mend}")


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


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def record_of(path: Path) -> FileRecord:
    """Digest and size of a file, as a manifest keeps them."""
    return FileRecord(sha256=sha256_of(path), size=path.stat().st_size)


@contextmanager
def staging(target: Path, force: bool) -> Iterator[Path]:
    """A folder beside `target` that takes its place when the block ends, and is gone when the block fails.

    Raises `ExportError` if `target` is there and `force` is not given, is no bundle, or cannot be written.
    """
    if target.exists() and not force:
        raise ExportError(f"{target} is there already; give --force to replace it or --name to make another")
    if target.exists() and not (target / MANIFEST).is_file():
        raise ExportError(f"{target} is not a bundle, so --force does not replace it; choose another --name")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise ExportError(
            f"{target.parent} cannot be written ({error.strerror}); choose another folder with --out"
        ) from error
    try:
        folder.chmod(0o755)
        yield folder
        _move(folder, target, replace=force and target.exists())
    except OSError as error:
        raise ExportError(f"writing {target} failed ({error.strerror or error}); nothing was changed") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _move(folder: Path, target: Path, replace: bool) -> None:
    """Rename `folder` to `target`; what is to be replaced is moved aside first and removed last."""
    if not replace:
        folder.rename(target)  # fails if another export has made it meanwhile
        return
    aside = folder.with_name(folder.name + ".old")
    target.rename(aside)
    try:
        folder.rename(target)
    except BaseException:
        aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def bundle_from_model(
    model: Model,
    target: Path,
    *,
    cache: Sequence[str] | None = None,
    opset: int = 23,
    force: bool = False,
    report: Callable[[str], None] = lambda stage: None,
) -> Bundle:
    """Split, trace, measure and write `model` as the bundle `target`, whose name is the folder's.

    `report` is told each stage as it begins. Raises `ExportError`; then `target` is as it was.
    """
    with staging(target, force) as folder:
        weights = weights_digest(model.module)
        report("tracing the full graph")
        full, sites = full_graph_from_model(model, cache, opset)
        report("tracing the reuse graph")
        reuse = reuse_graph_from_model(model, sites, opset)
        graphs = {FULL: full, REUSE: reuse}
        report("writing the graphs")
        written = [file for name, graph in graphs.items() for file in save_graph(graph, folder / f"{name}.onnx")]
        (folder / SCHEDULER).write_text(json.dumps(model.scheduler, indent=2) + "\n", encoding="utf-8")
        records = {name: _record_of_graph(name, graph) for name, graph in graphs.items()}
        del graphs, full, reuse
        gc.collect()  # the exporter leaves cycles that keep the weights in memory
        report("measuring the graphs against PyTorch")
        errors = measure_errors(model, sites, {name: folder / record.file for name, record in records.items()})
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            name=target.name,
            versions={"fora_trt": __version__, "torch": torch.__version__, "onnx": onnx.__version__},
            model=ModelRecord(
                source=model.source,
                architecture=model.spec.architecture,
                config=model.config,
                weights_sha256=weights,
                image_size=model.image_size,
                vae=model.vae,
            ),
            precision=model.precision,
            opset=opset,
            graphs=records,
            cache_sites=tuple(sites),
            latents=model.spec.latents,
            guidance=model.spec.guidance,
            files={file.name: record_of(file) for file in (*written, folder / SCHEDULER)},
            measured_error=errors,
        )
        (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return Bundle(target, manifest)


def _record_of_graph(name: str, graph: Graph) -> GraphRecord:
    return GraphRecord(file=f"{name}.onnx", inputs=graph.inputs, outputs=graph.outputs)


def weights_digest(module: torch.nn.Module) -> str:
    """SHA-256 over name, dtype, shape and bytes of every parameter; shared ones count once."""
    digest = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters()):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
        digest.update(parameter.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
