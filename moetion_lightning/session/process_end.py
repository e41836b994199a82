"""Whether the process ends well: only then is a run complete, and what was kept for a restart is removed.

A script that fails after training (in a test, an export, an upload) is started again and must find the end of training.
"""

from __future__ import annotations

import atexit
import functools
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

__all__ = ["at_good_end", "note_exit_code"]

_log = logging.getLogger(__name__)
_actions: list[Callable[[], None]] = []
_owner: list[int] = []  # the process that registered them: its forks end by themselves
_exit_code: list[object] = []


def at_good_end(action: Callable[[], None]) -> None:
    """Call ``action`` when the process ends, unless by an error, a signal, or an exit code other than 0."""
    if _owner != [os.getpid()]:
        _owner[:] = [os.getpid()]
        _actions.clear()
        atexit.register(_end)
        _note_exit_codes()
    _actions.append(action)


def note_exit_code(code: int) -> None:
    """The process is about to end with this code, by an exception and not by ``sys.exit``."""
    _exit_code[:] = [code]


def _note_exit_codes() -> None:
    """``SystemExit`` leaves no trace at the interpreter's end; ``sys.exit`` is how scripts give a code."""
    original = sys.exit

    @functools.wraps(original)
    def leave(code: Any = None, /) -> None:
        _exit_code[:] = [code]
        original(code)

    sys.exit = leave  # type: ignore[assignment]


def _ended_well() -> bool:
    if _exit_code and _exit_code[0] not in (None, 0, False):
        return False
    interactive = hasattr(sys, "ps1") or "ipykernel" in sys.modules  # where an error ends no process
    return interactive or getattr(sys, "last_type", None) is None


def _end() -> None:
    if _owner != [os.getpid()] or not _actions:
        return
    if not _ended_well():
        _log.info("the process ends with an error: the end of training is kept, and the same command continues there")
        return
    for action in _actions:
        try:
            action()
        except Exception:
            _log.exception("what was kept for a restart could not be removed; `moetion clean` removes it")
    _actions.clear()
