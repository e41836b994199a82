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

__all__ = ["BEAT", "DONE", "LOST_EXIT", "READY", "end_with_launcher", "report", "report_error", "start_heartbeat"]

BEAT = b"\0"
#: This process has imported everything.
READY = b"\1"
#: The program has returned: what follows is the interpreter's own end, without beats.
DONE = b"\2"
#: Exit status of a rank whose state is lost for good: it is not started again.
LOST_EXIT = 79

_BEAT_SECONDS = 0.5
_ERROR_BYTES = 4000  # a single write of at most PIPE_BUF (4096) bytes is whole or not at all
_PR_SET_PDEATHSIG = 1


def start_heartbeat() -> None:
    """Tell the launcher every 0.5 s, from a daemon thread, that this process runs; without a launcher, do nothing.

    The beats stop when the whole process is stopped, or when something holds the interpreter lock for good.
    """
    if report_channel() is not None:
        threading.Thread(target=_beat, name="moetion-heartbeat", daemon=True).start()


def _beat() -> None:
    wait = threading.Event().wait
    while report(BEAT):
        wait(_BEAT_SECONDS)


def report_error(text: str) -> None:
    """Tell the launcher the last lines of the error that ends this process."""
    report(text.encode(errors="replace")[-_ERROR_BYTES:].translate(None, BEAT + READY + DONE))


def end_with_launcher() -> None:
    """Let the kernel kill this process when its launcher is gone (Linux only)."""
    channel = report_channel()
    if channel is None or sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != channel[1]:  # it died before the call
        os._exit(1)


def report(data: bytes) -> bool:
    """Tell the launcher. Returns whether it may still listen."""
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
