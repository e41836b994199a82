"""SIGTERM: what is committed goes to storage inside the grace period that schedulers give."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import logging
import os
import signal
import socket
import threading
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

__all__ = ["TerminationWatch"]

_log = logging.getLogger(__name__)
_SIGNAL = signal.SIGTERM


class TerminationWatch:
    """Persists committed windows at SIGTERM, without taking the signal from other handlers.

    Whoever handled the signal before (Lightning, the user) handles it as usual, at once; persisting runs beside that.
    Where nobody did, the process ends by the signal, as it would have, when persisting is done.

    A Python handler runs only between two bytecodes of the main thread, which may be inside a long step. So a thread
    waits for what the interpreter writes to its wake-up descriptor at the instant of the signal.

    Args:
        persist: Persists everything and returns when that is done; called on a thread, once.
    """

    def __init__(self, persist: Callable[[], None]) -> None:
        self._persist = persist
        self._handler = self._handle  # one object, to be recognised
        self._previous: Any = signal.SIG_DFL
        self._previous_fd = -1
        self._is_active = False
        self._ended = False
        self._is_done = threading.Event()
        self._reader: socket.socket | None = None
        self._writer: socket.socket | None = None
        self._thread: threading.Thread | None = None

    def install(self) -> bool:
        """Begin to watch. Returns whether that is possible: on the main thread, and not over a handler of C code."""
        if self._is_active:
            return True
        previous = signal.getsignal(_SIGNAL)
        if threading.current_thread() is not threading.main_thread() or previous is None:
            return False
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._previous = previous
        self._is_active = True
        self._thread = threading.Thread(target=self._watch, name="moetion-sigterm", daemon=True)
        self._thread.start()
        signal.signal(_SIGNAL, self._handler)
        self._previous_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        _installed.add(self)
        return True

    def remove(self) -> None:
        """Stop watching, after what is being persisted is on storage; the handler before takes its place again."""
        if self._thread is None or self._writer is None or self._reader is None:
            return
        self._give_back()
        self._is_active = False
        self._ended = True
        with contextlib.suppress(OSError):
            self._writer.send(b"\0")
        self._thread.join()
        self._thread = None
        self._reader.close()
        self._writer.close()

    # --- inside --------------------------------------------------------------------------------------------------

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Main thread."""
        if self._is_active and self._writer is not None:
            # Again, for programs (asyncio) that have the wake-up descriptor for themselves.
            with contextlib.suppress(OSError):
                self._writer.send(bytes([number]))
        if callable(self._previous):
            self._previous(number, frame)
        elif self._previous is signal.SIG_DFL and not self._is_active and self._is_first():
            _end_by(number)

    def _is_first(self) -> bool:
        """Whether nobody has put another handler over this one, who decides what the signal means."""
        return signal.getsignal(_SIGNAL) is self._handler

    def _watch(self) -> None:
        assert self._reader is not None
        while not self._ended:
            for number in self._reader.recv(64):
                if number != 0 and self._previous_fd >= 0:
                    with contextlib.suppress(OSError):
                        os.write(self._previous_fd, bytes([number]))
                if number == _SIGNAL and not self._is_done.is_set():
                    self._act()

    def _act(self) -> None:
        ends = self._previous is signal.SIG_DFL and self._is_first()
        atexit.register(self._is_done.wait)  # a handler may end the program without closing anything
        try:
            self._persist()
        except Exception:
            _log.exception("SIGTERM: persisting failed")
        finally:
            self._is_done.set()
            atexit.unregister(self._is_done.wait)
        if ends and self._is_active:
            _end_by(_SIGNAL)

    def _give_back(self) -> None:
        _installed.discard(self)
        with contextlib.suppress(ValueError):  # not the main thread: the handler stays, and passes signals on
            if self._is_first():
                signal.signal(_SIGNAL, self._previous)
            current = signal.set_wakeup_fd(self._previous_fd)
            if self._writer is not None and current != self._writer.fileno():
                signal.set_wakeup_fd(current)

    def leave_child(self) -> None:
        """In a forked child, which has nothing to persist: signals mean what they meant before."""
        self._is_active = False
        self._give_back()
        with contextlib.suppress(ValueError):
            signal.set_wakeup_fd(-1)
        for end in (self._reader, self._writer):
            if end is not None:
                end.close()
        self._thread = None


_installed: weakref.WeakSet[TerminationWatch] = weakref.WeakSet()


def _forget_in_child() -> None:
    for watch in list(_installed):
        watch.leave_child()


os.register_at_fork(after_in_child=_forget_in_child)


def _end_by(number: int) -> None:
    """End the process by a signal's default action, from any thread."""
    ctypes.CDLL(None).signal(number, None)  # the signal module would do it on the main thread only
    os.kill(os.getpid(), number)
