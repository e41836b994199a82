"""``recipe:NAME`` on the command line: replaced by the path of the packaged file."""

from __future__ import annotations

from collections.abc import Sequence

from moetion_lightning.recipes import PREFIX, recipe_path

__all__ = ["expand_recipes"]

_FLAGS = ("--config", "-c")


def expand_recipes(args: Sequence[str]) -> list[str]:
    """Replace ``recipe:NAME`` after ``--config`` or ``-c`` by the recipe's path; everything else stays as it is.

    Raises:
        ConfigurationError: A recipe is unknown.
    """
    expanded: list[str] = []
    for index, arg in enumerate(args):
        flag, equals, value = arg.partition("=")
        if equals and flag in _FLAGS and value.startswith(PREFIX):
            expanded.append(f"{flag}={recipe_path(value)}")
        elif arg.startswith(PREFIX) and index and args[index - 1] in _FLAGS:
            expanded.append(str(recipe_path(arg)))
        else:
            expanded.append(arg)
    return expanded
