"""``moetion recipes``: what there is, one recipe's text, or a copy of it."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from moetion_lightning.errors import ConfigurationError
from moetion_lightning.recipes import PREFIX, list_recipes, recipe_path

__all__ = ["recipes"]


def recipes(args: Sequence[str]) -> int:
    """List the recipes, print one, or copy one (or all) to a folder.

    Args:
        args: Arguments after ``moetion recipes``.
    """
    parser = argparse.ArgumentParser(prog="moetion recipes", description="List, print or copy the packaged recipes.")
    parser.add_argument("name", nargs="?", help="a recipe; without it all are listed")
    parser.add_argument("--copy", metavar="DIR", help="copy the recipe (or all of them) into DIR, to edit it there")
    options = parser.parse_args(args)

    chosen = [recipe_path(options.name)] if options.name else [recipe.path for recipe in list_recipes()]
    if options.copy:
        for path in chosen:
            print(_copy(path, Path(options.copy)))
    elif options.name:
        print(chosen[0].read_text(encoding="utf-8"), end="")
    else:
        known = list_recipes()
        width = max(len(recipe.name) for recipe in known)
        for recipe in known:
            print(f"{recipe.name:<{width}}  {recipe.title}")
        print(f"\nrun one:   moetion fit --config {PREFIX}{known[0].name}\nprint one: moetion recipes {known[0].name}")
    return 0


def _copy(path: Path, folder: Path) -> Path:
    target = folder / path.name
    if target.exists():
        raise ConfigurationError(f"{target} exists already; remove it, or copy into another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    except OSError as error:
        raise ConfigurationError(
            f"--copy {folder}: cannot write {path.name} there: {error.strerror or error}. Give a folder, new or "
            "existing, where this user may write."
        ) from error
    return target
