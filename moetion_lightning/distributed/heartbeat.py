"""The worker's side of the pipe to its launcher: signs of life, readiness, and the error that ends the process.

One byte of zero is a beat, of one says "ready", of two "done"; everything else is text for people. The launcher's
side is ``processes.Child``. A pipe leaves nothing behind, whoever is killed.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading

from moetion_lightning.config import report_channel

__all__ = [
    "BEAT",
    "DONE",
    "LOST_EXIT",
    "READY",
    "Heartbeat",
    "end_with_launcher",
    "report_done",
    "report_error",
    "report_ready",
]

BEAT = b"\0"
READY = b"\1"
DONE = b"\2"
#: Exit status of a rank whose state is lost for good: it is not started again.
LOST_EXIT = 79

_BEAT_SECONDS = 0.5
_ERROR_BYTES = 4000  # a single write of at most PIPE_BUF (4096) bytes is whole or not at all
_PR_SET_PDEATHSIG = 1


class Heartbeat:
    """A daemon thread that tells the launcher every 0.5 s that this process runs.

    It stops when the whole process is stopped, or when something holds the interpreter lock for good.
    """

    def __init__(self) -> None:
        self._thread = threading.Thread(target=self._beat, name="moetion-heartbeat", daemon=True)

    def start(self) -> None:
        """Begin to beat; without a launcher, do nothing."""
        if report_channel() is not None:
            self._thread.start()

    def _beat(self) -> None:
        wait = threading.Event().wait
        while _report(BEAT):
            wait(_BEAT_SECONDS)


def report_ready() -> None:
    """Tell the launcher that this process has imported everything."""
    _report(READY)


def report_done() -> None:
    """Tell the launcher that the program has returned: what follows is the interpreter's own end, without beats."""
    _report(DONE)


def report_error(text: str) -> None:
    """Tell the launcher the last lines of the error that ends this process."""
    _report(text.encode(errors="replace")[-_ERROR_BYTES:].translate(None, BEAT + READY + DONE))


def end_with_launcher() -> None:
    """Let the kernel kill this process when its launcher is gone (Linux only)."""
    channel = report_channel()
    if channel is None or sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != channel[1]:  # it died before the call
        os._exit(1)


def _report(data: bytes) -> bool:
    channel = report_channel()
    if channel is None:
        return False
    try:
        os.write(channel[0], data)
    except BlockingIOError:  # the launcher is stopped and the pipe full: it has beats enough to read
        return True
    except OSError:  # the launcher is gone, or the program closed the descriptor
        return False
    return True
