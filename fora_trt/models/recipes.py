"""Recipes: TOML files under `export/` with the options of an export."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fora_trt.contract import Optimization
from fora_trt.downloads import text_of
from fora_trt.errors import ModelError, first_line
from fora_trt.models.options import SourceOptions
from fora_trt.schedule import in_folder

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class Recipe(SourceOptions):
    """The options of `fora-trt export` by name; None for an option that the recipe does not set."""

    name: str | None = None
    precision: str | None = None
    opset: int | None = None
    optimize: Optimization | None = None
    schedule: str | None = None

    def options(self) -> SourceOptions:
        """The options that determine how the source is loaded."""
        return SourceOptions(**{name: getattr(self, name) for name in SourceOptions.model_fields})


def read_recipe(path: Path) -> Recipe:
    """Read a recipe. The path of a schedule file is relative to the recipe.

    Raises `ModelError` that names the file and the invalid key.
    """
    try:
        values: dict[str, Any] = tomllib.loads(text_of(path))
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ModelError(
            f"the recipe {path} is invalid at {key!r}: {first['msg']}; valid keys are {', '.join(Recipe.model_fields)}"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        reason = first_line(error)
        raise ModelError(f"the recipe {path} cannot be read: {reason}; give the path of a valid TOML file") from error
    if recipe.schedule is not None:
        recipe = recipe.model_copy(update={"schedule": in_folder(recipe.schedule, path.parent)})
    return recipe
