"""Find the cache sites of a network: resolve kinds and patterns to module paths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from fora_trt.errors import ExportError

OTHER = "module"
"""Kind of a cache site that the architecture does not declare."""


def find_sites(
    module: nn.Module, known: Mapping[str, Sequence[str]], cache: Sequence[str] | None, exclude: Sequence[str] = ()
) -> list[tuple[str, str]]:
    """Module path and kind of every site that `cache` selects and `exclude` does not, in the order of the module tree.

    `known` maps the kinds of the architecture to patterns. Each entry of `cache` is such a kind (`attention`) or a
    pattern over module paths (`transformer_blocks.*.attn1`), and so is each of `exclude`; None selects all kinds.
    Raises `ExportError` for an entry that matches nothing, and for a site inside another site.
    """
    name = type(module).__name__
    paths = [path for path, _ in module.named_modules(remove_duplicate=False) if path]
    shapes = _shapes(paths)
    repeated = [shape for shape in shapes if "*." in shape]
    attentions = [shape for shape in repeated if "att" in shape.rsplit(".", 1)[-1]]
    example = next((patterns[0] for patterns in known.values()), [*attentions, *repeated, "blocks.*.attn"][0])
    choices = f"one of {', '.join(known)} or " if known else ""
    kinds: dict[str, str] = {}
    for wanted in known if cache is None else cache:
        patterns = known.get(wanted, (wanted,))
        matched = [path for path in paths if any(matches(path, pattern) for pattern in patterns)]
        if not matched:
            raise ExportError(
                f"the cache pattern {wanted!r} matches no module of {name}; give {choices}a pattern such as "
                f"{example}, in which * matches one part of a path; the module contains {_outline(shapes)}"
            )
        kinds.update({path: _kind_of(path, known) for path in matched})
    if not kinds:
        raise ExportError(
            f"no cache sites are given for {name}; give --cache a pattern such as {example}; "
            f"the module contains {_outline(shapes)}"
        )
    _leave_out(kinds, known, exclude)
    for path in kinds:
        if outer := next((one for one in kinds if path.startswith(f"{one}.")), None):
            raise ExportError(f"the cache site {path} is inside the cache site {outer}; give --exclude one of them")
    return [(path, kinds[path]) for path in paths if path in kinds]


def _leave_out(kinds: dict[str, str], known: Mapping[str, Sequence[str]], exclude: Sequence[str]) -> None:
    """Remove the sites that `exclude` names. Raises `ExportError` for an entry without a site, and if none is left."""
    selected = [*kinds]
    for unwanted in exclude:
        patterns = known.get(unwanted, (unwanted,))
        matched = [path for path in selected if any(matches(path, pattern) for pattern in patterns)]
        if not matched:
            raise ExportError(
                f"the exclude pattern {unwanted!r} matches no cache site; the cache sites are {_outline(selected)}"
            )
        for path in matched:
            kinds.pop(path, None)
    if not kinds:
        raise ExportError(f"--exclude {' and '.join(exclude)} leaves no cache site; exclude fewer sites")


def matches(path: str, pattern: str) -> bool:
    """Whether a module path matches a pattern, part by part."""
    parts, wanted = path.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def _kind_of(path: str, known: Mapping[str, Sequence[str]]) -> str:
    for kind, patterns in known.items():
        if any(matches(path, pattern) for pattern in patterns):
            return kind
    return OTHER


def _shapes(paths: Sequence[str]) -> list[str]:
    """Distinct module paths with stars for numbers, at most three levels deep; repeated modules come first."""
    starred = (".".join("*" if part.isdecimal() else part for part in path.split(".")) for path in paths)
    shapes = [shape for shape in dict.fromkeys(starred) if shape.count(".") < 3]
    return sorted(shapes, key=lambda shape: "*." not in shape)


def _outline(shapes: Sequence[str], most: int = 12) -> str:
    """The first `most` paths, for a message."""
    return ", ".join(shapes[:most]) + (", ..." if len(shapes) > most else "")
