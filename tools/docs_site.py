"""Hooks of mkdocs: the pages outside docs/ become a part of the site, and links between files work in it.

Pages link to each other as files of the repository, so that the links work where the repository is shown. In the site a
page that is outside docs/ stands under `repository/`. A link to a file that is not in the site becomes plain text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DOCS, REPOSITORY = "docs/", "repository/"

OUTSIDE = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "export/README.md", "engines/README.md")
"""Pages of the site that are not in docs/."""

LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<path>[^)#\s]*)(?P<anchor>#[^)\s]*)?\)")


def in_site(path: str) -> str | None:
    """Where a file of the repository is in the site; None if it is not there."""
    if path.startswith(DOCS):
        return path.removeprefix(DOCS)
    return f"{REPOSITORY}{path}" if path in OUTSIDE else None


def in_repository(page: str) -> str:
    """Which file of the repository a page of the site is."""
    return page.removeprefix(REPOSITORY) if page.startswith(REPOSITORY) else f"{DOCS}{page}"


def links_for_site(markdown: str, path: str) -> str:
    """The text of a file of the repository, with links between pages of the site."""
    folder = posixpath.dirname(in_site(path) or "")

    def for_site(link: re.Match[str]) -> str:
        if not link["path"] or ":" in link["path"]:
            return link[0]
        target = in_site(posixpath.normpath(posixpath.join(posixpath.dirname(path), link["path"])))
        if target is None:
            return link["text"]
        relative = posixpath.relpath(target, folder or ".")
        return f"{link['image']}[{link['text']}]({relative}{link['anchor'] or ''})"

    return LINK.sub(for_site, markdown)


def on_files(files: Any, *, config: Any) -> Any:
    """Called by mkdocs with the files of docs/."""
    from mkdocs.structure.files import File

    for path in OUTSIDE:
        files.append(File.generated(config, in_site(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Called by mkdocs with the text of each page."""
    return links_for_site(markdown, in_repository(page.file.src_uri))
