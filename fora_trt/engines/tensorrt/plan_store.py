"""The folder `engines/`: sets of plans, each built once for one bundle, one version of TensorRT and one kind of GPU.

A plan contains native code. It is deserialized only if its set is unaltered and was built from this bundle for this
library version and GPU.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from fora_trt import __version__
from fora_trt.bundle import SCHEDULER, Bundle, PlainName
from fora_trt.engines.options import EngineOptions, Progress
from fora_trt.engines.tensorrt.library import TENSORRT, Gpu, Library, supported_capabilities, unsupported
from fora_trt.engines.tensorrt.plan_builder import Attention, PlanOptions, Profile, plan_from_onnx
from fora_trt.errors import PlanError
from fora_trt.files import (
    MANIFEST,
    FileRecord,
    Record,
    check_files,
    clear_unfinished,
    read_manifest,
    record_of,
    staging,
    write_manifest,
)
from fora_trt.untrusted import in_command

FORMAT_VERSION = 3
PORTABLE = ("8.0", "8.6", "8.9", "12.0")
"""Default compute capabilities of a TensorRT-RTX plan: those that TensorRT-RTX calls Ampere and later."""

DEFAULT_MAXIMUM = 16
"""Largest batch of the default profile, for builds with smaller batches."""


class PlanRecord(Record):
    """A plan file, the attentions of its graph (fused or not), and the duration of the build."""

    file: PlainName
    attentions: tuple[Attention, ...]
    seconds: float


class PlanManifest(Record):
    """The manifest of a set of plans; `engines/README.md` explains each field."""

    format_version: int
    fora_trt: str
    built: str
    backend: Literal["tensorrt", "tensorrt-rtx"]
    version: str
    compute_capabilities: tuple[str, ...]
    gpu: str | None
    bundle: str
    bundle_files: dict[str, str]
    options: PlanOptions
    plans: dict[str, PlanRecord]
    files: dict[str, FileRecord]


@dataclass(frozen=True)
class Target:
    """The target of a build: library, compute capabilities, and the GPU model if plans are tuned for one."""

    library: Library
    compute_capabilities: tuple[str, ...]
    gpu: str | None

    @property
    def prefix(self) -> str:
        """The beginning of the folder name of a set for this target."""
        capabilities = "-".join(one.replace(".", "") for one in self.compute_capabilities)
        return f"{self.library.backend}-{self.library.version}-sm{capabilities}"


@dataclass(frozen=True)
class PlanSet:
    """A set of plans whose files were all checked."""

    folder: Path
    manifest: PlanManifest

    def path(self, graph: str) -> Path:
        """The plan file of a graph."""
        return self.folder / self.manifest.plans[graph].file


def target_of(library: Library, gpu: Gpu | None, compute_capabilities: Sequence[str] = ()) -> Target:
    """The target of a build: with TensorRT `gpu`, with TensorRT-RTX the given or else the portable capabilities.

    Raises `PlanError` if the library cannot build for it.
    """
    if not library.is_rtx:
        if compute_capabilities:
            raise PlanError(
                f"{TENSORRT} builds only for the GPU of this machine; leave --compute-capability out, or give "
                "--backend tensorrt-rtx"
            )
        if gpu is None:
            raise PlanError(
                f"{TENSORRT} builds plans on the GPU that will run them, and torch finds no GPU; build on a machine "
                "with that GPU, or build for GeForce and workstation GPUs with --backend tensorrt-rtx"
            )
        return Target(library, (gpu.compute_capability,), gpu.name)
    known = supported_capabilities(library)
    for capability in compute_capabilities:
        if capability not in known:
            raise PlanError(
                f"tensorrt-rtx {library.version} does not support compute capability {capability!r}; "
                f"choose from {', '.join(known)}"
            )
    if compute_capabilities:
        return Target(library, tuple(dict.fromkeys(compute_capabilities)), None)
    if gpu is None or gpu.compute_capability in PORTABLE:
        return Target(library, PORTABLE, None)
    if gpu.compute_capability not in known:
        raise PlanError(unsupported(gpu.compute_capability))
    return Target(library, (gpu.compute_capability,), None)


def default_profile(batch: int) -> Profile:
    """The profile for `batch`: minimum 1, tuned for `batch`, maximum 16 or the next power of two if larger."""
    return Profile(minimum=1, optimum=batch, maximum=max(DEFAULT_MAXIMUM, 1 << (batch - 1).bit_length()))


def build_plans(
    bundle: Bundle,
    target: Target,
    options: PlanOptions,
    engines: Path,
    *,
    timing_cache: Path | None = None,
    force: bool = False,
    report: Callable[[str], None] = lambda line: None,
    progress: Progress = lambda fraction, phase: None,
) -> tuple[PlanSet, bool]:
    """Check the bundle and return its set of plans for `target`, and whether the set existed; build it if it did not.

    Only one process builds at a time and the others wait: concurrent builds would disturb each other's kernel timings,
    and a waiting process can use the set that the first one built. Raises `PlanError`; then nothing is changed.
    """
    _check_precision(bundle, target)
    folder = engines / bundle.manifest.name / f"{target.prefix}-{_key(bundle, target, options)}"
    clear_unfinished(folder.parent)  # of builds with other options too, also if nothing is built now
    with ThreadPoolExecutor(1) as pool:
        checking = pool.submit(bundle.check)  # concurrent with the check of the plans, as both read gigabytes
        found = open_plans(folder, bundle, target.library) if folder.exists() and not force else None
        checking.result()
    if found is not None:
        return found, True
    cache = timing_cache or (None if target.library.is_rtx else engines / f"{target.prefix}.timing-cache")
    with _only_builder(engines, report):
        clear_unfinished(folder.parent)  # of a builder that was killed while this one waited
        if folder.exists() and not force:
            return open_plans(folder, bundle, target.library), True
        with staging(folder, force, "set of plans", PlanError) as staged:
            plans: dict[str, PlanRecord] = {}
            for number, (name, graph) in enumerate(bundle.manifest.graphs.items()):
                report(f"building the {name} plan with {target.library.backend} {target.library.version}")
                watch = _part_of(progress, number, len(bundle.manifest.graphs))
                built = plan_from_onnx(
                    target.library,
                    bundle.graph_path(name),
                    staged / f"{name}.plan",
                    graph.inputs,
                    options.of_graph(name),
                    target.compute_capabilities,
                    cache,
                    watch,
                )
                plans[name] = PlanRecord(file=f"{name}.plan", attentions=built.attentions, seconds=built.seconds)
            manifest = PlanManifest(
                format_version=FORMAT_VERSION,
                fora_trt=__version__,
                built=datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
                backend=target.library.backend,
                version=target.library.version,
                compute_capabilities=target.compute_capabilities,
                gpu=target.gpu,
                bundle=bundle.manifest.name,
                bundle_files=_files_of(bundle),
                options=options,
                plans=plans,
                files={plan.file: record_of(staged / plan.file) for plan in plans.values()},
            )
            write_manifest(staged, manifest)
    return PlanSet(folder, manifest), False


def plans_for(bundle: Bundle, library: Library, gpu: Gpu, options: EngineOptions) -> PlanSet:
    """The newest matching set of plans, which is built if there is none. Raises `PlanError`.

    If `options.folder` is itself a set, only this set is considered, and nothing is built.
    """
    for place in (options.folder.parent, options.folder / bundle.manifest.name):
        clear_unfinished(place)  # puts a set back whose replacement was killed
    if (options.folder / MANIFEST).exists():
        return open_plans(options.folder, bundle, library, gpu, options.batch)
    fitting: list[tuple[str, Path]] = []
    for folder in _sets_in(options.folder / bundle.manifest.name, library):
        manifest = _manifest_of(folder, bundle, library)
        if reason := _difference(manifest, bundle, library, gpu, options.batch):
            options.report(f"ignoring {folder}: it {reason}")
        else:
            fitting.append((manifest.built, folder))
    if fitting:
        return open_plans(max(fitting)[1], bundle, library, gpu, options.batch)
    built = PlanOptions(profiles=(default_profile(options.batch),))
    target = target_of(library, gpu)
    return build_plans(bundle, target, built, options.folder, report=options.report, progress=options.progress)[0]


def open_plans(
    folder: Path, bundle: Bundle, library: Library, gpu: Gpu | None = None, batch: int | None = None
) -> PlanSet:
    """Open a set of plans and check that it matches bundle, library, GPU and batch, and that no file is altered.

    Raises `PlanError` that names the difference and the command that builds a matching set.
    """
    manifest = _manifest_of(folder, bundle, library)
    mend = _build_command(bundle, library)
    if reason := _difference(manifest, bundle, library, gpu, batch):
        wider = f" --batch 1:{batch}:{batch}" if batch is not None and not _admits(manifest, batch) else ""
        raise PlanError(f"{folder} cannot be used: it {reason}; build a matching set: {mend}{wider}")
    check_files(folder, manifest.files, f"build it again: {mend} --force", PlanError)
    if manifest.plans.keys() != bundle.manifest.graphs.keys() or any(
        plan.file not in manifest.files for plan in manifest.plans.values()
    ):
        raise PlanError(f"{folder} does not contain a plan for each graph; build it again: {mend} --force")
    return PlanSet(folder, manifest)


def _manifest_of(folder: Path, bundle: Bundle, library: Library) -> PlanManifest:
    mend = f"build it again: {_build_command(bundle, library)} --force"
    return read_manifest(folder, PlanManifest, FORMAT_VERSION, "set of plans", mend, PlanError)


def _build_command(bundle: Bundle, library: Library) -> str:
    return f"fora-trt build {in_command(bundle.folder)} --backend {library.backend}"


def _difference(
    manifest: PlanManifest, bundle: Bundle, library: Library, gpu: Gpu | None, batch: int | None
) -> str | None:
    """Why plans do not match, as the end of a sentence that begins with "it"; None if they match."""
    made = f"{manifest.backend} {manifest.version}"
    if made != (here := f"{library.backend} {library.version}"):
        return f"was built with {made}; {here} is installed"
    if gpu is not None and gpu.compute_capability not in manifest.compute_capabilities:
        built = ", ".join(manifest.compute_capabilities)
        return f"was built for compute capability {built}; {gpu.name} has {gpu.compute_capability}"
    if gpu is not None and manifest.gpu not in (None, gpu.name):
        return f"was built on {manifest.gpu}; this GPU is {gpu.name}"
    if manifest.bundle_files != _files_of(bundle):
        return f"was built from other graphs than those in {bundle.folder}"
    if batch is not None and not _admits(manifest, batch):
        profiles = ", ".join(map(str, manifest.options.profiles))
        return f"was built for batches of {profiles} (min:opt:max); a batch of {batch} is needed"
    return None


def _admits(manifest: PlanManifest, batch: int) -> bool:
    return any(profile.admits(batch) for profile in manifest.options.profiles)


def _sets_in(folder: Path, library: Library) -> list[Path]:
    """Folders of sets of this backend and major version, by name; hidden folders are unfinished builds."""
    if not folder.is_dir():
        return []
    begin = f"{library.backend}-{library.version.split('.')[0]}"
    return sorted(one for one in folder.iterdir() if one.name.startswith(begin) and (one / MANIFEST).exists())


def _files_of(bundle: Bundle) -> dict[str, str]:
    """SHA-256 of the bundle's files that determine a plan."""
    return {name: record.sha256 for name, record in bundle.manifest.files.items() if name != SCHEDULER}


