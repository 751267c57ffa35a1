"""Collect all wheels that fora-trt needs for a machine without network, with digests and an install script.

    python -m tools.wheelhouse --python 3.12 --extras rtx --without torch

If that machine has most distributions already, give the output of its `pip list` (columns or --format=freeze): only
missing distributions are collected, and installed ones do not change.

    python -m tools.wheelhouse --python 3.12 --extras '' --have pip-list.txt

The wheels can also be unpacked to a folder on PYTHONPATH, without a virtual environment; see --help.
"""

from __future__ import annotations

import email.parser
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import click
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

ROOT = Path(__file__).parents[1]
MIB = 2**20
GLIBC = 28  # wheels for glibc 2.28 or older run on every Linux that current NVIDIA drivers support
SUMS, WHEEL_SUMS, SCRIPT = "SHA256SUMS", "WHEELS.SHA256SUMS", "install.sh"

# The script contains the digest of SHA256SUMS, which contains those of the parts and of WHEELS.SHA256SUMS. The wheels
# include pip, because a bare Python often has none. Settings of the machine's pip are disabled, so it uses no index.
INSTALL = r"""#!/bin/sh
# Installs fora-trt from the parts in the folder of this script, without network: sh install.sh [PYTHON] [VENV]
set -u
version='@version@' extras='@extras@' without='@without@' have='@have@' glibc='@glibc@'
python=${1:-python$version}
venv=${2:-fora-trt-venv}
outside=$without$have # distributions that PYTHON provides
here=$(cd "$(dirname "$0")" && pwd) || exit 1

fail() { echo "install.sh: $1" >&2; exit 1; }

intact() { # DIGEST NAME
    [ -f "$here/$2" ] || fail "$2 is missing: copy it again"
    [ "$(sha256sum <"$here/$2")" = "$1  -" ] || fail "$2 is damaged: copy it again"
}

install() { # with the pip inside its wheel, or else with the pip of PYTHON
    set -- --isolated install --quiet --no-index --find-links "$venv/wheels" "$@"
    pip=$(echo "$venv"/wheels/pip-*.whl)
    if [ -f "$pip" ]; then set -- "$pip/pip" "$@"; else set -- -m pip "$@"; fi
    PIP_CONFIG_FILE=/dev/null "$venv/bin/python" "$@"
}

differences() { # between the versions for which the wheels were collected and those of PYTHON
    "$python" -c 'import re, sys, importlib.metadata as m
found = []
for name, _, version in (promised.partition("==") for promised in sys.argv[1:]):
    try:
        there = re.sub(r"(^|[.+])0+(?=\d)", r"\1", m.version(name))
    except m.PackageNotFoundError:
        there = "none"
    if there != version:
        found.append(f"{name} {version} (installed: {there})")
print(*found, sep=", ")' $have
}

found=$("$python" -c 'import platform as p, sys
v = sys.version_info
print("%s %d.%d for %s %s" % (p.python_implementation(), v[0], v[1], p.system(), p.machine()))' 2>/dev/null) ||
    fail "$python cannot be run: give the path of a Python $version: sh install.sh PYTHON"
[ "$found" = "CPython $version for Linux x86_64" ] ||
    fail "these wheels are for CPython $version for Linux x86_64, but $python is $found: sh install.sh PYTHON"
for name in $without; do
    "$python" -c 'import sys, importlib.metadata as m; m.version(sys.argv[1])' "$name" 2>/dev/null ||
        fail "these wheels were collected without $name, but $python has no $name: give a Python that has it"
done
differing=$(differences) || fail "$python cannot list its distributions: give another: sh install.sh PYTHON"
[ -z "$differing" ] ||
    fail "these wheels were collected for $differing: give another Python, or collect again for its pip list with HAVE"

intact '@sums@' SHA256SUMS
while read -r digest name; do intact "$digest" "$name"; done <"$here/SHA256SUMS"

mkdir "$venv" 2>/dev/null || fail "$venv exists or cannot be created: give another folder: sh install.sh $python VENV"
trap 'rm -rf "$venv"' EXIT
trap 'exit 1' HUP INT TERM
mkdir "$venv/wheels"
(cd "$here" && sed -n 's/^.*  wheels/wheels/p' SHA256SUMS | xargs cat) | tar -xf - -C "$venv/wheels" &&
    (cd "$venv/wheels" && sha256sum -c "$here/WHEELS.SHA256SUMS" >/dev/null) ||
    fail "the wheels could not be unpacked to $venv: check the free space of the disk"
"$python" -m venv --without-pip ${outside:+--system-site-packages} "$venv" ||
    fail "$python cannot create a virtual environment: install its module venv"
if [ -n "$outside" ]; then # --system-site-packages does not show the packages of a PYTHON in a virtual environment
    packages='import sysconfig; print(sysconfig.get_path("purelib"))'
    "$python" -c "$packages" >"$("$venv/bin/python" -c "$packages")/outside.pth"
fi
# Install all wheels, whatever versions PYTHON has. Then a normal install lets pip report missing requirements. With
# HAVE this is skipped: versions were compared above, and distributions of PYTHON may lack their own requirements.
install --no-deps --ignore-installed "$venv"/wheels/*.whl &&
    { [ -n "$have" ] || install "fora-trt${extras:+[$extras]}"; } ||
    fail "pip could not install the wheels, which need glibc $glibc or newer; $venv was removed"
rm -r "$venv/wheels"
trap - EXIT
echo "fora-trt is installed: . $venv/bin/activate"
"$venv/bin/fora-trt" doctor
"""


