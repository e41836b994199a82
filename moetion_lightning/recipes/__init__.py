"""Recipes: complete, tested training configurations, and the small models and data that they run.

A recipe is a YAML file in LightningCLI form. Its header comment holds a title line, the launch command and one example
of an override.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from moetion_lightning.errors import ConfigurationError

__all__ = ["PREFIX", "Recipe", "list_recipes", "recipe_path"]

PREFIX = "recipe:"
_FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A packaged recipe.

    Args:
        name: What follows ``recipe:`` on the command line.
        title: First line of the file's header comment.
        path: The YAML file.
    """

    name: str
    title: str
    path: Path


def list_recipes() -> list[Recipe]:
    """All packaged recipes, by name."""
    return [Recipe(name=p.stem, title=_title(p), path=p) for p in sorted(_FOLDER.glob("*.yaml"))]


def recipe_path(name: str) -> Path:
    """Path of a packaged recipe.

    Args:
        name: Name of a recipe, with or without the prefix ``recipe:`` and the ending ``.yaml``.

    Raises:
        ConfigurationError: There is no such recipe; the message lists the known ones.
    """
    stem = name.removeprefix(PREFIX).removesuffix(".yaml")
    known = {recipe.name: recipe.path for recipe in list_recipes()}
    if stem in known:
        return known[stem]
    near = difflib.get_close_matches(stem, known, n=1, cutoff=0.4)
    hint = f" Did you mean {PREFIX}{near[0]}?" if near else ""
    raise ConfigurationError(f"unknown recipe {stem!r}.{hint} Known recipes: {', '.join(known)}.")


def _title(path: Path) -> str:
    with path.open(encoding="utf-8") as lines:
        return next(lines, "").lstrip("#").strip()
