"""Recipe files: the options of an export, kept in a TOML file under `export/`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fora_trt.errors import ModelError
from fora_trt.models.options import SourceOptions
from fora_trt.models.spec import Optimization

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class Recipe(SourceOptions):
    """What `fora-trt export` takes, by the names of its options; None where the recipe is silent."""

    name: str | None = None
    precision: str | None = None
    cache: tuple[str, ...] | None = None
    opset: int | None = None
    optimize: Optimization | None = None

    def options(self) -> SourceOptions:
        """What of it says how to load the source."""
        return SourceOptions(**{name: getattr(self, name) for name in SourceOptions.model_fields})


def read_recipe(path: Path) -> Recipe:
    """Read a recipe. Raises `ModelError` that names the file and the key that is wrong."""
    try:
        values: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        return Recipe.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ModelError(
            f"the recipe {path} is wrong at {key!r}: {first['msg']}; keys are {', '.join(Recipe.model_fields)}"
        ) from error
    except (OSError, ValueError) as error:
        raise ModelError(f"the recipe {path} cannot be read: {error}") from error