def run(command: list[str], failure: str) -> None:
    """Run a command without showing its output; if it fails, raise `failure` with the last lines of the output."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise click.ClickException("\n  ".join([failure, *lines[-5:]]))


def interpreter_from_name(wanted: str) -> tuple[str, str]:
    """Path and version (such as 3.12) of the interpreter that `wanted` names: a version, a command or a path."""
    named = re.fullmatch(r"(?:python)?(3\.\d+)", wanted)
    version = named[1] if named else ""
    code = "import sys, platform as p; print(sys.executable, '%d.%d' % sys.version_info[:2], p.system(), p.machine())"
    # A pyenv shim runs an installed but inactive version only if PYENV_VERSION names it.
    environment = os.environ | ({"PYENV_VERSION": version} if version else {})
    for command in (sys.executable, f"python{version}", "python3") if version else (wanted,):
        try:
            asked = subprocess.run([command, "-c", code], env=environment, capture_output=True, text=True)
        except OSError:
            continue
        path, found, *machine = asked.stdout.rsplit(maxsplit=3) if asked.returncode == 0 else ("", "", "")
        if path and version in ("", found):
            if machine != ["Linux", "x86_64"]:
                raise click.ClickException(f"{path} is for {' '.join(machine)}: collect the wheels on Linux x86-64")
            return path, found
    raise click.ClickException(f"no Python {wanted} is installed: install it, or give its path with --python")


def environment_in(folder: Path, python: str) -> str:
    """The interpreter of a new environment with a current pip; older ones download wheels just to resolve versions."""
    run([python, "-m", "venv", str(folder)], f"{python} cannot create a virtual environment:")
    inside = str(folder / "bin" / "python")
    run([inside, "-m", "pip", "install", "--quiet", "--upgrade", "pip"], "pip could not be updated:")
    return inside


def listed(path: Path) -> dict[str, str]:
    """Versions by name from the output of `pip list`, in columns or with --format=freeze, without fora-trt itself."""
    found: dict[str, str] = {}
    mend = f"create it on that machine with: python -m pip list >{path.name}"
    for line in filter(None, map(str.strip, path.read_text(encoding="utf-8").splitlines())):
        if re.match(r"Package\s+Version|-[- ]+$|#|WARNING:|\[notice\]", line):
            continue
        entry = re.match(r"([A-Za-z0-9][\w.-]*)(?:==|\s+)(\S+)(?:\s|$)", line)
        try:
            found[canonicalize_name(entry[1] if entry else "")] = str(Version(entry[2] if entry else ""))
        except InvalidVersion as error:
            raise click.ClickException(f"{path} has no distribution and version in {line!r}: {mend}") from error
    if not found:
        raise click.ClickException(f"{path} lists no distributions: {mend}")
    found.pop("fora-trt", None)
    return found


def machine_like(folder: Path, python: str, have: Mapping[str, str]) -> str:
    """The interpreter of an environment that contains only metadata of these distributions; pip sees them as installed.

    The metadata lists no requirements, so requirements of installed distributions are not collected.
    """
    run([python, "-m", "venv", "--without-pip", str(folder)], f"{python} cannot create a virtual environment:")
    (site,) = folder.glob("lib/python*/site-packages")
    for name, version in have.items():
        about = site / f"{name.replace('-', '_')}-{version}.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return str(folder / "bin" / "python")


def project_wheel(python: str, extras: Collection[str], folder: Path) -> Path:
    """Build the wheel of fora-trt. Raises for extras that it does not have, and for cpu together with gpu."""
    run(
        [python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)],
        "pip cannot build fora-trt:",
    )
    (wheel,) = folder.glob("fora_trt-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        known = email.parser.Parser().parsestr(archive.read(name).decode()).get_all("Provides-Extra", [])
    if unknown := set(extras) - set(known):
        raise click.ClickException(f"unknown extras {', '.join(sorted(unknown))}; choose from {', '.join(known)}")
    if {"cpu", "gpu"} <= set(extras):
        raise click.ClickException("the extras cpu and gpu exclude each other: give only one of them")
    return wheel


def resolved(python: str, wheel: Path, extras: str, folder: Path, have: Mapping[str, str]) -> dict[str, Any]:
    """Pip's report of the distributions that a machine with `have` lacks; keeps installed versions if possible."""
    machine = machine_like(folder / "machine", python, have)
    tested = constraints_of(ROOT / "constraints.txt")
    others = [line for name, lines in tested.items() if name not in have for line in lines]
    kept = [f"{name}=={version}" for name, version in have.items()]

    def lacking(constraints: list[str]) -> dict[str, Any]:
        return report_of(python, machine, wheel, extras, folder, constraints)

    if not have:
        return lacking(others)
    for constraints, word in (
        ([*kept, *others], "versions in constraints.txt conflict with installed ones: allowing other versions"),
        (kept, "not every installed version can be kept: allowing newer ones"),
    ):
        with suppress(Unresolvable):
            return lacking(constraints)
        click.echo(word, err=True)
    found = lacking(others)
    with suppress(Unresolvable):
        replaced = [line for name in have.keys() & versions_of(found) for line in tested.get(name, ())]
        return lacking([*others, *replaced])
    return found


