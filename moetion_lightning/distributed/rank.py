"""``python -m moetion_lightning.distributed.rank [-m] PROGRAM ARGUMENTS``: one rank.

Makes process groups recoverable, shows signs of life, then runs the program as ``__main__``, as python itself would.
With ``--standby`` in place of the program it imports what training needs and waits for one line of JSON on stdin,
``{"env": {...}, "argv": [...], "stdout": "", "stderr": ""}`` (files, or "" for what it has), then becomes that rank.
It initialises no device and draws no random number before. At the end of stdin without a line it ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import runpy
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from types import TracebackType

from moetion_lightning.config import report_channel, update_environment
from moetion_lightning.distributed import progress
from moetion_lightning.distributed.exits import FAILED, STATE_LOST, STRANDED
from moetion_lightning.errors import StateLostError, StrandedRankError

__all__ = ["execute", "frames_of_program", "main"]

_PR_SET_PDEATHSIG = 1
_RUNPY = (runpy.__file__, "<frozen runpy>")
#: What a training script imports first, by name: this room itself knows no Lightning.
_IMPORTS = ("torch", "torch.distributed", "lightning.pytorch", "moetion_lightning.callbacks")


def main(argv: Sequence[str]) -> None:
    """Be a rank, or stand by; ends the process with python's own exit status and traceback.

    Args:
        argv: The program and its arguments, with ``-m`` before a module; or ``--standby``.
    """
    _end_with_launcher()
    if argv[0] == "--standby":
        order = _stand_by()
        if order is None:
            return
        argv = order
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    import_module("moetion_lightning.distributed.groups").install()
    progress.mark(progress.State.RUNNING) if progress._report else progress.start(progress.State.RUNNING)
    _run(argv)


def execute(argv: Sequence[str], *, is_module: bool) -> None:
    """Run a script or module as python itself would.

    Args:
        argv: Script or module, and its arguments.
        is_module: Whether the first one is a module.
    """
    sys.argv = list(argv)
    sys.path[0] = os.getcwd() if is_module else os.path.dirname(os.path.realpath(argv[0]))
    if is_module:
        runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(argv[0], run_name="__main__")


def _run(argv: Sequence[str]) -> None:
    is_module = argv[0] == "-m"
    try:
        execute(argv[1:] if is_module else argv, is_module=is_module)
    except Exception as error:
        error.__traceback__ = frames_of_program(error.__traceback__)
        with contextlib.suppress(OSError):
            import_module("torch.distributed.elastic.multiprocessing.errors").get_error_handler().record_exception(
                error
            )
        sys.excepthook(type(error), error, error.__traceback__)
        lost = STRANDED if isinstance(error, StrandedRankError) else STATE_LOST
        code = lost if isinstance(error, (StateLostError, StrandedRankError)) else FAILED
        progress.fail(code)
        sys.exit(code)
    except SystemExit as end:
        if end.code in (None, 0):
            progress.mark(progress.State.DONE)
        raise
    progress.mark(progress.State.DONE)


def _stand_by() -> list[str] | None:
    for name in (*_IMPORTS, "moetion_lightning.distributed.groups"):
        with contextlib.suppress(ImportError):  # Lightning need not be installed
            import_module(name)
    progress.start(progress.State.READY)
    line = sys.stdin.readline()
    if not line:
        return None
    order = json.loads(line)
    for descriptor, path in ((1, order["stdout"]), (2, order["stderr"])):
        if path:
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(file, descriptor)
            os.close(file)
    update_environment(order["env"])
    rank_zero = sys.modules.get("lightning_utilities.core.rank_zero")
    if rank_zero is not None:  # it read the rank from the environment before this process had one
        rank_zero.rank_zero_only.rank = int(order["env"]["RANK"])
    return list(order["argv"])


def _end_with_launcher() -> None:
    """Let the kernel kill this process when its launcher is gone (Linux only)."""
    channel = report_channel()
    if channel is None or sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != channel[1]:  # it died before the call
        os._exit(1)


def frames_of_program(frames: TracebackType | None) -> TracebackType | None:
    """A traceback as of the program alone: without what has executed it; all of it if there is nothing else."""
    program = frames
    while program is not None and program.tb_frame.f_code is not execute.__code__:
        program = program.tb_next
    while program is not None and program.tb_frame.f_code.co_filename in (__file__, *_RUNPY):
        program = program.tb_next
    return program or frames


if __name__ == "__main__":
    main(sys.argv[1:])
