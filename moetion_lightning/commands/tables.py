"""What commands print: tables drawn by rich, or the same as JSON."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import sys
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["add_json", "paragraph", "print_json", "show", "table", "text"]

_NO_LIMIT = 10_000  # characters of a line where nobody looks at a terminal: another program may read it

_PROSE = 100  # characters of a line of running text, where a terminal is not narrower


def paragraph(prose: str) -> Text:
    """Running text: its lines are broken where the terminal ends."""
    return Text(prose)


def table(header: Sequence[str], rows: Iterable[Sequence[str]], right: Collection[int] = ()) -> Table:
    """A plain table.

    Args:
        header: One title a column.
        rows: Cells; all rows have as many.
        right: Columns of numbers.
    """
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for index, name in enumerate(header):
        # What a row is about is there to be copied.
        made.add_column(name, justify="right" if index in right else "left", overflow="fold", no_wrap=index == 0)
    for row in rows:
        made.add_row(*row)
    return made


def show(*parts: str | Text | Table) -> None:
    """Print lines and tables: to a terminal as wide as that is, else every row on a line of its own."""
    _print(parts, sys.stdout)


def text(*parts: str | Text | Table) -> str:
    """The same as text."""
    stream = io.StringIO()
    _print(parts, stream)
    return stream.getvalue()


def _print(parts: Sequence[str | Text | Table], stream: TextIO) -> None:
    console = Console(file=stream, width=None if stream.isatty() else _NO_LIMIT, highlight=False, markup=False)
    for part in parts:
        width = min(_PROSE, console.width) if isinstance(part, Text) else None
        console.print(part, soft_wrap=isinstance(part, str), width=width)


def add_json(parser: argparse.ArgumentParser) -> None:
    """Give a command ``--json``."""
    parser.add_argument("--json", action="store_true", help="print one JSON document instead, for programs")


def print_json(value: Any) -> None:
    """Print dataclasses, mappings and sequences of such, numbers and strings as one JSON document."""
    print(json.dumps(value, default=_plain, indent=2, allow_nan=False))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        values = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {name: found for name, found in values.items() if not callable(found)}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} has no form in JSON")
