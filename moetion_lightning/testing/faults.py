"""Fault drills: end a process at a chosen instant, from outside the code under test.

Give a :class:`KillAt` as a sink to a callback, start the command, start it again without the sink, and compare the runs
with :mod:`moetion_lightning.testing.compare`.
"""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

from moetion_lightning.events import Event

__all__ = ["KillAt"]


class KillAt:
    """An event sink that sends SIGKILL to its own process.

    Args:
        event: Name of the event class, e.g. ``"CaptureProgress"``.
        count: Kill at the ``count``-th event that matches.
        **fields: Values that the event's fields must have.
    """

    fine_grained = True

    def __init__(self, event: str, count: int = 1, **fields: Any) -> None:
        self.event = event
        self.fields = fields
        self._left = count
        self._lock = threading.Lock()

    def __call__(self, event: Event) -> None:
        """Look at one event; this may be the process's last."""
        if event.kind != self.event:
            return
        if any(getattr(event, name) != value for name, value in self.fields.items()):
            return
        with self._lock:
            self._left -= 1
            if self._left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
