"""Fault drills: end a process at a chosen instant, from outside the code under test.

Give a :class:`KillAt` as a sink to a callback, start the command, start it again without the sink, and compare the runs
with :mod:`moetion_lightning.testing.compare`.
"""

from __future__ import annotations

import functools
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from moetion_lightning.capture import copies as copying
from moetion_lightning.capture import plan
from moetion_lightning.core import reconstruct
from moetion_lightning.events import Event
from moetion_lightning.gradient_log import gradients, rebuild

__all__ = ["KillAt"]

#: What copies tensors into a window, and out of one.
_COPIES = (
    *((copying, "move"), (copying, "_write_parts"), (plan, "move"), (plan, "copy_tensors")),
    *((gradients, "move"), (gradients, "copy_tensors")),
    *((reconstruct, "write_active"), (reconstruct, "write_compute"), (rebuild, "write_active")),
)


class KillAt:
    """An event sink that sends SIGKILL to its own process.

    Args:
        event: Name of the event class, e.g. ``"SlotSealed"``.
        count: Kill at the ``count``-th event that matches.
        copies: Kill only behind so many copies that follow it: with ``"CaptureStarted"`` in the middle of a capture,
            with ``"RestoreStarted"`` in that of a restore.
        **fields: Values that the event's fields must have.
    """

    def __init__(self, event: str, count: int = 1, copies: int = 0, **fields: Any) -> None:
        self.event = event
        self.fields = fields
        self._copies = copies
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
                self._kill_behind_copies()

    def _kill_behind_copies(self) -> None:
        if self._copies == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        copying._MAX_PARTS = 1
        for module, name in _COPIES:
            setattr(module, name, self._counted(getattr(module, name)))

    def _counted(self, copy: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(copy)
        def counted(*args: Any, **kwargs: Any) -> Any:
            result = copy(*args, **kwargs)
            self._copies -= 1
            if self._copies == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return counted
