"""Results that many tests compare with: made once, also where several processes run tests beside each other."""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


class References:
    """Folders of finished runs, by what was run.

    Args:
        base: Folder that all processes of the test session share.
    """

    def __init__(self, base: Path) -> None:
        self._base = base
        base.mkdir(exist_ok=True)

    def get(self, spec: Any, make: Callable[[Path], None]) -> Path:
        """The folder of a run, which is made by the first who asks for it while the others wait.

        Args:
            spec: What is run, as plain data.
            make: Fills the empty folder; an error leaves it to the next one who asks.
        """
        key = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:32]
        folder, done = self._base / key, self._base / f"{key}.done"
        with (self._base / f"{key}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                done.touch()
        return folder
