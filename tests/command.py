"""Running `moetion` commands, and waiting for what they do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
LIMIT_SECONDS = 60.0


def until(condition: Callable[[], Any], what: str) -> Any:
    """Wait until a condition holds, and return its value."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError(f"not within {LIMIT_SECONDS} s: {what}")


def _heed_interrupts() -> None:
    """What a shell starts in the background ignores SIGINT, and so would this command."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Command:
    """A running `moetion` command."""

    def __init__(self, log: Path, *args: object, **env: str) -> None:
        self.log = log
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "moetion_lightning", *map(str, args)],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", **env},
                stdout=file,
                stderr=subprocess.STDOUT,
                preexec_fn=_heed_interrupts,
            )

    @property
    def text(self) -> str:
        return self.log.read_text()

    def wait(self) -> int:
        return self.process.wait(timeout=LIMIT_SECONDS)

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def pids_of(self, module: str) -> set[int]:
        found = set()
        for child in self.children():
            try:
                if f"moetion_lightning.distributed.{module}" in child.cmdline():
                    found.add(child.pid)
            except psutil.Error:  # it ended meanwhile
                pass
        return found
