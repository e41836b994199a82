"""How processes of a job end, in numbers: what a scheduler and the launcher go by.

======= ============ =========================================================== ================
status  whose        meaning                                                     start again?
======= ============ =========================================================== ================
0       both         done
1       both         failed, or cannot be completed by the ranks that are left   yes
2       launcher     wrong usage                                                 no
79      both         state is lost that nothing can bring back                   no
80      launcher     several starts in a row made no progress                    no: do not requeue
81      rank         the others cannot take it back: all ranks begin again       by the launcher
128 + n launcher     stopped by signal n                                         yes
======= ============ =========================================================== ================
"""

from __future__ import annotations

import signal

from moetion_lightning.errors import LaunchError

__all__ = ["FAILED", "NO_PROGRESS", "STATE_LOST", "STRANDED", "JobEndedError", "describe_exit"]

FAILED = 1
STATE_LOST = 79
NO_PROGRESS = 80
STRANDED = 81


class JobEndedError(LaunchError):
    """The job, or this node's part of it, has come to an end that is no success.

    Args:
        message: What happened, and what to do.
        code: Exit status of the launcher.
        error_file: Error file (as torch elastic writes them) of the rank that caused it, if it wrote one.
        only_here: Only this node cannot go on: a spare may take its place.
    """

    def __init__(self, message: str, code: int = FAILED, error_file: str = "", *, only_here: bool = False) -> None:
        super().__init__(message)
        self.only_here = only_here
        self.code = code
        self.error_file = error_file


def describe_exit(status: int) -> str:
    """``exit code 1``, or ``killed by SIGKILL``."""
    if status >= 0:
        return f"exit code {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"
