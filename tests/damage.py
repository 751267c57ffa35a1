"""Ways to harm a folder that a manifest describes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fora_trt.files import sealed


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest as its author could: with a digest that fits."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    change(manifest)
    path.write_text(sealed(manifest))


def flip_a_byte(path: Path, position: int | None = None) -> None:
    """Flip the lowest bit of one byte, in the middle if nothing else is said."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if position is None else position] ^= 1
    path.write_bytes(content)


def replace_by_link(path: Path) -> None:
    """Move a file out of its folder and leave a link to it."""
    path.symlink_to(path.rename(path.parent.parent / path.name))
