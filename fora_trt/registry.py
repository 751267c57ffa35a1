"""Extensible registries: architectures, backends, metrics and kinds of schedules, each entry found by its name.

The entries that come with fora-trt are registered by the modules of one package per registry: a new file in that
package adds an entry. Another installed package adds entries by an entry point of the group `fora_trt.plugins`, which
names a module that registers them. All these modules are imported at the first look-up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules
from typing import Protocol, TypeVar

from fora_trt.errors import ForaError

GROUP = "fora_trt.plugins"


class Named(Protocol):
    """An entry of a registry."""

    @property
    def name(self) -> str:
        """The key of the entry in the registry."""


Entry = TypeVar("Entry", bound=Named)


class Registry(Mapping[str, Entry]):
    """Entries by name, in the order of registration.

    `what` is the word for an entry in messages ("backend"). A look-up of an unknown name raises `error`. `package` is
    the dotted name of the package whose modules register the entries that come with fora-trt.
    """

    def __init__(self, what: str, error: type[ForaError], package: str | None = None) -> None:
        self._what, self._error, self._package = what, error, package
        self._entries: dict[str, Entry] = {}

    def register(self, entry: Entry) -> Entry:
        """Add an entry and return it. Raises `ValueError` if the name is registered already."""
        if entry.name in self._entries:
            raise ValueError(f"a {self._what} named {entry.name!r} is already registered; choose another name")
        self._entries[entry.name] = entry
        return entry

    def unregister(self, name: str) -> None:
        """Remove an entry, for example one that a test added."""
        del self._entries[name]

    def __getitem__(self, name: str) -> Entry:
        self._load()
        if name not in self._entries:
            raise self._error(f"unknown {self._what} {name!r}; choose one of {', '.join(self._entries)}")
        return self._entries[name]

    def get(self, name: str, default: None = None) -> Entry | None:  # type: ignore[override]
        """The entry of this name, or None; that of `Mapping` would raise `error`."""
        self._load()
        return self._entries.get(name)

    def __contains__(self, name: object) -> bool:
        self._load()
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(self._entries)

    def __len__(self) -> int:
        self._load()
        return len(self._entries)

    def _load(self) -> None:
        """Import the modules that register entries, once."""
        package, self._package = self._package, None  # reset before the imports, which may look up entries
        if package is not None:
            for module in iter_modules(import_module(package).__path__):
                import_module(f"{package}.{module.name}")
        _load_plugins()


_loaded = False


def _load_plugins() -> None:
    """Import the modules that the entry points of installed packages name, once."""
    global _loaded
    if not _loaded:
        _loaded = True  # set before the imports: a plugin may look up entries
        for plugin in entry_points(group=GROUP):
            plugin.load()