class Unresolvable(click.ClickException):
    """Requirements and constraints that contradict each other."""


def constraints_of(path: Path) -> dict[str, list[str]]:
    """Lines of a constraints file by the name of the distribution."""
    found: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            found.setdefault(canonicalize_name(Requirement(line).name), []).append(line)
    return found


def report_of(
    python: str, machine: str, wheel: Path, extras: str, folder: Path, constraints: Iterable[str]
) -> dict[str, Any]:
    """Pip's report of the distributions that the machine lacks; prefers wheels that also run on older Linux."""
    report, file = folder / "report.json", folder / "constraints.txt"
    file.write_text("".join(f"{line}\n" for line in constraints))
    command = [python, "-m", "pip", "--python", machine, "install", "--quiet", "--dry-run", "--report", str(report)]
    command += ["--constraint", str(file), "pip", f"{wheel}[{extras}]" if extras else str(wheel)]
    (limit,) = Path(machine).parents[1].glob("lib/python*/site-packages")
    limit /= "_manylinux.py"  # pip imports this module to check wheels (PEP 600)
    limit.write_text(f"def manylinux_compatible(major, minor, arch): return (major, minor) <= (2, {GLIBC})\n")
    try:
        run(command, "pip cannot resolve the requirements:")
    except click.ClickException as error:
        if "ResolutionImpossible" in error.message:
            raise Unresolvable(error.message) from error
        if "No matching distribution" not in error.message:
            raise
        click.echo(f"some distributions have no wheel for glibc 2.{GLIBC}: allowing newer glibc", err=True)
        limit.unlink()
        run(command, "pip cannot resolve the requirements:")
    found: dict[str, Any] = json.loads(report.read_text())
    return found


def versions_of(report: dict[str, Any]) -> dict[str, str]:
    """Versions by name of the distributions that pip would install."""
    found = (item["metadata"] for item in report["install"])
    return {canonicalize_name(metadata["name"]): metadata["version"] for metadata in found}