def _key(bundle: Bundle, target: Target, options: PlanOptions) -> str:
    """Short digest of everything that changes a plan and is not part of the folder name."""
    content = [FORMAT_VERSION, _files_of(bundle), options.model_dump(mode="json"), target.gpu]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _check_precision(bundle: Bundle, target: Target) -> None:
    for capability in target.compute_capabilities:
        if bundle.manifest.precision == "bf16" and float(capability) < 8.0:
            raise PlanError(
                f"compute capability {capability} does not support the bf16 of {bundle.folder}; "
                f"leave this capability out, or export with --precision fp16"
            )


@contextmanager
def _only_builder(engines: Path, report: Callable[[str], None]) -> Iterator[None]:
    """Hold the build lock of the folder; the operating system releases it even if the process is killed."""
    lock = FileLock(engines / ".lock")
    try:
        engines.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            report(f"another process is building plans in {engines}; waiting for it")
            lock.acquire()
    except OSError as problem:
        raise PlanError(
            f"{engines} cannot be written ({problem.strerror or problem}); choose another folder with --engines"
        ) from problem
    try:
        yield
    finally:
        lock.release()


def _part_of(progress: Progress, number: int, count: int) -> Progress:
    """Convert the progress of build number `number` of `count` to the progress of all builds."""
    return lambda fraction, phase: progress((number + fraction) / count, phase)
