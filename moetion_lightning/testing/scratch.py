"""A copy of a folder in which a script may write: its own folder stays as it is."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Scratch", "copy_folder"]

_LEFT_OUT = frozenset({".git", ".hg", ".venv", "venv", "node_modules", "__pycache__", ".mypy_cache", ".ruff_cache"})
_LARGE_BYTES = 32 << 20
_ALL_BYTES = 1 << 30
_ALL_FILES = 20_000


@dataclass(kw_only=True)
class Scratch:
    """The copy.

    Args:
        folder: Where it is.
        linked: What is a link to the original: large files, and all that came after too many.
    """

    folder: Path
    linked: list[str] = field(default_factory=list)


def copy_folder(source: Path, target: Path) -> Scratch:
    """Copy what a script may need: its code, its configurations, its small data.

    Files of more than 32 MiB are linked, as is everything beyond 1 GiB or 20,000 files in all: to be read, not written.
    Virtual environments and repositories' own folders are left out.

    Args:
        source: The folder.
        target: A new folder.
    """
    scratch = Scratch(folder=target)
    target.mkdir(parents=True)
    room, files = _ALL_BYTES, _ALL_FILES
    for path in _walk(source):
        copy = target / path.relative_to(source)
        if path.is_symlink():
            copy.symlink_to(path.resolve())
        elif path.is_dir():
            copy.mkdir()
        elif path.is_file():
            size = path.stat().st_size
            if size > _LARGE_BYTES or size > room or files == 0:
                copy.symlink_to(path)
                scratch.linked.append(str(path.relative_to(source)))
            else:
                shutil.copy2(path, copy)
                room, files = room - size, files - 1
    return scratch


def _walk(folder: Path) -> Iterator[Path]:
    """Everything below, folders before what is in them; by names, so that two copies are alike."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except PermissionError:
        return
    for entry in entries:
        if entry.name in _LEFT_OUT:
            continue
        yield Path(entry.path)
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path))
