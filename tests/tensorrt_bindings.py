"""What TensorRT's Python modules offer, read from the modules themselves: names, kinds and signatures, no behaviour.

The extension modules on PyPI are small. They load without a GPU and without TensorRT, over stub libraries that define
the few functions they refer to. Each is imported in a process of its own, as two versions exclude each other.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Kind = Literal["method", "property", "enum member", "class", "attribute"]
ROOT = Path(__file__).parents[1]
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
# The extension takes the addresses of these functions, so it does not load without them.
STUB = """
#define STUB(name) void *name(void) { return 0; }
STUB(createInferBuilder_INTERNAL) STUB(createInferRefitter_INTERNAL) STUB(createInferRuntime_INTERNAL)
STUB(createNvOnnxParserRefitter_INTERNAL) STUB(createNvOnnxParser_INTERNAL) STUB(getNvOnnxParserVersion)
STUB(getBuilderPluginRegistry) STUB(getPluginRegistry) STUB(initLibNvInferPlugins)
"""
# What may hold a comma inside one parameter: a string, a subscript, a tuple, and a default such as <DataType.FLOAT: 0>.
NESTED = re.compile(r"""'[^']*'|"[^"]*"|\[[^][()<>]*]|\([^][()<>]*\)|<[^][()<>]*>""")


class NoBindings(Exception):  # noqa: N818 - a reason to skip a test, not an error
    """The bindings cannot be had here, for the stated reason."""


@dataclass(frozen=True)
class Overload:
    """One form of a method: its documented signature, and for each parameter but self whether it has a default."""

    signature: str
    defaults: Mapping[str, bool]

    def takes(self, arguments: int, keywords: Collection[str]) -> bool:
        """Whether a call with so many positional arguments and these keywords fits."""
        rest = dict(list(self.defaults.items())[arguments:])
        filled = all(name in keywords or default for name, default in rest.items())
        return arguments <= len(self.defaults) and set(keywords) <= set(rest) and filled


@dataclass(frozen=True)
class Member:
    """A member of a class or of the module; without overloads, the arguments of a method are not known."""

    kind: Kind
    settable: bool = False
    overloads: tuple[Overload, ...] = ()


@dataclass(frozen=True)
class Bindings:
    """The classes of a module by qualified name, with inherited members; the class "" holds the module's own names."""

    title: str
    classes: Mapping[str, Mapping[str, Member]]

    def problem(
        self, class_name: str, member: str, kind: Kind | None = "method", arguments: int | None = None,
        keywords: Collection[str] = (), assigned: bool = False,
    ) -> str | None:  # fmt: skip
        """What is wrong with such a use, in a sentence, or None.

        `kind` None means any; `arguments` are the positional ones without self, None if their number is not known.
        """
        if class_name not in self.classes:
            return f"{self.title} has no class {class_name}{_hint(class_name, self.classes)}"
        members, name = self.classes[class_name], f"{class_name}.{member}".lstrip(".")
        if member not in members:
            return f"{self.title} has no {name}{_hint(member, members)}"
        found = members[member]
        if kind not in (None, found.kind):
            return f"{name} of {self.title} is {_a(found.kind)} and not {_a(str(kind))}"
        if assigned and not found.settable:
            return f"{name} of {self.title} is {_a(found.kind)} without a setter"
        wrong = _wrong_call(found.overloads, arguments, keywords) if found.overloads else None
        return wrong and f"{name} of {self.title} {wrong}"


def names_of(version: str, folder: Path) -> Bindings:
    """The bindings of a release of TensorRT, downloaded to the folder."""
    if sys.platform != "linux":
        raise NoBindings("the stub libraries are made as Linux names and finds them")
    pip = ("-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--retries=1", "--no-deps")
    package = f"tensorrt_cu13_bindings=={version}"
    _run("pip cannot download the bindings", sys.executable, *pip, "--only-binary=:all:", "-d", str(folder), package)
    unpacked = folder / version
    for wheel in folder.glob(f"tensorrt_cu13_bindings-{version}-*.whl"):
        shutil.unpack_archive(wheel, unpacked, "zip")
    _make_stubs(unpacked, major=version.split(".")[0])
    return _described("tensorrt_bindings", unpacked)


def names_of_installed(module: str) -> Bindings:
    """The bindings of a module that is installed here, such as tensorrt_rtx."""
    if importlib.util.find_spec(module) is None:
        raise NoBindings(f"{module} is not installed")
    return _described(module)


