"""A copy of a folder in which a script may write: its own folder stays as it is."""

from __future__ import annotations

import os
import shutil
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
    copy = _Copy(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    copy.folder(source, target)
    return Scratch(folder=target, linked=copy.linked)


class _Copy:
    def __init__(self, source: Path) -> None:
        self._source = source
        self._room, self._files = _ALL_BYTES, _ALL_FILES
        self.linked: list[str] = []

    def folder(self, source: Path, target: Path) -> None:
        """Its entries by their names, so that two copies are alike."""
        target.mkdir()
        try:
            entries = sorted(os.scandir(source), key=lambda entry: entry.name)
        except PermissionError:
            return
        for entry in entries:
            path, copy = Path(entry.path), target / entry.name
            if entry.name in _LEFT_OUT:
                continue
            if entry.is_symlink():
                copy.symlink_to(path.resolve())
            elif entry.is_dir() and self._files > 0:
                self.folder(path, copy)
            elif entry.is_dir() or entry.is_file():
                self._entry(entry, copy)

    def _entry(self, entry: os.DirEntry[str], copy: Path) -> None:
        size = entry.stat().st_size
        if entry.is_dir() or size > min(_LARGE_BYTES, self._room) or self._files == 0:
            copy.symlink_to(entry.path)
            self.linked.append(os.path.relpath(entry.path, self._source))
        else:
            shutil.copy2(entry.path, copy)
            self._room, self._files = self._room - size, self._files - 1