def closure(report: dict[str, Any], roots: Iterable[str], without: Collection[str]) -> set[str]:
    """Names of the distributions that the roots need; requirements of distributions in `without` are not followed."""
    found = {canonicalize_name(item["metadata"]["name"]): item["metadata"] for item in report["install"]}
    reached: set[tuple[str, str]] = set()
    waiting = [Requirement(root) for root in roots]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras} if name not in without else ():
            if (name, extra) in reached:
                continue
            reached.add((name, extra))
            environment = report["environment"] | {"extra": extra}
            needs = map(Requirement, found[name].get("requires_dist", ()))
            waiting += [need for need in needs if need.marker is None or need.marker.evaluate(environment)]
    return {name for name, _ in reached}


def download(python: str, report: dict[str, Any], names: Collection[str], folder: Path) -> None:
    """Download the distributions `names` of the report as wheels; each is pinned by its SHA-256."""
    lines = []
    for (name, version), item in zip(versions_of(report).items(), report["install"], strict=True):
        if name in names and name != "fora-trt":
            lines.append(
                f"{name}=={version} --hash=sha256:{item['download_info']['archive_info']['hashes']['sha256']}\n"
            )
    wanted = folder.parent / "wanted.txt"
    wanted.write_text("".join(lines))
    command = [python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder)]
    run([*command, "--requirement", str(wanted)], "pip could not download the wheels:")
    if built := [wheel.name for wheel in folder.glob("*-linux_x86_64.whl")]:
        raise click.ClickException(
            f"{built[0]} was compiled on this machine and may not run on others: pin a version that has a wheel"
        )


