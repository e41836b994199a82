"""``job.json``: which process opened a place last, for people and for messages."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from typing import Any

from moetion_lightning.errors import MoEtionError
from moetion_lightning.storage.folders import JOB_NOTE
from moetion_lightning.storage.owner import boot_id
from moetion_lightning.storage.place import Place

__all__ = ["is_of_this_process", "main_file", "read_job_note", "write_job_note"]


def write_job_note(place: Place, *, job: str, rank: int, world_size: int) -> None:
    """Say that this process has opened the place."""
    note = {
        "job": job,
        "rank": rank,
        "world_size": world_size,
        **_process(),
        "argv": sys.argv,
        "cwd": os.getcwd(),
        "script": main_file(),
        "created": time.time(),
    }
    place.write(JOB_NOTE, json.dumps(note, indent=1).encode())


def read_job_note(place: Place) -> dict[str, Any]:
    """What the note says, empty when it is absent or damaged: it only informs."""
    try:
        note = json.loads(place.read(JOB_NOTE) or b"{}")
    except (MoEtionError, ValueError, RecursionError):
        return {}
    if not isinstance(note, dict) or not isinstance(note.get("created", 0), (int, float)):
        return {}
    return note


def is_of_this_process(place: Place) -> bool:
    """Whether this process was the last one to open the place."""
    note = read_job_note(place)
    return all(note.get(key) == value for key, value in _process().items())


def main_file() -> str:
    """Absolute path of the program's main file; "" where there is none (a notebook, ``python -c``)."""
    main = sys.modules.get("__main__")
    file = getattr(main, "__file__", None) or (sys.argv[0] if sys.argv else "")
    return os.path.abspath(file) if file and os.path.exists(file) else ""


def _process() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": platform.node(), "boot_id": boot_id()}
