"""A small process that ends what a launcher has started, if the launcher is killed.

The kernel ends the ranks themselves; what *they* have started would live on. The guard reads lines of ``+PID`` and
``-PID`` and, when its stdin ends, kills the process groups that are left.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys

__all__ = ["Guard"]

_CODE = """
import os, signal, sys
left = set()
for line in sys.stdin:
    (left.add if line[0] == "+" else left.discard)(int(line[1:]))
for pid in left:
    try:
        os.killpg(pid, signal.SIGKILL)
    except OSError:
        pass
"""


class Guard:
    """The launcher's side of it."""

    def __init__(self) -> None:
        self._known: set[int] = set()
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _CODE], stdin=subprocess.PIPE, start_new_session=True, text=True
        )

    def add(self, pid: int) -> None:
        """A process, which leads a group of its own, was started."""
        if pid not in self._known:
            self._known.add(pid)
            self._tell(f"+{pid}")

    def remove(self, pid: int) -> None:
        """It has ended."""
        self._known.discard(pid)
        self._tell(f"-{pid}")

    def close(self) -> None:
        """Kill what is left, and end."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5.0)

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
