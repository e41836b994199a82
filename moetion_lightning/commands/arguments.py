"""Arguments that several commands take: a program, and ``recipe:NAME``, which stands for a packaged file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from moetion_lightning.recipes import PREFIX, recipe_path

__all__ = ["add_program", "expand_recipes"]

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


def add_program(parser: argparse.ArgumentParser, text: str) -> None:
    """Let a parser know a script or module with its arguments.

    Args:
        parser: The parser.
        text: What is done with it.
    """
    parser.add_argument("-m", "--module", action="store_true", help="SCRIPT is a module, as for python -m")
    parser.add_argument("script", metavar="SCRIPT", help=text)
    rest = parser.add_argument("arguments", metavar="ARGUMENTS", nargs=argparse.REMAINDER, help="its arguments")
    rest.required = False  # argparse names it among what is missing