def _hint(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _a(kind: str) -> str:
    return f"{'an' if kind[0] in 'ae' else 'a'} {kind}"


def _wrong_call(overloads: tuple[Overload, ...], arguments: int | None, keywords: Collection[str]) -> str | None:
    names = [name for overload in overloads for name in overload.defaults]
    for keyword in keywords:
        if keyword not in names:
            return f"has no parameter {keyword}{_hint(keyword, names)}"
    if arguments is None or any(overload.takes(arguments, keywords) for overload in overloads):
        return None
    most = max(len(overload.defaults) for overload in overloads)
    least = min(list(overload.defaults.values()).count(False) for overload in overloads)
    given = arguments + len(keywords)
    if least <= given <= most:
        return f"does not take {arguments} positional arguments and {', '.join(keywords) or 'no others'}"
    takes = f"{least} to {most} arguments" if least < most else f"{most} argument{'s' * (most != 1)}"
    return f"takes {takes}, {given} {'was' if given == 1 else 'were'} given"


def _run(failure: str, *command: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise NoBindings(f"{failure}: {(result.stderr.strip() or 'no message').splitlines()[-1]}")


def _make_stubs(folder: Path, major: str) -> None:
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        raise NoBindings("there is no C compiler")
    source = folder / "stub.c"
    source.write_text(STUB)
    for library in LIBRARIES:
        stub = folder / f"lib{library}.so.{major}"
        _run("the C compiler fails", compiler, "-shared", "-fPIC", "-o", str(stub), str(source))


def _described(module: str, folder: Path | None = None) -> Bindings:
    """What `main` prints in another process; the folder holds the module and the libraries that it needs."""
    command, environment = ["-m", "tests.tensorrt_bindings", module], dict(os.environ)
    if folder is not None:
        # -S: the bindings import the wheel of TensorRT's libraries where one is installed, perhaps of another version
        command = ["-S", *command, str(folder.resolve())]
        paths = (str(folder.resolve()), environment.get("LD_LIBRARY_PATH"))
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, paths))
    result = subprocess.run(
        [sys.executable, *command], stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT, env=environment
    )
    title, classes = json.loads(result.stdout)
    return Bindings(
        title, {name: {each: _restored(fields) for each, fields in found.items()} for name, found in classes.items()}
    )


def _restored(fields: Mapping[str, Any]) -> Member:
    return Member(fields["kind"], fields["settable"], tuple(Overload(**form) for form in fields["overloads"]))


def _classes(owner: type | types.ModuleType, name: str = "") -> Iterator[tuple[str, dict[str, Member]]]:
    """The members of a class or of the module, then those of the classes in it."""
    names = [each for each in dir(owner) if each[0] != "_" or each in ("__init__", "__version__")]
    values = {each: inspect.getattr_static(owner, each) for each in names}
    # a class that cannot be constructed has a slot wrapper as __init__, which raises
    values = {each: value for each, value in values.items() if not isinstance(value, types.WrapperDescriptorType)}
    yield name, {each: _member(each, value) for each, value in values.items()}
    for each, value in values.items():
        if isinstance(value, type):
            yield from _classes(value, f"{name}.{each}".lstrip("."))


def _member(name: str, value: Any) -> Member:
    if isinstance(value, type):
        return Member("class")
    if isinstance(value, property):
        return Member("property", settable=value.fset is not None)
    if hasattr(type(value), "__members__"):
        return Member("enum member")
    return Member("method", overloads=tuple(_overloads(name, value))) if callable(value) else Member("attribute")


def _overloads(name: str, value: Any) -> Iterator[Overload]:
    """The forms of a method, from the signatures that pybind11 puts into its docstring."""
    python = isinstance(value, types.FunctionType)
    text = f"{name}{inspect.signature(value)} -> object" if python else value.__doc__ or ""
    for signature, listed in re.findall(rf"^(?:\d+\. )?({re.escape(name)}\((.*)\) -> .*)$", text, re.MULTILINE):
        flat, nested = listed, 1
        while nested:
            flat, nested = NESTED.subn("", flat)
        parameters = [parameter.strip() for parameter in flat.split(",") if parameter.strip() not in ("", "*", "/")]
        defaults = {re.split("[:=]", each)[0].strip(): "=" in each for each in parameters}
        yield Overload(signature, {each: default for each, default in defaults.items() if each != "self"})


def main(module: str, folder: str | None = None) -> None:
    """Print the title and the classes of a module as JSON."""
    if folder is not None:
        sys.path.insert(0, folder)
    imported = importlib.import_module(module)
    classes = {name: {each: asdict(m) for each, m in members.items()} for name, members in _classes(imported)}
    print(json.dumps([f"{module} {imported.__version__}", classes]))


if __name__ == "__main__":
    main(*sys.argv[1:])