class Parts(io.RawIOBase):
    """A stream that writes to numbered files of at most `limit` bytes each."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self.files: list[Path] = []
        self.room = 0

    def write(self, data: Any) -> int:
        """Append to the last file; start a new file when it is full."""
        rest = memoryview(data)
        while rest:
            if self.room == 0:
                self.files.append(self.folder / f"wheels.tar.{len(self.files):03d}")
                self.room = self.limit
            with self.files[-1].open("ab") as file:
                written = file.write(rest[: self.room])
            rest, self.room = rest[written:], self.room - written
        return len(data)


def sums_of(files: Iterable[Path]) -> str:
    """SHA-256 of each file, in the format of sha256sum."""
    lines = []
    for path in files:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(MIB):
                digest.update(block)
        lines.append(f"{digest.hexdigest()}  {path.name}\n")
    return "".join(lines)


def pack(
    wheels: Collection[Path], house: Path, limit: int, version: str, extras: str, without: str, have: str = ""
) -> list[Path]:
    """Write parts, digests of parts and wheels, and the install script to a new folder; return the parts."""
    house.mkdir()
    parts = Parts(house, limit)
    with tarfile.open(fileobj=parts, mode="w|", bufsize=MIB) as tar:
        for wheel in wheels:
            entry = tarfile.TarInfo(wheel.name)  # no owner and a fixed time: equal wheels give equal parts
            entry.size, entry.mtime = wheel.stat().st_size, 315532800  # 1980-01-01; tar warns about 1970
            with wheel.open("rb") as file:
                tar.addfile(entry, file)
    (house / WHEEL_SUMS).write_text(sums_of(wheels))
    (house / SUMS).write_text(sums_of([*parts.files, house / WHEEL_SUMS]))
    # A wheel without a glibc version in its name needs at most glibc 2.17.
    glibc = max(min(map(int, re.findall(r"manylinux_2_(\d+)", wheel.name)), default=17) for wheel in wheels)
    values = {"version": version, "extras": extras, "without": without, "have": have, "glibc": f"2.{glibc}"}
    values["sums"] = sums_of([house / SUMS]).split()[0]
    (house / SCRIPT).write_text(re.sub("@([a-z]+)@", lambda match: values[match[1]], INSTALL))
    return parts.files


def check_replaceable(out: Path) -> None:
    """Raise unless `out` is missing, an empty folder or a wheelhouse."""
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    foreign = {name for name in names if not re.fullmatch(rf"wheels\.tar\.\d+|{SUMS}|{WHEEL_SUMS}|{SCRIPT}", name)}
    if foreign or (out.exists() and not out.is_dir()):
        raise click.ClickException(f"{out} is not a wheelhouse and is not replaced: give another folder with --out")


class Collected(NamedTuple):
    """The wheels, largest first, and versions of distributions that the machine must have installed."""

    wheels: list[Path]
    promised: dict[str, str]


def collected(work: Path, python: str, extras: str, absent: Collection[str], have: Mapping[str, str]) -> Collected:
    """Download the distributions that the extras need to a folder of `work`.

    Distributions of `have` and `absent`, and requirements of only `absent` ones, are left out.
    """
    inside = environment_in(work / "environment", python)
    wheel = project_wheel(inside, set(filter(None, extras.split(","))), work / "wheels")
    click.echo(f"resolving with {python}", err=True)
    report, roots = resolved(inside, wheel, extras, work, have), ["pip", f"fora-trt[{extras}]"]
    lacking = versions_of(report)
    there = {name: version for name, version in have.items() if name not in lacking}
    whole = report | {"install": [*report["install"], *({"metadata": {"name": name}} for name in there)]}
    everything, names = closure(whole, roots, ()), closure(whole, roots, absent)
    if unknown := set(absent) - everything:
        raise click.ClickException(f"no distribution requires {', '.join(sorted(unknown))}: remove it from --without")
    for name in sorted(names & lacking.keys() & have.keys()):
        click.echo(f"{name} {have[name]} is installed but not supported: collecting {lacking[name]}", err=True)
    click.echo(f"downloading {len(names - there.keys())} of {len(everything)} distributions", err=True)
    download(inside, report, names - there.keys(), work / "wheels")
    wheels = sorted((work / "wheels").iterdir(), key=lambda file: (-file.stat().st_size, file.name))
    return Collected(wheels, {name: there[name] for name in sorted(names & there.keys())})


def make_wheelhouse(
    python: str, extras: str, without: Collection[str], have: Mapping[str, str], limit: int, out: Path
) -> None:
    """Write the wheelhouse to a temporary folder, rename it to `out`, and list its content."""
    check_replaceable(out)
    path, version = interpreter_from_name(python)
    absent = [canonicalize_name(name) for name in without]
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
        work = Path(temporary)
        wheels, promised = collected(work, path, extras, absent, have)
        lists = " ".join(absent), " ".join(f"{name}=={version}" for name, version in promised.items())
        parts = [part.stat().st_size for part in pack(wheels, work / "house", limit, version, extras, *lists)]
        lines = [f"{wheel.stat().st_size / MIB:9.2f} MiB  {wheel.name}" for wheel in wheels]
        if out.exists():
            out.rename(work / "replaced")
        (work / "house").rename(out)
    lines.append(f"{sum(parts) / MIB:9.2f} MiB  in {len(parts)} parts of at most {max(parts) / MIB:.2f} MiB in {out}")
    click.echo("\n".join([*lines, f"copy this folder to the other machine and run there: sh {SCRIPT} [PYTHON] [VENV]"]))


@click.command()
@click.option("--python", default=f"3.{sys.version_info.minor}", help="Version, command or path.", show_default=True)
@click.option("--extras", default="cpu", help="Extras of fora-trt, comma-separated.", show_default=True)
@click.option("--without", multiple=True, help="Leave out a distribution and what only it requires; repeatable.")
@click.option(
    "--have",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="File with the output of `pip list` on that machine: collect only missing distributions.",
)
@click.option(
    "--part-size", type=click.IntRange(min=1), default=60, help="Largest size of a part in MiB.", show_default=True
)
@click.option("--out", type=click.Path(path_type=Path), default="wheelhouse", help="Output folder.", show_default=True)
def main(python: str, extras: str, without: tuple[str, ...], have: Path | None, part_size: int, out: Path) -> None:
    """Collect the wheels of fora-trt for a Linux x86-64 machine without network; install.sh installs them there.

    \b
    To use the wheels without a virtual environment, unpack them there and put `wheels` on PYTHONPATH:
      mkdir wheels && cat wheels.tar.* | tar -xf - -C wheels
      for wheel in wheels/*.whl; do python3 -m zipfile -e "$wheel" wheels; done
      PYTHONPATH=$PWD/wheels python3 -m fora_trt doctor
    """
    try:
        there = {} if have is None else listed(have)
        make_wheelhouse(python, extras.replace(" ", ""), without, there, part_size * MIB, out.resolve())
    except OSError as error:
        raise click.ClickException(f"the wheelhouse cannot be written: {error}") from error


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # exit normally, so that the temporary folder is deleted
    main()
