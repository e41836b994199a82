"""Where drills and demonstrations write: a folder for results, and one in memory that never stays."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from moetion_lightning.errors import ConfigurationError

__all__ = ["run_folders", "shared_memory"]

_SHARED = Path("/dev/shm")


def shared_memory() -> Path | None:
    """Host memory as a folder; None where there is none that this user may write to."""
    return _SHARED if os.access(_SHARED, os.W_OK | os.X_OK) else None


@contextlib.contextmanager
def run_folders(wanted: Path | None, option: str, prefix: str, memory_base: Path | None) -> Iterator[tuple[Path, Path]]:
    """An empty folder for results, kept if the user named it, and one in memory that is removed in the end.

    Args:
        wanted: The user's folder.
        option: By which it was given, for the message.
        prefix: Of the names of folders that are made here.
        memory_base: Where the second one is made; None: among temporary files.

    Raises:
        ConfigurationError: The user's folder is not empty.
    """
    folder = Path(wanted or tempfile.mkdtemp(prefix=prefix)).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ConfigurationError(f"{option} {folder} is not empty; give a new folder")
    memory = Path(tempfile.mkdtemp(prefix=prefix, dir=memory_base))
    try:
        yield folder, memory
    finally:
        shutil.rmtree(memory, ignore_errors=True)
        if wanted is None:
            shutil.rmtree(folder, ignore_errors=True)
