"""The folder `engines/`: sets of plans, each built once for one bundle, one version of TensorRT and one kind of GPU.

A plan is native code: it is deserialized only if its set was made from this bundle for this machine and is unaltered.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from fora_trt import __version__
from fora_trt.bundle import SCHEDULER, Bundle
from fora_trt.engines.plan_builder import Attention, PlanOptions, Profile, Progress, plan_from_onnx
from fora_trt.engines.tensorrt_library import TENSORRT, Gpu, Library, supported_capabilities, unsupported
from fora_trt.errors import PlanError
from fora_trt.folders import (
    MANIFEST,
    FileRecord,
    Record,
    check_files,
    read_manifest,
    record_of,
    staging,
    write_manifest,
)

FORMAT_VERSION = 2
PORTABLE = ("8.0", "8.6", "8.9", "12.0")
"""Compute capabilities that a TensorRT-RTX plan is built for unless asked otherwise: all it calls Ampere and later."""

DEFAULT_MAXIMUM = 16
"""Largest batch of a plan that is built without being told a profile."""


class PlanRecord(Record):
    """A plan, and which attentions of its graph became fused kernels."""

    file: str
    attentions: tuple[Attention, ...]
    seconds: float


class PlanManifest(Record):
    """What a set of plans was made from and for; the meaning of each field is in `engines/README.md`."""

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
    """What plans are made for: a library, compute capabilities, and the model of GPU if plans are tuned for it."""

    library: Library
    compute_capabilities: tuple[str, ...]
    gpu: str | None

    @property
    def prefix(self) -> str:
        """How the folder of a set for this target begins."""
        capabilities = "-".join(one.replace(".", "") for one in self.compute_capabilities)
        return f"{self.library.backend}-{self.library.version}-sm{capabilities}"


@dataclass(frozen=True)
class PlanSet:
    """Plans whose every file was checked, made from one bundle for one target."""

    folder: Path
    manifest: PlanManifest

    def path(self, graph: str) -> Path:
        """The plan of a graph of the bundle."""
        return self.folder / self.manifest.plans[graph].file


@dataclass(frozen=True)
class PlanSource:
    """Where plans are looked for and built; what the user of an engine may decide about them.

    `folder` holds sets by bundle, or is one set that is used as it is. `batch` is the largest that is going to be
    used, of which a set that is missing is built. `report` is told what takes long.
    """

    folder: Path = Path("engines")
    batch: int = 2
    report: Callable[[str], None] = field(default=lambda line: None, compare=False)
    progress: Progress = field(default=lambda fraction, phase: None, compare=False)


def target_of(library: Library, gpu: Gpu | None, compute_capabilities: Sequence[str] = ()) -> Target:
    """What to build for: the GPU at hand with TensorRT, the asked or the portable capabilities with TensorRT-RTX.

    Raises `PlanError` where that is not possible.
    """
    if not library.is_rtx:
        if compute_capabilities:
            raise PlanError(
                f"{TENSORRT} builds for the GPU at hand alone; leave --compute-capability out, or use tensorrt-rtx"
            )
        if gpu is None:
            raise PlanError(
                f"{TENSORRT} builds plans on the GPU that will run them, and there is none here that torch can use; "
                "run this on that machine, or build for GeForce and workstation GPUs with --backend tensorrt-rtx"
            )
        return Target(library, (gpu.compute_capability,), gpu.name)
    known = supported_capabilities(library)
    for capability in compute_capabilities:
        if capability not in known:
            raise PlanError(
                f"tensorrt-rtx {library.version} does not build for compute capability {capability!r}; "
                f"it knows {', '.join(known)}"
            )
    if compute_capabilities:
        return Target(library, tuple(dict.fromkeys(compute_capabilities)), None)
    if gpu is None or gpu.compute_capability in PORTABLE:
        return Target(library, PORTABLE, None)
    if gpu.compute_capability not in known:
        raise PlanError(unsupported(gpu.compute_capability))
    return Target(library, (gpu.compute_capability,), None)


def default_profile(batch: int) -> Profile:
    """Batches from 1 on, tuned for `batch`, up to 16 or the next power of two."""
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
    """The set of plans of `bundle` for `target`, and whether it was there already; checks the bundle first.

    Of several processes one builds and the others wait: builds that run side by side would time kernels wrongly, and
    what the first has built the others use. Raises `PlanError`; then nothing was changed.
    """
    _check_precision(bundle, target)
    folder = engines / bundle.manifest.name / f"{target.prefix}-{_key(bundle, target, options)}"
    with ThreadPoolExecutor(1) as pool:
        checking = pool.submit(bundle.check)  # beside the check of the plans: both read gigabytes
        found = open_plans(folder, bundle, target.library) if folder.exists() and not force else None
        checking.result()
    if found is not None:
        return found, True
    cache = timing_cache or (None if target.library.is_rtx else engines / f"{target.prefix}.timing-cache")
    with _only_builder(engines, report):
        if folder.exists() and not force:
            return open_plans(folder, bundle, target.library), True
        for left in folder.parent.glob(f".{folder.name}.*"):  # by a build that was killed
            shutil.rmtree(left, ignore_errors=True)
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


def plans_for(bundle: Bundle, library: Library, gpu: Gpu, source: PlanSource) -> PlanSet:
    """The newest set that fits; built if there is none. Raises `PlanError`.

    Where `source.folder` is itself a set, that one is used or refused and nothing is built.
    """
    if (source.folder / MANIFEST).is_file():
        return open_plans(source.folder, bundle, library, gpu, source.batch)
    fitting: list[tuple[str, Path]] = []
    for folder in _sets_in(source.folder / bundle.manifest.name, library):
        manifest = _manifest_of(folder, bundle, library)
        if reason := _difference(manifest, bundle, library, gpu, source.batch):
            source.report(f"{folder} does not fit: it {reason}")
        else:
            fitting.append((manifest.built, folder))
    if fitting:
        return open_plans(max(fitting)[1], bundle, library, gpu, source.batch)
    options = PlanOptions(profiles=(default_profile(source.batch),))
    target = target_of(library, gpu)
    return build_plans(bundle, target, options, source.folder, report=source.report, progress=source.progress)[0]


def open_plans(
    folder: Path, bundle: Bundle, library: Library, gpu: Gpu | None = None, batch: int | None = None
) -> PlanSet:
    """A set whose manifest fits the bundle, the library, the GPU and the batch, and whose files are unaltered.

    Raises `PlanError` that names what differs and the command that mends it.
    """
    manifest = _manifest_of(folder, bundle, library)
    mend = f"fora-trt build {bundle.folder} --backend {library.backend}"
    if reason := _difference(manifest, bundle, library, gpu, batch):
        wider = f" --batch 1:{batch}:{batch}" if batch is not None and not _admits(manifest, batch) else ""
        raise PlanError(f"{folder} cannot be used: it {reason}; build for it: {mend}{wider}")
    check_files(folder, manifest.files, f"build it again: {mend} --force", PlanError)
    if manifest.plans.keys() != bundle.manifest.graphs.keys() or any(
        plan.file not in manifest.files for plan in manifest.plans.values()
    ):
        raise PlanError(f"{folder} does not hold a plan for each graph; build it again: {mend} --force")
    return PlanSet(folder, manifest)


def _manifest_of(folder: Path, bundle: Bundle, library: Library) -> PlanManifest:
    mend = f"build it again: fora-trt build {bundle.folder} --backend {library.backend} --force"
    return read_manifest(folder, PlanManifest, FORMAT_VERSION, "set of plans", mend, PlanError)


def _difference(
    manifest: PlanManifest, bundle: Bundle, library: Library, gpu: Gpu | None, batch: int | None
) -> str | None:
    """Why plans do not fit, to be read after "it"; None where they do."""
    made = f"{manifest.backend} {manifest.version}"
    if made != (here := f"{library.backend} {library.version}"):
        return f"was built with {made}, and here is {here}"
    if gpu is not None and gpu.compute_capability not in manifest.compute_capabilities:
        built = ", ".join(manifest.compute_capabilities)
        return f"was built for compute capability {built}, and {gpu.name} has {gpu.compute_capability}"
    if gpu is not None and manifest.gpu not in (None, gpu.name):
        return f"was built on {manifest.gpu}, and this GPU is {gpu.name}"
    if manifest.bundle_files != _files_of(bundle):
        return f"was built from another export than {bundle.folder}"
    if batch is not None and not _admits(manifest, batch):
        profiles = ", ".join(map(str, manifest.options.profiles))
        return f"was built for batches of {profiles} (least:best:most), and a batch of {batch} is asked for"
    return None


def _admits(manifest: PlanManifest, batch: int) -> bool:
    return any(profile.admits(batch) for profile in manifest.options.profiles)


def _sets_in(folder: Path, library: Library) -> list[Path]:
    """Folders of sets of this backend and major version, by name; hidden ones are being built or were left behind."""
    if not folder.is_dir():
        return []
    begin = f"{library.backend}-{library.version.split('.')[0]}"
    return sorted(one for one in folder.iterdir() if one.name.startswith(begin) and (one / MANIFEST).exists())


def _files_of(bundle: Bundle) -> dict[str, str]:
    """SHA-256 of everything in a bundle that goes into a plan."""
    return {name: record.sha256 for name, record in bundle.manifest.files.items() if name != SCHEDULER}


def _key(bundle: Bundle, target: Target, options: PlanOptions) -> str:
    """Short digest of all that changes a plan and is not in the folder's name otherwise."""
    content = [FORMAT_VERSION, _files_of(bundle), options.model_dump(mode="json"), target.gpu]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _check_precision(bundle: Bundle, target: Target) -> None:
    for capability in target.compute_capabilities:
        if bundle.manifest.precision == "bf16" and float(capability) < 8.0:
            raise PlanError(
                f"compute capability {capability} has no bfloat16 and {bundle.folder} is in bf16; "
                f"leave that capability out, or export with --precision fp16"
            )


@contextmanager
def _only_builder(engines: Path, report: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of the folder; it is given up when the process ends, however it ends."""
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
            f"{engines} cannot be written ({problem.strerror or problem}); choose another folder for the plans"
        ) from problem
    try:
        yield
    finally:
        lock.release()


def _part_of(progress: Progress, number: int, count: int) -> Progress:
    """Progress of the k-th of several builds, as progress of all."""
    return lambda fraction, phase: progress((number + fraction) / count, phase)
