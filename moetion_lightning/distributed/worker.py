"""``python -m moetion_lightning.distributed.worker SCRIPT ARGS`` (or ``-m MODULE ARGS``): one rank.

Starts the heartbeat, makes process groups recoverable, then runs the program as ``__main__``, as python itself would.
"""

from __future__ import annotations

import os
import runpy
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from types import TracebackType

from moetion_lightning.distributed.heartbeat import (
    DONE,
    LOST_EXIT,
    end_with_launcher,
    report,
    report_error,
    start_heartbeat,
)
from moetion_lightning.errors import StateLostError

__all__ = ["execute", "main", "run_program"]

_ERROR_LINES = 12


def main(argv: Sequence[str]) -> None:
    """Run the program of this rank.

    Args:
        argv: Script and its arguments, or ``-m``, module and its arguments.
    """
    end_with_launcher()
    is_module = argv[0] == "-m"
    run_program(argv[1:] if is_module else argv, is_module=is_module)


def run_program(argv: Sequence[str], *, is_module: bool) -> None:
    """Run a script or module as ``__main__``; ends the process with python's own exit status and traceback.

    Args:
        argv: Script or module, and its arguments.
        is_module: Whether the first one is a module.
    """
    _prepare()
    try:
        execute(argv, is_module=is_module)
    except Exception as error:
        error.__traceback__ = _own_frames(error.__traceback__)
        lines = "".join(traceback.format_exception(error)).splitlines()
        report_error("\n".join(lines[-_ERROR_LINES:]))
        sys.excepthook(type(error), error, error.__traceback__)
        sys.exit(LOST_EXIT if isinstance(error, StateLostError) else 1)
    except SystemExit as end:
        if end.code in (None, 0):
            report(DONE)
        raise
    report(DONE)


def execute(argv: Sequence[str], *, is_module: bool) -> None:
    """Run a script or module as python itself would; arguments as of :func:`run_program`."""
    sys.argv = list(argv)
    sys.path[0] = os.getcwd() if is_module else os.path.dirname(os.path.realpath(argv[0]))
    if is_module:
        runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(argv[0], run_name="__main__")


def _prepare() -> None:
    import_module("moetion_lightning.distributed.groups").install()
    start_heartbeat()  # after the imports, which may hold the interpreter for long


def _own_frames(frames: TracebackType | None) -> TracebackType | None:
    """The traceback without this module's and runpy's frames; all of it if there are no others."""
    program = frames
    while program is not None and program.tb_frame.f_code.co_filename in (__file__, runpy.__file__, "<frozen runpy>"):
        program = program.tb_next
    return program or frames


if __name__ == "__main__":
    main(sys.argv[1:])
