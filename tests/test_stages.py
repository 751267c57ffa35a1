"""The shape of the package: data flows one way and imports the other; commands are thin, the denoiser has little state.

Imports are read off the source text.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import click

from fora_trt import load
from fora_trt.bundle import Bundle
from fora_trt.cli import main

PACKAGE = Path(__file__).parents[1] / "fora_trt"

STAGES = [
    "interruption",
    "downloads",
    "untrusted",
    "errors",
    "quiet",
    "registry",
    "contract",
    "memo",
    "call",
    "plan",
    "masks",
    "schedule",
    "presets",
    "files",
    "models",
    "published_schedules",
    "graph_check",
    "bundle",
    "export",
    "engines",
    "runtime",
    "sampling",
    "images",
    "pipeline",
    "saved_pipeline",
    "diffusers_pipeline",
    "metrics",
    "report",
    "ray_cluster",
    "evaluate",
    "exporting",
    "serve",
    "inspection",
    "doctor",
    "cli",
    "__main__",
]
"""In the order of the data flow; what stands in no folder is a stage of its own."""


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py")}


def imported_by(path: Path) -> Iterator[str]:
    """Modules of the package that one names anywhere, within functions and for type checking too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "fora_trt":
            names = [f"{node.module}.{name.name}" for name in node.names]
            yield from (name if name in MODULES else node.module for name in names)


IMPORTS = {name: {*imported_by(path)} for name, path in MODULES.items() if name != "fora_trt"}
"""Without the package itself, which offers names of all stages."""


def stage_of(module: str) -> int:
    return STAGES.index(module.split(".")[1])


def test_no_module_imports_a_later_stage() -> None:
    later = [
        f"{module} imports {imported}"
        for module, names in IMPORTS.items()
        for imported in names - {"fora_trt"}
        if stage_of(imported) > stage_of(module)
    ]
    assert not later


def test_no_module_imports_itself_through_others() -> None:
    def reached(module: str) -> set[str]:
        found: set[str] = set()
        waiting = [module]
        while waiting:
            for name in IMPORTS.get(waiting.pop(), set()) - found:
                found.add(name)
                waiting.append(name)
        return found

    assert [module for module in IMPORTS if module in reached(module)] == []


def test_the_tests_above_see_imports() -> None:
    assert "fora_trt.contract" in IMPORTS["fora_trt.bundle"]
    assert "fora_trt.engines.backends" in IMPORTS["fora_trt.runtime.denoiser"]


def test_commands_are_thin() -> None:
    """A command is its options, one call and one print: no more than 60 lines, in a file of its own."""
    for name, command in main.commands.items():
        assert isinstance(command, click.Command)
        tree = ast.parse((PACKAGE / "cli" / f"{name}.py").read_text())
        (function,) = [one for one in tree.body if isinstance(one, ast.FunctionDef) and one.name == name]
        assert function.end_lineno is not None
        assert function.end_lineno - function.lineno < 60, name


def test_the_denoiser_has_little_state(exported: Bundle) -> None:
    denoiser = load(exported, schedule="fora:3", backend="torch", device="cpu")
    assert len(vars(denoiser)) <= 15, sorted(vars(denoiser))
