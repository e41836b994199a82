"""Signs of life of a rank: numbers in memory that it shares with its launcher.

The launcher makes a small file for each process (in memory, without a name in any directory, on Linux). The process
maps it and counts there: how often its main thread has run Python code, where in the training loop it is, and how many
collectives it has begun. Nothing is sent, and nothing is left behind, whoever is killed. What ``faulthandler`` writes
when the launcher asks for the stacks is appended to the same file.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import enum
import faulthandler
import mmap
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator

from moetion_lightning.config import report_channel

__all__ = [
    "STACKS_SIGNAL",
    "Report",
    "Section",
    "State",
    "begin_stage",
    "count_evaluated",
    "enter",
    "fail",
    "mark",
    "start",
    "waiting",
]

_BYTES = 4096
_TICK_SECONDS = 0.5
#: Asks a rank for the stacks of all its threads. Not SIGUSR1 or SIGUSR2: schedulers and scripts use them.
STACKS_SIGNAL = signal.SIGRTMIN + 7 if sys.platform == "linux" else signal.SIGUSR2


class State(enum.IntEnum):
    """How far a process is."""

    BEGUN = 0
    READY = 1  # has imported everything and stands by
    RUNNING = 2
    DONE = 3  # the program has returned; the interpreter ends


class Section(enum.IntEnum):
    """What the main thread does; each section has a limit of its own for its silence."""

    START = 0
    STEP = 1
    VALIDATION = 2
    SAVE = 3


class Report:
    """The shared numbers of one process, seen from both sides.

    Args:
        path: The file; None makes a new one (the launcher's side).
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = path or _make_file()
        with open(self.path, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), _BYTES)
        #: state, ticks of a thread, times at which the main thread ran Python code, section, changes of it, iteration
        #: + 1, collectives begun in the default process group, whether it waits for the control plane, stages begun,
        #: exit code of the error that ends it
        self.cells = memoryview(self._map).cast("Q")
        self._is_owner = path is None

    state = property(lambda self: State(self.cells[0]))
    ticks = property(lambda self: self.cells[1])
    beats = property(lambda self: self.cells[2])
    section = property(lambda self: Section(self.cells[3]))
    changes = property(lambda self: self.cells[4])
    iteration = property(lambda self: self.cells[5] - 1)
    collectives = property(lambda self: self.cells[6])
    waits = property(lambda self: bool(self.cells[7]))
    stage = property(lambda self: self.cells[8])
    exit_code = property(lambda self: self.cells[9])

    def stacks(self) -> str:
        """What the process wrote when it was asked for its stacks."""
        with open(self.path, "rb") as file:
            file.seek(_BYTES)
            return file.read().decode(errors="replace")

    def close(self) -> None:
        """Give the file up (the launcher's side)."""
        if self._map.closed:
            return
        self.cells.release()
        self._map.close()
        if self._is_owner and self.path.startswith("/proc/"):
            os.close(int(self.path.rpartition("/")[2]))
        elif self._is_owner:
            os.unlink(self.path)


def _make_file() -> str:
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("moetion-report")
        path = f"/proc/{os.getpid()}/fd/{descriptor}"
    else:
        descriptor, path = tempfile.mkstemp(prefix="moetion-report-")
    os.truncate(descriptor, _BYTES)
    if not path.startswith("/proc/"):
        os.close(descriptor)
    return path


# --- the rank's side -----------------------------------------------------------------------------------------------

_report: Report | None = None


def start(state: State) -> None:
    """Begin to show signs of life; without a launcher, do nothing."""
    global _report
    channel = report_channel()
    if channel is None:
        return
    _report = Report(channel[0])
    _report.cells[0] = state
    signal.signal(STACKS_SIGNAL, signal.SIG_IGN)  # when the interpreter ends, and faulthandler gives the signal back
    faulthandler.register(STACKS_SIGNAL, open(channel[0], "ab"), all_threads=True)  # noqa: SIM115
    _report.cells[1] = _report.cells[2] = 1  # from now on it may be asked
    thread = threading.Thread(target=_tick, args=(_report.cells, _listen()), name="moetion-progress", daemon=True)
    thread.start()


def mark(state: State) -> None:
    """Say how far this process is."""
    if _report is not None:
        _report.cells[0] = state


def begin_stage() -> None:
    """A fit, a validation, a test or a prediction of its own begins; its iterations are counted from 0."""
    if _report is not None:
        cells = _report.cells
        cells[3], cells[5] = Section.START, 0
        cells[4] += 1
        cells[8] += 1


def count_evaluated() -> None:
    """A batch of a validation, a test or a prediction of its own begins."""
    enter(Section.VALIDATION, None if _report is None else _report.iteration + 1)


def fail(exit_code: int) -> None:
    """The program has ended by an error. What breaks while the interpreter ends must not hide that."""
    if _report is not None:
        _report.cells[9] = exit_code


def enter(section: Section, iteration: int | None = None) -> None:
    """The main thread begins something else.

    Args:
        section: What.
        iteration: Number of the iteration that begins; None if none does.
    """
    if _report is None:
        return
    cells = _report.cells
    if section == Section.STEP and not cells[5]:
        section = Section.START  # a first step compiles, and sets communicators up
    cells[3] = section
    cells[4] += 1
    if iteration is not None:
        cells[5] = iteration + 1


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """While other ranks are waited for outside of process groups, with a deadline: such silence is no hang."""
    cells = None if _report is None else _report.cells
    if cells is not None:
        cells[7] = 1
    try:
        yield
    finally:
        if cells is not None:
            cells[7] = 0


def _listen() -> threading.Event:
    ended = threading.Event()
    atexit.register(ended.set)
    return ended


def _tick(cells: memoryview, ended: threading.Event) -> None:
    beaten = True

    def beat(_: object) -> int:
        nonlocal beaten
        beaten = True
        cells[2] += 1
        return 0

    call = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(beat)
    while not ended.wait(_TICK_SECONDS):
        cells[1] += 1
        cells[6] = _collectives()
        if beaten:
            beaten = False
            # The interpreter calls it between two instructions of the main thread: not while that sleeps or waits.
            ctypes.pythonapi.Py_AddPendingCall(call, None)


def _collectives() -> int:
    torch_distributed = sys.modules.get("torch.distributed.distributed_c10d")
    group = None if torch_distributed is None else torch_distributed.GroupMember.WORLD
    try:
        return 0 if group is None else int(group._get_sequence_number_for_group())
    except (RuntimeError, AttributeError):  # a backend without numbers, or a group that is just given up
        return 0
