"""Which job this is: the same command started again is the same job."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import xxhash

from moetion_lightning.config import job_id_from_environment

__all__ = ["derive_job_id", "note_completed"]

#: Completed runs of this process, by identity.
_completed: dict[str, int] = {}


def derive_job_id(given: str | None, root_dir: str | os.PathLike[str]) -> str:
    """The identity under which state is stored and found again.

    Two starts are the same job when user, working directory, command line and root directory agree. After a completed
    run, the next one of the same process gets an identity of its own, so that a script that trains twice does not take
    one run for the other; after a failed one it continues that.

    Args:
        given: Explicit identity, or None.
        root_dir: Where the run writes its files.
    """
    base = given or job_id_from_environment()
    if base is None:
        parts = [str(os.getuid()), os.getcwd(), str(Path(root_dir).absolute()), sys.executable, *sys.argv]
        script = Path(sys.argv[0]).stem if sys.argv and sys.argv[0] else "python"
        name = "".join(c if c.isalnum() or c in "_-" else "_" for c in script)[:40] or "python"
        base = f"{name}-{xxhash.xxh3_64_hexdigest(chr(0).join(parts).encode())}"
    number = _completed.get(base, 0)
    return base if number == 0 else f"{base}.{number}"


def note_completed(job: str) -> None:
    """The run with this identity is complete."""
    base, _, number = job.rpartition(".")
    if base in _completed and number.isdigit():
        job = base
    _completed[job] = _completed.get(job, 0) + 1
